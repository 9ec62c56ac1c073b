"""What happens to a model between two passes of its generation is seen by the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from tests.contract.cases import move
from tests.models import llama
from trimtab import LoraConfig, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT, NEW, WHEN = 4, 7, 3  # tokens, and the pass after which something happens


def made(**fields: Any) -> Any:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=TARGETS, **fields))
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    for name in ("default", "other"):
        move(model, name)
    return model.eval()


def ids(rows: int) -> Tensor:
    return torch.randint(5, 60, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


class Meanwhile(LogitsProcessor):
    """Does something to the model between two passes of a generation."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.passes = act, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == WHEN:
            self.act()
        return scores


def generated(model: Any, rows: int, act: Callable[[], object], **how: Any) -> tuple[Tensor, Tensor]:
    """(tokens, the scores of each pass)."""
    out = model.generate(
        input_ids=ids(rows), attention_mask=torch.ones(rows, PROMPT, dtype=torch.long), max_new_tokens=NEW,
        min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=1, output_logits=True,
        return_dict_in_generate=True, logits_processor=[Meanwhile(act)], **how,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@torch.no_grad()
def stepped(model: Any, rows: int, act: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """The same by calls of the model, each with the cache of those before."""
    tokens, given, cache, scores = ids(rows), ids(rows), None, []
    for n in range(NEW):
        out = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        scores.append(logits)
        if n + 1 == WHEN:
            act()
        chosen = logits.clone()
        chosen[:, 1] = -torch.inf  # no end before the last token
        given = chosen.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, given], 1)
    return tokens, torch.stack(scores)


def layer(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.up_proj


def another(model: Any) -> None:
    old = layer(model).lora_B["default"].weight
    layer(model).lora_B["default"].weight = nn.Parameter(old.detach() * 3)


def base_replaced(model: Any) -> None:
    frozen = layer(model).base_layer
    frozen.weight = nn.Parameter(frozen.weight.detach() * 2, requires_grad=False)


ACTS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda model: None,
    "another adapter": lambda model: model.set_adapter("other"),
    "both adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "a scale": lambda model: layer(model).set_scale("default", 4.0),
    "a scale by its name": lambda model: layer(model).scaling.__setitem__("default", 7.0),
    "written past autograd": lambda model: layer(model).lora_B["default"].weight.data.mul_(5),
    "other memory": lambda model: setattr(layer(model).lora_A["default"].weight, "data", torch.ones(3, 16)),
    "another parameter": another,
    "another base weight": base_replaced,
    "merged": lambda model: model.merge_adapter(),
    "deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "another format": lambda model: model.double().float(),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ACTS)
def test_generation_sees_what_happens_between_its_passes(name: str, rows: int) -> None:
    one, other = made(), made()
    tokens, scores = generated(one, rows, lambda: ACTS[name](one))
    wanted, expected = stepped(other, rows, lambda: ACTS[name](other))
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_a_model_left_in_training_mode() -> None:
    model = made(lora_dropout=0.5).train()
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(generated(model, 1, lambda: None)[1])
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], generated(model.eval(), 1, lambda: None)[1])
    _, scores = generated(model, 1, model.train)  # switched while it runs
    assert torch.equal(scores[:WHEN], generated(model.eval(), 1, lambda: None)[1][:WHEN])
    assert not torch.equal(scores, generated(model, 1, lambda: None)[1])
