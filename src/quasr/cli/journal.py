"""What is done already: a record in the output folder, by which a job that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from quasr.errors import OptionError
from quasr.output.files import TEMPORARY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from quasr.cli.inputs import Input

JOURNAL_FILE = ".quasr.jsonl"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a transcript depends on beside its audio: `model` by `weights.record.identity`, and the options by name.

    Batch size, device and threads are not among them: they change how fast a text comes, not what it says.
    """

    model: str
    options: Mapping[str, Any]

    def of(self, item: Input) -> str | None:
        """SHA-256 of all that the transcript of `item` depends on; None where its audio cannot be read ahead.

        A file counts by its content. A URL counts by its text, so that what is done is not fetched again.
        """
        audio = _audio_hash(item)
        if audio is None:
            return None
        parts = [audio, self.model, dict(self.options), item.language, item.context]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Journal:
    """The outputs of a folder that are complete: a line before the files are written, and one when they are there.

    After a crash between the two, the first line's hashes say whether the files are complete; files with both lines
    may have been corrected by hand, and are left alone. A line that a crash cut off is passed over. Of several runs in
    one folder one at a time writes its lines and files, so that the last lines are those of the files that are there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL_FILE
        self._records = _read(self._path)
        self._file: IO[str] | None = None

    def key(self, name: str) -> str | None:
        """The fingerprint that the output `name` was made with; None if it is not there in full."""
        record = self._records.get(name)
        if record is None:
            return None
        paths = {self._folder / file: digest for file, digest in record["files"].items()}
        if record.get("done"):
            return record["key"] if all(path.is_file() for path in paths) else None
        return record["key"] if all(_hash(path) == digest for path, digest in paths.items()) else None

    @contextmanager
    def writing(self, name: str, key: str | None, texts: Mapping[str, str]) -> Iterator[None]:
        """Around the writing of `texts`, by path below the folder. Without a key only that older lines about that name
        count no more is written.

        Raises OptionError where the journal cannot be written.
        """
        with self._telling():
            self._folder.mkdir(parents=True, exist_ok=True)
        with _held(self._folder):
            if key is not None or self._path.is_file():
                self.begin(name, key or "", texts)
            yield
            if key is not None:
                self.end(name)

    def begin(self, name: str, key: str, texts: Mapping[str, str]) -> None:
        """Records what is about to be written: texts by path below the folder.

        Raises OptionError where the journal cannot be written.
        """
        files = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts.items()}
        self._records[name] = {"output": name, "key": key, "files": files}
        self._write(self._records[name])

    def end(self, name: str) -> None:
        """Records that all of it is written. Raises OptionError where the journal cannot be."""
        record = self._records[name]
        record["done"] = True
        self._write({"output": name, "key": record["key"], "done": True})

    def sweep(self, outputs: Iterable[str]) -> None:
        """Removes what a killed run of this job left half-written beside `outputs`, unless another run is at work here.

        Raises OptionError where the journal cannot be written.
        """
        if not self._path.is_file():
            return
        with self._telling():
            self._file = self._file or _open(self._path)
            if _alone(self._file):
                for folder in {(self._folder / name).parent for name in outputs}:
                    for path in folder.glob(TEMPORARY):
                        path.unlink(missing_ok=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._telling():
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = _open(self._path)
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OptionError(f"{self._path} cannot be written ({error.strerror}): choose another folder") from error

    def close(self) -> None:
        """Closes the file. Raises OptionError where what it still holds cannot be written."""
        if self._file is not None:
            with self._telling():
                self._file.close()


def _audio_hash(item: Input) -> str | None:
    if item.is_url:
        return f"url {item.source}"
    return None if item.path is None else _hash(item.path)


def _hash(path: Path) -> str | None:
    """SHA-256 of a file's content; None where it cannot be read, which is said when its turn comes.

    None, too, for what is no file: a pipe could not be read again, and a device never ends.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def _open(path: Path) -> IO[str]:
    """The journal, with a lock that others may share: as long as it is held somebody is at work."""
    file = path.open("a", encoding="utf-8", newline="\n")
    _lock(file, "LOCK_SH")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Nobody else holds the folder meanwhile. Where there are no locks nobody knows."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder, and another system none that may not be listed
        yield
        return
    try:
        _lock(handle, "LOCK_EX")
        yield
    finally:
        os.close(handle)


def _alone(file: IO[str]) -> bool:
    """Whether nobody else holds the lock. Where there are no locks nobody knows."""
    alone = _lock(file, "LOCK_EX", "LOCK_NB")
    _lock(file, "LOCK_SH")
    return alone


def taken(file: IO[str]) -> bool:
    """Locks the file for this run alone; whether another has done so. Where there are no locks nobody knows."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without any
        return False
    return False


def _lock(file: IO[str] | int, *kinds: str) -> bool:
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, sum(getattr(fcntl, kind) for kind in kinds))
    except OSError:  # another's lock, or a file system without any
        return False
    return True


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}): choose another folder") from error
    records: dict[str, dict[str, Any]] = {}
    for record in map(_record, lines):
        if "files" in record:
            records[record["output"]] = record
        elif "done" in record and record["output"] in records:
            begun = records[record["output"]]
            # Without locks another run's files may have come between: then the hashes decide.
            begun["done"] = begun.get("done", True) and record.get("key") == begun["key"]
    return records


def _record(line: str) -> dict[str, Any]:
    """One line's object; empty for a line that was cut off, or is not ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if _is_record(record) else {}


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("output"), str):
        return False
    return "files" not in record or (isinstance(record["files"], dict) and isinstance(record.get("key"), str))
