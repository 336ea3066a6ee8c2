"""A transcript in each of the file formats. Conventions of openai/whisper, with WebVTT's escapes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from quasr.errors import OptionError
from quasr.output.cues import LineRules, one_line, split_cues
from quasr.output.timestamps import clock, milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from quasr.types import Transcript


def render(transcript: Transcript, fmt: str, rules: LineRules = LineRules()) -> str:  # noqa: B008  (frozen)
    """The whole file's text, ending in a line end if there is any. `rules` concern srt and vtt only.

    Raises OptionError for a format that is not in FORMATS.
    """
    if fmt not in _WRITERS:
        raise OptionError(f"output format {fmt[:40]!r} is not known: use one of {', '.join(FORMATS)}")
    return _WRITERS[fmt](transcript, rules)


def _txt(transcript: Transcript, _rules: LineRules) -> str:
    texts = (one_line(segment.text) for segment in transcript.segments)
    return "".join(f"{text}\n" for text in texts if text)


def _srt(transcript: Transcript, rules: LineRules) -> str:
    blocks = (
        f"{number}\n{clock(cue.start, ',')} --> {clock(cue.end, ',')}\n" + "\n".join(cue.lines) + "\n"
        for number, cue in enumerate(split_cues(transcript.segments, rules), start=1)
    )
    return "\n".join(blocks)


def _vtt(transcript: Transcript, rules: LineRules) -> str:
    blocks = (
        f"{clock(cue.start, '.')} --> {clock(cue.end, '.')}\n" + _escape("\n".join(cue.lines)) + "\n"
        for cue in split_cues(transcript.segments, rules)
    )
    return "\n".join(["WEBVTT\n", *blocks])


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _tsv(transcript: Transcript, _rules: LineRules) -> str:
    rows = (
        f"{milliseconds(segment.start)}\t{milliseconds(segment.end)}\t{text}\n"
        for segment in transcript.segments
        if (text := one_line(segment.text))
    )
    return "start\tend\ttext\n" + "".join(rows)


def _json(transcript: Transcript, _rules: LineRules) -> str:
    """A segment at a time, because `json` takes ten times the memory of the text that it indents."""
    text = _indented(replace(transcript, segments=()).to_dict()) + "\n"
    if not transcript.segments:
        return text
    segments = ",\n    ".join(_indented(asdict(segment)).replace("\n", "\n    ") for segment in transcript.segments)
    # Quotes inside strings are escaped, so the key alone can look like this.
    return text.replace('"segments": []', f'"segments": [\n    {segments}\n  ]', 1)


def _indented(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    # No string holds a line end, so what is matched are the lists of tokens and of their probabilities.
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


_NUMBERS = re.compile(r"\[\n([-+.,\de\s]+)\]")


_WRITERS: dict[str, Callable[[Transcript, LineRules], str]] = {
    "txt": _txt,
    "srt": _srt,
    "vtt": _vtt,
    "tsv": _tsv,
    "json": _json,
}

FORMATS = tuple(_WRITERS)
"""Names of the formats, which are also the files' extensions."""
