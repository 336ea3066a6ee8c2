"""Cues: what stands on the screen at once, and the splitting of segments into lines and cues."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quasr.types import Segment

MAX_PAUSE = 3.0
"""Seconds of silence between two words after which a new cue begins."""

_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_OPENER = "「『（【〔《〈“‘"
_CLOSER = "、。，．！？：；）」』】〕》〉”’…・ー"
_ATOM = re.compile(
    rf"\s*(?:[{_OPENER}]*[{_IDEOGRAPH}]|[{_OPENER}]*[^\s{_IDEOGRAPH}{_OPENER}]+|[{_OPENER}]+)[{_CLOSER}]*"
)
"""What is never cut: a word, or one ideograph or kana, each with the punctuation that belongs to it."""


@dataclass(frozen=True, slots=True)
class LineRules:
    """Most columns of a line and most lines of a cue. CJK characters take two columns; None means no limit."""

    max_line_width: int | None = None
    max_line_count: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}: it must be 1 or more")
        if self.max_line_count is not None and self.max_line_width is None:
            raise OptionError("max_line_count has no effect alone: give max_line_width too")


@dataclass(frozen=True, slots=True)
class Cue:
    """`lines` shown from `start` to `end` seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Unit:
    """Text that is not cut, with the space before it, and its time in seconds."""

    text: str
    start: float
    end: float


def one_line(text: str) -> str:
    """`text` on a single line, stripped: line ends and tabs become spaces."""
    return " ".join(filter(None, (line.strip() for line in text.replace("\t", " ").splitlines())))


def cue_text(text: str) -> str:
    """`text` on a single line without `-->`, which stands for a time line in subtitle files; `->` replaces it."""
    return re.sub(r"-{2,}>", "->", one_line(text))


def display_width(text: str) -> int:
    """Columns of `text`: two for a wide East Asian character, none for a combining mark (Unicode annex 11)."""
    return sum(_columns(char) for char in text)


def split_cues(segments: Iterable[Segment], rules: LineRules) -> Iterator[Cue]:
    """Cues of all segments that have text. Without a `max_line_width` a segment is one cue of one line.

    With one, a new cue begins after `max_line_count` lines and after a pause of over 3 s between words. Where a
    segment has no word times, its time is shared in proportion to characters.
    """
    for segment in segments:
        text = cue_text(segment.text)
        if text and rules.max_line_width is None:
            yield Cue(segment.start, segment.end, (text,))
        elif text:
            yield from _pack(_timed_units(segment, text) or _shared_units(segment, text), rules)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _shared_units(segment: Segment, text: str) -> list[_Unit]:
    atoms = _ATOM.findall(text)
    ends = list(accumulate(map(len, atoms), initial=0))
    scale = (segment.end - segment.start) / len(text)
    times = [segment.start + scale * end for end in ends[:-1]] + [segment.end]
    return [_Unit(atom, *span) for atom, span in zip(atoms, pairwise(times), strict=True)]


def _timed_units(segment: Segment, text: str) -> list[_Unit]:
    """The words' times on the text's own spelling: a unit runs from one word's first letter to the next word's.

    An aligner's words have no punctuation, so each is looked for in the text; one that is not there widens the unit
    before it.
    """
    found: list[tuple[int, float, float]] = []
    after = 0
    for word in segment.words:
        spelled = cue_text(word.text)
        at = text.find(spelled, after) if spelled else -1
        if at >= 0:
            found.append((_word_start(text, at, after), word.start, word.end))
            after = at + len(spelled)
        elif found:
            found[-1] = (*found[-1][:2], word.end)
    edges = [0, *(at for at, _, _ in found[1:]), len(text)]
    return [_Unit(text[edges[index] : edges[index + 1]], start, end) for index, (_, start, end) in enumerate(found)]


def _word_start(text: str, at: int, floor: int) -> int:
    """Takes the opening punctuation before a word along with it, down to `floor`."""
    while at > floor and (text[at - 1] in _OPENER or text[at - 1] in "\"'([{¿¡"):
        at -= 1
    return at


def _pack(units: list[_Unit], rules: LineRules) -> Iterator[Cue]:
    lines: list[list[_Unit]] = []
    for unit in units:
        pause = bool(lines) and unit.start - lines[-1][-1].end > MAX_PAUSE
        if lines and not pause and _fits(lines[-1], unit, rules):
            lines[-1].append(unit)
            continue
        if lines and (pause or len(lines) == rules.max_line_count):
            yield _cue(lines)
            lines = []
        lines.append([unit])
    if lines:
        yield _cue(lines)


def _fits(line: list[_Unit], unit: _Unit, rules: LineRules) -> bool:
    width = display_width("".join(member.text for member in [*line, unit]).strip())
    return rules.max_line_width is None or width <= rules.max_line_width


def _cue(lines: list[list[_Unit]]) -> Cue:
    texts = tuple("".join(unit.text for unit in line).strip() for line in lines)
    return Cue(lines[0][0].start, lines[-1][-1].end, texts)
