from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_samples import activations, linear, relative_error
from torch import Tensor

from quasr.errors import OptionError
from quasr.quant.linear import BLOCK_NUMBERS, Int4Linear, Int8Linear, pack, quantise_int4, quantise_int8, unpack
from quasr.quant.scheme import GROUPS, parse

torch.set_num_threads(1)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
"""Half a unit in the last place: what rounding one product to the dtype may add."""


@given(st.integers(1, 7), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_pack_and_unpack(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack(packed, columns), codes)


def test_packing_by_hand() -> None:
    packed = pack(torch.tensor([[-8, 7, 0, 1, -1]], dtype=torch.int8))
    assert packed.tolist() == [[0xF0, 0x98, 0x87]]


@given(st.sampled_from(GROUPS), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_saved_codes_are_the_layer(group: int, groups: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, groups * group), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    truth = codes.double().view(rows, groups, group) * scale.double()[..., None]
    for cls in (Int8Linear, Int4Linear):
        layer = cls.from_codes(codes, scale, None)
        assert torch.equal(layer.codes(), codes)
        assert (layer.in_features, layer.out_features, layer.group) == (groups * group, rows, group)
        assert torch.allclose(layer.dequantize().double().view_as(truth), truth, rtol=1e-6, atol=0)


@given(st.sampled_from((0, *GROUPS)), st.integers(1, 4), st.floats(1e-6, 1e3), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_int8_is_at_most_half_a_step_off(group: int, rows: int, size: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) * size).to(dtype)
    codes, scale = quantise_int8(weight, group)
    wide = weight.double().view(rows, scale.shape[1], -1)
    step = scale.double()[..., None]
    # A scale that was rounded down leaves the extreme up to 127 roundings beyond its last code; fp16's get coarse
    # below 2**-14.
    beyond = wide.abs().amax(-1, keepdim=True) * HALF_STEP[dtype] * 2 + 2**-24 * 127
    assert bool(((codes.double().view_as(wide) * step - wide).abs() <= step / 2 + beyond).all())


def test_int8_scale_is_the_largest_over_127() -> None:
    weight = torch.tensor([[0.5, -1.27, 0.004, 0.0], [12.7, 0.1, -0.05, 0.16]])
    codes, scale = quantise_int8(weight)
    assert scale.flatten().tolist() == pytest.approx([0.01, 0.1])
    assert codes.tolist() == [[50, -127, 0, 0], [127, 1, 0, 2]]


def test_int4_uses_all_sixteen_codes() -> None:
    weight = torch.arange(-8, 8).float().repeat(2)[None]
    codes, scale = quantise_int4(weight, 32)
    assert scale.tolist() == [[1.0]]
    assert torch.equal(codes.float(), weight)
    turned, negative = quantise_int4(-weight, 32)
    assert negative.tolist() == [[-1.0]]
    assert torch.equal(turned, codes)


@pytest.mark.parametrize("group", GROUPS)
def test_int4_beats_the_symmetric_scale(group: int) -> None:
    weight = linear(rows=256).weight.double()
    wide = weight.view(256, -1, group)
    plain = wide.abs().amax(-1, keepdim=True) / 7
    codes, scale = quantise_int4(weight.float(), group)
    ours = relative_error(codes.double().view_as(wide) * scale.double()[..., None], wide)
    theirs = relative_error((wide / plain).round().clamp(-8, 7) * plain, wide)
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4])
def test_zeros_stay_zeros(quantise: object) -> None:
    codes, scale = quantise(torch.zeros(3, 64, dtype=torch.float16), 32)  # type: ignore[operator]
    assert not codes.any()
    assert bool(scale.all())


@pytest.mark.parametrize("name", ["int8", *(f"{kind}-g{group}" for kind in ("int8", "int4") for group in GROUPS)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_its_dequantised_reference(name: str, dtype: torch.dtype) -> None:
    layer = linear(dtype)
    scheme = parse(name)
    quantised = (Int8Linear if scheme.bits == 8 else Int4Linear).from_linear(layer, scheme)
    x = activations().to(dtype)
    assert quantised.scale.dtype == dtype
    truth = F.linear(x.double(), dequantised(quantised), layer.bias.double())
    # The weight is rounded to the dtype once, the result once; sums are kept in fp32.
    assert relative_error(quantised(x), truth) < 2 * HALF_STEP[dtype]
    bits = {8: 0.009, 4: 0.11}[scheme.bits]
    assert relative_error(quantised(x), layer(x)) < bits
    assert quantised(x).dtype == dtype
    assert quantised(x.view(4, 4, 4, -1)).shape == (4, 4, 4, 96)


def dequantised(layer: Int8Linear | Int4Linear) -> Tensor:
    """By index arithmetic, without the methods under test."""
    weight = layer.weight.long()
    if isinstance(layer, Int4Linear):
        columns = torch.arange(layer.in_features)
        weight = (weight[:, columns // 2] >> (columns % 2 * 4) & 15) - 8
    return weight.double() * layer.scale.double().repeat_interleave(weight.shape[1] // layer.scale.shape[1], dim=1)


def test_large_weights_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear().weight
    whole = quantise_int4(weight, 64)
    monkeypatch.setitem(BLOCK_NUMBERS, "cpu", 7 * 256)
    assert all(torch.equal(a, b) for a, b in zip(quantise_int4(weight, 64), whole, strict=True))


def test_wrong_group() -> None:
    with pytest.raises(OptionError, match="96 input features do not divide into groups of 64"):
        Int4Linear.from_linear(linear(columns=96), parse("int4-g64"))


@pytest.mark.parametrize("name", ["int8", "int8-g64", "int4"])
def test_shape_without_memory(name: str) -> None:
    scheme = parse(name)
    cls = Int8Linear if scheme.bits == 8 else Int4Linear
    real, empty = cls.from_linear(linear(), scheme), cls.shaped_like(linear().to("meta"), scheme)
    assert {key: (value.shape, value.dtype) for key, value in real.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in empty.state_dict().items()
    }
    assert all(value.is_meta for value in empty.state_dict().values())
    assert "group=" in repr(real)
