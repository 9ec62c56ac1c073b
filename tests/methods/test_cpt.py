"""CPT in plain loops: where the examples may move, and which labels are trained."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch

from tests.methods.nets import numbers, same
from tests.models import llama, tokens
from trimtab import CPTConfig, PeftModel, get_peft_model

IDS, TYPES = [4, 9, 2, 7, 3, 8, 6, 5], [1, 2, 3, 4, 5, 6, 7, 8]


def model(**fields):
    fields = {"cpt_token_ids": IDS, "cpt_tokens_type_mask": TYPES, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(llama().double(), CPTConfig(**fields)).double().eval()


def test_each_token_moves_within_its_ball() -> None:
    adapted = model(opt_projection_epsilon=3.0, opt_projection_format_epsilon=0.5)
    own = adapted.prompt_encoder["default"]
    torch.nn.init.normal_(own.delta_embedding.weight, std=0.2)
    D, C = numbers(own.delta_embedding.weight), numbers(adapted.get_input_embeddings().weight)
    want = []
    for id, type, d in zip(IDS, TYPES, D):
        radius = {0: 1e-10, 2: 3.0 * sqrt(len(d) / 2048)}.get(type % 4, 0.5 * sqrt(len(d) / 2048))
        share = min(1.0, radius / sqrt(sum(v * v for v in d)))
        want.append([c + share * v for c, v in zip(C[id], d)])
    same(adapted.get_prompt(1)[0], want, 1e-7)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_loss_of_the_labels(told: bool, decay: float | None) -> None:
    adapted = model(**({} if decay is None else {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}))
    x = tokens(vocabulary=64)[:2, :5]
    types = torch.tensor([[1, 2, 3, 4, 4], [2, 2, 4, 5, 8]])
    labels = x if told else torch.where(torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]).bool(), x, -100)
    out = adapted(x, labels=labels, **({"input_type_mask": types} if told else {}))
    given = types if told else torch.where(labels != -100, 4, 0)
    terms = []
    for row in range(2):
        kinds = TYPES + [t + 8 if t else 0 for t in given[row].tolist()]
        ids = IDS + labels[row].tolist()
        groups = sorted({k for k in kinds[1:] if k and k % 4 == 0})
        for i in range(1, len(ids)):
            if kinds[i] in groups:
                logits = numbers(out.logits[row, i - 1])
                top = max(logits)
                loss = top + log(sum(2.718281828459045 ** (v - top) for v in logits)) - logits[ids[i]]
                terms.append(loss * (decay or 1.0) ** sum(g > kinds[i] for g in groups))
    same(out.loss, sum(terms) / len(terms), 1e-5)


def test_labels_do_not_move_and_the_given_types_stay() -> None:
    adapted, x = model(), tokens(vocabulary=64)
    types = torch.full_like(x, 4)
    adapted(x, labels=x, input_type_mask=types).loss.backward()
    gradient = adapted.prompt_encoder["default"].delta_embedding.weight.grad
    assert [bool(row.any()) for row in gradient] == [type % 4 != 0 for type in TYPES]
    assert (types == 4).all()


def test_what_is_loaded_is_where_it_was(tmp_path) -> None:
    adapted, x = model(), tokens(vocabulary=64)
    torch.nn.init.normal_(adapted.prompt_encoder["default"].delta_embedding.weight)
    want = adapted(x).logits
    adapted.save_pretrained(tmp_path)
    same(PeftModel.from_pretrained(llama().double(), tmp_path)(x).logits, want, 1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"task_type": "SEQ_CLS"}, "only supports"), ({"cpt_mask": [1]}, "same length")],
)
def test_errors(fields, words) -> None:
    with pytest.raises(ValueError, match=words):
        model(**fields)


def test_a_mask_that_does_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match="cpt_mask"):
        model(cpt_mask=[0, *[1] * 7])
