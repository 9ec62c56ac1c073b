"""Which packages are installed, and how old transformers is, as peft's modules are asked."""

from __future__ import annotations

import importlib.util
import re
from functools import cache, partial
from typing import Any

from packaging.version import Version

# peft's question: the package it is about
PACKAGES = {
    "is_aqlm_available": "aqlm",
    "is_bnb_available": "bitsandbytes",
    "is_bnb_4bit_available": "bitsandbytes",
    "is_diffusers_available": "diffusers",
    "is_eetq_available": "eetq",
    "is_gptqmodel_available": "gptqmodel",
    "is_hqq_available": "hqq",
    "is_inc_available": "neural_compressor",
    "is_optimum_available": "optimum",
    "is_te_available": "transformer_engine",
    "is_te_pytorch_available": "transformer_engine",
    "is_torch_tpu_available": "torch_xla",
    "is_torchao_available": "torchao",
}
VERSIONS = ("ge_v5", "ge_v5_1_0", "ge_v5_4_0", "ge_v5_6_0", "ge_v5_13_0", "ge_v5_17_0", "le_4_53")

__all__ = [
    *PACKAGES,
    *(f"is_transformers_{v}" for v in VERSIONS),
    *("is_transformers_dtensor_tp",),
    "is_xpu_available",
    "mlu_available",
]


@cache
def available(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch can use an Intel GPU."""
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()


mlu_available = False


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return partial(available, PACKAGES[name])
    if name == "is_transformers_dtensor_tp":
        name = "is_transformers_ge_v5_17_0"
    found = re.fullmatch(r"is_transformers_(ge|le)_v?([\d_]+)", name)
    if found is None:
        raise AttributeError(name)
    import transformers

    wanted, there = Version(found[2].replace("_", ".")), Version(Version(transformers.__version__).base_version)
    return there >= wanted if found[1] == "ge" else there.release[: len(wanted.release)] <= wanted.release
