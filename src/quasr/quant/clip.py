"""Scales of 4-bit groups, chosen by what they do to the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quasr.quant.linear import INT4_HIGHEST, INT4_LOWEST, SMALLEST_SCALE

if TYPE_CHECKING:
    from torch import Tensor

PARTS = tuple(1 - step / 20 for step in range(11))
"""Parts of the full range that are tried: 1 to 0.5."""


def search_scales(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The scale of each group with the least square error of the output, rounded to nearest with it.

    weight: (rows, columns); hessian: (columns, columns), mean of x x^T over the layer's inputs. Returns (rows, groups)
    in `dtype`. For an error e of a group's weights the output's square error is e H e^T with that group's block of H.
    The number furthest from zero gets the code -8 or 7, shrunk by up to half (the clipping of AWQ, Lin et al. 2023).
    """
    found = [
        _best(columns.float(), hessian[start : start + group, start : start + group], dtype)
        for start, columns in zip(range(0, weight.shape[1], group), weight.split(group, dim=1), strict=True)
    ]
    return torch.stack(found, dim=1)


def _best(weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, group) -> (rows,)."""
    extreme = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    best, least = extreme, torch.full_like(extreme, torch.inf)
    for part in PARTS:
        for code in (INT4_LOWEST, INT4_HIGHEST):
            scale = stored(extreme * part / code, dtype)
            missed = round_codes(weight, scale) * scale - weight
            error = (missed @ hessian * missed).sum(1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best[:, 0].to(dtype)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32, rounded as it will be stored, and never zero."""
    return scale.abs().clamp_(min=SMALLEST_SCALE).copysign(scale).to(dtype).float()


def round_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes, from -8 to 7, in fp32."""
    return (weight / scale).round_().clamp_(INT4_LOWEST, INT4_HIGHEST)
