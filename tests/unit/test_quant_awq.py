"""AWQ: folding changes nothing, and the search pays where some inputs are large."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch
from quant_samples import CONFIG, network

from quasr.quant.awq import fold_norm, fold_up, fold_values, output_error, search_factors
from quasr.quant.calibrate import GATES, QUERIES, forward
from quasr.quant.linear import Int4Linear
from quasr.quant.scheme import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from quasr.model.decoder import DecoderLayer

SHARED = (CONFIG.text.kv_heads, CONFIG.text.heads // CONFIG.text.kv_heads)
HIDDEN, FFN = CONFIG.text.hidden, CONFIG.text.ffn


def layer() -> DecoderLayer:
    return cast("DecoderLayer", network().decoder.layers[0])


def factors(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(4)) * 3 + 0.3


def factors_of_values() -> torch.Tensor:
    heads = factors(CONFIG.text.kv_heads * CONFIG.text.head_dim).unflatten(0, (CONFIG.text.kv_heads, 1, -1))
    return heads.expand(*SHARED, -1).flatten()


@pytest.mark.parametrize(
    ("fold", "changed"),
    [
        (lambda one: fold_norm(one, "input_layernorm", QUERIES, factors(HIDDEN)), "self_attn.q_proj"),
        (lambda one: fold_norm(one, "post_attention_layernorm", GATES, factors(HIDDEN)), "mlp.gate_proj"),
        (lambda one: fold_values(one, SHARED, factors_of_values()), "self_attn.o_proj"),
        (lambda one: fold_up(one, factors(FFN)), "mlp.down_proj"),
    ],
)
def test_folding_leaves_the_output_of_the_layer(fold: Callable[[DecoderLayer], None], changed: str) -> None:
    folded, original = layer(), layer()
    fold(folded)
    x = torch.randn(1, 20, HIDDEN, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(forward(folded, x), forward(original, x), atol=2e-5, rtol=1e-5)
    name = f"{changed}.weight"
    assert not torch.allclose(folded.get_parameter(name), original.get_parameter(name), rtol=0.1)


def salient(columns: int = 128) -> torch.Tensor:
    """Hessian of independent inputs of which four are thirty times larger."""
    size = torch.ones(columns)
    size[[3, 50, 77, 100]] = 30
    return torch.diag(size.square())


def test_search_beats_plain_rounding_where_few_inputs_are_large() -> None:
    weight, hessian = torch.randn(64, 128, generator=torch.Generator().manual_seed(6)), salient()
    found = search_factors([weight], [64], hessian)
    assert output_error(weight, found, 64, hessian) < 0.75 * output_error(weight, torch.ones(128), 64, hessian)
    assert float(found[3]) > float(found[4])


def test_search_keeps_plain_rounding_where_all_inputs_are_alike() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    assert torch.equal(search_factors([weight], [64], torch.eye(128)), torch.ones(128))


def test_query_heads_that_share_a_key_head_get_equal_factors() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    found = search_factors([weight], [64], salient(), shared=(2, 2)).unflatten(0, (2, 2, 32))
    assert torch.equal(found[:, 0], found[:, 1])
    assert float(found.max()) > float(found.min())


def test_output_error_is_that_of_real_outputs() -> None:
    generator = torch.Generator().manual_seed(8)
    weight, x = torch.randn(16, 64, generator=generator), torch.randn(500, 64, generator=generator)
    scales = factors(64)
    linear = torch.nn.Linear(64, 16, bias=False).requires_grad_(False)
    linear.weight.copy_(weight * scales)
    quantised = Int4Linear.from_linear(linear, parse("int4-g32"))
    expected = (quantised(x / scales) - x @ weight.T).square().sum(1).mean()
    assert output_error(weight, scales, 32, x.T @ x / len(x)) == pytest.approx(float(expected), rel=1e-4)
