"""IA3, LoHa, LN tuning, OFT, VeRA and AdaLoRA against PEFT: names, starts, outputs, gradients, merges, files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.parity.models import MODELS, batch, build
from tests.parity.pairs import (
    BOTH,
    all_near,
    config_file,
    copy_state,
    gradients,
    near,
    quiet,
    run,
    spoken,
    stir,
    trainable,
    weights_file,
)
from trimtab.errors import ReadOnlyWeight
from trimtab.methods import METHODS, config_class, load


class Pixels(nn.Module):
    """Convolutions with and without a kernel; token ids make its picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 54)
        self.kernel = nn.Conv2d(6, 8, 2, padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).view(-1, 6, 3, 3)
        return self.head(self.norm(torch.tanh(self.point(torch.tanh(self.kernel(x)))).mean((-1, -2))))


MODELS["pixels"] = Pixels
CONVOLUTIONS = ["kernel", "point", "head"]
LAST = {"layers_to_transform": [1]}
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]

BANK = {"num_vectors": 90, "vector_length": 4, "init_vector_bank_bound": 0.3}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3_llama": ("llama", "IA3", {}),
    "ia3_gpt2": ("gpt2", "IA3", {}),
    "ia3_bert": ("bert", "IA3", {}),
    "ia3_t5": ("t5", "IA3", {"task_type": "SEQ_2_SEQ_LM"}),
    "ia3_head": ("bert_seq", "IA3", {"task_type": "SEQ_CLS"}),
    "ia3_all_linear": ("llama", "IA3", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "ia3_regex": ("llama", "IA3", {"target_modules": r".*\.(k|down)_proj", "feedforward_modules": r".*mlp.*"}),
    "ia3_random": ("llama", "IA3", {"init_ia3_weights": False}),
    "ia3_conv": ("pixels", "IA3", {"target_modules": CONVOLUTIONS, "feedforward_modules": ["kernel"]}),
    "loha_llama": ("llama", "LoHa", {"r": 4, "alpha": 6}),
    "loha_bert": ("bert", "LoHa", {"r": 4, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}}),
    "loha_random": ("llama", "LoHa", {"r": 3, "init_weights": False, "target_modules": PROJECTIONS}),
    "loha_layers": ("llama", "LoHa", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "loha_head": ("llama", "LoHa", {"modules_to_save": ["lm_head"]}),
    "loha_conv": ("pixels", "LoHa", {"r": 3, "target_modules": CONVOLUTIONS}),
    "loha_cores": ("pixels", "LoHa", {"r": 3, "target_modules": CONVOLUTIONS, "use_effective_conv2d": True}),
    "lokr_llama": ("llama", "LoKr", {"r": 2, "alpha": 5}),
    "lokr_bert": ("bert", "LoKr", {"r": 2, "rank_pattern": {"query": 1}, "alpha_pattern": {"value": 3}}),
    "lokr_both": ("llama", "LoKr", {"r": 1, "decompose_both": True, "init_weights": "lycoris", "decompose_factor": 8}),
    "lokr_random": ("llama", "LoKr", {"r": 1, "decompose_both": True, "init_weights": False, "decompose_factor": 0}),
    "lokr_conv": ("pixels", "LoKr", {"r": 1, "target_modules": CONVOLUTIONS}),
    "lokr_cores": ("pixels", "LoKr", {"r": 1, "target_modules": CONVOLUTIONS, "use_effective_conv2d": True}),
    "lokr_full": ("pixels", "LoKr", {"r": 9, "target_modules": CONVOLUTIONS, "init_weights": "lycoris"}),
    "ln_llama": ("llama", "LNTuning", {}),
    "ln_gpt2": ("gpt2", "LNTuning", {"modules_to_save": ["lm_head"]}),
    "ln_bert": ("bert", "LNTuning", {"target_modules": ["LayerNorm"]}),
    "ln_t5": ("t5", "LNTuning", {}),
    "ln_linear": ("llama", "LNTuning", {"target_modules": ["q_proj", "norm"]}),
    "miss_llama": ("llama", "Miss", {"r": 5}),
    "miss_bias": ("bert", "Miss", {"r": 4, "bias": "MiSS_only"}),
    "miss_random": ("llama", "Miss", {"r": 3, "init_weights": False, "target_modules": PROJECTIONS}),
    "miss_mini": ("llama", "Miss", {"r": 4, "mini_r": 2, "init_weights": "mini", "target_modules": PROJECTIONS}),
    "miss_bat": ("llama", "Miss", {"r": 4, "init_weights": "bat", "target_modules": PROJECTIONS}),
    "hira_llama": ("llama", "Hira", {"r": 5, "target_modules": PROJECTIONS}),
    "hira_gpt2": ("gpt2", "Hira", {"r": 4, "init_weights": "gaussian", "fan_in_fan_out": True}),
    "hira_random": ("bert", "Hira", {"r": 4, "init_weights": False}),
    "hira_embedding": ("llama", "Hira", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "hira_conv": ("pixels", "Hira", {"r": 2, "target_modules": CONVOLUTIONS}),
    "c3a_llama": ("llama", "C3A", {"block_size": 4, **LAST}),
    "c3a_bert": ("bert", "C3A", {"block_size_pattern": {"query": 4, "value": 8}, "bias": "c3a_only", **LAST}),
    "c3a_gaussian": ("llama", "C3A", {"block_size": 1, "init_weights": "gaussian"}),
    "c3a_kaiming": ("llama", "C3A", {"block_size": 8, "init_weights": "kaiming_uniform", **LAST}),
    "c3a_zero": ("llama", "C3A", {"block_size": 2, "init_weights": True}),
    "fourier_llama": ("llama", "FourierFT", {"n_frequency": 20, "scaling": 9.0, "target_modules": PROJECTIONS}),
    "fourier_gpt2": ("gpt2", "FourierFT", {"n_frequency": 12, "random_loc_seed": 5}),
    "fourier_bert": (
        "bert",
        "FourierFT",
        {"n_frequency": 20, "n_frequency_pattern": {"query": 9}, "bias": "fourier_only", "init_weights": True},
    ),
    "wave_llama": ("llama", "WaveFT", {"n_frequency": 20, "scaling": 2.0, "target_modules": PROJECTIONS}),
    "wave_gpt2": ("gpt2", "WaveFT", {"n_frequency": 12, "random_loc_seed": 5, "wavelet_family": "sym4"}),
    "wave_bert": ("bert", "WaveFT", {"n_frequency": 20, "n_frequency_pattern": {"query": 9}, "bias": "waveft_only"}),
    "wave_sparse": ("llama", "WaveFT", {"n_frequency": 20, "scaling": 2.0, "use_idwt": False, "init_weights": False}),
    "wave_shared_out": (
        "llama",
        "WaveFT",
        {"n_frequency": 20, "proportional_parameters": True, "wavelet_family": "coif1", "target_modules": PROJECTIONS},
    ),
    "shira_llama": ("llama", "Shira", {"r": 2, "random_seed": 3, "target_modules": PROJECTIONS}),
    "shira_random": ("bert", "Shira", {"r": 1, "random_seed": 3, "init_weights": False}),
    "glora_llama": ("llama", "Glora", {"r": 3, "target_modules": PROJECTIONS}),
    "glora_bert": ("bert", "Glora", {"r": 3, "bias": "glora_only"}),
    "glora_vectors": ("bert", "Glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora_bias": ("bert", "Glora", {"config_A_B": "none", "config_C": "lora", "config_D_E": "none"}),
    "super_llama": ("llama", "Supertuning", {"sparsity": 0.9, "target_modules": PROJECTIONS}),
    "super_bottom": ("bert", "Supertuning", {"sparsity": 0.8, "select_top": False}),
    "super_found": ("llama", "Supertuning", {"sparsity": 0.8, "save_precomputed_indices": False}),
    "super_supra": ("llama", "Supertuning", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}),
    "oft_llama": ("llama", "OFT", {"oft_block_size": 4}),
    "oft_blocks": ("llama", "OFT", {"r": 2, "oft_block_size": 0, "target_modules": PROJECTIONS}),
    "oft_exact": ("bert", "OFT", {"oft_block_size": 8, "use_cayley_neumann": False, "bias": "oft_only"}),
    "oft_terms": ("llama", "OFT", {"oft_block_size": 8, "num_cayley_neumann_terms": 7, "block_share": True}),
    "oft_two_terms": ("llama", "OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    "oft_constrained": ("llama", "OFT", {"oft_block_size": 4, "coft": True, "eps": 0.1}),
    "oft_random": ("bert", "OFT", {"oft_block_size": 5, "init_weights": False, "bias": "all"}),
    "oft_embedding": ("llama", "OFT", {"oft_block_size": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "oft_point": ("pixels", "OFT", {"oft_block_size": 4, "target_modules": ["point", "head"]}),
    "vera_llama": ("llama", "Vera", {"r": 6, "target_modules": PROJECTIONS}),
    "vera_gpt2": ("gpt2", "Vera", {"r": 6, "projection_prng_key": 5, "d_initial": 0.3}),
    "vera_drawn": ("llama", "Vera", {"r": 6, "save_projection": False, "target_modules": PROJECTIONS}),
    "vera_bias": ("bert", "Vera", {"r": 6, "bias": "vera_only"}),
    "ada_llama": ("llama", "AdaLora", {"init_r": 4, "total_step": 10, "target_modules": PROJECTIONS}),
    "ada_gpt2": ("gpt2", "AdaLora", {"init_r": 4, "total_step": 10, "lora_alpha": 16}),
    "ada_random": ("bert", "AdaLora", {"init_r": 3, "total_step": 10, "init_lora_weights": False, "bias": "all"}),
    "ada_conv": ("pixels", "AdaLora", {"init_r": 3, "total_step": 10, "target_modules": ["kernel", "head"]}),
    "ada_tokens": ("llama", "AdaLora", {"init_r": 3, "total_step": 10, "trainable_token_indices": [1, 5]}),
    "delora_llama": ("llama", "Delora", {"r": 3, "target_modules": PROJECTIONS}),
    "delora_bert": ("bert", "Delora", {"r": 3, "bias": "delora_only", "init_weights": False}),
    "delora_patterns": ("llama", "Delora", {"rank_pattern": {"q_proj": 2}, "lambda_pattern": {"v_proj": 3.5}}),
    "gralora_llama": ("llama", "Gralora", {"r": 4, "target_modules": PROJECTIONS}),
    "gralora_gpt2": ("gpt2", "Gralora", {"r": 6, "gralora_k": 2, "alpha": 5, "hybrid_r": 3}),
    "gralora_bert": ("bert", "Gralora", {"r": 4, "gralora_k": 4, "bias": "all", "init_weights": False, "hybrid_r": 2}),
    "rand_llama": ("llama", "RandLora", {"r": 3, "randlora_alpha": 6, "target_modules": PROJECTIONS}),
    "rand_gpt2": ("gpt2", "RandLora", {"r": 5, "randlora_alpha": 4, "projection_prng_key": 5, "init_weights": False}),
    "rand_sparse": ("bert", "RandLora", {"r": 4, "randlora_alpha": 4, "sparse": True, "bias": "randlora_only"}),
    "rand_drawn": (
        "llama",
        "RandLora",
        {"r": 4, "randlora_alpha": 4, "very_sparse": True, "save_projection": False, "target_modules": PROJECTIONS},
    ),
    "pvera_llama": ("llama", "Pvera", {"r": 6, "target_modules": PROJECTIONS}),
    "pvera_gpt2": ("gpt2", "Pvera", {"r": 6, "projection_prng_key": 5, "d_initial": 0.3, "init_weights": False}),
    "pvera_drawn": ("bert", "Pvera", {"r": 6, "save_projection": False, "bias": "pvera_only"}),
    "vb_llama": ("llama", "VBLoRA", {**BANK, "r": 3, "target_modules": PROJECTIONS}),
    "vb_gpt2": ("gpt2", "VBLoRA", {**BANK, "topk": 3, "vector_length": 8}),
    "vb_few": ("bert", "VBLoRA", {**BANK, "save_only_topk_weights": True, "bias": "vblora_only"}),
    "uni_llama": (
        "llama",
        "UniLora",
        {"r": 3, "theta_d_length": 37, "target_modules": PROJECTIONS},
    ),
    "uni_gpt2": ("gpt2", "UniLora", {"r": 2, "theta_d_length": 500, "proj_seed": 5, "init_weights": False}),
    "uni_kept": ("bert", "UniLora", {"r": 3, "theta_d_length": 30, "save_indices": True, "bias": "unilora_only"}),
    "tiny_llama": ("llama", "TinyLora", {"r": 3, "u": 7, "target_modules": PROJECTIONS}),
    "tiny_gpt2": ("gpt2", "TinyLora", {"u": 5, "weight_tying": 1.0, "projection_seed": 5, "init_weights": "uniform"}),
    "tiny_tied": ("llama", "TinyLora", {"u": 5, "weight_tying": 0.4, "target_modules": "all-linear"}),
    "tiny_embedding": ("llama", "TinyLora", {"u": 5, "r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "tiny_drawn": ("bert", "TinyLora", {"u": 5, "r": 20, "save_projection": False, "bias": "tinylora_only"}),
    "frod_llama": ("llama", "Frod", {"target_modules": PROJECTIONS, "sparse_rate": 0.1}),
    "frod_gpt2": ("gpt2", "Frod", {"sparse_rate": 0.2, "projection_prng_key": 5, "init_weights": False}),
    "frod_bert": (
        "bert",
        "Frod",
        {"target_modules": ["query", "dense"], "sparse_rate": 0.05, "regularization_alpha": 0.1, "bias": "frod_only"},
    ),
    "boft_llama": ("llama", "BOFT", {"boft_block_size": 4}),
    "boft_number": ("bert", "BOFT", {"boft_block_size": 0, "boft_block_num": 2, "bias": "boft_only"}),
    "boft_random": ("bert", "BOFT", {"boft_block_size": 8, "init_weights": False}),
    "boft_conv": ("pixels", "BOFT", {"boft_block_size": 4, "target_modules": CONVOLUTIONS}),
    "hra_llama": ("llama", "HRA", {"r": 4}),
    "hra_odd": ("bert", "HRA", {"r": 3, "bias": "hra_only"}),
    "hra_orthogonal": ("llama", "HRA", {"r": 3, "apply_GS": True, "init_weights": False}),
    "hra_conv": ("pixels", "HRA", {"r": 4, "target_modules": CONVOLUTIONS}),
    "road_llama": ("llama", "Road", {"group_size": 4}),
    "road_2": ("bert", "Road", {"group_size": 8, "variant": "road_2"}),
    "road_4": ("bert", "Road", {"group_size": 4, "variant": "road_4", "init_weights": False}),
    "deft_llama": ("llama", "Deft", {"r": 4, "alpha": 6}),
    "deft_gpt2": ("gpt2", "Deft", {"r": 4, "decomposition_method": "qr", "init_weights": False, "init_scale": 3.0}),
    "deft_wide": ("bert", "Deft", {"r": 99, "alpha": 7, "bias": "deft_only"}),
    "deft_para": ("llama", "Deft", {"r": 3, "para": True}),
    "peanut_llama": ("llama", "Peanut", {"r": 4, "scaling": 2.0}),
    "peanut_deep": ("bert", "Peanut", {"r": 4, "depth": 2, "act_fn": "silu", "init_weights": False}),
    "beft_bert": ("bert", "Beft", {}),
    "beft_random": ("bert", "Beft", {"init_weights": False}),
    "lily_llama": ("llama", "Lily", {"r": 20, "target_modules": PROJECTIONS, "stride_A": 2, "scaling": 0.5}),
    "lily_t5": ("t5", "Lily", {"r": 20, "target_modules": ["q", "wo"], "stride_A": 2, "num_B": 3}),
    "lily_all": ("llama", "Lily", {"r": 20, "target_modules": "all-linear", "init_weights": False}),
    "lily_regex": ("bert", "Lily", {"r": 20, "target_modules": ".*(query|dense)", "stride_A": 2}),
    "psoft_llama": ("llama", "Psoft", {"r": 4, "psoft_alpha": 6}),
    "psoft_free": ("bert", "Psoft", {"r": 4, "psoft_orth": False, "psoft_mag_b": False, "init_weights": False}),
    "psoft_series": ("bert", "Psoft", {"r": 5, "use_cayley_neumann": True, "cayley_neumann_eps": 0.4}),
    "psoft_terms": ("llama", "Psoft", {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 2}),
    "psoft_lowrank": ("llama", "Psoft", {"r": 4, "psoft_svd": "lowrank", "random_seed": 5, "psoft_mag_a": False}),
    "psoft_roots": ("llama", "Psoft", {"r": 4, "ab_svd_init": "pissa_init", "init_weights": False}),
    "osf_llama": ("llama", "OSF", {}),
    "osf_pattern": ("bert", "OSF", {"rank_pattern": {"query": 3}, "target_modules": ["query", "key"]}),
    "osf_random": ("llama", "OSF", {"effective_rank": 0.45, "init_weights": False, "target_modules": ["q_proj"]}),
    "adamss_bert": ("bert", "Adamss", {"r": 6, "num_subspaces": 3, "subspace_rank": 2}),
    "adamss_llama": ("llama", "Adamss", {"r": 99, "num_subspaces": 4, "random_seed": 3}),
}
SAMPLED = ("pvera",)  # whose forward is random in training
# Whose starting values are drawn in another order: equal in distribution.
STARTS_ALIKE = ("vb_", "lily_", "frod_")
ONCE = "vblora_vector_bank|unilora_theta_d|tinylora_v"  # kept once; theirs is registered at every layer as well, and found there first
every = pytest.mark.parametrize("case", CASES)
STACKED = [
    "ia3_llama",
    "loha_llama",
    "vera_llama",
    "boft_llama",
    "hra_llama",
    "road_llama",
    "deft_llama",
    "peanut_llama",
    "beft_bert",
    "psoft_llama",
    "adamss_bert",
]
METHODS_HERE = [
    "IA3",
    "LoHa",
    "LNTuning",
    "OFT",
    "Vera",
    "AdaLora",
    "Delora",
    "Gralora",
    "RandLora",
    "Pvera",
    "VBLoRA",
    "UniLora",
    "LoKr",
    "Miss",
    "Hira",
    "C3A",
    "FourierFT",
    "WaveFT",
    "BOFT",
    "HRA",
    "Road",
    "Deft",
    "Peanut",
    "Beft",
    "TinyLora",
    "Frod",
    "Lily",
    "Psoft",
    "OSF",
    "Adamss",
]


def config_of(library: Any, kind: str, fields: dict[str, Any]) -> Any:
    return quiet(getattr(library, f"{kind}Config"), **json.loads(json.dumps(fields)))


def adapt(library: Any, case: str, dtype: torch.dtype = torch.float32) -> Any:
    name, kind, fields = CASES[case]
    model = build(name, dtype)
    torch.manual_seed(11)
    return quiet(library.get_peft_model, model, config_of(library, kind, fields))


def owned(name: str) -> str:
    """A parameter's name in PEFT's model as it is in ours."""
    return re.sub(rf"^base_model\.model\..*\.({ONCE})\.", r"base_model.\1.", name)


def pair(case: str) -> tuple[Any, Any]:
    """(ours, theirs), holding the same numbers under the same names, stirred."""
    ours, theirs = (adapt(library, case) for library in BOTH)
    stir(theirs)
    if case.startswith("frod_"):  # what is fixed has signs of its own, too
        trimtab.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    with torch.no_grad():
        held = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                held[owned(name)].copy_(parameter)
    return ours, theirs


def load_in(library: Any, case: str, folder: Path) -> Any:
    model = build(CASES[case][0])
    torch.manual_seed(13)
    return quiet(library.PeftModel.from_pretrained, model, str(folder))


# ---------------------------------------------------------------------- configs
@pytest.mark.parametrize("kind", METHODS_HERE)
def test_fields_defaults_and_json_are_theirs(kind: str, tmp_path: Path) -> None:
    required = {"total_step": 10} if kind == "AdaLora" else {}
    contents = []
    for library in BOTH:
        config = config_of(library, kind, required)
        config.save_pretrained(tmp_path / library.__name__)
        contents.append(json.loads((tmp_path / library.__name__ / "adapter_config.json").read_text()))
        contents[-1].pop("peft_version")
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", METHODS_HERE)
def test_default_targets_are_theirs(kind: str) -> None:
    from peft.utils import constants

    peft_type = next(t for t in METHODS if config_class(t).__name__ == f"{kind}Config")
    method = load(*METHODS[peft_type][:2])
    name = peft_type.replace("_", "")
    as_sets = lambda table: {k: v if isinstance(v, str) else set(v) for k, v in table.items()}
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")
    assert as_sets(method.targets) == as_sets(theirs)
    if kind == "IA3":
        theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        assert as_sets(method.defaults["feedforward_modules"]) == as_sets(theirs)


# ---------------------------------------------------------------------- the model
@every
def test_names_shapes_and_starts(case: str) -> None:
    ours, theirs = (adapt(library, case) for library in BOTH)
    assert trainable(ours) == set(map(owned, trainable(theirs)))
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad or ".adamss_A." in name:  # theirs is a random approximation of ours
            continue
        if "frod_lambda_l" in name:  # in another basis of the same space, where eigenvalues are equal
            near(held[name].norm(), parameter.norm(), 1e-4 if CASES[case][2].get("init_weights", True) else 0.2)
        elif case.startswith(STARTS_ALIKE) and parameter.unique().numel() > 1:
            assert held[owned(name)].shape == parameter.shape
            assert abs(held[owned(name)].std() / parameter.std() - 1) < 0.2, name
        elif ".adamss_A." not in name:  # theirs is a random approximation of ours
            assert torch.equal(held[owned(name)], parameter), name
    assert type(ours.base_model).__name__ == type(theirs.base_model).__name__


@every
def test_outputs_and_gradients(case: str) -> None:
    ours, theirs = pair(case)
    name = CASES[case][0]
    near(run(ours.eval(), name), run(theirs.eval(), name))
    train = not case.startswith(SAMPLED)
    expected = gradients(theirs, name, train)
    found = gradients(ours, name, train)
    expected = {owned(key): gradient for key, gradient in expected.items()}
    assert found.keys() == expected.keys()
    wrong = ("hada_w1_a", "hada_w2_a") if case == "loha_cores" else ()  # theirs: see the next test
    for key, gradient in expected.items():
        if not any(w in key and "kernel" in key for w in wrong):
            near(found[key], gradient)


def test_what_pvera_draws_has_their_distribution() -> None:
    """In training: the same mean, the same spread, and another draw for every token."""
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(3000, 2, 16)
    drawn = []
    for model in pair("pvera_llama"):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.train()
        torch.manual_seed(4)
        with torch.no_grad():
            drawn.append(layer(x) - layer.base_layer(x))
    ours, theirs = drawn
    spread = theirs.flatten(0, 1).std(0)
    assert ((ours.flatten(0, 1).std(0) - spread).abs() < 0.05 * spread).all()
    assert ((ours.mean((0, 1)) - theirs.mean((0, 1))).abs() < 0.1 * spread).all()
    for sample in drawn:
        first, second = sample.unbind(1)
        assert abs(float(torch.corrcoef(torch.stack([first[:, 0], second[:, 0]]))[0, 1])) < 0.1


def test_gradients_of_cores_are_wrong_in_peft() -> None:
    """Finite differences say who is right: theirs are off for w1_a and w2_a."""
    ours, theirs = (m.double().eval() for m in pair("loha_cores"))
    inputs = batch("pixels")
    for leaf, agrees in (("hada_w1_a", False), ("hada_w2_a", False), ("hada_w1_b", True), ("hada_t2", True)):
        p, q = (getattr(m.base_model.model.kernel, leaf)["default"] for m in (ours, theirs))
        for m in (ours, theirs):
            m.zero_grad()
            m(**inputs).square().sum().backward()
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                p.view(-1)[1] += step
                values.append(float(ours(**inputs).square().sum()))
        slope = (values[0] - values[1]) / 2e-6
        assert abs(float(p.grad.view(-1)[1]) - slope) < 1e-5 * max(1, abs(slope))
        assert (abs(float(q.grad.view(-1)[1]) - slope) < 1e-5 * max(1, abs(slope))) == agrees


@every
def test_merges(case: str) -> None:
    ours, theirs = pair(case)
    name = CASES[case][0]
    if not load(*METHODS[ours.peft_config["default"].peft_type.value][:2]).mergeable:
        for model in (ours, theirs):
            with pytest.raises((ReadOnlyWeight, NotImplementedError)):
                quiet(model.merge_and_unload)
        return
    if case == "oft_embedding":  # tied or not, theirs merges embeddings alike
        assert not ours.config.tie_word_embeddings
    near(run(quiet(ours.merge_and_unload), name), run(quiet(theirs.merge_and_unload), name))


@every
@pytest.mark.parametrize("writer", [0, 1], ids=["ours", "theirs"])
def test_files_both_ways(case: str, writer: int, tmp_path: Path) -> None:
    both = pair(case)
    name = CASES[case][0]
    for model, folder in zip(both, ("0", "1"), strict=True):
        quiet(model.eval().save_pretrained, str(tmp_path / folder))
    mine, yours = (weights_file(tmp_path / folder) for folder in "01")
    if case.startswith("rand"):  # theirs has the bases once more at every layer; test_differences.py
        yours = {k: v for k, v in yours.items() if not re.fullmatch(r"base_model\.model\..*randlora_[AB]", k)}
    all_near(mine, yours)
    a, b = (config_file(tmp_path / folder) for folder in "01")
    assert a == b
    if case == "ia3_all_linear" and writer == 0:  # theirs does not take its own file: the entries of one field are
        with pytest.raises(ValueError, match="subset"):  # whole paths, those of the other their ends
            load_in(peft, case, tmp_path / "1")
        return
    read = load_in(BOTH[1 - writer], case, tmp_path / str(writer))
    near(run(read.eval(), name), run(both[writer], name))


@pytest.mark.parametrize("case", ["ia3_llama", "loha_llama", "oft_llama", "vera_llama", "vera_drawn", "ada_llama"])
def test_half_precision(case: str, tmp_path: Path) -> None:
    ours, theirs = (adapt(library, case, torch.bfloat16) for library in BOTH)
    stir(theirs)
    copy = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    copy = {n: p for n, p in copy.items() if ".ranknum." not in n}  # which theirs trains, in half precision
    held = dict(ours.named_parameters())
    for name, parameter in copy.items():
        assert held[name].dtype == parameter.dtype == torch.float32
        held[name].data.copy_(parameter)
    name = CASES[case][0]
    near(run(ours.eval(), name).float(), run(theirs.eval(), name).float(), 0.05)
    if case.startswith("vera"):
        assert torch.equal(ours.base_model.vera_A["default"], theirs.base_model.vera_A["default"])


@pytest.mark.parametrize("case", STACKED)
def test_two_adapters_active_and_switched(case: str) -> None:
    ours, theirs = pair(case)
    name, kind, fields = CASES[case]
    for library, model in zip(BOTH, (ours, theirs), strict=True):
        torch.manual_seed(3)
        quiet(model.add_adapter, "second", config_of(library, kind, fields))
        model.base_model.set_adapter(["default", "second"])
    stir(theirs)
    with torch.no_grad():
        held = dict(ours.named_parameters())
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                held[key].copy_(parameter)
    for names in (["default", "second"], ["second"], ["default"]):
        for model in (ours, theirs):
            model.eval().base_model.set_adapter(names)
        near(run(ours, name), run(theirs, name))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 48), (4, 32), (0, 0)])
def test_block_sizes_warn_and_raise_as_theirs(sizes: tuple[int, int]) -> None:
    options = dict(zip(("r", "oft_block_size"), sizes, strict=True))
    said = []
    for library in BOTH:
        try:
            config = config_of(library, "OFT", {"target_modules": ["q_proj"], **options})
            texts = spoken(library.get_peft_model, build("llama"), config)
            said.append([t for t in texts if t.startswith("Invalid")])
        except ValueError:
            said.append("raised")
    assert said[0] == said[1]


# ---------------------------------------------------------------------- AdaLoRA's schedule
def schedule(library: Any, steps: int = 30) -> tuple[Any, list[Any]]:
    fields = {"init_r": 4, "target_r": 2, "total_step": 24, "tinit": 4, "tfinal": 6, "deltaT": 3, "lora_alpha": 16,
              "task_type": "CAUSAL_LM", "target_modules": PROJECTIONS}  # fmt: skip
    model = build("llama", scale=1.0)
    torch.manual_seed(11)
    model = quiet(library.get_peft_model, model, config_of(library, "AdaLora", fields)).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    log = []
    for t in range(1, steps + 1):
        x = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(t))
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(t)
        optimiser.zero_grad()
        pattern = model.peft_config["default"].rank_pattern or {}
        log.append((float(loss.detach()), {k.removesuffix(".default"): v for k, v in pattern.items()}))
    return model.eval(), log


def test_thirty_steps_of_adalora(tmp_path: Path) -> None:
    (ours, mine), (theirs, yours) = (schedule(library) for library in BOTH)
    for (a, kept), (b, expected) in zip(mine, yours, strict=True):
        assert abs(a - b) < 1e-4
        assert kept == expected
    assert sum(map(sum, mine[-1][1].values())) == 2 * 6
    near(run(ours, "llama"), run(theirs, "llama"), 1e-4)
    for model, folder in ((ours, "0"), (theirs, "1")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    shapes = [{k: v.shape for k, v in weights_file(tmp_path / f).items()} for f in "01"]
    assert shapes[0] == shapes[1]
    for library, folder in ((trimtab, "1"), (peft, "0")):
        read = quiet(library.PeftModel.from_pretrained, build("llama", scale=1.0), str(tmp_path / folder))
        near(run(read.eval(), "llama"), run(theirs, "llama"), 1e-4)


@pytest.mark.parametrize(("total", "tinit", "tfinal", "every"), [(6, 1, 1, 1), (9, 0, 2, 2)])
def test_the_last_cut_of_adalora_takes_no_gradient_in(total: int, tinit: int, tfinal: int, every: int) -> None:
    """It goes by the averages of the steps before."""
    fields = {"init_r": 6, "target_r": 2, "total_step": total, "tinit": tinit, "tfinal": tfinal, "deltaT": every}
    kept = []
    for library in BOTH:
        torch.manual_seed(0)
        model = quiet(library.get_peft_model, build("llama"), library.AdaLoraConfig(task_type="CAUSAL_LM", **fields))
        stir(model.train(), 0.1)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for t in range(total):
            if t == total - tfinal:  # a gradient that would turn the order over
                for n, p in model.named_parameters():
                    if "lora_A" in n:
                        p.grad = torch.linspace(0, 1e6, p.numel()).reshape(p.shape)
            else:
                x = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(t))
                model(input_ids=x, labels=x).loss.backward()
                optimiser.step()
            model.base_model.update_and_allocate(t)
            optimiser.zero_grad()
        kept.append({k.removesuffix(".default"): v for k, v in model.peft_config["default"].rank_pattern.items()})
    assert kept[0] == kept[1]


def sizes(model: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", ["named", "bare", "tensors", "part"])
def test_adalora_cut_down_to_its_pattern(form: str, tmp_path: Path) -> None:
    """`resize_modules_by_rank_pattern`: smaller parameters of the same names, the same outputs, the same file."""
    models, patterns = [], []
    for library in BOTH:
        model, log = schedule(library, 24)
        y = run(model, "llama")
        pattern: Any = dict(log[-1][1])
        if form != "bare":
            pattern = {f"{key}.default": left for key, left in pattern.items()}
        if form == "tensors":
            pattern = {key: torch.tensor(left) for key, left in pattern.items()}
        if form == "part":
            pattern = dict(list(pattern.items())[:2])
        assert model.base_model.resize_modules_by_rank_pattern(pattern, "default") is None
        near(run(model, "llama"), y)
        models.append(model)
        patterns.append(log[-1][1])
    assert patterns[0] == patterns[1]
    assert sizes(models[0]) == sizes(models[1])
    assert len(set(sizes(models[0]).values())) > 6
    for model, folder in zip(models, "01", strict=True):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    read = quiet(peft.PeftModel.from_pretrained, build("llama", scale=1.0), str(tmp_path / "0"))
    near(run(read.eval(), "llama"), run(models[0], "llama"), 1e-4)


def test_keys_of_a_rank_pattern_end_with_the_adapters_name_in_peft_until_it_is_saved(tmp_path: Path) -> None:
    for library, ends in zip(BOTH, (".lora_E", ".lora_E.default"), strict=True):
        model, _ = schedule(library, 24)
        assert all(key.endswith(ends) for key in model.peft_config["default"].rank_pattern)
        quiet(model.save_pretrained, str(tmp_path))
        assert all(key.endswith(".lora_E") for key in model.peft_config["default"].rank_pattern)


def test_a_state_dict_of_adalora_cut_down_to_the_pattern() -> None:
    cut = []
    for library in BOTH:
        model, log = schedule(library, 24)
        state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        found = model.base_model.resize_state_dict_by_rank_pattern(log[-1][1], state, "default")
        assert found is state
        cut.append(found)
    all_near(cut[0], cut[1])
    assert len({tensor.shape for tensor in cut[0].values()}) > 6


def test_a_rank_pattern_that_is_none() -> None:
    for library, wrong in ((trimtab, ValueError), (peft, (AttributeError, IndexError))):
        model, log = schedule(library, 24)
        key, left = next(iter(log[-1][1].items()))
        before = sizes(model)
        for pattern, error in (({key: 2}, TypeError), ({key: left[:3]}, wrong), ({"no.lora_E": left}, wrong)):
            with pytest.raises(error):
                model.base_model.resize_modules_by_rank_pattern(pattern, "default")
        assert sizes(model) == before


def test_adalora_cut_twice_is_an_error_in_peft() -> None:
    """And so is the training of one that was cut; ours stays as it is, and trains on."""
    x = batch("llama")["input_ids"]
    for library, right in ((trimtab, True), (peft, False)):
        model, log = schedule(library, 20)
        cut = lambda model=model, log=log: model.base_model.resize_modules_by_rank_pattern(log[-1][1], "default")
        cut()
        if not right:
            with pytest.raises(IndexError):
                cut()
            with pytest.raises(RuntimeError):
                model.base_model.update_and_allocate(20)
            continue
        y, held = run(model, "llama"), dict(model.named_parameters())
        cut()
        assert torch.equal(run(model, "llama"), y)
        model.train()(input_ids=x, labels=x).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
        model.base_model.update_and_allocate(25)
        assert all(held[n] is p for n, p in model.named_parameters())
        assert not torch.equal(run(model.eval(), "llama"), y)


# ---------------------------------------------------------------------- where PEFT is wrong
def test_oft_on_a_kernel_is_no_identity_in_peft() -> None:
    """Theirs changes the output before any training; ours does not, and its forward is its merged one."""
    base = run(build("pixels"), "pixels")
    for library, right in ((trimtab, True), (peft, False)):
        config = config_of(library, "OFT", {"target_modules": ["kernel"], "oft_block_size": 4})
        model = quiet(library.get_peft_model, build("pixels"), config)
        assert (float((run(model.eval(), "pixels") - base).detach().abs().max()) < 1e-5) == right


def test_two_ofts_at_once_are_not_what_they_merge_to_in_peft() -> None:
    for library, right in ((trimtab, True), (peft, False)):
        first, second = (config_of(library, "OFT", {"oft_block_size": b, "init_weights": False}) for b in (4, 8))
        model = quiet(library.get_peft_model, build("llama"), first)
        quiet(model.add_adapter, "second", second)
        model.base_model.set_adapter(["default", "second"])
        stir(model)
        y = run(model.eval(), "llama")
        model.merge_adapter(["default", "second"])
        assert (float((run(model, "llama") - y).detach().abs().max()) < 1e-4) == right


def test_oft_module_dropout_does_nothing_in_peft() -> None:
    for library, acts in ((trimtab, True), (peft, False)):
        fields = {"oft_block_size": 4, "init_weights": False, "module_dropout": 0.9}
        model = quiet(library.get_peft_model, build("llama"), config_of(library, "OFT", fields))
        y = run(model.eval(), "llama")
        assert bool((run(model.train(), "llama") != y).any()) == acts


def test_adaloras_penalty_is_in_the_evaluation_loss_in_peft() -> None:
    x = batch("llama")["input_ids"]
    base = build("llama")(input_ids=x, labels=x).loss
    fields = {"total_step": 10, "task_type": "CAUSAL_LM"}
    for library, right in ((trimtab, True), (peft, False)):
        model = quiet(library.get_peft_model, build("llama"), config_of(library, "AdaLora", fields)).eval()
        assert (abs(float((model(input_ids=x, labels=x).loss - base).detach())) < 1e-5) == right


def test_adaloras_penalty_is_missing_without_a_task_type_in_peft() -> None:
    x = batch("llama")["input_ids"]
    base = build("llama")(input_ids=x, labels=x).loss
    for library, right in ((trimtab, True), (peft, False)):
        model = quiet(library.get_peft_model, build("llama"), config_of(library, "AdaLora", {"total_step": 10}))
        assert (abs(float((model.train()(input_ids=x, labels=x).loss - base).detach())) > 0.01) == right


def test_miss_beside_bat_fails_in_peft() -> None:
    for library, right in ((trimtab, True), (peft, False)):
        first, second = (config_of(library, "Miss", {"r": 4, "init_weights": form}) for form in (True, "bat"))
        model = quiet(library.get_peft_model, build("llama"), first)
        quiet(model.add_adapter, "second", second)
        model.base_model.set_adapter(["default", "second"])
        stir(model)
        if not right:
            with pytest.raises(RuntimeError):
                run(model.eval(), "llama")
            return
        y = run(model.eval(), "llama")
        model.merge_adapter(["default", "second"])
        near(run(model, "llama"), y)


def test_hiras_rank_pattern_does_nothing_in_peft() -> None:
    for library, rank in ((trimtab, 2), (peft, 4)):
        fields = {"r": 4, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"]}
        model = quiet(library.get_peft_model, build("llama"), config_of(library, "Hira", fields))
        assert {len(p) for n, p in model.named_parameters() if "hira_A" in n} == {rank}


def test_two_c3as_at_once_are_not_what_they_merge_to_in_peft() -> None:
    for library, right in ((trimtab, True), (peft, False)):
        config = config_of(library, "C3A", {"block_size": 4, "target_modules": ["q_proj"]})
        model = quiet(library.get_peft_model, build("llama"), config)
        quiet(model.add_adapter, "second", config)
        model.base_model.set_adapter(["default", "second"])
        stir(model, 2.0)
        y = run(model.eval(), "llama")
        model.merge_adapter(["default", "second"])
        assert (float((run(model, "llama") - y).detach().abs().max()) < 1e-4) == right


def test_c3as_gradient_of_its_input_is_wrong_in_peft() -> None:
    """It turns blocks the other way round; ours is the product by what the layer adds."""
    for library, right in ((trimtab, True), (peft, False)):
        config = config_of(library, "C3A", {"block_size": 4, "target_modules": ["q_proj"]})
        layer = quiet(library.get_peft_model, build("llama"), config).base_model.model.model.layers[0].self_attn.q_proj
        delta = lambda x, layer=layer: layer(x) - layer.base_layer(x)
        x = torch.randn(1, 16, requires_grad=True, generator=torch.Generator().manual_seed(0))
        weight = torch.arange(16.0)
        (delta(x) * weight).sum().backward()
        assert torch.allclose(x.grad[0], delta(torch.eye(16)).detach() @ weight, atol=1e-4) == right


def wavelet_delta(library: Any, family: str, size: int, place: int | None = None) -> Tensor:
    """The update of one layer of a few random coefficients, or of one of them."""
    fields = {"n_frequency": size * size, "wavelet_family": family, "target_modules": ["0"], "scaling": 1.0}
    net = quiet(library.get_peft_model, nn.Sequential(nn.Linear(size, size)), config_of(library, "WaveFT", fields))
    layer = net.base_model.model[0]
    spectrum = layer.waveft_spectrum["default"].data.normal_(generator=torch.Generator().manual_seed(0))
    if place is not None:
        order = torch.randperm(size * size, generator=torch.Generator().manual_seed(777))
        spectrum.copy_(order == place)
    return layer.get_delta_weight("default").detach()


def test_wavelets_are_theirs() -> None:
    from trimtab.methods.waveft import FAMILIES

    for family in FAMILIES[:-2]:
        near(*(wavelet_delta(library, family, 7) for library in BOTH))


def test_the_last_coiflets_are_no_wavelets_in_peft() -> None:
    """A wavelet's filter is orthogonal to itself moved by two; that of coif5 has not even its length."""
    for library, expected in ((trimtab, 0.0), (peft, 0.0211)):
        delta = wavelet_delta(library, "coif4", 80, place=20 * 80 + 20).double()
        row = delta[:, delta.abs().sum(0).argmax()]
        assert abs(float((row[:-2] * row[2:]).sum() / row.square().sum()) - expected) < 1e-4
    assert [wavelet_delta(library, "coif5", 80).shape == (80, 80) for library in BOTH] == [True, False]


def test_wavelets_that_fail_in_peft_when_used_are_refused_at_once() -> None:
    fields = {"n_frequency": 20, "wavelet_family": "db11", "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="not supported"):
        config_of(trimtab, "WaveFT", fields)
    model = quiet(peft.get_peft_model, build("llama"), config_of(peft, "WaveFT", fields))
    with pytest.raises(ValueError, match="Unknown wavelet"):
        run(model, "llama")


def test_adamss_freezes_the_clusters_that_peft_freezes() -> None:
    """And one less: PEFT keeps those above the k-th best of them, so that one fewer is left than the config says."""
    fields = {"r": 6, "num_subspaces": 3, "subspace_rank": 2, "init_weights": None, "use_asa": True}
    fields |= {"asa_target_subspaces": 4, "init_warmup": 2, "final_warmup": 9, "mask_interval": 2}
    models = []
    for library in BOTH:
        torch.manual_seed(11)
        config = library.AdamssConfig(task_type="CAUSAL_LM", **fields)
        models.append(quiet(library.get_peft_model, build("llama"), config))
    ours, theirs = models
    copy_state(theirs, ours)
    left = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for t in range(1, 5):
            optimizer.zero_grad()
            model(**batch("llama"), labels=batch("llama")["input_ids"]).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(t)
        left.append({n for n, p in model.named_parameters() if p.requires_grad and "adamss_A" in n})
    assert len(left[0]) == int(4 + 8 * (5 / 7) ** 3) == len(left[1]) + 1
    assert left[1] < left[0]


@pytest.mark.parametrize("name", ["Pvera", "TinyLora", "Hira"])
def test_how_the_weight_lies_is_found_out(name: str) -> None:
    """PEFT warns where `fan_in_fan_out` does not fit the layers; HiRA's stays wrong in its file, too."""
    noted = {}
    for library, base, given in ((lib, base, base == "llama") for lib in BOTH for base in ("gpt2", "llama")):
        fields = {"target_modules": ["c_attn", "q_proj"], "fan_in_fan_out": given}
        model = quiet(library.get_peft_model, build(base), getattr(library, f"{name}Config")(**fields))
        noted[library.__name__, base] = model.peft_config["default"].fan_in_fan_out
    assert (noted["trimtab", "gpt2"], noted["trimtab", "llama"]) == (True, False)
    assert (noted["peft", "gpt2"], noted["peft", "llama"]) == ((True, False) if name != "Hira" else (False, True))
