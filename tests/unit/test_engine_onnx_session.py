"""Providers, threads, and how ONNX Runtime's absence is told. No torch here."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from quasr.engine import onnx_session
from quasr.engine.cores import has_vnni, physical_cores
from quasr.engine.onnx_session import Runtime, choose_runtime, open_session
from quasr.engine.token_table import TokenTable
from quasr.errors import MissingDependencyError, OptionError, ResourceError
from quasr.export.manifest import EmbeddingTable

if TYPE_CHECKING:
    from pathlib import Path


def only(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    module = SimpleNamespace(get_available_providers=lambda: list(providers))
    monkeypatch.setattr(onnx_session, "_onnxruntime", lambda: module)


def test_auto_is_the_cpu_even_where_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "CUDAExecutionProvider", "CPUExecutionProvider")
    found = choose_runtime()
    assert (found.provider, found.device, found.threads) == ("cpu", "cpu", physical_cores())
    assert choose_runtime("cuda", 3).device == "cuda"


@pytest.mark.parametrize(("threads", "ahead"), [(None, False), (4, True), (5, False), (8, False)])
def test_the_next_clip_is_encoded_ahead_where_there_are_as_many_cores_again(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, ahead: bool
) -> None:
    only(monkeypatch, "CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.setattr(onnx_session, "physical_cores", lambda: 8)
    found = choose_runtime("cpu", threads)
    assert found.ahead is ahead
    assert ("the next clip is encoded beside the decoding: there are 8 cores" in found.reasons) is ahead
    assert not choose_runtime("cuda", threads).ahead


@pytest.mark.parametrize(
    ("provider", "package"), [("cuda", "pip install onnxruntime-gpu"), ("tensorrt", "onnxruntime-gpu tensorrt")]
)
def test_a_missing_provider_names_its_package(monkeypatch: pytest.MonkeyPatch, provider: str, package: str) -> None:
    only(monkeypatch, "CPUExecutionProvider")
    with pytest.raises(MissingDependencyError, match=f"no provider {provider}: .*{package}"):
        choose_runtime(provider)


def test_wrong_names_and_counts() -> None:
    with pytest.raises(OptionError, match="unknown provider 'gpu': use auto, cpu, cuda, tensorrt"):
        choose_runtime("gpu")
    for threads in (0, -1, 1025, 1 << 62):
        with pytest.raises(OptionError, match=f"threads is {threads}: it must be at least 1 and at most 1024$"):
            choose_runtime(threads=threads)
    assert choose_runtime(threads=1024).threads == 1024


def test_without_onnx_runtime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed: pip install onnxruntime"):
        choose_runtime()


def test_a_provider_that_does_not_start_is_no_silent_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime itself goes on with the CPU where CUDA's libraries are missing."""
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    options = SimpleNamespace(add_session_config_entry=lambda *_: None)
    module = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=lambda: options,
        InferenceSession=lambda *_, **__: session,
    )
    monkeypatch.setattr(onnx_session, "_onnxruntime", lambda: module)
    with pytest.raises(ResourceError, match=r"provider cuda does not start here: .* --provider cpu"):
        open_session(tmp_path / "x.onnx", choose_runtime("cuda"))
    assert open_session(tmp_path / "x.onnx", choose_runtime("cpu")) is session


def test_two_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    for index, (package, core) in enumerate([(0, 0), (0, 1), (0, 0), (1, 0), (1, 0)]):
        folder = tmp_path / f"cpu{index}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    assert physical_cores(tmp_path) == 3
    assert physical_cores(tmp_path / "nothing") == 5


@pytest.mark.parametrize(
    ("flags", "there"), [("avx2 avx512_vnni", True), ("sse avx_vnni", True), ("avx2 avx512f", False)]
)
def test_processors_with_products_of_uint8_and_int8(flags: str, there: bool, tmp_path: Path) -> None:
    features = tmp_path / "cpuinfo"
    features.write_text(f"processor : 0\nflags\t\t: fpu {flags} sse4_2\nprocessor : 1\n")
    assert has_vnni(features) is there
    assert not has_vnni(tmp_path / "nothing")


@pytest.mark.parametrize("there", [True, False])
def test_exact_products_where_fast_ones_saturate(there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries: dict[str, str] = {}
    options = SimpleNamespace(add_session_config_entry=entries.__setitem__)
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    runtime = SimpleNamespace(SessionOptions=lambda: options, InferenceSession=lambda *_, **__: session)
    monkeypatch.setattr(onnx_session, "_onnxruntime", lambda: runtime)
    monkeypatch.setattr(onnx_session, "has_vnni", lambda: there)
    open_session(tmp_path / "x.onnx", Runtime("cpu", 1))
    assert ("session.x64quantprecision" in entries) is not there


def test_rows_of_the_token_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (5, 8), np.uint8)
    scale = rng.random((5, 2), np.float32)
    (tmp_path / "data").write_bytes(b"1234" + codes.tobytes() + scale.tobytes())
    table = EmbeddingTable("data", 4, (5, 8), "uint8", group=4, scale_offset=44, scale_shape=(5, 2))
    rows = TokenTable(tmp_path, table).rows([3, 0, 3])
    expected = [[(int(codes[t, c]) - 128) * scale[t, c // 4] for c in range(8)] for t in (3, 0, 3)]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert rows.dtype == np.float32
    assert TokenTable(tmp_path, table).rows([]).shape == (0, 8)


def test_rows_of_a_token_table_of_nibbles(tmp_path: Path) -> None:
    """Two codes in a byte, the even column in the low half; 8 stands for 0."""
    data, scale = bytes([0x0F, 0x80, 0x21, 0x43]), np.array([[0.5], [2.0]], np.float32)
    (tmp_path / "data").write_bytes(data + scale.tobytes())
    table = EmbeddingTable("data", 0, (2, 4), "uint4", group=4, scale_offset=4, scale_shape=(2, 1), zero_point=8)
    rows = TokenTable(tmp_path, table).rows([1, 0])
    assert rows.tolist() == [[-14, -12, -10, -8], [3.5, -4, -4, 0]]
    assert TokenTable(tmp_path, table).rows([]).shape == (0, 4)
