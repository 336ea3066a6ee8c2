"""The safetensors reader on sound, damaged and forged files."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from quasr.errors import CheckpointError
from quasr.weights.shard import DTYPES, Shard
from quasr.weights.staging import Staging, Stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOUND = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
RELAXED = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def forge(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with Shard(path) as shard:
        staging = Staging(torch.device("cpu"))
        return {name: Stored(shard, name, DTYPES[e.dtype], staging).whole() for name, e in shard.entries.items()}


def open_only(path: Path) -> None:
    with Shard(path):
        pass


def accepts(path: Path, read: Callable[[Path], object] = read_all) -> bool:
    """True if it reads; a CheckpointError of one line is the only other way out."""
    try:
        read(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert "\n" not in message
    return False


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
    except SafetensorError:
        return False


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(SOUND)
    got = read_all(tmp_path / "x")
    assert got.keys() == {"a", "b"}
    assert torch.equal(got["a"], torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    assert torch.equal(got["b"], torch.ones(4, dtype=torch.bfloat16))


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        forge(b"{}", length=2**63),
        forge(b"{}", length=3),
        forge(b"not json"),
        forge(b"[1]"),
        forge(b"\xff\xfe"),
        forge(b"[" * 100_000),
        forge(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8)),
        *(
            forge(json.dumps({"a": one}).encode(), bytes(8))
            for one in (
                entry(data_offsets=[0, 2**70]),
                entry(data_offsets=[-8, 0]),
                entry(data_offsets=[8, 0]),
                entry(data_offsets=[0]),
                entry(data_offsets=[0, 8, 9]),
                entry(data_offsets="08"),
                entry(data_offsets=[0.0, 8.0]),
                entry(data_offsets=[False, 8]),
                entry(data_offsets=[None, 8]),
                entry(shape=[-2]),
                entry(shape=[-1, -2]),
                entry(shape=2),
                entry(shape=["2"]),
                entry(shape=[3]),
                entry(shape=[2**63, 2**63]),
                entry(dtype="F33"),
                entry(dtype=["F32"]),
                entry(dtype=None),
                {"dtype": "F32"},
                [],
                None,
                "x",
            )
        ),
        forge(json.dumps({"a": entry()}).encode(), bytes(9)),
        forge(json.dumps({"a": entry()}).encode(), bytes(7)),
        forge(json.dumps({"a": entry(), "b": entry()}).encode(), bytes(8)),
        forge(json.dumps({"a": entry(), "b": entry(data_offsets=[12, 20])}).encode(), bytes(20)),
    ],
)
def test_forged_files(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x").write_bytes(raw)
    assert not accepts(tmp_path / "x")
    assert not library_accepts(tmp_path / "x")


def test_unaligned_tensors(tmp_path: Path) -> None:
    """The format allows a 4-byte number at an odd offset."""
    header = {
        "odd": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (1 - len(raw) % 2)
    (tmp_path / "x").write_bytes(forge(raw, bytes(2) + struct.pack("<2f", 1.5, -2.0)))
    assert read_all(tmp_path / "x")["a"].tolist() == [1.5, -2.0]


def test_folder_and_missing_file(tmp_path: Path) -> None:
    assert not accepts(tmp_path)
    assert not accepts(tmp_path / "none")


@RELAXED
@given(at=st.integers(0, len(SOUND) - 1), value=st.integers(0, 255))
def test_one_changed_byte_is_read_as_the_library_reads_it_or_refused(tmp_path: Path, at: int, value: int) -> None:
    raw = bytearray(SOUND)
    raw[at] = value
    (tmp_path / "x").write_bytes(raw)
    if accepts(tmp_path / "x"):
        assert library_accepts(tmp_path / "x")


@RELAXED
@given(raw=st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x").write_bytes(raw)
    assert accepts(tmp_path / "x") <= library_accepts(tmp_path / "x")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OFFSETS = st.integers(-16, 64) | st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63)])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "C64", "F4"]) | JSON_VALUES,
        "shape": st.lists(OFFSETS, max_size=3) | JSON_VALUES,
        "data_offsets": st.tuples(OFFSETS, OFFSETS) | JSON_VALUES,
    }
)


@pytest.mark.slow
@RELAXED
@given(header=st.dictionaries(st.text(max_size=6), ENTRIES | JSON_VALUES, max_size=3), size=st.integers(0, 64))
def test_any_header(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    (tmp_path / "x").write_bytes(forge(json.dumps(header).encode(), bytes(size)))
    assert accepts(tmp_path / "x", read=open_only) <= library_accepts(tmp_path / "x")
