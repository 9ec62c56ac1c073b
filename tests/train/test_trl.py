"""The same rows give the same tokens, labels and losses as TRL's SFTTrainer, packed or not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests.models import llama
from trimtab.files.sources import resolve_base
from trimtab.train.data import Example, collate, collate_packed, pack, prepare
from trimtab.train.packing import token_losses

GENERATION = (  # ChatML that marks what the assistant says
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"  # nothing after the end token
ENDS += "{% if add_generation_prompt %}[assistant]{% endif %}"


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] if len(contents) % 2 == 0 else ["system", "user", "assistant"]
    roles += ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


MESSAGES = [
    {"messages": turns("Hi?", "Hello.")},
    {"messages": turns("Be brief.", "2+2?", "4")},
    {"messages": turns("Count: 1, 2,", "3.", "And then?", "4, of course: \n\n that's how it goes")},
    {"messages": turns("What is ß?", "A letter – 'eszett' 🙂.")},
]
PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in MESSAGES]
STRINGS = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "The sky is", "completion": " blue, mostly."},
    {"prompt": "Translate: Bär\n", "completion": "bear"},
]
TEXTS = [{"text": "A document."}, {"text": "Another one, with\nlines."}, {"text": "x"}]


def theirs(rows: list[dict[str, Any]], tokenizer: Any, folder: Any, **options: Any) -> SFTTrainer:
    torch.manual_seed(0)
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2)
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "max_length": 256, "per_device_train_batch_size": 8, "shuffle_dataset": False, **options,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SFTTrainer(
            model, args=SFTConfig(**arguments), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )


def one_by_one(trainer: SFTTrainer, batch: dict[str, Any]) -> list[float]:
    """The loss that the trainer computes for each trained token: of the batch with all other labels taken away."""
    losses = []
    for place in (batch["labels"] != -100).nonzero().tolist():
        if place[1] > 0:
            labels = torch.full_like(batch["labels"], -100)
            labels[tuple(place)] = batch["labels"][tuple(place)]
            with torch.no_grad():
                losses.append(trainer.compute_loss(trainer.model, {**batch, "labels": labels}).item())
    return losses


CASES = {
    "messages": (MESSAGES, GENERATION, {"assistant_only_loss": True}, {}),
    "all of the messages": (MESSAGES, GENERATION, {}, {"train_on": "all"}),
    "conversational pairs": (PAIRS, ENDS, {}, {}),
    "pairs of strings": (STRINGS, None, {}, {}),
    "pairs of strings, though there is a template": (STRINGS, ENDS, {}, {"plain": True}),
    "pairs, with their prompts": (STRINGS, None, {"completion_only_loss": False}, {"train_on": "all"}),
    "texts": (TEXTS, None, {}, {}),
}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_labels_and_losses_are_trls(case, packing, tokenizer_factory, tmp_path) -> None:
    rows, template, their_options, our_options = CASES[case]
    tokenizer = tokenizer_factory(template, eos="</s>" if template != GENERATION else "<|im_end|>")
    ours = prepare(rows, tokenizer, **our_options).examples
    trainer = theirs(rows, tokenizer, tmp_path, **their_options)
    same_tokens(ours, trainer.train_dataset)
    if packing:
        trainer = theirs(rows, tokenizer, tmp_path, packing=True, **their_options)
    same_losses(ours, trainer, packing)


def same_tokens(ours: list[Example], dataset: Dataset) -> None:
    """Ours end with the last token that is trained: what comes after it changes nothing."""
    assert len(ours) == len(dataset)
    for example, row in zip(ours, dataset):
        n = len(example.ids)
        assert example.ids == row["input_ids"][:n]
        assert example.labels[1:] == row["labels"][1:n]
        assert set(row["labels"][n:]) <= {-100}


def same_losses(ours: list[Example], trainer: SFTTrainer, packing: bool) -> None:
    data = trainer.train_dataset
    batch = trainer.data_collator(list(data))
    assert packing == ("attention_mask" not in batch)
    if packing:
        [order] = pack(ours, 256)
        assert [len(ours[i].ids) for i in order] == sorted((len(e.ids) for e in ours), reverse=True)
        mine = token_losses(trainer.model, collate_packed([ours[i] for i in order]))
    else:
        mine = token_losses(trainer.model, collate(ours))
    reference = one_by_one(trainer, batch)
    assert len(mine) == len(reference) == sum(e.trained for e in ours)
    assert mine.sort().values.tolist() == pytest.approx(sorted(reference), abs=1e-5)
    if not packing:
        assert mine.tolist() == pytest.approx(reference, abs=1e-5)


def test_trl_also_trains_the_newline_after_a_completions_end(tokenizer, tmp_path) -> None:
    # The one difference: ChatML writes a newline after the end token, and no model is ever asked for it.
    ours = prepare(PAIRS, tokenizer).examples
    newline = tokenizer("\n").input_ids
    for example, row in zip(ours, theirs(PAIRS, tokenizer, tmp_path).train_dataset):
        assert example.ids + newline == row["input_ids"]
        assert example.labels + newline == row["labels"]


def test_trls_training_template_is_used_where_it_is_asked_for(tokenizer_factory, tmp_path) -> None:
    import trl.chat_template_utils as templates

    thinks = turns("Hi?", "<think>\nA greeting.\n</think>\n\nHello.", "2+2?", "<think>\nEasy.\n</think>\n\n4")
    tokenizer = tokenizer_factory(templates.qwen3_chat_template)
    rows = [*MESSAGES, {"messages": thinks}]
    ours = prepare(rows, tokenizer, template="trl")
    assert ours.report.template == "TRL's training template for Qwen3"
    trainer = theirs(rows, tokenizer, tmp_path, assistant_only_loss=True)
    same_tokens(ours.examples, trainer.train_dataset)
    same_losses(ours.examples, trainer, packing=False)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_smollm2s_tokenizer_by_prefixes_is_trl_by_marks(packing, tmp_path) -> None:
    folder = resolve_base("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = prepare(MESSAGES, tokenizer)
    assert ours.report.template == "the tokenizer's chat template, by rendering prefixes"
    marked = AutoTokenizer.from_pretrained(folder)
    content = "message['content'] + '<|im_end|>'"
    before, after = marked.chat_template.split("{{'<|im_start|>' + message['role'] + '\n' + " + content + " + '\n'}}")
    marked.chat_template = (
        before
        + (
            "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
            f"{{{{{content}}}}}{{% endgeneration %}}{{% else %}}{{{{{content}}}}}{{% endif %}}{{{{ '\n' }}}}"
        )
        + after
    )
    trainer = theirs(MESSAGES, marked, tmp_path, assistant_only_loss=True)
    same_tokens(ours.examples, trainer.train_dataset)
    if packing:
        trainer = theirs(MESSAGES, marked, tmp_path, assistant_only_loss=True, packing=True)
    same_losses(ours.examples, trainer, packing)
