"""One row a method: the smallest configs that show all it can do. A new method adds its row; the tests do the rest.

Which layers of the toy model a case runs on follows from its method's `kinds`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import SITES, tokens, toy
from trimtab import PeftModel, get_peft_model
from trimtab.methods import METHODS, config_class, load, method_class

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """A config to test.

    Attributes:
        name: what the test is called.
        peft_type: the method's.
        options: fields of its config, beside `target_modules`.
        identity: it promises to change nothing at the start.
        mutates: its start changes the base's weights (and what is promised holds for the sum).
        sites: only these layers, where a field narrows what the method can do.
    """

    name: str
    peft_type: str
    options: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    mutates: bool = False
    sites: tuple[str, ...] | None = None

    def config(self, *names: str, **more: Any) -> Any:
        """The config for these layers (all it can adapt, by default)."""
        names = names or self.names
        return config_class(self.peft_type)(target_modules=list(names), **{**self.options, **more})

    @cached_property  # asked for each of the many thousand rows
    def method(self) -> Any:
        """The class that does it."""
        return method_class(config_class(self.peft_type)(**self.options))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The layers of the toy that its method can adapt."""
        able = tuple(name for name, kind in SITES.items() if kind in self.method.kinds)
        return able if self.sites is None else tuple(n for n in able if n in self.sites)


LINEAR = ("up", "down", "head")
EVEN = ("embed", "scaled", "up", "down", "conv")  # those with an even number of outputs

CASES = [
    Case("lora", "LORA", {"r": 3, "lora_alpha": 5}),
    Case("lora-rslora", "LORA", {"r": 2, "lora_alpha": 3, "use_rslora": True}),
    Case("lora-dropout", "LORA", {"r": 2, "lora_dropout": 0.4}),
    Case("lora-bias", "LORA", {"r": 2, "lora_bias": True}, sites=LINEAR),
    Case("lora-random", "LORA", {"r": 2, "init_lora_weights": False}, identity=False),
    Case("lora-gaussian", "LORA", {"r": 2, "init_lora_weights": "gaussian"}),
    Case("lora-orthogonal", "LORA", {"r": 2, "init_lora_weights": "orthogonal"}),
    Case("lora-pissa", "LORA", {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"}, mutates=True),
    Case("lora-pissa-niter", "LORA", {"r": 2, "init_lora_weights": "pissa_niter_4"}, mutates=True),
    Case("lora-olora", "LORA", {"r": 2, "lora_alpha": 3, "init_lora_weights": "olora"}, mutates=True),
    Case("dora", "LORA", {"r": 3, "lora_alpha": 5, "use_dora": True}),
    Case("dora-dropout", "LORA", {"r": 2, "use_dora": True, "lora_dropout": 0.4}),
    Case("dora-pissa", "LORA", {"r": 2, "use_dora": True, "init_lora_weights": "pissa"}, mutates=True),
    Case("alora", "LORA", {"r": 2, "alora_invocation_tokens": [2]}),
    Case("velora", "LORA", {"r": 2, "lora_alpha": 3, "velora_config": {"num_groups": 4}}),
    Case("monteclora", "LORA", {"r": 2, "lora_alpha": 3, "monteclora_config": {"num_samples": 3}}),
    Case("kasa", "LORA", {"r": 2, "lora_alpha": 3, "kasa_config": {"gamma": 0.1}}, identity=False, mutates=True),
    Case("bdlora", "LORA", {"r": 2, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["up", "down", "head"]}}),
    Case(
        "bdlora-b",
        "LORA",
        {"r": 2, "use_bdlora": {"nblocks": 2, "target_modules_bd_b": ["up", "down"]}},
        sites=LINEAR[:2],
    ),
    Case("mica", "LORA", {"r": 2, "lora_alpha": 3, "init_lora_weights": "mica"}),
    Case("qalora", "LORA", {"r": 2, "lora_alpha": 3, "use_qalora": True}),
    Case("lora-tied", "LORA", {"r": 2, "lora_alpha": 3, "ensure_weight_tying": True}),
    Case("lora-tokens", "LORA", {"r": 2, "trainable_token_indices": {"embed": [1, 5]}}, sites=LINEAR),
    Case("tokens", "TRAINABLE_TOKENS", {"token_indices": [1, 2, 5]}),
    Case("ia3", "IA3", {"feedforward_modules": ".*down"}),
    Case("loha", "LOHA", {"r": 2, "alpha": 3}),
    Case("loha-dropout", "LOHA", {"r": 2, "rank_dropout": 0.4}),
    Case("lokr", "LOKR", {"r": 1, "alpha": 3, "init_weights": "lycoris"}),
    Case("lokr-both", "LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 2, "use_effective_conv2d": True}),
    Case("lokr-dropout", "LOKR", {"r": 2, "init_weights": False, "rank_dropout": 0.4}, identity=False),
    Case("ln-tuning", "LN_TUNING"),
    Case("c3a", "C3A", {"block_size": 2}, identity=False, sites=("up", "down")),
    Case("c3a-zero", "C3A", {"block_size": 1, "init_weights": True}),
    Case("fourierft", "FOURIERFT", {"n_frequency": 9, "scaling": 20.0, "init_weights": True}),
    Case("fourierft-random", "FOURIERFT", {"n_frequency": 30, "random_loc_seed": 3}, identity=False),
    Case("waveft", "WAVEFT", {"n_frequency": 20, "scaling": 3.0}),
    Case("waveft-db3", "WAVEFT", {"n_frequency": 9, "wavelet_family": "db3", "init_weights": False}, identity=False),
    Case("waveft-sparse", "WAVEFT", {"n_frequency": 15, "use_idwt": False, "proportional_parameters": True}),
    Case("shira", "SHIRA", {"r": 2}),
    Case("shira-random", "SHIRA", {"r": 1, "random_seed": 3, "init_weights": False}, identity=False),
    Case("glora", "GLORA", {"r": 2}),
    Case("glora-vectors", "GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    Case(
        "glora-bias", "GLORA", {"config_A_B": "constant", "init_weights": False}, identity=False, sites=("up", "down")
    ),
    Case("super", "SUPERTUNING", {"sparsity": 0.6}),
    Case("supra", "SUPERTUNING", {"sparsity": 0.8, "select_top": False, "r": 2, "lora_dropout": 0.4}),
    Case("hira", "HIRA", {"r": 3}),
    Case("hira-dropout", "HIRA", {"r": 2, "hira_dropout": 0.4, "init_weights": "gaussian"}),
    Case("hira-random", "HIRA", {"r": 2, "init_weights": False}, identity=False),
    Case("miss", "MISS", {"r": 4}),
    Case("miss-mini", "MISS", {"r": 3, "mini_r": 2, "init_weights": "mini"}, sites=("up", "down")),
    Case("miss-bat", "MISS", {"r": 2, "init_weights": "bat", "miss_dropout": 0.4}, sites=("up", "down")),
    Case("oft", "OFT", {"oft_block_size": 2}),
    Case("oft-cayley", "OFT", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    Case("oft-constrained", "OFT", {"oft_block_size": 2, "coft": True, "eps": 1.0}),
    Case("oft-shared", "OFT", {"oft_block_size": 2, "block_share": True, "module_dropout": 0.4}),
    Case("vera", "VERA", {"r": 4}),
    Case("vera-drawn", "VERA", {"r": 3, "save_projection": False, "projection_prng_key": 7, "vera_dropout": 0.3}),
    Case("delora", "DELORA", {"r": 3, "delora_lambda": 4}),
    Case("delora-random", "DELORA", {"r": 2, "init_weights": False, "module_dropout": 0.3}, identity=False),
    Case("gralora", "GRALORA", {"r": 2, "gralora_k": 2, "alpha": 3}, sites=("up", "down")),
    Case("gralora-hybrid", "GRALORA", {"r": 4, "hybrid_r": 2, "gralora_dropout": 0.3}, sites=("up", "down")),
    Case("gralora-one", "GRALORA", {"r": 2, "gralora_k": 1, "alpha": 3, "init_weights": False}, identity=False),
    Case("randlora", "RANDLORA", {"r": 3, "randlora_alpha": 2}),
    Case("randlora-sparse", "RANDLORA", {"r": 2, "randlora_alpha": 2, "sparse": True, "randlora_dropout": 0.3}),
    Case("randlora-drawn", "RANDLORA", {"r": 4, "randlora_alpha": 2, "save_projection": False, "very_sparse": True}),
    Case("pvera", "PVERA", {"r": 4}),
    Case("pvera-drawn", "PVERA", {"r": 3, "save_projection": False, "projection_prng_key": 7, "pvera_dropout": 0.3}),
    Case(
        "vblora",
        "VBLORA",
        {"r": 3, "num_vectors": 5, "vector_length": 2, "init_vector_bank_bound": 0.5},
        identity=False,
        sites=("up", "down"),
    ),
    Case(
        "vblora-three",
        "VBLORA",
        {"num_vectors": 9, "vector_length": 2, "init_vector_bank_bound": 0.5, "topk": 3, "vblora_dropout": 0.2},
        identity=False,
        sites=("up", "down"),
    ),
    Case("unilora", "UNILORA", {"r": 3, "theta_d_length": 17, "init_theta_d_bound": 0.5}, identity=False),
    Case(
        "unilora-kept",
        "UNILORA",
        {"r": 2, "theta_d_length": 6, "save_indices": True, "unilora_dropout": 0.3, "init_weights": False},
        identity=False,
    ),
    Case("tinylora", "TINYLORA", {"r": 3, "u": 5}),
    Case(
        "tinylora-drawn",
        "TINYLORA",
        {"u": 4, "save_projection": False, "tinylora_dropout": 0.3, "init_weights": "uniform", "init_v_bound": 1.0},
        identity=False,
    ),
    Case("frod", "FROD", {"sparse_rate": 0.2}),
    Case(
        "frod-found",
        "FROD",
        {"sparse_rate": 0.5, "save_projection": False, "frod_dropout": 0.3, "init_weights": False},
        identity=False,
    ),
    Case("boft", "BOFT", {"boft_block_size": 2}),
    Case("boft-dropout", "BOFT", {"boft_block_size": 2, "boft_dropout": 0.3}),
    Case("hra", "HRA", {"r": 4}),
    Case("hra-odd", "HRA", {"r": 3}, identity=False),
    Case("hra-orthogonal", "HRA", {"r": 2, "apply_GS": True}, identity=False),
    Case("road", "ROAD", {"group_size": 2}, sites=EVEN),
    Case("road-2", "ROAD", {"group_size": 2, "variant": "road_2"}, sites=EVEN),
    Case("road-4", "ROAD", {"group_size": 2, "variant": "road_4"}, sites=EVEN),
    Case("deft", "DEFT", {"r": 3, "alpha": 5}),
    Case("deft-qr", "DEFT", {"r": 2, "decomposition_method": "qr", "deft_dropout": 0.3}),
    Case("deft-para", "DEFT", {"r": 2, "para": True}, identity=False, sites=("embed", "down", "head", "conv")),
    Case("peanut", "PEANUT", {"r": 3, "scaling": 1.5}),
    Case("peanut-deep", "PEANUT", {"r": 3, "depth": 2, "act_fn": "silu"}),
    Case("beft", "BEFT"),
    Case("poly", "POLY", {"r": 2}),
    Case("poly-splits", "POLY", {"r": 3, "n_skills": 3, "n_splits": 2}, sites=("up", "down")),
    Case("poly-random", "POLY", {"r": 2, "n_skills": 2, "init_weights": False}, identity=False),
    Case("bitfit", "BITFIT"),
    Case("bottleneck", "BOTTLENECK", {"r": 3, "scaling": 1.5, "non_linearity": "gelu"}),
    Case("bottleneck-parallel", "BOTTLENECK", {"r": 3, "parallel": True}),
    Case("loreft", "LOREFT", {"r": 2, "positions": "all"}),
    Case("dylora", "DYLORA", {"r": 3, "rank": 2, "lora_alpha": 5, "lora_dropout": 0.4}),
    Case("lily", "LILY", {"r": 3, "num_B": 3, "scaling": 1.5}),
    Case("lily-random", "LILY", {"r": 2, "stride_A": 2, "init_weights": False}, identity=False),
    Case("psoft", "PSOFT", {"r": 3, "psoft_alpha": 5}),
    Case("psoft-free", "PSOFT", {"r": 2, "psoft_orth": False, "psoft_mag_a": False, "psoft_dropout": 0.3}),
    Case("psoft-series", "PSOFT", {"r": 3, "use_cayley_neumann": True, "psoft_mag_b": False}),
    Case("osf", "OSF", {"effective_rank": 0.5}),
    Case("osf-random", "OSF", {"effective_rank": 3, "init_weights": False}, identity=False),
    Case("adamss", "ADAMSS", {"r": 4, "num_subspaces": 2, "subspace_rank": 2}),
    Case("adalora", "ADALORA", {"init_r": 3, "target_r": 2, "total_step": 10, "lora_dropout": 0.2}),
]
MERGEABLE = [case for case in CASES if case.method.mergeable]
BY_NAME = {case.name: case for case in CASES}
MERGEABLE = [case for case in CASES if case.method.mergeable]
# One case of each formula: for tests that are quadratic, or compile.
FORMULAS = [
    BY_NAME[name]
    for name in (
        "lora",
        "lora-bias",
        "dora",
        "lora-tokens",
        "tokens",
        "ia3",
        "loha",
        "lokr",
        "ln-tuning",
        "c3a-zero",
        "fourierft",
        "glora",
        "shira",
        "supra",
        "waveft",
        "hira",
        "miss",
        "miss-bat",
        "oft",
        "vera",
        "poly",
        "adalora",
        "delora",
        "gralora",
        "randlora",
        "pvera",
        "vblora",
        "unilora",
        "tinylora",
        "bitfit",
        "bottleneck",
        "loreft",
        "dylora",
        "lily",
    )
]


def pairs(cases: list[Case] | None = None, fused: bool = False) -> list[Any]:
    """(case, layer of the toy) as pytest parameters; with `fused`, where the method edits input and output."""
    import pytest

    return [
        pytest.param(c, site, id=f"{c.name}-{site}")
        for c in cases or CASES
        for site in c.names
        if not fused or SITES[site] in c.method.fused
    ]


def adapted(case: Case, *names: str, dtype: torch.dtype = torch.float32, moved: bool = True, **more: Any) -> PeftModel:
    """The toy with one adapter on these layers, in evaluation mode; `moved`: with its tensors as after training."""
    model = get_peft_model(toy(dtype), case.config(*names, **more)).eval()
    if moved:
        move(model, "default")
    return model


def also(model: PeftModel, name: str, case: Case, *names: str) -> None:
    """A second adapter, moved as well."""
    model.add_adapter(name, case.config(*names))
    model.eval()
    move(model, name)


@torch.no_grad()
def move(model: PeftModel, adapter: str) -> None:
    """Change an adapter's tensors as training would, each in its own way."""
    for key, tensor in tensors(model, adapter).items():
        seed = zlib.crc32(f"{adapter}.{key}".encode())
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        tensor.add_(0.3 * noise.to(tensor.dtype))


def tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The trained tensors of an adapter by their names in the model."""
    methods = [m for layer in model.modules() for m in getattr(layer, "methods", {}).get(adapter, ())]
    frozen = {id(m.tensor(leaf)) for m in methods if m.places for leaf in m.declared if leaf not in m.trained}
    return {n: p for n, p in model.named_parameters() if adapter in n.split(".") and id(p) not in frozen}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a few roundings of `dtype`, measured on the scale of the whole tensor."""
    limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = float(expected.detach().double().abs().max())
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert error <= limit * max(scale, 1.0), f"off by {error:.2e} on a scale of {scale:.2e}"


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by more than rounding."""
    return bool((a - b).abs().max() > 1e-3)


def ids() -> Tensor:
    """The input of all contract tests."""
    return tokens()


def layer_of(model: PeftModel, site: str) -> nn.Module:
    """The adapted layer of that name."""
    return model.get_base_model().get_submodule(site)


def covered() -> set[str]:
    """The methods that have a row."""
    return {case.peft_type for case in CASES}


def missing() -> set[str]:
    """The methods of layers that have none."""
    classes = {t: load(file, method) for t, (file, method, _) in METHODS.items()}
    layers = {t for t, cls in classes.items() if "model" not in cls.kinds and cls.around is None}
    return layers - covered()
