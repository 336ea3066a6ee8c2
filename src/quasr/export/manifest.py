"""`quasr_onnx.json`: what an ONNX folder holds and where. No torch and no onnx here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quasr.errors import CheckpointError
from quasr.model.config import read_json

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_FILE = "quasr_onnx.json"

VERSION = 1
"""Of the folder's format. A reader refuses what is newer than itself."""

ZERO_POINT = 128
"""What stands for 0 in 8 bits."""

NIBBLE_ZERO_POINT = 8
"""What stands for 0 in 4 bits."""

TABLE_BITS = {"uint4": 4, "uint8": 8, "int8": 8, "float32": 32}
"""Of one number, for each dtype that a token table may have."""

AGAIN = "export the model again"


@dataclass(frozen=True, slots=True)
class File:
    """One file of the folder."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """Sizes of the graphs' inputs and outputs. `positions` is the length of the rotary tables."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    positions: int
    mel_bins: int
    chunk_frames: int
    chunk_tokens: int
    window_tokens: int
    cache_dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Where the token table lies: `shape` (vocab, hidden) of `dtype` from byte `offset` of `file` on.

    uint4 (two in a byte, the even column in the low half), uint8 and int8: row = (codes - zero_point) * scale, a
    float32 scale for every `group` codes, (vocab, hidden / group) from `scale_offset` on. float32: the rows themselves.
    """

    file: str
    offset: int
    shape: tuple[int, int]
    dtype: str
    group: int = 0
    scale_offset: int = 0
    scale_shape: tuple[int, int] = (0, 0)
    zero_point: int = ZERO_POINT

    @property
    def end(self) -> int:
        """The byte of `file` behind the last of rows and scales."""
        rows = self.offset + math.prod(self.shape) * TABLE_BITS[self.dtype] // 8
        return max(rows, self.scale_offset + math.prod(self.scale_shape) * TABLE_BITS["float32"] // 8)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the decoder's data file: `shape` of `dtype`, little-endian, from byte `offset` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`weights` is fp32, int8 or int4, `group` of the decoder's layers, 0 where a scale is for a whole row.

    `source` tells where the weights came from, with the hash of each file. `decoder` says by their names where the
    decoder's tensors lie, for those that run it without its graph; empty in folders of before that was written.
    """

    weights: str
    group: int
    activations: str
    graph: GraphFacts
    embedding: EmbeddingTable
    files: dict[str, File]
    source: dict[str, Any]
    quasr: str
    decoder: dict[str, Tensor] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, for `read_manifest`."""
        return asdict(self)


def is_onnx_folder(folder: Path) -> bool:
    """Whether `folder` was written by `quasr export`."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest and compares the sizes of all files with it; their hashes it does not.

    Raises CheckpointError for a manifest that is missing, damaged or of a newer version, and for missing or cut files.
    """
    path = folder / MANIFEST_FILE
    raw = read_json(path)
    version = raw.get("version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} tells no version: {AGAIN}")
    if version > VERSION:
        raise CheckpointError(
            f"{folder} was written by a newer quasr (format {version}, this one reads up to {VERSION}): upgrade quasr"
        )
    try:
        manifest = _parse(raw)
        _check_facts(manifest.graph)
        _check_table(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {AGAIN}") from error
    _check_files(folder, manifest)
    return manifest


def _parse(raw: dict[str, Any]) -> Manifest:
    table = raw["embedding"]
    return Manifest(
        weights=str(raw["weights"]),
        group=int(raw["group"]),
        activations=str(raw["activations"]),
        graph=GraphFacts(**raw["graph"]),
        embedding=EmbeddingTable(
            **{**table, "shape": _pair(table, "shape"), "scale_shape": _pair(table, "scale_shape")}
        ),
        files={_plain(name): File(int(file["size"]), str(file["sha256"])) for name, file in raw["files"].items()},
        source=dict(raw["source"]),
        quasr=str(raw["quasr"]),
        decoder={name: _tensor(place) for name, place in raw.get("decoder", {}).items()},
        version=int(raw["version"]),
    )


def _tensor(raw: dict[str, Any]) -> Tensor:
    tensor = Tensor(int(raw["offset"]), tuple(map(int, raw["shape"])), str(raw["dtype"]))
    if tensor.offset < 0 or min(tensor.shape, default=1) < 1:
        raise ValueError(f"a tensor of {str(tensor.shape)[:80]} at {str(tensor.offset)[:80]}")
    return tensor


def _pair(table: dict[str, Any], name: str) -> tuple[int, int]:
    first, second = table[name]
    return int(first), int(second)


def _plain(name: str) -> str:
    if "/" in name or "\\" in name:
        raise ValueError(f"{name[:80]!r} is no file of the folder")
    return name


def _check_facts(graph: GraphFacts) -> None:
    """Raises ValueError for a size that is no whole number from 1 on."""
    for name, size in asdict(graph).items():
        if name != "cache_dtype" and (not isinstance(size, int) or size < 1):
            raise ValueError(f"the graph's {name} is {str(size)[:80]!r}")


def _check_table(manifest: Manifest) -> None:
    """Raises ValueError where the token table is not the graph's, or not inside its file."""
    table, graph = manifest.embedding, manifest.graph
    for name in ("offset", "group", "scale_offset", "zero_point"):
        number = getattr(table, name)
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"the embedding's {name} is {str(number)[:80]!r}")
    if table.file not in manifest.files or table.dtype not in TABLE_BITS:
        raise ValueError("the embedding's file or dtype is unknown")
    if bool(table.group) == (table.dtype == "float32") or (table.group and graph.hidden % table.group):
        raise ValueError(f"an embedding in {table.dtype} has no groups of {table.group}")
    scales = (graph.vocab, graph.hidden // table.group) if table.group else (0, 0)
    if (table.shape, table.scale_shape) != ((graph.vocab, graph.hidden), scales):
        raise ValueError("the embedding's shapes are not the graph's")
    if table.end > manifest.files[table.file].size:
        raise ValueError(f"the embedding goes beyond the end of {table.file}")


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.size:
            raise CheckpointError(f"{path} is missing or has not {file.size} bytes: {AGAIN}, or fetch it again")
