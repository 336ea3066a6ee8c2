"""`quasr_onnx.json`: what an ONNX folder holds and where. No torch and no onnx here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    uint8 and int8: row = (codes - zero_point) * scale, a float32 scale for every `group` codes, (vocab, hidden / group)
    from `scale_offset` on. float32: the rows themselves.
    """

    file: str
    offset: int
    shape: tuple[int, int]
    dtype: str
    group: int = 0
    scale_offset: int = 0
    scale_shape: tuple[int, int] = (0, 0)
    zero_point: int = ZERO_POINT


@dataclass(frozen=True, slots=True)
class Manifest:
    """`weights` is fp32, int8 or int4, `group` of the decoder's layers, 0 where a scale is for a whole row.

    `source` tells where the weights came from, with the hash of each file.
    """

    weights: str
    group: int
    activations: str
    graph: GraphFacts
    embedding: EmbeddingTable
    files: dict[str, File]
    source: dict[str, Any]
    quasr: str
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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
        version=int(raw["version"]),
    )


def _pair(table: dict[str, Any], name: str) -> tuple[int, int]:
    first, second = table[name]
    return int(first), int(second)


def _plain(name: str) -> str:
    if "/" in name or "\\" in name:
        raise ValueError(f"{name[:80]!r} is no file of the folder")
    return name


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.size:
            raise CheckpointError(f"{path} is missing or has not {file.size} bytes: {AGAIN}, or fetch it again")
