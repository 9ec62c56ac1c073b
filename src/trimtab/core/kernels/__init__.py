"""Fused steps: autograd functions of plain tensors, each proved equal to its plain spelling. They know no layer."""

from trimtab.core.kernels.anew import anew
from trimtab.core.kernels.delta import delta_linear
from trimtab.core.kernels.grouped import layered
from trimtab.core.kernels.half import HALF, add_product, project
from trimtab.core.kernels.loss import linear_cross_entropy
from trimtab.core.kernels.lowrank import Layer, fits, lora_linear, lora_linear_group

__all__ = [
    "HALF",
    "Layer",
    "add_product",
    "anew",
    "delta_linear",
    "fits",
    "layered",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
    "project",
]
