"""GPTQ on problems small enough to know the answer."""

from __future__ import annotations

import pytest
import torch

from quasr.errors import ModelError
from quasr.quant.clip import round_codes, search_scales, stored
from quasr.quant.gptq import GPTQOptions, gptq_codes, inverse_factor
from quasr.quant.linear import quantise_int4

GROUP = 32
COLUMNS = 160


def correlated(columns: int = COLUMNS, seed: int = 2) -> torch.Tensor:
    """Hessian of inputs that are mixtures of a few sources, with channels of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(2000, columns // 4, generator=generator)
    mixed = sources @ torch.randn(columns // 4, columns, generator=generator)
    x = (mixed + 0.3 * torch.randn(2000, columns, generator=generator)) * torch.rand(columns, generator=generator)
    return x.T @ x / len(x)


def weights(rows: int = 48, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def spread(scale: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    return scale.repeat_interleave(group, dim=1)


def output_error(codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    missed = (codes * spread(scale) - weight).double()
    return float((missed @ hessian.double() * missed).sum())


@pytest.mark.parametrize("act_order", [True, False])
def test_halves_the_output_error_of_rounding_to_nearest(act_order: bool) -> None:
    weight, hessian = weights(), correlated()
    nearest, scale = quantise_int4(weight, GROUP)
    codes = gptq_codes(weight, hessian, scale, GPTQOptions(act_order=act_order))
    assert output_error(codes, scale, weight, hessian) < 0.5 * output_error(nearest, scale, weight, hessian)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_without_correlation_leave_the_nearest_codes(act_order: bool) -> None:
    weight = weights()
    nearest, scale = quantise_int4(weight, GROUP)
    diagonal = torch.diag(torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.1)
    for hessian in (torch.eye(COLUMNS), diagonal):
        assert torch.equal(gptq_codes(weight, hessian, scale, GPTQOptions(act_order=act_order)), nearest)


def test_agrees_with_the_plain_formula_of_the_paper() -> None:
    """Optimal brain surgeon, one column after the other: the inverse Hessian shrinks by one row each time."""
    weight, hessian = weights(4, 64), correlated(64)
    scale = quantise_int4(weight, GROUP)[1]
    steps = spread(scale).double()
    left = weight.double()
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(64))
    expected = torch.empty(4, 64, dtype=torch.int8)
    for column in range(64):
        codes = (left[:, column] / steps[:, column]).round().clamp(-8, 7)
        expected[:, column] = codes.to(torch.int8)
        error = (left[:, column] - codes * steps[:, column]) / inverse[column, column]
        left = left - error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    assert torch.equal(gptq_codes(weight, hessian, scale, GPTQOptions(act_order=False)), expected)


def test_inverse_factor_is_the_upper_root_of_the_damped_inverse() -> None:
    hessian = correlated(32).double()
    factor = inverse_factor(hessian, 0.05).double()
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(32)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(32, dtype=torch.float64), atol=1e-4, rtol=0)


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, hessian = weights(), correlated()
    hessian[7] = hessian[:, 7] = 0
    scale = quantise_int4(weight, GROUP)[1]
    codes = gptq_codes(weight, hessian, scale)
    assert torch.equal(codes[:, 7].float(), round_codes(weight[:, 7], scale[:, 0]))


def test_activations_that_are_not_finite_are_an_error() -> None:
    hessian = correlated()
    hessian[3, 3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        gptq_codes(weights(), hessian, torch.ones(48, COLUMNS // GROUP))


def test_searched_scales_are_never_worse_than_those_of_rounding_to_nearest() -> None:
    """Every scale that rounding to nearest tries is among those of the search, which counts the output's error."""
    weight, hessian = weights(), correlated()
    nearest, plain = quantise_int4(weight, GROUP)
    scale = search_scales(weight, hessian, GROUP, torch.float32)
    blocks = hessian * torch.block_diag(*[torch.ones(GROUP, GROUP)] * (COLUMNS // GROUP))
    found = round_codes(weight, spread(scale))
    for row in range(len(weight)):
        own = output_error(found[row : row + 1], scale[row : row + 1], weight[row : row + 1], blocks)
        other = output_error(nearest[row : row + 1], plain[row : row + 1], weight[row : row + 1], blocks)
        assert own <= other * (1 + 1e-5)


def test_scales_are_those_that_can_be_stored() -> None:
    scale = search_scales(weights(), correlated(), GROUP, torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    assert torch.all(scale != 0)
    assert torch.equal(stored(torch.zeros(2), torch.float16), torch.full((2,), 2.0**-24))
