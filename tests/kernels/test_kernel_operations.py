"""Every Triton kernel against the plain reference: on a GPU where there is one, else interpreted, with small shapes."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import accumulate, product
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from fast_samples import DEVICE

from quasr.errors import OptionError
from quasr.kernels import dispatch, reference, triton_attention, triton_product
from quasr.kernels.matrix import Heads, Matrix, Norm
from quasr.kernels.state import DecodeState, Places, Prompts
from quasr.quant.linear import pack, quantise_int4, quantise_int8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytest.importorskip("triton")
torch.set_num_threads(1)
# A sigmoid far below zero: numpy, in which the interpreter counts, warns of it, and the result is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of ||out - reference|| / ||reference||; 16-bit outputs are rounded once or twice, in other places."""

WIDE = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
"""The interpreter has no products in bf16."""

SHAPES = [(34, 192), (48, 80), (129, 320)]
"""Rows and columns of matrices: neither is a power of two."""
THOROUGH = DEVICE.type == "cuda"
"""The interpreter takes seconds where a GPU takes microseconds, so it gets fewer cases."""


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that is not written yet holds NaN; every test draws numbers of its own."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def kernels(dtype: torch.dtype) -> dispatch.Kernels:
    return dispatch.triton(DEVICE, dtype)


def matrix(rows: int, columns: int, scheme: str, dtype: torch.dtype) -> Matrix:
    weight = torch.randn(rows, columns, device=DEVICE).to(dtype)
    kind, _, group = scheme.partition("-")
    if kind == "none":
        return Matrix(weight)
    if kind == "int8":
        return Matrix(*quantise_int8(weight, int(group or 0)))
    codes, scale = quantise_int4(weight, int(group))
    return Matrix(pack(codes), scale)


def norm(size: int, dtype: torch.dtype) -> Norm:
    return Norm((torch.rand(size, device=DEVICE) + 0.5).to(dtype), 1e-6)


def exact(weights: Matrix) -> Matrix:
    """The same numbers in fp32."""
    if weights.scale is None:
        return Matrix(weights.weight.float())
    return Matrix(reference.dequantise(Matrix(weights.weight, weights.scale.float())))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.isfinite().all()
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype]


def products(scheme: str, dtype: torch.dtype, m: int, shape: tuple[int, int]) -> None:
    """The three products and the head, with the reference in fp32 throughout."""
    rows, columns = shape
    weights, table = matrix(rows, columns, scheme, dtype), kernels(dtype)
    wide, gain = exact(weights), norm(columns, dtype)
    x = 3 * torch.randn(m, columns, device=DEVICE)
    fp32 = Norm(gain.weight.float(), gain.eps)
    close(table.linear(x, weights, gain), reference.linear(x, wide, fp32), dtype)
    close(table.linear(x.to(dtype), weights), reference.linear(x.to(dtype).float(), wide), dtype)
    even = Matrix(weights.weight[: rows // 2 * 2], None if weights.scale is None else weights.scale[: rows // 2 * 2])
    close(table.gated_linear(x, even, gain), reference.gated_linear(x, exact(even), fp32), dtype)
    close(table.gated_linear(x.to(dtype), even), reference.gated_linear(x.to(dtype).float(), exact(even)), dtype)
    got = torch.randn(m, rows, device=DEVICE)
    expected = got.clone()
    table.add_linear(x.to(dtype), weights, got)
    reference.add_linear(x.to(dtype).float(), wide, expected)
    close(got, expected, dtype)
    chosen(table.choose(x, gain, weights), reference.linear(x, wide, fp32), dtype)


def same(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Each number near the expected one; they are of the size of 1."""
    slack = 8 * TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), expected.float(), atol=slack, rtol=slack)


def chosen(found: tuple[Tensor, Tensor], logits: Tensor, dtype: torch.dtype) -> None:
    """A token whose logit is the largest but for rounding, with its log-probability."""
    tokens, logprobs = found
    slack = 10 * TOLERANCE[dtype] * float(logits.abs().max())
    of_tokens = logits.gather(1, tokens[:, None])[:, 0]
    assert (of_tokens >= logits.amax(1) - slack).all()
    torch.testing.assert_close(logprobs, of_tokens - logits.logsumexp(1), atol=slack, rtol=0)


@pytest.mark.parametrize("m", [1, pytest.param(3, marks=pytest.mark.slow), 17])
@pytest.mark.parametrize("scheme", ["int8", "int4-32"])
def test_products(scheme: str, m: int) -> None:
    products(scheme, torch.float32, m, (34, 192))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES if THOROUGH else SHAPES[1:2], ids=str)
@pytest.mark.parametrize("m", [1, 3, 17, 40, 70] if THOROUGH else [1, 17])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("scheme", ["none", "int8", "int8-16", "int4-16"])
def test_products_of_awkward_shapes(scheme: str, dtype: torch.dtype, m: int, shape: tuple[int, int]) -> None:
    products(scheme, dtype, m, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "parts"), [("int8", 2), ("int4-64", 3), ("int8-96", 2), ("none", 4)])
def test_products_in_parts(scheme: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 steps: parts of unequal lengths, and with 4 parts one that has no columns."""
    plan = triton_product.plan

    def in_parts(weights: Matrix, m: int, memory: int, *, gate: bool, head: bool = False) -> triton_product.ProductPlan:
        chosen = plan(weights, m, memory, gate=gate, head=head)
        return replace(chosen, columns=64, rows=32, splits=1 if head else parts)

    monkeypatch.setattr(triton_product, "plan", in_parts)
    for _ in range(2):
        products(scheme, torch.float16, 5, (34, 192))


@pytest.mark.parametrize("scheme", ["none", "int8-16", "int4-64"])
def test_one_row_in_bf16(scheme: str) -> None:
    products(scheme, torch.bfloat16, 1, (34, 128))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [48, 34], ids=["even parts", "odd parts"])
def test_many_rows_are_multiplied_by_torch(rows: int) -> None:
    products("int4-64", WIDE[-1], 300, (rows, 192))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: the interpreter does one thing after the other")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", WIDE[1:], ids=str)
@pytest.mark.parametrize("scheme", ["none", "int8", "int8-16", "int4-64"])
def test_products_are_the_same_every_time(scheme: str, dtype: torch.dtype) -> None:
    """Right once is not enough: a step that runs into the one before it does so now and then."""
    table, weights, gain = kernels(dtype), matrix(128, 320, scheme, dtype), norm(320, dtype)
    for m in (17, 40, 70, 200):
        x = torch.randn(m, 320, device=DEVICE).to(dtype)
        expected = reference.gated_linear(x.float(), exact(weights)), reference.linear(x.float(), exact(weights))
        first = table.gated_linear(x, weights), table.linear(x, weights)
        tokens = table.choose(x.float(), gain, weights)[0]
        for found, right in zip(first, expected, strict=True):
            close(found, right, dtype)
        for _ in range(200):
            assert torch.equal(table.gated_linear(x, weights), first[0])
            assert torch.equal(table.linear(x, weights), first[1])
            assert torch.equal(table.choose(x.float(), gain, weights)[0], tokens)


def test_of_equal_logits_the_first_wins() -> None:
    """Rows 40 and 3 of the head are equal and the largest, in different programs."""
    weights = torch.randn(70, 32, device=DEVICE)
    weights[[40, 3]] = 9.0
    x = torch.ones(2, 32, device=DEVICE)
    tokens, _ = kernels(torch.float32).choose(x, norm(32, torch.float32), Matrix(weights))
    assert tokens.tolist() == [3, 3]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter counts in numpy
def test_nan_shows_in_the_log_probability() -> None:
    x = torch.randn(3, 32, device=DEVICE)
    x[1, 5] = torch.nan
    weights = matrix(70, 32, "int8", torch.float32)
    tokens, logprobs = kernels(torch.float32).choose(x, norm(32, torch.float32), weights)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert 0 <= int(tokens[1]) < 70


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_embedding(scheme: str) -> None:
    table = matrix(50, 80, scheme, torch.float16)
    tokens = torch.tensor([49, 0, 7], device=DEVICE)
    expected = exact(table).weight[tokens]
    close(kernels(torch.float16).embed(tokens, table), expected, torch.float16)


def heads_of(count: int, kv_count: int, size: int, dtype: torch.dtype) -> Heads:
    rates = 1 / 1e4 ** (torch.arange(0, size, 2, device=DEVICE).float() / size)
    return Heads(count, kv_count, size, norm(size, dtype), norm(size, dtype), rates)


PLACES = {
    "first": ([5], [0], [False]),
    "two": ([90, 3], [41, 60], [False, True]),
    "ragged": ([120, 0, 90, 60], [77, 55, 0, 29], [False, False, True, False]),
    "all idle": ([0, 10, 30], [9, 20, 3], [True, True, True]),
}
"""Offsets, lengths, idle rows."""


def attention(dtype: torch.dtype, heads: Heads, case: str) -> None:
    """Rotation and write, attention, and both at once; positions that no row owns hold NaN."""
    offsets, lengths, idle = (torch.tensor(numbers, device=DEVICE) for numbers in PLACES[case])
    places, table = Places(offsets, lengths, idle), kernels(dtype)
    x = 2 * torch.randn(len(offsets), heads.width, device=DEVICE).to(dtype)
    shape = (heads.kv_count, 200, heads.size)
    stores = [torch.full(shape, torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    for store in stores:
        for start, filled in zip(offsets.tolist(), lengths.tolist(), strict=True):
            store[:, start : start + filled] = torch.randn(heads.kv_count, filled, heads.size, device=DEVICE).to(dtype)
    expected, apart, fused = ([store.clone() for store in stores] for _ in range(3))
    q = reference.rotate_write(x, *expected, places, heads)
    close(table.rotate_write(x, *apart, places, heads), q, dtype)
    y = reference.attend(q, *expected, places, heads)
    for got in (table.attend(q, *expected, places, heads), table.attend_step(x, *fused, places, heads)):
        assert got.isfinite().all()
        same(got, y, dtype)
    for found in (apart, fused):
        for new, old in zip(found, expected, strict=True):
            assert torch.equal(new.isnan(), old.isnan())
            same(new.nan_to_num(), old.nan_to_num(), dtype)


def test_attention() -> None:
    attention(torch.float32, heads_of(3, 1, 16, torch.float32), "two")


def test_attention_by_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs with little shared memory."""
    monkeypatch.setattr(triton_attention, "wide_fits", lambda x: False)
    attention(torch.float32, heads_of(4, 2, 32, torch.float32), "two")


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_products_take_as_many_stages_as_fit(bits: int) -> None:
    """All that an H200 has room for; two thirds of its shared memory and less hold fewer."""
    rows, columns = 4096, 2048
    weights = {
        16: Matrix(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")),
        8: Matrix(
            torch.empty(rows, columns, dtype=torch.int8, device="meta"), torch.empty(rows, 1, device="meta").half()
        ),
        4: Matrix(
            torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta"),
            torch.empty(rows, columns // 128, device="meta").half(),
        ),
    }[bits]
    fewer = 0
    for m, (gate, head) in product((2, 16, 32, 64, 256), ((False, False), (True, False), (False, True))):
        best = triton_product.plan(weights, m, 227 << 10, gate=gate, head=head)
        found = triton_product.plan(weights, m, 64 << 10, gate=gate, head=head)
        assert replace(found, stages=best.stages) == best
        held = best.columns * (best.rows * bits // 8 + best.lines * 2)
        assert best == triton_product.plan(weights, m, sys.maxsize, gate=gate, head=head)
        assert found.stages == best.stages or (found.stages - 1) * held <= 64 << 10 < found.stages * held
        fewer += found.stages < best.stages
    assert fewer


@pytest.mark.slow
@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("counts", [(6, 2, 16), (5, 1, 80), *[(4, 4, 32), (16, 8, 24)][: 2 * THOROUGH]], ids=str)
def test_attention_of_awkward_shapes(counts: tuple[int, int, int], dtype: torch.dtype, case: str) -> None:
    attention(dtype, heads_of(*counts, dtype), case)


PROMPTS = {
    "one": ([9], [5]),
    "ragged": ([70, 1, 16, 33], [60, 10, 135, 20]),
    "equal": ([40, 40], [0, 40]),
    "long": ([150], [3]),
    "one token": ([1], [199]),
    "a block": ([64], [7]),
    "a token more": ([65], [0]),
}
"""Lengths and offsets."""


def prompts_of(case: str) -> Prompts:
    lengths, offsets = PROMPTS[case]
    starts = torch.tensor([0, *accumulate(lengths)], device=DEVICE)
    return Prompts(tuple(lengths), tuple(offsets), starts, torch.tensor(offsets, device=DEVICE))


def attention_of_prompts(dtype: torch.dtype, heads: Heads, case: str) -> None:
    """Positions that no prompt owns hold NaN."""
    prompts = prompts_of(case)
    q = 2 * torch.randn(sum(prompts.lengths), heads.query_width, device=DEVICE).to(dtype)
    stores = [torch.full((heads.kv_count, 200, heads.size), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    for store in stores:
        for length, offset in zip(prompts.lengths, prompts.offsets, strict=True):
            store[:, offset : offset + length] = torch.randn(heads.kv_count, length, heads.size, device=DEVICE)
    got = kernels(dtype).attend_prompts(q, *stores, prompts, heads)
    assert got.dtype == dtype
    expected = reference.attend_prompts(q.float(), *(store.float() for store in stores), prompts, heads)
    close(got, expected, dtype)


@pytest.mark.parametrize("case", PROMPTS)
def test_attention_of_prompts(case: str) -> None:
    attention_of_prompts(WIDE[-1], heads_of(4, 2, 16, WIDE[-1]), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("counts", [(3, 3, 16), (5, 1, 24), *[(16, 8, 128), (32, 2, 80)][: 2 * THOROUGH]], ids=str)
def test_attention_of_prompts_of_awkward_shapes(counts: tuple[int, int, int], dtype: torch.dtype, case: str) -> None:
    attention_of_prompts(dtype, heads_of(*counts, dtype), case)


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_among_empty_ones_and_idle_tokens_are_the_same(case: str) -> None:
    """To the bit; and the host is told nothing."""
    heads, prompts, table = heads_of(4, 2, 16, WIDE[-1]), prompts_of(case), kernels(WIDE[-1])
    count, tokens = len(prompts.lengths), sum(prompts.lengths)
    q = torch.randn(tokens, heads.query_width, device=DEVICE).to(WIDE[-1])
    keys, values = (torch.randn(heads.kv_count, 200, heads.size, device=DEVICE).to(WIDE[-1]) for _ in range(2))
    empty = prompts.starts[-1:].expand(8 - count)
    padded = Prompts((), (), torch.cat([prompts.starts, empty]), F.pad(prompts.begins, (0, 8 - count)))
    got = table.attend_prompts(F.pad(q, (0, 0, 0, 256 - tokens), value=torch.nan), keys, values, padded, heads)
    assert torch.equal(got[:tokens], table.attend_prompts(q, keys, values, prompts, heads))


def test_the_reference_refuses_prompts_that_the_host_does_not_know() -> None:
    prompts, q = prompts_of("one"), torch.ones(9, 32, device=DEVICE)
    store = torch.ones(1, 20, 16, device=DEVICE)
    with pytest.raises(ValueError, match="the host does not know"):
        reference.attend_prompts(q, store, store, replace(prompts, lengths=()), heads_of(2, 1, 16, torch.float32))


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_attended_as_token_by_token(case: str) -> None:
    """Two references: one that takes whole prompts, one in which each token reads the cache for itself."""
    heads, prompts = heads_of(4, 2, 16, torch.float32), prompts_of(case)
    q = torch.randn(sum(prompts.lengths), heads.query_width, device=DEVICE)
    keys, values = (torch.randn(heads.kv_count, 200, heads.size, device=DEVICE) for _ in range(2))
    offsets = prompts.begins.repeat_interleave(torch.tensor(prompts.lengths, device=DEVICE))
    steps = torch.cat([torch.arange(length, device=DEVICE) for length in prompts.lengths])
    places = Places(offsets, steps, torch.zeros_like(steps, dtype=torch.bool))
    expected = reference.attend(q, keys, values, places, heads)
    close(reference.attend_prompts(q, keys, values, prompts, heads), expected, torch.float32)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_norm_of_a_residual(dtype: torch.dtype) -> None:
    x, y, gain = 3 * torch.randn(7, 80, device=DEVICE), torch.randn(7, 80, device=DEVICE).to(dtype), norm(80, dtype)
    expected, exact_gain, table = x.clone(), Norm(gain.weight.float(), gain.eps), kernels(dtype)
    close(table.add_rms_norm(x, None, gain), reference.rms_norm(x, exact_gain), dtype)
    got = table.add_rms_norm(x, y, gain)
    assert got.dtype == dtype
    close(got, reference.add_rms_norm(expected, y.float(), exact_gain), dtype)
    assert torch.equal(x, expected)


def test_rows_stop_and_stay() -> None:
    """Rows: one goes on, one meets a stop token, one uses its budget up, one is finished, one ends by both."""
    states = []
    for advance in (reference.advance, kernels(torch.float32).advance):
        state = DecodeState.allocate(5, 6, [7, 3], DEVICE)
        state.lengths.copy_(torch.tensor([10, 20, 30, 40, 50]))
        state.cursor.copy_(torch.tensor([1, 2, 3, 4, 5]))
        state.limits.copy_(torch.tensor([6, 6, 4, 6, 6]))
        state.finished.copy_(torch.tensor([False, False, False, True, False]))
        advance(state, torch.tensor([5, 3, 9, 8, 7], device=DEVICE), -torch.arange(5.0, device=DEVICE))
        states.append(state)
    plain, fast = states
    for name in ("tokens", "lengths", "cursor", "finished", "history", "logprobs"):
        assert torch.equal(getattr(fast, name), getattr(plain, name)), name
    assert fast.lengths.tolist() == [11, 21, 31, 40, 51]
    assert fast.finished.tolist() == [False, True, True, True, True]
    assert fast.cursor.tolist() == [2, 2, 4, 4, 5]
    assert fast.history.tolist()[0] == [0, 5, 0, 0, 0, 0]


def test_the_table_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for wish, reason in (("auto", "this is cpu"), ("reference", "QUASR_KERNELS=reference asks for it")):
        monkeypatch.setenv(dispatch.VARIABLE, wish)
        dispatch.choose.cache_clear()
        table = dispatch.choose(cpu, torch.float32)
        assert table.name == "reference"
        assert len(table.lines()) == len(dispatch.OPERATIONS)
        assert all("quasr.kernels.reference" in line for line in table.lines())
        assert reason in table.reason
    for wish in ("triton", "fast"):
        monkeypatch.setenv(dispatch.VARIABLE, wish)
        dispatch.choose.cache_clear()
        with pytest.raises(OptionError, match=dispatch.VARIABLE):
            dispatch.choose(cpu, torch.float32)
    dispatch.choose.cache_clear()
