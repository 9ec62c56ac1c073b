"""Shadow against PEFT: starts, outputs, gradients, generation, files both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import peft.tuners.shadow as peft_shadow
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlamaForSequenceClassification

import trimtab
from tests.parity.alias import find
from tests.parity.models import batch, build
from tests.parity.pairs import (
    BOTH,
    all_near,
    config_file,
    copy_state,
    copy_trained,
    near,
    quiet,
    starts_alike,
    stir,
    trainable,
    weights_file,
)  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "small": ("llama", {"shadow_hidden_size": 8, "shadow_intermediate_size": 12, "r": 3, "update_hidden_size": 5}),
    "own": ("llama", {"share_embeddings": False, "shadow_num_hidden_layers": 2, "shadow_alpha": 0.5}),
    "random": ("llama_tied", {"init_weights": False, "auxiliary_loss_weight": 0.0}),
    "gpt2": ("gpt2", {}),
    "gpt2-small": ("gpt2", {"shadow_hidden_size": 8, "shadow_num_attention_heads": 1, "shadow_intermediate_size": 9}),
    "some": ("llama_deep", {"target_modules": ["layers.0", "layers.1", "layers.2"]}),
}
every = pytest.mark.parametrize("case", CASES)


def adapt(library: Any, case: str) -> Any:
    name, fields = CASES[case]
    torch.manual_seed(11)
    config = library.ShadowConfig(task_type="CAUSAL_LM", **fields)
    return quiet(library.get_peft_model, build(name), config).eval()


def pair(case: str) -> tuple[Any, Any]:
    ours, theirs = (adapt(library, case) for library in BOTH)
    stir(theirs, 0.1)
    copy_state(theirs, ours)
    return ours, theirs


@every
def test_names_and_starts(case: str) -> None:
    ours, theirs = (adapt(library, case) for library in BOTH)
    assert trainable(ours) == trainable(theirs)
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert held[name].shape == parameter.shape
            starts_alike(held[name], parameter, name)


@every
def test_outputs_gradients_and_generation(case: str) -> None:
    results = []
    for model in pair(case):
        inputs = batch(CASES[case][0])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :2] = 0
        logits = model(**inputs).logits
        logits.float().square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        said = [model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=n) for n in (1, 2)]
        results.append((logits, grads, said))
    (ours, mine, said), (theirs, yours, answer) = results
    near(ours, theirs)
    all_near(mine, yours)
    assert torch.equal(said[0], answer[0])
    assert torch.equal(said[1], answer[1])


@pytest.mark.parametrize("case", ["llama", "small", "gpt2"])
def test_the_loss_of_the_first_state(case: str) -> None:
    """PEFT adds it in evaluation, too, where there is no dropout: here it is taken from training without dropout."""
    ours, theirs = pair(case)
    inputs = batch(CASES[case][0])
    ours.peft_config["default"].shadow_dropout = 0.0
    wanted = theirs(**inputs, labels=inputs["input_ids"])
    found = ours.train()(**inputs, labels=inputs["input_ids"])
    near(found.loss, wanted.loss)
    near(found.shadow_loss, wanted.shadow_loss)
    near(ours.base_model.last_shadow_loss, theirs.base_model.last_shadow_loss.detach())
    assert found.keys() == wanted.keys()
    assert ours.eval()(**inputs, labels=inputs["input_ids"]).loss < wanted.loss


@every
@pytest.mark.parametrize("writer", [0, 1], ids=["ours", "theirs"])
def test_files_both_ways(case: str, writer: int, tmp_path: Path) -> None:
    both = pair(case)
    for model, folder in zip(both, ("0", "1"), strict=True):
        quiet(model.save_pretrained, str(tmp_path / folder))
    mine, yours = (weights_file(tmp_path / folder) for folder in "01")
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in yours.items()}
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    library = (trimtab, peft)[1 - writer]
    read = quiet(library.PeftModel.from_pretrained, build(CASES[case][0]), str(tmp_path / str(writer)))
    inputs = batch(CASES[case][0])
    near(read.eval()(**inputs).logits, both[writer](**inputs).logits)


def classifier() -> Any:
    config = build("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(3)
    return LlamaForSequenceClassification(config)


def classifiers() -> tuple[Any, Any]:
    found = []
    for library in BOTH:
        config = library.ShadowConfig(task_type="SEQ_CLS")
        found.append(quiet(library.get_peft_model, classifier(), config).eval())
    ours, theirs = found
    assert trainable(ours) == trainable(theirs)
    stir(theirs, 0.1)
    copy_trained(theirs, ours)
    return ours, theirs


def test_classifiers(tmp_path: Path) -> None:
    ours, theirs = classifiers()
    inputs = batch("llama")
    inputs["input_ids"][:, -2:] = 0  # padding
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    labels = torch.arange(len(inputs["input_ids"])) % 3
    near(ours(**inputs).logits, theirs(**inputs).logits)
    ours.peft_config["default"].shadow_dropout = 0.0
    wanted, found = theirs(**inputs, labels=labels).loss, ours.train()(**inputs, labels=labels).loss
    near(found, wanted)
    found.backward()
    wanted.backward()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            near(dict(ours.named_parameters())[name].grad, parameter.grad)
    for model, folder in ((ours.eval(), "0"), (theirs, "1")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert weights_file(tmp_path / "0").keys() == weights_file(tmp_path / "1").keys()
    for folder in "01":
        for library in BOTH:
            read = quiet(library.PeftModel.from_pretrained, classifier(), str(tmp_path / folder)).eval()
            near(read(**inputs).logits, theirs(**inputs).logits)


@pytest.fixture(scope="module", params=["llama_deep", "gpt2", "thin"])
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that can be the shadow of another."""
    folder = str(tmp_path_factory.mktemp("shadow"))
    torch.manual_seed(5)
    if request.param == "thin":
        config = build("llama").config
        config.hidden_size, config.num_hidden_layers, config.head_dim = 8, 1, 4
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        build(request.param).save_pretrained(folder)
    return folder


def with_ready(folder: str, task: str = "CAUSAL_LM") -> list[Any]:
    models = []
    for library in BOTH:
        torch.manual_seed(11)
        model = build("llama") if task == "CAUSAL_LM" else classifier()
        config = library.ShadowConfig(task_type=task, shadow_model=folder)
        models.append(quiet(library.get_peft_model, model, config).eval())
    return models


def test_a_shadow_that_is_there_already(ready: str, tmp_path: Path) -> None:
    ours, theirs = with_ready(ready)
    assert trainable(ours) == trainable(theirs)
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "shadow_backbone" in name:
            assert torch.equal(held[name], parameter), name
    frozen = [n for n, p in held.items() if "shadow_backbone" in n and not p.requires_grad]
    assert len(frozen) == 1
    stir(theirs, 0.1)
    copy_state(theirs, ours)
    results = []
    for model in (ours, theirs):
        inputs = batch("llama")
        logits = model(**inputs).logits
        logits.float().square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        results.append((logits, grads, said, model.unload_shadow().eval()(**inputs).logits))
    (mine, grads, said, alone), (yours, others, answer, apart) = results
    near(mine, yours)
    near(alone, apart)
    all_near(grads, others)
    assert torch.equal(said, answer)
    for model, folder in ((ours, "0"), (theirs, "1")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert weights_file(tmp_path / "0").keys() == weights_file(tmp_path / "1").keys()
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    for writer in "01":
        for library in BOTH:
            read = quiet(library.PeftModel.from_pretrained, build("llama"), str(tmp_path / writer)).eval()
            near(read(**batch("llama")).logits, yours)


def test_a_classifiers_shadow_that_is_there_already(ready: str) -> None:
    ours, theirs = with_ready(ready, "SEQ_CLS")
    assert trainable(ours) == trainable(theirs)
    stir(theirs, 0.1)
    copy_trained(theirs, ours)
    inputs = batch("llama")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    near(ours(**inputs).logits, theirs(**inputs).logits)
    near(ours.unload_shadow().eval()(**inputs).logits, theirs.unload_shadow().eval()(**inputs).logits)


@every
@pytest.mark.parametrize("copy", [False, True])
def test_the_small_model_by_itself(case: str, copy: bool) -> None:
    """Peft's copy of GPT-2's reads embeddings that were never trained: its original is what ours are compared with."""
    results = []
    for model, own in zip(pair(case), (copy, False), strict=True):
        alone = model.unload_shadow(copy=own).eval()
        inputs = batch(CASES[case][0])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :2] = 0
        out = alone(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        said = [alone.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=n) for n in (1, 2)]
        results.append((alone, out, said))
    (ours, mine, said), (theirs, yours, answer) = results
    near(mine.logits, yours.logits)
    near(mine.loss, yours.loss)
    assert [torch.equal(a, b) for a, b in zip(said, answer, strict=True)] == [True, True]
    assert ours.state_dict().keys() >= theirs.state_dict().keys()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (ours, theirs)]
    all_near(*grads)


def test_a_small_classifier_by_itself() -> None:
    inputs = batch("llama")
    labels = torch.arange(len(inputs["input_ids"])) % 3
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    mine, yours = (model.unload_shadow().eval() for model in classifiers())
    ours, theirs = (model(**inputs, labels=labels) for model in (mine, yours))
    assert type(ours) is type(theirs)
    near(ours.logits, theirs.logits)
    near(ours.loss, theirs.loss)
    padded = inputs["input_ids"].clone()
    padded[:, -2:] = 0
    near(mine(padded).logits, yours(padded, attention_mask=(padded != 0).long()).logits)  # peft's needs the mask


def test_one_of_several_and_parts_put_together() -> None:
    for library in BOTH:
        fields = {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}
        model = quiet(library.get_peft_model, build("llama"), library.ShadowConfig(task_type="CAUSAL_LM"))
        model.add_adapter("other", library.ShadowConfig(task_type="CAUSAL_LM", **fields))
        assert [model.unload_shadow(name).config.hidden_size for name in (None, "other")] == [16, 8]
        with pytest.raises(ValueError, match="unknown"):
            model.unload_shadow("unknown")
    torch.manual_seed(0)
    backbone, inputs = build("llama").model.eval(), batch("llama")
    parts = (torch.nn.Linear(16, 12), torch.nn.Linear(12, 40))
    outside = torch.nn.Embedding(40, 16)
    results: list[list[Any]] = [[], []]
    for which, module in enumerate(
        (find("peft.tuners.shadow", "DetachedShadowModel"), peft_shadow.DetachedShadowModel)
    ):
        whole, plain = module(backbone, *parts).eval(), module(backbone, input_embeddings=outside).eval()
        results[which] += [
            whole(**inputs).logits,
            plain(inputs["input_ids"]),
            whole.can_generate(),
            plain.can_generate(),
        ]
        assert plain.get_input_embeddings() is outside
        assert plain.get_output_embeddings() is None
        assert whole.state_dict().keys() == peft_shadow.DetachedShadowModel(backbone, *parts).state_dict().keys()
    torch.testing.assert_close(*results)


def caches() -> list[Any]:
    """A pair each: of a model with three numbers a key, and of a shadow with two."""
    found = []
    for module in (find("peft.tuners.shadow", "ShadowCache"), peft_shadow.ShadowCache):
        held = []
        for dim in (3, 2):
            cache = DynamicCache()
            keys = torch.arange(2.0 * 4 * dim).view(2, 1, 4, dim)
            cache.update(keys, -keys, 0)
            held.append(cache)
        found.append(module(*held))
    return found


def test_caches_in_pairs() -> None:
    new = torch.ones(2, 1, 1, 3)
    changes: list[Any] = [
        lambda c: c.update(new, new, 0),
        lambda c: c.crop(-1),
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([0, 3])),
        lambda c: c.reset(),
    ]
    held_pairs = caches()
    for change in changes:
        results: list[list[Any]] = [[], []]
        for which, cache in enumerate(held_pairs):
            change(cache)
            tensors = [t for half in (cache.base, cache.shadow) for t in (half.layers[0].keys, half.layers[0].values)]
            results[which] += [torch.zeros(0) if t is None else t for t in tensors]
            results[which] += [cache.get_seq_length(), *cache.get_mask_sizes(1, 0), len(cache), cache.is_initialized]
            assert cache.layers is cache.base.layers
            assert not cache.is_compileable
        torch.testing.assert_close(*results)
    for module in (type(cache) for cache in caches()):
        empty = module()
        assert (len(empty), empty.get_seq_length(), empty.get_mask_sizes(2, 0), empty.is_initialized) == (
            0,
            0,
            (2, 0),
            False,
        )
    carriers = [
        module(new, -new) for module in (find("peft.tuners.shadow", "ShadowCarrier"), peft_shadow.ShadowCarrier)
    ]
    assert all(c.hidden is new and torch.equal(c.shadow, -new) for c in carriers)


def test_another_name(tmp_path: Path) -> None:
    ours = quiet(trimtab.get_peft_model, build("llama"), trimtab.ShadowConfig(task_type="CAUSAL_LM"), "first").eval()
    stir(ours, 0.1)
    quiet(ours.save_pretrained, tmp_path)
    read = quiet(peft.PeftModel.from_pretrained, build("llama"), str(tmp_path / "first"), adapter_name="other").eval()
    near(read(**batch("llama")).logits, ours(**batch("llama")).logits)


def test_fields() -> None:
    ours, theirs = (quiet(library.ShadowConfig).to_dict() for library in BOTH)
    assert {k: str(v) for k, v in ours.items()} == {k: str(v) for k, v in theirs.items()}
    assert {f.name for f in dataclasses.fields(trimtab.ShadowConfig)} == {
        f.name for f in dataclasses.fields(peft.ShadowConfig)
    }


ENCODERS = {
    "bert": {}, "bert_token": {"task_type": "TOKEN_CLS"}, "bert_seq": {"task_type": "SEQ_CLS"},
    "bert_qa": {"task_type": "QUESTION_ANS"},
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("fields", [{}, {"shadow_hidden_size": 8}, {"share_embeddings": False}])
def test_encoders(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT must be told their blocks; a classifier's own loss is one of its last token in both."""
    models = []
    for library in BOTH:
        torch.manual_seed(11)
        fields = {"target_modules": r".*layer\.\d+", "shadow_dropout": 0.0, **ENCODERS[name], **fields}
        config = library.ShadowConfig(**fields)
        models.append(quiet(library.get_peft_model, build(name), config).eval())
    ours, theirs = models
    assert trainable(ours) == trainable(theirs)
    stir(theirs, 0.1)
    copy_trained(theirs, ours)
    inputs = batch(name)
    if name == "bert_seq":
        inputs["labels"] = torch.arange(len(inputs["input_ids"])) % 2
        inputs["attention_mask"] = (inputs["input_ids"] != build(name).config.pad_token_id).long()
    found = []
    for model in (ours.train(), theirs):  # theirs has its own loss in evaluation, too
        out = model(**inputs)
        (out.loss if "labels" in inputs else out[0].square().mean()).backward()
        found.append((out[0], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    near(found[0][0], found[1][0])
    all_near(found[0][1], found[1][1])
    alone = [model.unload_shadow().eval()(**inputs) for model in (ours.eval(), theirs)]
    near(*(out if isinstance(out, torch.Tensor) else out.logits for out in alone))
    for model, folder in ((ours, "0"), (theirs, "1")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert weights_file(tmp_path / "0").keys() == weights_file(tmp_path / "1").keys()
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    for folder in "01":
        for library in BOTH:
            read = quiet(library.PeftModel.from_pretrained, build(name), str(tmp_path / folder)).eval()
            near(read(**inputs)[1 if "labels" in inputs else 0], theirs(**inputs)[1 if "labels" in inputs else 0])


def test_the_first_state_has_a_loss_of_its_own_in_two_tasks_only() -> None:
    ours, theirs = (quiet(lib.get_peft_model, build("llama"), lib.ShadowConfig(shadow_dropout=0.0)) for lib in BOTH)
    inputs = batch("llama")
    near(ours.train()(**inputs, labels=inputs["input_ids"]).loss, theirs(**inputs, labels=inputs["input_ids"]).loss)
