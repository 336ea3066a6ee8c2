"""Transcript files, each there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from quasr.errors import OptionError, QuasrError, ResourceError
from quasr.output.cues import LineRules
from quasr.output.render import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.types import Transcript

TEMPORARY = ".quasr-*.tmp"
"""Names of files that are being written: a process that is killed leaves one behind."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_files(
    transcript: Transcript,
    folder: Path,
    stem: str,
    formats: Sequence[str],
    rules: LineRules = LineRules(),  # noqa: B008  (frozen)
) -> list[Path]:
    """Writes `folder/stem.fmt` in UTF-8 for each format, making the folder if needed; the paths in that order.

    Each file replaces an older one at once, when complete. Raises OptionError for an unknown format, an unusable
    stem or a place that cannot be written, ResourceError where the disk is full.
    """
    if not stem or "\0" in stem or Path(stem).name != stem:
        raise OptionError(f"{stem!r} is no file name: give a name without folders")
    texts = {folder / f"{stem}.{fmt}": render(transcript, fmt, rules) for fmt in formats}
    for path, text in texts.items():
        try:
            _write(path, text)
        except OSError as error:
            raise _refused(path, error) from error
    return list(texts)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private to the user, and a transcript follows the umask like any other file.
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refused(path: Path, error: OSError) -> QuasrError:
    if error.errno in _FULL:
        return ResourceError(f"{path} was not written, the disk is full: free some space or choose another folder")
    return OptionError(f"{path} cannot be written ({error.strerror}): choose another output folder")
