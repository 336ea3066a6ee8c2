"""The clips to evaluate: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quasr.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_LANGUAGE = "en"


@dataclass(frozen=True, slots=True)
class Clip:
    """One row. `reference` None: run, but not scored. `language` is an ISO 639 code; `size` orders by length."""

    path: Path
    name: str
    reference: str | None
    subset: str
    language: str
    size: float


def read_manifest(path: Path) -> list[Clip]:
    """Reads rows of `path` (relative to the manifest) and optionally text, norm, subset, lang, seconds.

    Where a row has `norm` but no `text`, that is the reference. Raises OptionError, with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OptionError(f"the manifest {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"the manifest {path} is not UTF-8 text: give a JSONL file") from error
    clips = [_clip(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not clips:
        raise OptionError(f"the manifest {path} is empty: give one JSON object with a path on each line")
    return clips


def _clip(manifest: Path, number: int, line: str) -> Clip:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{manifest}, line {number}: not valid JSON") from error
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
        raise OptionError(f'{manifest}, line {number}: expected an object with a "path"')
    seconds = row.get("seconds")
    if not isinstance(seconds, (int, float, type(None))):
        raise OptionError(f"{manifest}, line {number}: seconds is {seconds!r}, not a number")
    reference = row.get("text", row.get("norm"))
    audio = manifest.parent / row["path"]
    return Clip(
        path=audio,
        name=row["path"],
        reference=None if reference is None else str(reference),
        subset=str(row.get("subset", "all")),
        language=str(row.get("lang", DEFAULT_LANGUAGE)).lower().partition("-")[0],
        size=_bytes(audio) if seconds is None else float(seconds),
    )


def _bytes(path: Path) -> float:
    """The file's size stands in for its length, and may be missing: the decoder then says so."""
    return float(path.stat().st_size) if path.is_file() else 0.0
