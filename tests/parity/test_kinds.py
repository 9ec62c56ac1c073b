"""Kinds of models and layers at which two libraries may part: files both ways, results, and what is refused."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.parity.pairs import BOTH, quiet

transformers.logging.set_verbosity_error()
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 3]])
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}


def llama(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=2, **fields)
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, num_hidden_layers=1, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def fill(model: nn.Module) -> nn.Module:
    """Give every trainable parameter numbers that follow from its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


@pytest.mark.parametrize("build", [lambda: llama(tie_word_embeddings=True), t5, bert], ids=["llama", "t5", "bert"])
def test_files_of_trained_tokens_go_both_ways(build: Any, tmp_path: Path) -> None:
    kind = {"T5": "SEQ_2_SEQ_LM", "Be": "SEQ_CLS"}.get(type(build()).__name__[:2], "CAUSAL_LM")
    inputs = {"input_ids": IDS} | ({"labels": IDS} if kind == "SEQ_2_SEQ_LM" else {})
    files, wanted = [], []
    for library in BOTH:
        config = library.TrainableTokensConfig(token_indices=[5, 7], task_type=kind)
        model = fill(quiet(library.get_peft_model, build(), config))
        model.save_pretrained(tmp_path / library.__name__)
        files.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
        wanted.append(model(**inputs).logits)
        assert sorted(library.get_peft_model_state_dict(model)) == sorted(files[-1])
    assert sorted(files[0]) == sorted(files[1])
    torch.testing.assert_close(wanted[0], wanted[1], atol=1e-5, rtol=1e-4)
    for library, other in zip(BOTH, reversed(BOTH), strict=True):
        model = quiet(library.PeftModel.from_pretrained, build(), tmp_path / other.__name__).eval()
        torch.testing.assert_close(model(**inputs).logits, wanted[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["Lora", "LNTuning"])
def test_a_head_of_the_task_is_no_target(method: str) -> None:
    """A model of a type without default targets: the config must name some."""
    for library in BOTH:
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            quiet(library.get_peft_model, vit(), getattr(library, f"{method}Config")(task_type="SEQ_CLS"))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv1d(8, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.three, self.groups = nn.Conv3d(1, 2, 3, padding=1), nn.Conv1d(4, 6, 1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x)[..., None].expand(-1, -1, -1, 4))
        return self.groups(self.three(x[:, None]).flatten(2)[:, :1].expand(-1, 4, -1))


LOKRS: list[dict[str, Any]] = [
    {"r": 2},
    {"r": 2, "use_effective_conv2d": True},
    {"r": 1, "use_effective_conv2d": True},
    {"r": 1, "decompose_both": True},
]
CONVS = [("LoKr", fields, target) for fields in LOKRS for target in ("one", "two")]
CONVS.remove(("LoKr", LOKRS[2], "one"))  # an error of torch in PEFT
CONVS += [("LNTuning", {}, target) for target in ("one", "two", "three", "groups")]


@pytest.mark.parametrize(("method", "fields", "target"), CONVS)
def test_convolutions(method: str, fields: dict[str, Any], target: str) -> None:
    x = torch.linspace(-1, 1, 2 * 8 * 5).view(2, 8, 5)
    results = []
    for library in BOTH:
        config = getattr(library, f"{method}Config")(target_modules=[target], **fields)
        model = fill(library.get_peft_model(Convs(), config))
        out = model(x)
        results.append([out, model.merge_and_unload()(x)])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_status_of_adapters_inside_another_model() -> None:
    said = []
    for library in BOTH:
        inner = library.get_peft_model(Convs(), library.LoraConfig(target_modules=["one", "two"]))
        models = [inner, inner.base_model, inner.base_model.model, nn.Sequential(inner)]
        rows = [list(map(str, library.get_layer_status(m))) for m in models]
        said.append([rows, [str(library.get_model_status(m)) for m in models]])
    assert said[0] == said[1]


def test_what_does_not_fit_is_missing() -> None:
    missing = []
    for library in BOTH:
        model = library.get_peft_model(Convs(), library.LoraConfig(target_modules=["one"], r=2))
        tensors = library.get_peft_model_state_dict(model)
        key = next(k for k in tensors if "lora_A" in k)
        tensors[key] = torch.zeros(3, 3)
        result = quiet(library.set_peft_model_state_dict, model, tensors, ignore_mismatched_sizes=True)
        missing.append([k for k in result.missing_keys if "lora" in k])
    assert missing[0] == missing[1] == ["base_model.model.one.lora_A.default.weight"]
