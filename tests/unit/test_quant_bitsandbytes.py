from __future__ import annotations

import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from quant_samples import activations, linear, relative_error

from quasr.errors import MissingDependencyError, OptionError
from quasr.quant import bitsandbytes as wrapper
from quasr.quant.bitsandbytes import LLMInt8Linear, NF4Linear
from quasr.quant.linear import Int8Linear
from quasr.quant.scheme import INT8, llm_int8, parse

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
torch.set_num_threads(1)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2**-11, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Of the result in its dtype; LLM.int8 sees the activations in fp16 whatever they come in."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_is_the_library_s_own_layer(
    dtype: torch.dtype, threshold: float, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = linear(dtype), activations(outliers=True).to(dtype)
    theirs = bnb.nn.Linear8bitLt(256, 96, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = LLMInt8Linear.from_linear(layer, llm_int8(threshold))
    with torch.inference_mode():
        found = ours(x[None])
        assert not caplog.records
        with caplog.at_level(logging.ERROR, "bitsandbytes"):
            assert torch.equal(found[0], theirs(x))
    assert found.dtype == dtype
    stored = theirs.state_dict()
    assert stored.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, stored[name].to(value.dtype)) for name, value in ours.state_dict().items())


def test_what_the_threshold_does() -> None:
    layer, x = linear(rows=512), activations(outliers=True)
    truth = layer(x)
    errors = {
        threshold: relative_error(LLMInt8Linear.from_linear(layer, llm_int8(threshold))(x), truth)
        for threshold in (6.0, 0.0, 1e-6)
    }
    weights_only = relative_error(Int8Linear.from_linear(layer, INT8)(x), truth)
    # Without outlier columns in 16 bits, their size sets the step of all other activations.
    assert errors[0.0] > 3 * errors[6.0]
    # A threshold below everything leaves nothing to 8-bit activations: only the weights are rounded.
    assert errors[1e-6] == pytest.approx(weights_only, rel=0.02)
    assert weights_only < errors[6.0] < 1.5 * weights_only


def test_a_single_row_and_a_row_of_zeros() -> None:
    layer = LLMInt8Linear.from_linear(linear(), llm_int8(6.0))
    x = activations(outliers=True)
    x[5] = 0
    found = layer(x)
    assert torch.allclose(found[5], layer.bias, atol=1e-6)
    assert (
        relative_error(layer(x[:1]), F.linear(x[:1].double(), layer.dequantize().double(), layer.bias.double())) < 0.03
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_against_its_dequantised_reference(dtype: torch.dtype) -> None:
    layer, x = linear(dtype), activations().to(dtype)
    ours = NF4Linear.from_linear(layer, parse("nf4"))
    assert (ours.weight.shape, ours.absmax.shape) == ((96, 128), (96, 4))
    truth = F.linear(x.double(), by_hand(ours), layer.bias.double())
    assert relative_error(ours(x), truth) < 2 * ROUNDING[dtype]
    assert relative_error(ours.dequantize(), by_hand(ours)) < 1e-6
    assert relative_error(ours(x[None]), layer(x)[None]) < 0.11
    assert ours(x).dtype == dtype


def by_hand(layer: NF4Linear) -> torch.Tensor:
    """The table of the QLoRA paper's appendix E, the high nibble first."""
    table = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        dtype=torch.float64,
    )  # fmt: skip
    codes = torch.stack([layer.weight >> 4, layer.weight & 15], dim=-1).flatten(1).long()
    return table[codes] * layer.absmax.double().repeat_interleave(64, dim=1)


def test_nf4_needs_blocks_of_64() -> None:
    with pytest.raises(OptionError, match="blocks of 64"):
        NF4Linear.from_linear(linear(columns=96), parse("nf4"))


@pytest.mark.parametrize(("cls", "name"), [(LLMInt8Linear, "llm-int8"), (NF4Linear, "nf4")])
def test_shape_without_memory(cls: type[LLMInt8Linear | NF4Linear], name: str) -> None:
    real, empty = cls.from_linear(linear(), parse(name)), cls.shaped_like(linear().to("meta"), parse(name))
    assert {key: (value.shape, value.dtype) for key, value in real.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in empty.state_dict().items()
    }
    assert all(value.is_meta for value in empty.state_dict().values())
    assert "out=96" in repr(real)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper._library.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"quasr\[quant\]"):
        LLMInt8Linear.from_linear(linear(), llm_int8(6.0))
    wrapper._library.cache_clear()
