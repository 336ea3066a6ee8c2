"""The kernels' matrices, made of the network's modules in the memory of their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from quasr.kernels.matrix import Matrix
from quasr.quant.embedding import Int8Embedding
from quasr.quant.linear import Int4Linear, Int8Linear
from quasr.weights.load import assign

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

QUANTISED = (Int8Linear, Int4Linear)


def matrix_of(module: nn.Module) -> Matrix:
    """The weights of a linear or an embedding, in the same memory."""
    if isinstance(module, (*QUANTISED, Int8Embedding)):
        return Matrix(module.weight, module.scale)
    return Matrix(cast("Tensor", module.weight).detach())


def fuse(modules: Sequence[nn.Module]) -> Matrix:
    """One matrix of several; the modules' own weights become views of it, so nothing is held twice."""
    parts = [matrix_of(module) for module in modules]
    weight = torch.cat([part.weight for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    scale = torch.cat(scales) if scales else None
    sizes = [part.rows for part in parts]
    _share(modules, "weight", weight, sizes)
    if scale is not None:
        _share(modules, "scale", scale, sizes)
    return Matrix(weight, scale)


def _share(modules: Sequence[nn.Module], name: str, fused: Tensor, sizes: Sequence[int]) -> None:
    for module, part in zip(modules, fused.split(list(sizes)), strict=True):
        assign(module, name, part)
