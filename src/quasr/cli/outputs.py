"""Where transcripts go: standard output, or files in a folder with the journal of what is done."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from quasr.cli.journal import Journal
from quasr.cli.terminal import note, result
from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from quasr.cli.inputs import Input
    from quasr.output import LineRules
    from quasr.types import Transcript


@dataclass(frozen=True, slots=True)
class Style:
    """The formats to write, and the lines of subtitles."""

    formats: tuple[str, ...]
    rules: LineRules


def check_place(folder: Path) -> None:
    """Raises OptionError where nothing could be written into the folder, or where it could not be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise OptionError(f"{folder} cannot be written to: choose another output folder")


class Outputs(Protocol):
    """Takes what comes out. `style` is what its content depends on; None where nothing is kept for a later run."""

    @property
    def style(self) -> Mapping[str, Any] | None: ...

    def key(self, name: str) -> str | None:
        """The fingerprint that the output of the input `name` was made with; None if it is not there in full."""
        ...

    def start(self, pending: Sequence[Input]) -> None:
        """Comes once, before the first output."""
        ...

    def put(self, item: Input, transcript: Transcript, key: str | None) -> None:
        """Keeps or prints one transcript, with the fingerprint that it was made with."""
        ...

    def fail(self, item: Input, message: str) -> None:
        """Takes the one line that says why there is no transcript."""
        ...

    def close(self) -> None:
        """Ends it, whatever is missing."""
        ...


class Printed:
    """Transcripts on standard output."""

    style = None

    def __init__(self, style: Style) -> None:
        self._style = style
        self._many = False

    def key(self, name: str) -> str | None:
        """Nothing is kept."""
        return None

    def start(self, pending: Sequence[Input]) -> None:
        """Several are told apart by their names on standard error."""
        self._many = len(pending) > 1

    def put(self, item: Input, transcript: Transcript, key: str | None) -> None:
        """Prints it."""
        from quasr.output import render

        if self._many:
            note(f"{item.label}:")
        result(render(transcript, self._style.formats[0], self._style.rules))

    def fail(self, item: Input, message: str) -> None:
        """Standard output has transcripts alone."""

    def close(self) -> None:
        """There is nothing to close."""


class Files:
    """Files below a folder, each there whole or not at all, and then in its journal."""

    def __init__(self, folder: Path, style: Style) -> None:
        self._folder = folder
        self._style = style
        self._journal = Journal(folder)

    @property
    def style(self) -> Mapping[str, Any]:
        """Formats and line rules."""
        return asdict(self._style)

    def key(self, name: str) -> str | None:
        """From the journal, if the files are there."""
        return self._journal.key(name)

    def start(self, pending: Sequence[Input]) -> None:
        """Removes what a killed run left half-written. The folder is made with its first file.

        Raises OptionError where it could not be: hours of work would be lost.
        """
        check_place(self._folder)
        self._journal.sweep(item.name for item in pending)

    def put(self, item: Input, transcript: Transcript, key: str | None) -> None:
        """Writes the files; with a key, records them."""
        from quasr.output import render, write_files

        name, style = PurePosixPath(item.name), self._style
        texts = {f"{name}.{fmt}": render(transcript, fmt, style.rules) for fmt in style.formats}
        with self._journal.writing(item.name, key, texts):
            paths = write_files(transcript, self._folder / name.parent, name.name, style.formats, style.rules)
        for path in paths:
            note(f"wrote {path}")

    def fail(self, item: Input, message: str) -> None:
        """A failure leaves no file: the next run tries again."""

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()
