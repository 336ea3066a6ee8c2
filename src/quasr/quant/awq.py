"""AWQ (Lin et al. 2023): inputs that matter are made larger before the rounding, and what comes before them smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quasr.quant.linear import quantise_int4

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quasr.model.decoder import DecoderLayer

EXPONENTS = tuple(step / 20 for step in range(21))
"""Tried for each group of linears; 0 is plain rounding to nearest."""

SMALLEST_INPUT = 1e-4
"""Of a channel, as a part of the mean: bounds the factors where an input is always zero."""


def search_factors(
    weights: Sequence[Tensor], groups: Sequence[int], hessian: Tensor, shared: tuple[int, int] | None = None
) -> Tensor:
    """(columns,) fp32 factors for the inputs that all `weights` (rows, columns) share, each with its own group.

    factors = m^a / sqrt(max m^a * min m^a), m being the root mean square of each input, of which the diagonal of
    `hessian` = mean of x x^T is the square. The exponent a is that with the least square error of all outputs together.
    `shared` = (key heads, query heads a key head): m is averaged over the query heads, which get equal factors.
    """
    strength = _strength(hessian, shared)
    best, least = torch.ones_like(strength), torch.inf
    for exponent in EXPONENTS:
        factors = strength**exponent
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum(
            output_error(weight, factors, group, hessian) for weight, group in zip(weights, groups, strict=True)
        )
        if error < least:
            best, least = factors, error
    return best


def _strength(hessian: Tensor, shared: tuple[int, int] | None) -> Tensor:
    size = hessian.diagonal().sqrt()
    if shared is not None:
        heads = size.unflatten(0, (*shared, -1))
        size = heads.mean(1, keepdim=True).expand_as(heads).flatten()
    return (size / size.mean().clamp(min=torch.finfo(size.dtype).tiny)).clamp(min=SMALLEST_INPUT)


def output_error(weight: Tensor, factors: Tensor, group: int, hessian: Tensor) -> float:
    """Mean square error, summed over the outputs, of `weight` rounded to nearest with its columns times `factors`."""
    codes, scale = quantise_int4(weight.float() * factors, group)
    rounded = (codes.float().unflatten(1, (-1, group)) * scale[..., None]).flatten(1)
    missed = rounded / factors - weight.float()
    return float((missed @ hessian * missed).sum())


def fold_norm(layer: DecoderLayer, norm: str, linears: Sequence[str], factors: Tensor) -> None:
    """Divides the outputs of `norm` and multiplies the columns of `linears`: the layer computes the same."""
    _times(layer.get_parameter(f"{norm}.weight"), 1 / factors)
    for name in linears:
        _times(layer.get_parameter(f"{name}.weight"), factors)


def fold_values(layer: DecoderLayer, shared: tuple[int, int], factors: Tensor) -> None:
    """Divides the rows of v_proj, multiplies the columns of o_proj; `factors` are equal where a key head is shared."""
    own = factors.unflatten(0, (*shared, -1))[:, 0].flatten()
    _times(layer.self_attn.v_proj.weight, 1 / own[:, None])
    _times(layer.self_attn.o_proj.weight, factors)


def fold_up(layer: DecoderLayer, factors: Tensor) -> None:
    """Divides the rows of up_proj and multiplies the columns of down_proj."""
    _times(layer.mlp.up_proj.weight, 1 / factors[:, None])
    _times(layer.mlp.down_proj.weight, factors)


def _times(weight: Tensor, factors: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(weight.float() * factors)
