"""Differences of docs/differences.md in what is adapted, trained and loaded: PEFT's answer and ours, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab
from tests.parity.alias import find
from tests.parity.models import build
from tests.parity.pairs import BOTH, adapt, method, near, quiet, run, stir, trainable, weights_file


class Kinds(nn.Module):
    """One layer of each kind; the forward is the linear one's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv1d = nn.Linear(8, 8), Conv1D(8, 8)
        self.one, self.two, self.three = nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv3d(4, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_loaded_for_inference_are_frozen(kind: str, tmp_path: Path) -> None:
    loaded = []
    for lib in BOTH:
        config = getattr(lib, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        quiet(lib.get_peft_model, build("llama"), config).save_pretrained(tmp_path)
        loaded.append(trainable(quiet(lib.PeftModel.from_pretrained, build("llama"), tmp_path)))
    assert loaded == [set(), {"prompt_encoder.default.embedding.weight"}]


def test_biases_loaded_for_inference_are_frozen(tmp_path: Path) -> None:
    adapt(trimtab, "bert_seq", {"target_modules": ["query"], "bias": "all"}).save_pretrained(tmp_path)
    ours, theirs = (trainable(quiet(lib.PeftModel.from_pretrained, build("bert_seq"), str(tmp_path))) for lib in BOTH)
    assert not ours
    assert theirs
    assert all(name.endswith("bias") for name in theirs)


def test_copies_of_half_precision_norms_are_in_fp32() -> None:
    formats = []
    for lib in BOTH:
        config = lib.LNTuningConfig(target_modules=["input_layernorm"])
        model = quiet(lib.get_peft_model, build("llama", torch.bfloat16), config)
        formats.append({p.dtype for p in model.parameters() if p.requires_grad})
    assert formats == [{torch.float32}, {torch.bfloat16}]
    model = trimtab.get_peft_model(
        build("llama", torch.bfloat16), trimtab.LNTuningConfig(target_modules=["norm"]), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


MORE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("LoKrConfig", {}, ["conv1d", "three"]),
    ("MissConfig", {"r": 4}, ["conv1d"]),
    ("C3AConfig", {"block_size": 2}, ["conv1d"]),
    ("DeloraConfig", {}, ["conv1d"]),
    ("RoadConfig", {"group_size": 2}, ["conv1d", "one", "two", "three"]),
    ("IA3Config", {"feedforward_modules": []}, ["one"]),
    ("HRAConfig", {}, ["conv1d", "one", "three"]),
    ("AdaLoraConfig", {"total_step": 10}, ["one", "three"]),
]


@pytest.mark.parametrize(("name", "fields", "layers"), MORE, ids=[m[0] for m in MORE])
def test_layers_that_peft_refuses(name: str, fields: dict[str, Any], layers: list[str]) -> None:
    for layer in layers:
        ours, theirs = (getattr(lib, name)(target_modules=[layer], **fields) for lib in BOTH)
        assert trainable(quiet(trimtab.get_peft_model, Kinds(), ours))
        with pytest.raises((TypeError, ValueError)):
            quiet(peft.get_peft_model, Kinds(), theirs)


def test_several_active_adapters_that_train_one_head() -> None:
    """PEFT refuses; here the outermost's head counts."""
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ours, theirs = (adapt(lib, "llama", fields) for lib in BOTH)
    for model, lib in ((ours, trimtab), (theirs, peft)):
        model.add_adapter("other", lib.LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        theirs.base_model.set_adapter(["default", "other"])
    ours.base_model.set_adapter(["default", "other"])
    stir(ours)
    head, states = ours.base_model.model.lm_head, []
    head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    near(run(ours.eval(), "llama"), head.modules_to_save["other"](states[0]))


def test_all_linear_leaves_the_projection_of_an_attention() -> None:
    found = [
        quiet(lib.get_peft_model, Kinds(), lib.LoraConfig(target_modules="all-linear")).targeted_module_names
        for lib in BOTH
    ]
    assert set(found[1]) - set(found[0]) == {"attention.out_proj"}


def test_the_number_of_ranks_is_a_buffer() -> None:
    held = []
    for lib in BOTH:
        model = quiet(lib.get_peft_model, Kinds(), lib.AdaLoraConfig(target_modules=["linear"], total_step=10))
        held.append(
            [any("ranknum" in n for n, _ in found()) for found in (model.named_parameters, model.named_buffers)]
        )
    assert held == [[False, True], [True, False]]


def test_dora_of_an_attention() -> None:
    def config(lib: Any) -> Any:
        return lib.LoraConfig(target_modules=["attention"], use_dora=True)

    with pytest.raises(ValueError, match="does not support DoRA"):
        quiet(peft.get_peft_model, Kinds(), config(peft))
    model = quiet(trimtab.get_peft_model, Kinds(), config(trimtab)).eval()
    stir(model)
    x, attention = torch.randn(3, 2, 8), model.base_model.model.attention
    before = attention(x, x, x)[0]
    model.merge_adapter()
    near(attention(x, x, x)[0], before)


def test_inputs_are_never_cast() -> None:
    """In PEFT an input is cast to the adapter's format unless that is switched off, and then the product fails."""
    for lib in BOTH:
        model = adapt(lib, "llama", {"target_modules": ["q_proj"], "init_lora_weights": False}, torch.bfloat16).eval()
        plain = run(model, "llama")
        uncast = (
            peft.helpers.disable_input_dtype_casting
            if lib is peft
            else find("peft.helpers", "disable_input_dtype_casting")
        )
        with uncast(model):
            if lib is peft:
                with pytest.raises(RuntimeError, match="same dtype"):
                    run(model, "llama")
            else:
                assert torch.equal(run(model, "llama"), plain)


CAUSAL = {"task_type": "CAUSAL_LM"}


def test_adapters_beside_half_precision_layers_are_in_fp32() -> None:
    cases = {"AdaptionPrompt": {"adapter_len": 2, "adapter_layers": 1}, "Shadow": {}}
    for name, fields in cases.items():
        ours, theirs = (
            {
                p.dtype
                for p in method(library, name, dtype=torch.bfloat16, **CAUSAL, **fields).parameters()
                if p.requires_grad
            }
            for library in BOTH
        )
        assert ours == {torch.float32}
        assert torch.bfloat16 in theirs


def test_where_tensors_that_layers_share_are_in_memory(tmp_path: Path) -> None:
    for kind, tensor in (("UniLora", "unilora_theta_d"), ("TinyLora", "tinylora_v")):
        names, files = [], []
        for library in BOTH:
            model = method(library, kind, target_modules=["q_proj"])
            names.append([n.partition(f".{tensor}")[0] for n in trainable(model)])
            quiet(model.save_pretrained, tmp_path / library.__name__)
            files.append(sorted(weights_file(tmp_path / library.__name__)))
        assert set(names[0]) == {"base_model"}
        assert set(names[1]) == {"base_model.model.model.layers.0.self_attn.q_proj"}
        assert files[0] == files[1]


def test_a_prompt_lacks_no_keys_and_can_be_taken_off() -> None:
    missing, verbs = [], []
    for library in BOTH:
        model = method(library, "PromptTuning", num_virtual_tokens=2, **CAUSAL)
        state = library.get_peft_model_state_dict(model)
        missing.append(len(library.set_peft_model_state_dict(model, state).missing_keys))
        verbs.append([hasattr(model, name) for name in ("unload", "merge_and_unload")])
    assert missing[0] == 0 < missing[1]
    assert verbs == [[True, True], [False, False]]
    model = method(trimtab, "PromptTuning", num_virtual_tokens=2, **CAUSAL)
    base = model.get_base_model()
    assert model.unload() is base
    with pytest.raises(trimtab.errors.PeftError, match="cannot be merged"):
        method(trimtab, "PromptTuning", num_virtual_tokens=2, **CAUSAL).merge_and_unload()


def test_a_config_keeps_its_base_beside_a_model_without_a_name(tmp_path: Path) -> None:
    kept = []
    for library in BOTH:
        config = library.LoraConfig(target_modules=["q_proj"], base_model_name_or_path="some/base")
        kept.append(quiet(library.get_peft_model, build("llama"), config).peft_config["default"])
    assert [config.base_model_name_or_path for config in kept] == ["some/base", None]
    method(trimtab, "Lora", target_modules=["q_proj"]).save_pretrained(tmp_path)
    filled = []
    for library in BOTH:
        model = build("llama")
        model.name_or_path = "some/base"
        filled.append(quiet(library.PeftModel.from_pretrained, model, tmp_path).peft_config["default"])
    assert [config.base_model_name_or_path for config in filled] == ["some/base", None]
