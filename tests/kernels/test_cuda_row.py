"""The kernels for one row in CUDA C++: plans, compiling and its cache anywhere; numbers on a Hopper GPU."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from fast_samples import DEVICE

pytest.importorskip("triton")

from quasr.kernels import cuda_module, cuda_row, dispatch, reference
from quasr.kernels.matrix import Heads, Matrix, Norm
from quasr.kernels.state import Places
from quasr.kernels.triton_matvec import ADD, GATE, HEAD, PLAIN
from quasr.quant.linear import pack, quantise_int4, quantise_int8

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LACK = cuda_row.lack(DEVICE, torch.float16)
gpu = pytest.mark.skipif(LACK is not None, reason=f"kernels in CUDA C++: {LACK}")

SHARED_MEMORY = 227 << 10
"""Bytes of a multiprocessor of Hopper that one program may have: CUDA C++ Programming Guide, compute capability 9.0."""
PROCESSORS = 132
SHAPES = {
    "1.7b qkv": (4096, 2048, PLAIN),
    "1.7b output": (2048, 2048, ADD),
    "1.7b gate and up": (6144, 2048, GATE),
    "1.7b down": (2048, 6144, ADD),
    "1.7b head": (151936, 2048, HEAD),
    "0.6b qkv": (4096, 1024, PLAIN),
    "0.6b output": (1024, 2048, ADD),
    "0.6b gate and up": (3072, 1024, GATE),
    "0.6b down": (1024, 3072, ADD),
    "0.6b head": (151936, 1024, HEAD),
    "few rows": (48, 1024, PLAIN),
    "uneven": (4000, 3072, PLAIN),
}
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""As in test_kernel_operations."""
SUMS_TOLERANCE = 1e-3
"""Of sums that are not rounded to 16 bits: activations in 16 bits are wrong by some 1e-5 of the largest near them."""


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_plans_cover_every_row_and_fit(name: str, bits: int) -> None:
    rows, columns, mode = SHAPES[name]
    plan = cuda_row.plan_of(rows, columns, bits, 128 if bits == 4 else columns, mode, PROCESSORS)
    if bits == 4 and mode == HEAD:
        assert plan is None
        return
    assert plan is not None
    tile, macros = plan.tile, dict(plan.tile.macros)
    assert macros["SLICES"] * macros["CHUNKS"] * 32 * (128 // bits) == columns
    tiles = rows // tile.outputs
    most = -(-tiles // plan.programs)
    assert tiles * tile.outputs == rows
    assert plan.programs <= min(PROCESSORS, tiles)
    assert plan.stages <= most
    # What a program holds beside its ring: activations in two halves of 8 bits (or fp32), scales, sums.
    beside = columns * (4 if bits == 16 else 2) + columns // (128 // bits) * 4 + 4 * 128 * macros["SLICES"] + 1024
    assert plan.shape.shared + beside < SHARED_MEMORY
    if mode != HEAD:
        assert most * tile.height <= cuda_row.MOST_ROWS
        assert most * tile.outputs <= tile.warps * 32


def test_what_no_plan_fits() -> None:
    for rows, columns, bits, group, mode in (
        (2048, 2050, 8, 2050, PLAIN),  # not a whole number of loads
        (2047, 2048, 8, 2048, PLAIN),  # not a whole number of tiles
        (2048, 2048, 8, 128, PLAIN),  # 8 bits in groups
        (2048, 2048, 4, 16, PLAIN),  # a lane's codes have two scales
        (2048, 1 << 15, 16, 1 << 15, ADD),  # too wide for registers
        (151936, 4096, 16, 4096, HEAD),  # two warps a row, of which none would have a whole logit
        (151936, 4096, 8, 4096, HEAD),
        (151936, 3072, 8, 3072, HEAD),
    ):
        assert cuda_row.plan_of(rows, columns, bits, group, mode, PROCESSORS) is None


@pytest.mark.parametrize("processors", [78, 132])
@pytest.mark.parametrize("mode", [PLAIN, ADD, GATE, HEAD])
@pytest.mark.parametrize(("bits", "groups"), [(16, ()), (8, ()), (4, (32, 64, 96, 128, 256))])
def test_plans_copy_whole_loads_and_sum_whole_logits(
    bits: int, groups: tuple[int, ...], mode: int, processors: int
) -> None:
    planned = 0
    for rows, columns in product((24, 132, 4000, 6144), range(512, 6145, 512)):
        for group in [group for group in groups if columns % group == 0] or [columns]:
            plan = cuda_row.plan_of(rows, columns, bits, group, mode, processors)
            if plan is None:
                continue
            planned += 1
            tile, scales = plan.tile, columns // group if bits == 4 else int(bits == 8 and mode == HEAD)
            # Scales of a tile begin, and what goes up begins `rows` below the gate, at multiples of 16 bytes.
            assert all(count * scales * 2 % 16 == 0 for count in (tile.outputs, rows if mode == GATE else 0))
            assert tile.bytes % 128 == 0
            assert mode != HEAD or tile.slices == 1
            beside = columns * (4 if bits == 16 else 2) + columns // (128 // bits) * 4 + 512 * tile.slices + 1024
            assert plan.shape.shared + beside < SHARED_MEMORY
    assert planned or (bits == 4 and mode == HEAD)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, which begin 4 bytes behind a multiple of 16."""
    raw = torch.empty(tensor.nbytes + 32, dtype=torch.uint8, device=tensor.device)
    begin = -raw.data_ptr() % 16 + 4
    return raw[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def test_what_the_kernels_would_misread_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "index", lambda device: 0)
    monkeypatch.setattr(cuda_row, "_processors", lambda device: PROCESSORS)
    x, weight, norm = torch.ones(1, 1024), torch.ones(48, 1024).bfloat16(), Norm(torch.ones(1024).bfloat16(), 1e-6)
    weights = Matrix(weight)
    assert cuda_row._plan(x, weights, PLAIN, norm) is not None
    assert cuda_row._plan(x, weights, PLAIN, wide(norm)) is None
    assert cuda_row._plan(x, weights, PLAIN, replace(norm, weight=norm.weight.half())) is None
    assert cuda_row._plan(x, weights, PLAIN, replace(norm, weight=shifted(norm.weight))) is None
    assert cuda_row._plan(shifted(x), weights, PLAIN, norm) is None
    assert cuda_row._plan(x, Matrix(shifted(weight)), PLAIN, norm) is None
    coded = Matrix(torch.zeros(48, 1024, dtype=torch.int8), torch.ones(48, 1).bfloat16())
    assert cuda_row._plan(x, coded, PLAIN, norm) is not None
    assert cuda_row._plan(x, replace(coded, scale=shifted(torch.ones(48, 1).bfloat16())), PLAIN, norm) is None


def test_attention_that_the_kernel_would_misread_is_tritons() -> None:
    norm = Norm(torch.ones(128).bfloat16(), 1e-6)
    heads = Heads(2, 1, 128, norm, norm, torch.ones(64))
    x, keys, values = (torch.zeros(shape).bfloat16() for shape in ((1, 512), (1, 8, 128), (1, 8, 128)))
    assert cuda_row._as_read((x, keys, values), heads)
    assert not cuda_row._as_read((x, keys.half(), values), heads)
    assert not cuda_row._as_read((x, keys, shifted(values)), heads)
    assert not cuda_row._as_read((shifted(x), keys, values), heads)
    assert not cuda_row._as_read((x, keys, values), replace(heads, k_norm=wide(norm)))
    assert not cuda_row._as_read((x, keys, values), replace(heads, q_norm=replace(norm, weight=shifted(norm.weight))))


def test_constants_are_those_of_the_sources() -> None:
    products, attention = (cuda_module.source(name) for name in ("row_product.cu", "row_attention.cu"))
    found = dict(re.findall(r"(\w+) = (\d+)", products + attention))
    assert int(found["MOST_STAGES"]) == cuda_row.MOST_STAGES
    assert int(found["MOST_ROWS"]) == cuda_row.MOST_ROWS
    assert int(found["SIZE"]) == cuda_row.SIZE
    assert int(found["PARTS"]) == cuda_row.PARTS
    modes = re.search(r"enum \{ (.*?) \};", products)
    assert modes is not None
    assert modes[1].split(", ") == ["PLAIN", "ADD", "GATE", "HEAD"]
    assert (PLAIN, ADD, GATE, HEAD) == (0, 1, 2, 3)


def test_machine_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_source(text: str, options: list[str]) -> bytes:
        compiled.append(options)
        return text.encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_module, "compile_source", compile_source)
    for _ in range(2):
        assert cuda_module.machine_code("one", (9, 0), {"B": 1, "A": 2}) == b"one"
    assert compiled == [["--gpu-architecture=sm_90", "--std=c++17", "-default-device", "-DA=2", "-DB=1"]]
    for text, capability, macros in (("two", (9, 0), {"A": 2}), ("one", (10, 0), {"A": 2}), ("one", (9, 0), {"A": 3})):
        cuda_module.machine_code(text, capability, macros)
    assert len(compiled) == 4
    assert len(list((tmp_path / "quasr" / "cuda").iterdir())) == 4


@pytest.mark.parametrize("left", [b"", b"cod", b"code", bytes(100)], ids=["empty", "part", "whole", "zeros"])
def test_what_a_crash_left_in_the_cache_is_compiled_again(
    left: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_module, "compile_source", lambda text, options: b"code")
    cuda_module.machine_code("one", (9, 0), {})
    (kept,) = (tmp_path / "quasr" / "cuda").iterdir()
    good = kept.read_bytes()
    kept.write_bytes(left)
    assert cuda_module.machine_code("one", (9, 0), {}) == b"code"
    assert kept.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quasr").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_module, "compile_source", lambda text, options: b"code")
    assert cuda_module.machine_code("one", (9, 0), {}) == b"code"


def test_a_full_disk_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_module, "compile_source", lambda text, options: b"code")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert cuda_module.machine_code("one", (9, 0), {}) == b"code"
    assert list((tmp_path / "quasr" / "cuda").iterdir()) == []


def test_without_nvrtc_triton_takes_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_nvrtc", lambda: None)
    with pytest.raises(cuda_module.CompileError, match="NVRTC is not installed"):
        cuda_module.compile_source("", [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_module, "version", lambda: None)
    device = torch.device("cuda")
    assert cuda_row.lack(device, torch.float16) == "NVRTC, which compiles them, is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert cuda_row.lack(device, torch.float16) == "they need compute capability (9, 0), and this GPU has (8, 9)"


def driver_of(shared: int) -> SimpleNamespace:
    """The driver of a GPU whose programs may have so many bytes of shared memory."""

    def get(place: object, ordinal: int) -> int:
        ctypes.cast(place, ctypes.POINTER(ctypes.c_int))[0] = 40 + ordinal
        return 0

    def tell(found: object, attribute: int, place: ctypes.c_int) -> int:
        assert (attribute, place.value) == (97, 40)
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int))[0] = shared
        return 0

    return SimpleNamespace(cuDeviceGet=get, cuDeviceGetAttribute=tell)


def test_gpus_with_little_shared_memory_have_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(cuda_module, "version", lambda: (13, 0))
    monkeypatch.setattr(cuda_row, "_attention", lambda *_: None)
    for shared, lack in (
        (99 << 10, "they need 227 KB of shared memory a program, and this GPU has 99 KB"),
        (SHARED_MEMORY, None),
    ):
        monkeypatch.setattr(cuda_module, "_driver", partial(driver_of, shared))
        cuda_module.shared_memory.cache_clear()
        assert cuda_row.lack(device, torch.bfloat16) == lack
    cuda_module.shared_memory.cache_clear()


@gpu
def test_the_shared_memory_of_a_gpu_that_runs_them() -> None:
    assert cuda_module.shared_memory(torch.cuda.current_device()) >= SHARED_MEMORY


def test_the_table_says_why_there_are_none() -> None:
    kernels = dispatch.fastest(torch.device("cpu"), torch.float32)
    assert kernels.reason.endswith(
        "; one row by Triton too: for kernels in CUDA C++ they need a CUDA device, and this is cpu"
    )
    assert kernels.linear.__module__ == "quasr.kernels.triton_linear"


def options_for(architecture: int, half: int, **macros: int) -> list[str]:
    given = [f"-D{name}={value}" for name, value in (*macros.items(), ("TYPE_IS_HALF", half))]
    return [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "-default-device", *given]


@pytest.mark.slow
@pytest.mark.skipif(cuda_module.version() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("half", [0, 1])
def test_sources_compile(half: int) -> None:
    for bits, (rows, columns, mode) in product((16, 8, 4), SHAPES.values()):
        plan = cuda_row.plan_of(rows, columns, bits, 128 if bits == 4 else columns, mode, PROCESSORS)
        if plan is not None:
            options = options_for(90, half, **dict(plan.tile.macros))
            assert cuda_module.compile_source(cuda_module.source("row_product.cu"), options)


@pytest.mark.slow
@pytest.mark.skipif((cuda_module.version() or (0, 0)) < (12, 8), reason="NVRTC is not installed, or knows no Blackwell")
@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_attention_compiles(group: int, architecture: int) -> None:
    options = options_for(architecture, 0, GROUP=group)
    assert cuda_module.compile_source(cuda_module.source("row_attention.cu"), options)


@pytest.mark.skipif(cuda_module.version() is None, reason="NVRTC is not installed")
def test_a_head_whose_rows_are_cut_is_refused() -> None:
    macros = {"BITS": 8, "SLICES": 2, "CHUNKS": 4, "GROUPS": 4, "ROWS": 2, "MODE": HEAD, "NORM": 1, "GROUP": 4096}
    with pytest.raises(cuda_module.CompileError, match="best of whole logits"):
        cuda_module.compile_source(cuda_module.source("row_product.cu"), options_for(90, 0, **macros))


@pytest.mark.skipif(cuda_module.version() is None, reason="NVRTC is not installed")
def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(cuda_module.CompileError, match="nonsense"):
        cuda_module.compile_source("nonsense", ["--gpu-architecture=sm_90"])


def matrix(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> Matrix:
    weight = torch.randn(rows, columns, device=DEVICE).to(dtype) * columns**-0.5
    if bits == 16:
        return Matrix(weight)
    if bits == 8:
        return Matrix(*quantise_int8(weight, 0))
    codes, scale = quantise_int4(weight, group)
    return Matrix(pack(codes), scale)


def exact(weights: Matrix) -> Matrix:
    """The same numbers in fp32."""
    scale = None if weights.scale is None else weights.scale.float()
    return Matrix(reference.dequantise(Matrix(weights.weight if scale is not None else weights.weight.float(), scale)))


def gain(size: int, dtype: torch.dtype) -> Norm:
    return Norm((torch.rand(size, device=DEVICE) + 0.5).to(dtype), 1e-6)


def wide(norm: Norm) -> Norm:
    return Norm(norm.weight.float(), norm.eps)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


CASES = [
    (name, bits, group)
    for name, (bits, group) in product(SHAPES, ((16, 0), (8, 0), (4, 128), (4, 32)))
    if not (bits == 4 and SHAPES[name][2] == HEAD)
]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_products(name: str, bits: int, group: int, dtype: torch.dtype) -> None:
    rows, columns, mode = SHAPES[name]
    weights = matrix(rows * (2 if mode == GATE else 1), columns, bits, group, dtype)
    assert cuda_row.plan_of(rows, columns, bits, weights.group, mode, PROCESSORS) is not None
    x, norm = 3 * torch.randn(1, columns, device=DEVICE), gain(columns, dtype)
    x[0, columns // 3] = 300  # one channel far larger than others
    if mode == ADD:
        got = torch.randn(1, rows, device=DEVICE)
        expected = got.clone()
        cuda_row.add_linear(x.to(dtype), weights, got)
        reference.add_linear(x.to(dtype).float(), exact(weights), expected)
        assert error(got, expected) < SUMS_TOLERANCE
    elif mode == HEAD:
        tokens, logprobs = cuda_row.choose(x, norm, weights)
        logits = reference.linear(x, exact(weights), wide(norm))
        slack = SUMS_TOLERANCE * float(logits.abs().max())
        assert logits[0, tokens[0]] >= logits.max() - slack
        assert abs(float(logprobs[0] - logits.log_softmax(1)[0, tokens[0]])) < slack
    else:
        name = "gated_linear" if mode == GATE else "linear"
        got = getattr(cuda_row, name)(x, weights, norm)
        expected = getattr(reference, name)(x, exact(weights), wide(norm))
        assert got.dtype == dtype
        assert error(got, expected) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_goes_on(bits: int, bad: float) -> None:
    weights, norm = matrix(2048, 2048, bits, 128, torch.bfloat16), gain(2048, torch.bfloat16)
    x = torch.randn(1, 2048, device=DEVICE)
    x[0, 1027] = bad
    got = torch.zeros(1, 2048, device=DEVICE)
    cuda_row.add_linear(x.bfloat16(), weights, got)
    assert not got.isfinite().any()
    assert cuda_row.linear(x, weights, norm).isnan().all()
    if bits != 4:
        assert cuda_row.choose(x, norm, weights)[1].isnan().all()


@gpu
def test_of_equal_logits_the_first_wins() -> None:
    weights = torch.randn(4096, 1024, device=DEVICE).half()
    weights[[4000, 77, 1234]] = 3 * weights.abs().max()
    x, norm = torch.ones(1, 1024, device=DEVICE), Norm(torch.ones(1024, device=DEVICE).half(), 1e-6)
    assert cuda_row.choose(x, norm, Matrix(weights))[0].tolist() == [77]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 7, 63, 64, 65, 430, 512, 513, 1500])
def test_attention(length: int, group: int, dtype: torch.dtype) -> None:
    kv, size, offset = 4, 128, 9
    rates = 1 / 1e6 ** (torch.arange(0, size, 2, device=DEVICE).float() / size)
    heads = Heads(kv * group, kv, size, gain(size, dtype), gain(size, dtype), rates)
    x = 2 * torch.randn(1, heads.width, device=DEVICE).to(dtype)
    expected = [torch.full((kv, 1600, size), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    for store in expected:
        store[:, offset : offset + length] = torch.randn(kv, length, size, device=DEVICE).to(dtype)
    own = [store.clone() for store in expected]
    places = Places(*(torch.tensor([number], device=DEVICE) for number in (offset, length, False)))
    assert cuda_row.attends(1, heads)
    got = cuda_row.attend_step(x, own[0], own[1], places, heads)
    assert error(got, reference.attend_step(x, expected[0], expected[1], places, heads)) < 2 * TOLERANCE[dtype]
    # A rotated key is the difference of two numbers, which the reference has rounded to 16 bits.
    slack = 4 * TOLERANCE[dtype]
    for new, old in zip(own, expected, strict=True):
        assert torch.equal(new.isnan(), old.isnan())
        torch.testing.assert_close(new.nan_to_num(), old.nan_to_num(), atol=slack, rtol=slack)
    idle = replace(places, idle=torch.tensor([True], device=DEVICE))
    before = [store.clone() for store in own]
    assert not cuda_row.attend_step(x, own[0], own[1], idle, heads).any()
    for new, old in zip(own, before, strict=True):
        assert torch.equal(new.nan_to_num(), old.nan_to_num())


@gpu
def test_other_rows_and_shapes_are_tritons() -> None:
    weights, norm = matrix(4096, 2048, 8, 0, torch.float16), gain(2048, torch.float16)
    x = torch.randn(2, 2048, device=DEVICE)
    assert error(cuda_row.linear(x, weights, norm), reference.linear(x, exact(weights), wide(norm))) < 1e-3
    odd = matrix(34, 192, 8, 0, torch.float16)
    y = torch.randn(1, 192, device=DEVICE).half()
    assert error(cuda_row.linear(y, odd), reference.linear(y.float(), exact(odd))) < 1e-3


@gpu
def test_the_same_numbers_every_time_and_from_a_graph() -> None:
    weights, norm = matrix(4096, 2048, 8, 0, torch.bfloat16), gain(2048, torch.bfloat16)
    x = torch.randn(1, 2048, device=DEVICE)
    first = cuda_row.linear(x, weights, norm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda_row.linear(x, weights, norm)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, first)


@gpu
def test_the_table_takes_them() -> None:
    kernels = dispatch.fastest(DEVICE, torch.bfloat16)
    assert kernels.reason.endswith("; one row by kernels in CUDA C++")
    modules = {getattr(kernels, name).__module__ for name in ("linear", "add_linear", "choose", "attend_step")}
    assert modules == {"quasr.kernels.cuda_row"}
