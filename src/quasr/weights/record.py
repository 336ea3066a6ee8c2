"""What was fetched from where: a small JSON file beside the cached checkpoint, so that a re-upload is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from quasr.errors import CheckpointError, ModelNotFoundError, ResourceError
from quasr.model.config import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

RECORD_FILE = "quasr_source.json"

WANTED = (".safetensors", ".json", ".txt")
"""Endings of the files that a checkpoint needs: weights, config and tokenizer."""

GRAPH_FILES = tuple(f"{graph}.onnx{ending}" for graph in ("stem", "encoder", "decoder") for ending in ("", ".data"))
"""What `quasr export` writes beside those; ONNX files of other names are other programs'."""

CONFIG_FILES = ("config.json", "generation_config.json", "quasr_quantization.json")
"""All that tells a model's shape and how it is quantised."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What a hub says of a file; `git_sha1` is the id of a git blob, for files that have no `sha256`."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The wanted files of one revision."""

    commit: str
    files: dict[str, RemoteFile]

    def config_only(self) -> Listing:
        """The same without weights and tokenizer."""
        return Listing(self.commit, {name: file for name, file in self.files.items() if name in CONFIG_FILES})


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A fetched file as it was when its content had been checked."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """The content of the record."""

    hub: str
    id: str
    revision: str
    commit: str
    files: dict[str, LocalFile]


def wanted(name: str) -> bool:
    """Whether a hub's file belongs to the checkpoint. A name that leaves the folder never does."""
    path = PurePosixPath(name)
    return (
        (name.endswith(WANTED) or name in GRAPH_FILES)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
    )


def read_record(folder: Path) -> Source | None:
    """The record of a cached checkpoint; None where there is none, or (with a warning) none that can be read."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        raw = read_json(path)
        files = {str(name): LocalFile(int(file["size"]), str(file["sha256"])) for name, file in raw["files"].items()}
        return Source(str(raw["hub"]), str(raw["id"]), str(raw["revision"]), str(raw["commit"]), files)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("%s cannot be used (%s): the files are checked again", path, error)
        return None


def write_record(folder: Path, source: Source) -> None:
    """Writes the record whole or not at all."""
    fresh = folder / f"{RECORD_FILE}.new"
    fresh.write_text(json.dumps(asdict(source), indent=2) + "\n", encoding="utf-8")
    fresh.replace(folder / RECORD_FILE)


def identity(folder: Path) -> str:
    """Of a fetched checkpoint its hub, id and commit; of another folder names, sizes and times of its files."""
    record = read_record(folder)
    if record is not None:
        return f"{record.hub} {record.id} {record.commit}"
    files = sorted(path for path in folder.iterdir() if wanted(path.name))
    return json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def digest(path: Path) -> LocalFile:
    """Size and SHA-256 of a file's content."""
    with path.open("rb") as file:
        return LocalFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def content_fits(path: Path, remote: RemoteFile, local: LocalFile) -> bool:
    """Whether the content is what the hub announced, by the strongest of what it said."""
    if local.size != remote.size:
        return False
    if remote.sha256:
        return local.sha256 == remote.sha256
    return remote.git_sha1 is None or _git_sha1(path, local.size) == remote.git_sha1


def _git_sha1(path: Path, size: int) -> str:
    """The id that git gives to a file's content."""
    sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    sha1.update(path.read_bytes())
    return sha1.hexdigest()


def wrong_sizes(folder: Path, files: Mapping[str, LocalFile | RemoteFile]) -> list[str]:
    """Names of files that are not there in full."""
    return [name for name, file in files.items() if not _has_size(folder / name, file.size)]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def check_cached(folder: Path, model: str) -> Path:
    """The folder again, if the recorded sizes fit. Raises CheckpointError. Files without a record pass."""
    record = read_record(folder)
    wrong = wrong_sizes(folder, record.files) if record else []
    if wrong:
        raise CheckpointError(
            f"the cached copy of {model} is damaged ({', '.join(wrong[:3])}): run once without --offline to mend it"
        )
    return folder


def verify(folder: Path) -> list[str]:
    """Hashes every recorded file again and returns one line for each that is not as it was fetched.

    Raises ModelNotFoundError where the folder has no record: it was not fetched by quasr.
    """
    record = read_record(folder)
    if record is None:
        raise ModelNotFoundError(f"{folder} has no {RECORD_FILE}: only what quasr itself fetched can be verified")
    lines = []
    for name, file in record.files.items():
        path = folder / name
        if not _has_size(path, file.size):
            lines.append(f"{name} is missing or has not {file.size} bytes")
        elif digest(path).sha256 != file.sha256:
            lines.append(f"{name} has another content than when it was fetched")
    return lines


def report_changes(model: str, old: Source | None, new: Source) -> None:
    """Logs a warning if a revision's files are not what they were under the same name."""
    if old is None or old.files == new.files:
        return
    changed = sorted(name for name in old.files.keys() | new.files.keys() if old.files.get(name) != new.files.get(name))
    logger.warning(
        "%s was re-uploaded under the same revision %s: fetched anew: %s", model, new.revision, ", ".join(changed)
    )


def storage_error(error: OSError, model: str) -> ResourceError | None:
    """The error for a disk that is full or may not be written; None for any other cause."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full: {model} was not fetched whole: make room and run again to resume")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"{error.filename or 'the cache folder'} may not be written: choose another cache folder")
    return None
