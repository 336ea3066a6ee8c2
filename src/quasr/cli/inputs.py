"""What is to be transcribed: files, folders, globs, URLs and standard input, each once, each with its output's name."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasr.cli.terminal import note
from quasr.errors import AudioDecodeError, AudioNotFoundError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quasr.errors import AudioError

STDIN = "-"

MEDIA = re.compile(
    r"\.(?:"
    r"3g2|3gp|aac|ac3|aif|aifc|aiff|amr|ape|asf|au|avi|awb|caf|dts|flac|flv|gsm|m2ts|m4a|m4b|m4v|mka|mkv|mov|"
    r"mp2|mp3|mp4|mpeg|mpg|mts|mxf|oga|ogg|ogv|opus|ra|rm|snd|spx|tta|vob|voc|w64|wav|webm|wma|wmv|wv"
    r")",
    re.IGNORECASE,
)
"""Endings of the files that are taken out of a folder. A file that is named itself may have any."""


LONGEST_STEM = 255 - len(".json")
"""Bytes. Common file systems take names of 255."""


@dataclass(frozen=True, slots=True)
class Input:
    """One input. `source` is a path, a URL or `-`; `label` is what messages call it, without a URL's secrets.

    `name` is unique: the output's path below the output folder without ending, or the id of a job. `language` and
    `context` are of its own, None for the command's. With an `error` there is nothing to read.
    """

    source: str
    label: str
    name: str
    language: str | None = None
    context: str | None = None
    error: AudioError | None = None

    @property
    def is_url(self) -> bool:
        """Whether it is fetched. A `file://` URL is a path."""
        from quasr.audio.source import Kind, kind_of

        return kind_of(self.source) is Kind.URL

    @property
    def path(self) -> Path | None:
        """The file; None for what is none or cannot be one."""
        from quasr.audio.source import path_of

        if self.source == STDIN or self.is_url or self.error:
            return None
        try:
            path = path_of(self.source)
        except AudioNotFoundError:
            return None
        return None if "\0" in path else Path(path)


def gather(arguments: Iterable[str], *, recursive: bool) -> list[Input]:
    """The inputs in the order of the arguments; inside folders and globs sorted, and each only once.

    A pattern that no file is named like is expanded. A folder needs `recursive`; its media files keep their place in
    its tree as their names. What cannot be taken is an input with an error.
    """
    found: dict[str, Input] = {}
    for argument in arguments:
        for source in _expand(argument):
            for item in _folder(source, recursive) if os.path.isdir(source) else (single(source),):
                found.setdefault(_identity(item), item)
    return list(found.values())


def single(source: str) -> Input:
    """The input of one path, URL or `-`, named by its stem."""
    from quasr.audio.source import url_name

    if source == STDIN:
        asked = (
            AudioNotFoundError("standard input is a terminal: pipe audio into quasr") if sys.stdin.isatty() else None
        )
        return Input(source, "standard input", "stdin", error=asked)
    label = url_name(source) if "://" in source else source
    return Input(source, label, Path(label).stem or "transcript")


def check_names(inputs: Sequence[Input], folder: Path) -> None:
    """Raises OptionError where two inputs would write to the same files below `folder`."""
    seen: dict[str, Input] = {}
    for item in inputs:
        first = seen.setdefault(item.name, item)
        if first is not item and not (item.error or first.error):
            raise OptionError(
                f"several inputs would write {folder / item.name}.*: {first.label} and {item.label}: "
                "give them one at a time, or their common folder with -r"
            )


def refuse_long_names(inputs: Iterable[Input]) -> list[Input]:
    """The inputs, those with an error whose files no folder could hold: one of them must not stop a job at its turn."""
    return [
        replace(item, error=AudioNotFoundError(f"{item.label}: its name is too long for an output file: rename it"))
        if len(os.fsencode(item.name.rpartition("/")[2])) > LONGEST_STEM
        else item
        for item in inputs
    ]


def total_seconds(inputs: Iterable[Input]) -> float | None:
    """Seconds of audio that the containers state; None where one of them does not say."""
    total = 0.0
    for item in inputs:
        # What is no file, as a pipe, can be read only once.
        seconds = _seconds(item.path) if item.path is not None and item.path.is_file() else None
        if seconds is None:
            return None
        total += seconds
    return total


def _expand(argument: str) -> Iterator[str]:
    if not glob.has_magic(argument) or "://" in argument or os.path.exists(argument):
        yield argument
        return
    matches = sorted(glob.glob(argument, recursive=True))
    yield from matches or [argument]


def _identity(item: Input) -> str:
    return item.source if item.path is None else os.path.realpath(item.path)


def _folder(folder: str, recursive: bool) -> list[Input]:
    if not recursive:
        return [_refused(folder, "is a folder: add -r to take the audio and video files in it")]
    paths = [Path(parent, name) for parent, names in _walk(folder) for name in names]
    media = [path for path in paths if MEDIA.fullmatch(path.suffix)]
    if len(media) < len(paths):
        note(f"{folder}: {len(paths) - len(media)} other files are left out, {len(media)} are audio or video")
    if not media:
        return [_refused(folder, "has no audio or video files: give another folder")]
    return _named_apart([_below(path, folder) for path in sorted(media)])


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Names of the files in each folder of the tree, without what is hidden: systems keep their own things there."""
    for parent, folders, names in os.walk(folder, onerror=_say_unread):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield parent, [name for name in names if not name.startswith(".")]


def _say_unread(error: OSError) -> None:
    note(f"warning: folder {error.filename} cannot be read: {error.strerror}")


def _below(path: Path, folder: str) -> Input:
    item = single(str(path))
    return replace(item, name=(path.relative_to(folder).parent / item.name).as_posix())


def _named_apart(items: list[Input]) -> list[Input]:
    """A film and its sound track may lie side by side: they keep their endings in their names."""
    counts = Counter(item.name for item in items)
    return [
        replace(item, name=item.name + Path(item.source).suffix) if counts[item.name] > 1 else item for item in items
    ]


def _refused(folder: str, reason: str) -> Input:
    return replace(single(folder), error=AudioNotFoundError(f"{folder} {reason}"))


def _seconds(path: Path) -> float | None:
    import av
    import av.error

    from quasr.audio.container import CONTAINER_OPTIONS, ByteReader

    try:
        with path.open("rb") as file:
            container: Any = av.open(ByteReader(file, path.name), container_options=CONTAINER_OPTIONS)
            with container:
                return None if container.duration is None else float(container.duration / av.time_base)
    except (OSError, UnicodeError, av.error.FFmpegError, AudioDecodeError):
        return None  # what is wrong with it is said when its turn comes
