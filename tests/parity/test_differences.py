"""Where PEFT 0.21.2 is wrong, what is right: each test shows PEFT's answer and ours. docs/differences.md lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import trimtab
from tests.parity.models import build
from tests.parity.pairs import (
    BOTH,
    adapt,
    copy_state,
    gradients,
    load,
    method,
    near,
    pair,
    parameters,
    quiet,
    run,
    spoken,
    stir,
    trainable,
    weights_file,
)
from trimtab.errors import AdapterFileError


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("keep", [True, False])
def test_tied_merge(name: str, keep: bool) -> None:
    """D2-1: an adapter on the embedding alone of a tied model. PEFT's merge changes the head as well."""
    target = {"llama_tied": "embed_tokens", "gpt2": "wte"}[name]
    errors = []
    for model in pair(name, {"target_modules": [target]}):
        before = run(model.eval(), name)
        after = run(quiet(model.merge_adapter) or model if keep else quiet(model.merge_and_unload), name)
        errors.append((after - before).abs().max().item())
    assert errors[0] < 1e-4 < 0.1 < errors[1]


def test_tied_merge_says_so() -> None:
    """The merged model is no longer tied, and its config knows; unmerged, it is tied again."""
    model = adapt(trimtab, "llama_tied", {"target_modules": ["embed_tokens"]})
    stir(model)
    base = model.get_base_model()
    assert any("share one weight" in text for text in spoken(model.merge_adapter))
    assert not base.config.tie_word_embeddings
    model.unmerge_adapter()
    assert base.config.tie_word_embeddings
    restored = model.unload()
    assert restored.lm_head.weight is restored.model.embed_tokens.weight


def test_tied_merge_saved(tmp_path: Path) -> None:
    """A merged model whose tie was cut comes back from disk as it was."""
    model = adapt(trimtab, "llama_tied", {"target_modules": ["embed_tokens"]})
    stir(model)
    merged = quiet(model.eval().merge_and_unload)
    merged.save_pretrained(tmp_path)
    near(run(type(merged).from_pretrained(tmp_path).eval(), "llama"), run(merged, "llama"))


@pytest.mark.parametrize(("name", "task"), [("bert_token", "TOKEN_CLS"), ("bert_qa", "QUESTION_ANS")])
def test_all_linear_with_heads(name: str, task: str) -> None:
    """D2-11: "all-linear" leaves the head to `modules_to_save`, for these tasks too."""
    fields = {"task_type": task, "target_modules": "all-linear"}
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        adapt(peft, name, fields)
    model = adapt(trimtab, name, fields)
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    assert not any(head in n for n in model.targeted_module_names)
    assert f"base_model.model.{head}.modules_to_save.default.weight" in trainable(model)


def test_config_is_not_changed() -> None:
    """PEFT writes into the config it is given, at every use; we keep a copy."""
    for library, kept in zip(BOTH, (True, False), strict=True):
        config = library.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
        before = json.dumps(config.to_dict(), default=str, sort_keys=True)
        for _ in range(3):
            quiet(library.get_peft_model, build("bert_seq"), config)
        assert (json.dumps(config.to_dict(), default=str, sort_keys=True) == before) is kept
    assert len(config.modules_to_save) == 6  # PEFT's: the heads three times over


def test_names_that_end_alike() -> None:
    """`modules_to_save=["score"]` means `score`, not `my_score` as well."""
    fields = {"target_modules": ["plain"], "modules_to_save": ["score"]}
    ours, theirs = (trainable(adapt(library, "toy", fields)) for library in BOTH)
    extra = theirs - ours
    assert extra == {f"base_model.model.my_score.modules_to_save.default.{p}" for p in ("weight", "bias")}


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["norm"]}, {"modules_to_save": ["embed_tokens", "norm"]}], ids=["norm", "longlora"]
)
def test_files_of_names_that_end_alike(fields: dict[str, Any], tmp_path: Path) -> None:
    """Files that PEFT has written by that rule (LongLoRA's "norm" stands for every norm) load all the same."""
    theirs = adapt(peft, "llama", fields)
    stir(theirs)
    quiet(theirs.save_pretrained, str(tmp_path / "theirs"))
    ours = load(trimtab, "llama", tmp_path / "theirs")
    near(run(ours, "llama"), run(theirs.eval(), "llama"))
    quiet(ours.save_pretrained, str(tmp_path / "ours"))
    assert weights_file(tmp_path / "ours").keys() == weights_file(tmp_path / "theirs").keys()
    for library in BOTH:
        near(run(load(library, "llama", tmp_path / "ours"), "llama"), run(theirs, "llama"))


FAULTS = {
    "missing": lambda t: {k: v for k, v in t.items() if "layers.0" not in k},
    "unexpected": lambda t: {**t, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(8, 16)},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_strict_loading(fault: Any, tmp_path: Path) -> None:
    """A file that does not fit key for key is an error; PEFT loads what fits."""
    model = adapt(trimtab, "llama", {})
    stir(model)
    model.save_pretrained(tmp_path)
    save_file(fault(weights_file(tmp_path)), tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    load(peft, "llama", tmp_path)
    with pytest.raises(AdapterFileError, match="missing keys|unexpected keys"):
        load(trimtab, "llama", tmp_path)
    load(trimtab, "llama", tmp_path, strict=False)
    again = adapt(trimtab, "llama", {})
    with pytest.raises(AdapterFileError, match="missing keys|unexpected keys"):
        again.load_adapter(tmp_path, "b")
    assert list(again.peft_config) == ["default"]


def test_silent_misses() -> None:
    """Targets and modules to save that fit nothing are named, also where others fit."""
    fields = {"target_modules": ["q_proj", "w_proj"], "modules_to_save": ["lm_heat"]}
    mine, other = (spoken(lambda lib=lib: lib.get_peft_model(build("llama"), lib.LoraConfig(**fields))) for lib in BOTH)
    assert other == []
    assert any("w_proj" in m for m in mine)
    assert any("lm_heat" in m and "lm_head" in m for m in mine)
    with pytest.raises(ValueError, match="w_proj"):
        trimtab.get_peft_model(build("llama"), trimtab.LoraConfig(target_modules=["q_proj", "w_proj"]), strict=True)


def test_save_only() -> None:
    """An adapter may consist of `modules_to_save` alone."""
    fields = {"target_modules": [], "modules_to_save": ["lm_head"]}
    with pytest.raises(ValueError, match="No modules were targeted"):
        adapt(peft, "llama", fields)
    assert trainable(adapt(trimtab, "llama", fields)) == {"base_model.model.lm_head.modules_to_save.default.weight"}


def test_olora_of_conv1d() -> None:
    """OLoRA on GPT-2's layers: PEFT factors the transposed weight, and its forward fails."""
    fields = {"init_lora_weights": "olora", "r": 4}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(adapt(peft, "gpt2", fields), "gpt2")
    near(run(adapt(trimtab, "gpt2", fields).eval(), "gpt2"), run(build("gpt2").eval(), "gpt2"), 2e-5)


def test_lora_bias_merge() -> None:
    """An adapter with a bias merges into a layer that has none: the layer gets one. PEFT refuses."""
    ours, theirs = pair("llama", {"lora_bias": True})
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        quiet(theirs.merge_and_unload)
    before = run(ours.eval(), "llama")
    near(run(quiet(ours.merge_adapter) or ours, "llama"), before)
    ours.unmerge_adapter()
    assert ours.unload().model.layers[0].self_attn.q_proj.bias is None


def test_disabling_does_not_freeze() -> None:
    """Whether adapters are on and whether they train are two things: PEFT's switch thaws what was frozen."""
    states = []
    for library in BOTH:
        model = adapt(library, "llama", {"inference_mode": True})
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
        states.append(trainable(model))
    assert states[0] == set() < states[1]


def test_active_adapter_of_several() -> None:
    """`active_adapter` lists what is in use; PEFT's stays at the name that was set last by itself."""
    answers = []
    for library in BOTH:
        model = adapt(library, "llama", {})
        model.add_adapter("b", library.LoraConfig())
        model.base_model.set_adapter(["default", "b"])
        answers.append(model.active_adapter)
    assert answers == [["default", "b"], "default"]


def test_multitask_prompt_of_a_decoder() -> None:
    """PEFT's forward puts half of a multitask prompt before the decoder; the paper, and its own generation, do not."""
    fields = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4, "num_tasks": 2}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3), "task_ids": torch.tensor([1])}
    labels = torch.tensor([[9]])  # the decoder is given its start token alone
    ours, theirs = (
        library.get_peft_model(build("t5").eval(), library.MultitaskPromptTuningConfig(**fields)).eval()
        for library in (trimtab, peft)
    )
    for model in (ours, theirs):
        for parameter in model.prompt_encoder["default"].parameters():
            torch.manual_seed(parameter.numel())
            torch.nn.init.normal_(parameter, std=3)
    here, there = (model(**inputs, labels=labels).logits for model in (ours, theirs))
    assert (here.shape[1], there.shape[1]) == (1, 5)
    first = []
    for model in (ours, theirs):
        scores = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
        first.append(scores)
    near(first[0], first[1])
    near(here[:, -1], first[0])
    assert not torch.allclose(there[:, -1], first[1], atol=1e-3)


def test_labels_of_cpt() -> None:
    """Where CPT's examples end before a label PEFT's count of types is out of step: no label of the call is trained."""
    x, last = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, -100, -100, 8]])
    for types in ([2, 3, 4], [3, 4, 5]):
        losses, given = [], torch.tensor([[1, 2, 3, 4]])
        for library in BOTH:
            config = library.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_tokens_type_mask=types)
            model = library.get_peft_model(build("llama").eval(), config).eval()
            args = {"input_ids": x, "attention_mask": torch.ones_like(x)}
            calls = [{"labels": last}, {"labels": torch.full_like(last, -100)}]
            calls.append({"labels": last, "input_type_mask": given.clone()})
            losses.append([float(model(**args, **call).loss) for call in calls])
            assert torch.equal(calls[-1]["input_type_mask"], given) is (library is trimtab)  # PEFT writes into it
        ours, theirs = losses
        if types[-1] == 4:
            assert ours == pytest.approx(theirs, abs=1e-5)
        else:
            assert theirs[0] == theirs[1]
            assert ours[0] == ours[2] != ours[1]


def test_padding_of_adapted_embedding() -> None:
    """An embedding's padding row: the gradient of the adapter there is PEFT's too (none)."""
    ours, theirs = pair("toy", {"target_modules": ["embed"]})
    mine, other = gradients(ours, "toy"), gradients(theirs, "toy")
    for key, gradient in other.items():
        near(mine[key], gradient)


def test_embedding_and_tokens() -> None:
    """LoRA on an embedding and some rows trained whole: PEFT cannot, we can."""
    fields = {"target_modules": ["embed_tokens", "q_proj"], "trainable_token_indices": [4, 5]}
    with pytest.raises(TypeError, match="cannot be applied"):
        adapt(peft, "llama", fields)
    model = adapt(trimtab, "llama", fields).eval()
    stir(model)
    before = run(model, "llama")
    near(run(quiet(model.merge_and_unload), "llama"), before, 3e-5)


def test_mutated_base_is_apart() -> None:
    """A start that changes the base (PiSSA) changes it for its own adapter only: others and the base stay right."""
    base = run(build("llama").eval(), "llama")
    for library, right in zip(BOTH, (True, False), strict=True):
        model = adapt(library, "llama", {"init_lora_weights": "pissa", "r": 4}).eval()
        with model.disable_adapter():
            off = run(model, "llama")
        assert bool((off - base).abs().max() < 1e-6) is right
        quiet(model.add_adapter, "plain", library.LoraConfig())
        model.set_adapter("plain")
        assert bool((run(model.eval(), "llama") - base).abs().max() < 1e-6) is right
        unloaded = quiet(model.unload)  # both leave what the start left, which the adapter's file belongs to
        assert not all(torch.equal(v, parameters(unloaded)[k]) for k, v in build("llama").named_parameters())


def test_copy_state_is_strict() -> None:
    """The helper of these tests compares names."""
    with pytest.raises(AssertionError):
        copy_state(build("llama"), build("gpt2"))


def test_randloras_bases_are_saved_once(tmp_path: Path) -> None:
    """D2-9: PEFT writes them again for every layer. Both libraries read both files (test_methods.py)."""
    counts, sizes = [], []
    for library in BOTH:
        config = library.RandLoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        folder = tmp_path / library.__name__
        quiet(quiet(library.get_peft_model, build("llama"), config).save_pretrained, str(folder))
        counts.append(sum("randlora_B" in key for key in weights_file(folder)))
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)
    assert counts == [1, 1 + 4]
    assert sizes[0] < sizes[1] / 2


def test_beft_without_a_bias_cannot_be_merged_in_peft() -> None:
    ours, theirs = (method(library, "Beft", init_weights=False) for library in BOTH)
    y = run(ours.eval(), "llama")
    near(run(theirs.eval(), "llama"), y)
    near(run(ours.merge_and_unload(), "llama"), y)
    with pytest.raises(ValueError, match="no bias"):
        quiet(theirs.merge_and_unload)


def test_osf_cannot_be_unmerged_in_peft_and_skips_what_it_does_not_know() -> None:
    ours, theirs = (method(library, "OSF", "gpt2", target_modules=["c_attn"]) for library in BOTH)
    assert trainable(ours)
    assert not trainable(theirs)
    ours, theirs = (method(library, "OSF", init_weights=False) for library in BOTH)
    y = run(ours.eval(), "llama")
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert torch.equal(run(ours, "llama"), y)
    quiet(theirs.merge_adapter)
    with pytest.raises(NotImplementedError):
        theirs.unmerge_adapter()


def test_butterfly_factors_need_an_extension_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs makes one of two factors, unless something stands in for its CUDA kernel: then both agree."""
    from peft.tuners.boft import layer

    class Kernel:
        """Blocks (n, k, b, b) as n block-diagonal matrices."""

        forward = staticmethod(lambda blocks: [torch.stack([torch.block_diag(*some) for some in blocks])])

    fields = {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "init_weights": False}
    factors = lambda model: {len(p) for n, p in model.named_parameters() if "boft_R" in n}
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)
    ours, theirs = (method(library, "BOFT", **fields) for library in BOTH)
    assert (factors(ours), factors(theirs)) == ({2}, {1})
    monkeypatch.setattr(layer, "get_fbd_cuda", Kernel)
    theirs = method(peft, "BOFT", **fields)
    assert factors(theirs) == {2}
    near(run(ours.eval(), "llama"), run(theirs.eval(), "llama"))


def test_frod_amplifies_rounding_where_a_weight_lacks_directions_in_peft() -> None:
    """A layer of 16 inputs and 8 outputs alone: moving l where W has nothing adds noise in theirs, nothing in ours."""
    moved = []
    for library in BOTH:
        fields = {"target_modules": ["v_proj"], "layers_to_transform": [0], "progressbar": False}
        model = method(library, "Frod", **fields).eval()
        layer = model.base_model.model.model.layers[0].self_attn.v_proj
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            y, (l,) = layer(x), layer.frod_lambda_l.values()
            lacking = l < 1e-6
            assert int(lacking.sum()) == 8
            l[lacking] += 1
            moved.append(float((layer(x) - y).abs().max()))
    assert moved[0] == 0
    assert moved[1] > 0.1


def test_frod_without_its_basis_is_another_model_elsewhere(tmp_path: Path) -> None:
    """The signs that PEFT's solver chose are nowhere in the file; ours follow a rule, and a warning names the risk."""
    fields = {"target_modules": ["q_proj"], "save_projection": False, "sparse_rate": 0.5, "progressbar": False}
    theirs = method(peft, "Frod", **fields).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    assert not any("frod_V" in key for key in weights_file(tmp_path))
    y = run(theirs, "llama")
    warnings = spoken(trimtab.PeftModel.from_pretrained, build("llama"), str(tmp_path))
    assert any("PEFT's and ours differ" in text for text in warnings)
    assert float((run(load(trimtab, "llama", tmp_path).eval(), "llama") - y).detach().abs().max()) > 1e-3


def test_merging_an_adapter_that_is_not_active() -> None:
    """PEFT's layers that have something merged no longer look at what is active."""
    outputs = []
    for library in BOTH:
        model = adapt(library, "llama", {"target_modules": ["q_proj"], "init_lora_weights": False})
        model.add_adapter("other", library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        stir(model)
        model.base_model.set_adapter(["default", "other"])
        both = run(model.eval(), "llama")
        model.set_adapter("default")
        model.merge_adapter(adapter_names=["other"])
        outputs.append((run(model, "llama") - both).abs().max().item())
    assert outputs[0] < 1e-4 < 0.01 < outputs[1]
