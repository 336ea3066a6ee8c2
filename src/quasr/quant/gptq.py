"""GPTQ (Frantar et al. 2022): columns are rounded one by one, and those still to come make up for the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quasr.errors import ModelError
from quasr.quant.clip import round_codes

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_COLUMNS = 128
"""Columns whose errors reach the columns beyond them in one matrix product."""


@dataclass(frozen=True, slots=True)
class GPTQOptions:
    """`damping`: part of the mean diagonal added to the Hessian; `act_order`: large inputs are rounded first."""

    damping: float = 0.01
    act_order: bool = True


def gptq_codes(weight: Tensor, hessian: Tensor, scale: Tensor, options: GPTQOptions | None = None) -> Tensor:
    """Codes from -8 to 7, int8 (rows, columns), for given scales.

    weight: (rows, columns); hessian: (columns, columns), mean of x x^T; scale: (rows, groups). With H^-1 = U^T U, the
    error of column c, over U[c, c] and times U[c, d], is taken from every later column d. Where H is diagonal nothing
    is taken, and the codes are the nearest. Raises ModelError where H is not finite.
    """
    chosen = options or GPTQOptions()
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if chosen.act_order else torch.arange(len(diagonal), device=weight.device)
    group = weight.shape[1] // scale.shape[1]
    steps = scale.float().repeat_interleave(group, dim=1)[:, order]
    factor = inverse_factor(hessian[order][:, order], chosen.damping)
    rounded = _round_in_order(weight.float()[:, order], steps, factor)
    codes = torch.empty_like(rounded, dtype=torch.int8)
    codes[:, order] = rounded.to(torch.int8)
    return codes


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping * mean diagonal * I)^-1; computed in fp64, returned in fp32.

    An input that is always zero gets a one in the diagonal. Raises ModelError where H is not finite.
    """
    wide = hessian.double()
    diagonal = wide.diagonal()
    extra = torch.where(diagonal == 0, torch.ones_like(diagonal), torch.zeros_like(diagonal))
    lower, failed = torch.linalg.cholesky_ex(wide + torch.diag(extra + damping * diagonal.mean()))
    if failed.any() or not lower.isfinite().all():
        raise ModelError("calibration saw activations that are not finite: use --dtype bf16 or fp32")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _round_in_order(weight: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
    """Codes in fp32; `weight` is overwritten."""
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        codes[:, block], errors = _round_block(weight[:, block], steps[:, block], factor[block, block])
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes


def _round_block(weight: Tensor, steps: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors of one block, each of its shape."""
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        step = steps[:, column]
        codes[:, column] = round_codes(weight[:, column], step)
        errors[:, column] = (weight[:, column] - codes[:, column] * step) / factor[column, column]
        weight[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return codes, errors
