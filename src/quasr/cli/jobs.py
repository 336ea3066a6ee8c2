"""`--jobs`: a manifest of inputs, each with options of its own, and one JSON line of result for each."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from quasr.cli.inputs import Input, single
from quasr.cli.journal import taken
from quasr.cli.terminal import result
from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from quasr.types import Transcript

FIELDS = ("path", "url", "id", "language", "context")

RESULT_FIELDS = ("key", "text", "error")
"""What only results have; each has one of them at least."""

LONE_SURROGATES = "backslashreplace"
"""What UTF-8 cannot say is written as JSON's own escape, which is spelled like Python's."""


def read_jobs(manifest: Path) -> list[Input]:
    """The inputs of a JSONL manifest: `path` (relative to the manifest) or `url`; optionally id, language, context.

    A row without `id` has its path or URL for one. Raises OptionError, with the line's number.
    """
    rows = list(_json_lines(manifest))
    if not rows:
        raise OptionError(f"{manifest} is empty: give one JSON object with a path or url on each line")
    found: dict[str, Input] = {}
    for number, row in rows:
        item = _input(manifest, number, row)
        if found.setdefault(item.name, item) is not item:
            raise OptionError(f"{manifest}, line {number}: id {item.name!r} is there twice: give each job its own")
    return list(found.values())


class JobLines:
    """The results on standard output, or in a file that a later run goes on with: the last line of an id counts.

    Lines of errors, and one that a crash cut off, are made again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines = {} if path is None else _read_results(path)
        self._file: IO[str] | None = None

    @property
    def style(self) -> Mapping[str, Any] | None:
        """There is one style; on standard output nothing is kept."""
        return None if self._path is None else {}

    def key(self, name: str) -> str | None:
        """The fingerprint that the result of the job `name` was made with; None if there is none, or an error."""
        line = self._lines.get(name, {})
        return None if "error" in line else line.get("key")

    def start(self, pending: Sequence[Input]) -> None:
        """Takes the old lines of what is done now out of the file, all at once, and keeps other runs out of it.

        Raises OptionError where it cannot be written, or another run is writing there.
        """
        if self._path is None:
            return
        again = {item.name for item in pending}
        kept = [_dumps(line) for name, line in self._lines.items() if name not in again]
        with self._telling():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._append() as old:
                if sys.platform == "win32":
                    old.close()  # there an open file cannot be replaced
                self._replace(kept)
                self._file = self._append()

    def put(self, item: Input, transcript: Transcript, key: str | None) -> None:
        """Adds the line of a job that is done."""
        self._add({**_head(item), **({"key": key} if key else {}), **transcript.to_dict()})

    def fail(self, item: Input, message: str) -> None:
        """Adds the line of a job that failed."""
        self._add({**_head(item), "error": message})

    def close(self) -> None:
        """Closes the file. Raises OptionError where what it still holds cannot be written."""
        if self._file is not None:
            with self._telling():
                self._file.close()

    def _append(self) -> IO[str]:
        """The file, locked. Raises OptionError where another run has the lock, or has just put a new file there."""
        assert self._path is not None
        file = self._path.open("a", encoding="utf-8", errors=LONE_SURROGATES, newline="\n")
        if taken(file) or not os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
            file.close()
            raise OptionError(f"another run is writing {self._path}: wait for its end, or choose another file")
        return file

    def _replace(self, lines: Sequence[str]) -> None:
        assert self._path is not None
        fresh = self._path.with_name(f".{self._path.name}.tmp")
        fresh.write_text("".join(lines), encoding="utf-8", errors=LONE_SURROGATES, newline="\n")
        os.replace(fresh, self._path)

    def _add(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            result(_dumps(line))
            return
        with self._telling():
            self._file.write(_dumps(line))
            self._file.flush()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OptionError(f"{self._path} cannot be written ({error.strerror}): choose another file") from error


def _input(manifest: Path, number: int, row: Any) -> Input:
    if not isinstance(row, dict) or ("path" in row) == ("url" in row):
        raise OptionError(f'{manifest}, line {number}: expected an object with a "path" or a "url"')
    given = {name: value for name, value in row.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS:
            raise OptionError(f"{manifest}, line {number}: unknown field {name!r}: there are {', '.join(FIELDS)}")
        if not (isinstance(value, str) or (name == "id" and isinstance(value, int))):
            raise OptionError(f"{manifest}, line {number}: {name} is {value!r}, not text")
    if "://" not in given.get("url", "://"):
        raise OptionError(f"{manifest}, line {number}: url is {given['url']!r}, which is none")
    audio = given.get("url") or given.get("path", "")
    # Not the `/` of paths: that makes a plain "-" of the file "./-", which would be standard input.
    item = single(audio if "url" in given else os.path.join(manifest.parent, audio))
    label = item.label if "url" in given else audio
    name = str(given.get("id", audio))
    return Input(item.source, label, name, given.get("language"), given.get("context"))


def _head(item: Input) -> dict[str, str]:
    return {"id": item.name, **({"url": item.source} if item.is_url else {"path": item.label})}


def _dumps(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    if not path.is_file():
        raise OptionError(f"{path} is no file that could be gone on with: leave -o out to get lines on standard output")
    lines = [line for _, line in _json_lines(path, torn=True)]
    if not all(map(_is_result, lines)):
        raise OptionError(f"{path} has lines that are no results of jobs: choose another file")
    return {line["id"]: line for line in lines}


def _is_result(line: Any) -> bool:
    """Rows of a manifest may have an id as well, and must not be taken for results and replaced."""
    return isinstance(line, dict) and isinstance(line.get("id"), str) and not line.keys().isdisjoint(RESULT_FIELDS)


def _json_lines(path: Path, *, torn: bool = False) -> list[tuple[int, Any]]:
    """(number, value) of each line that is not blank. With `torn` a last line without its end is left out."""
    try:
        data = path.read_bytes()
        lines = (data[: data.rfind(b"\n") + 1] if torn else data).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text: give a JSONL file") from error
    return [(number, _parsed(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}, line {number}: not valid JSON") from error
