"""One hypothesis against its reference: normalised, aligned, and checked for loops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quasr.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNSPACED = ("zh", "yue", "ja", "th")
"""Languages written without spaces: their words are characters, and so their WER is no figure at all."""

LONGEST_PHRASE = 5
"""Words of the longest phrase whose repetition counts as a loop."""

LOOP_TIMES = 4
"""A phrase said so often in a row counts as a loop."""


@dataclass(frozen=True, slots=True)
class Edits:
    """A Levenshtein alignment's counts over units: words or characters."""

    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0
    units: int = 0

    @property
    def rate(self) -> float | None:
        """(substitutions + insertions + deletions) / reference units; None without any reference."""
        return (self.substitutions + self.insertions + self.deletions) / self.units if self.units else None

    def __add__(self, other: Edits) -> Edits:
        return Edits(
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.units + other.units,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """Edits over words (None where the language has no spaces) and over characters, after normalisation."""

    words: Edits | None
    characters: Edits


def require_packages() -> None:
    """Raises MissingDependencyError now, and not after the work, where a scoring package is missing."""
    for name in ("jiwer", "whisper_normalizer"):
        _import(name)


def score(reference: str, hypothesis: str, language: str) -> Score:
    """Normalises both for `language` (ISO 639 code) and aligns them.

    Characters include the spaces between words, as in jiwer, except in languages without spaces.
    Raises MissingDependencyError without jiwer or whisper-normalizer.
    """
    clean = normaliser(language)
    expected, found = clean(reference), clean(hypothesis)
    if language in UNSPACED:
        return Score(None, character_edits(expected.replace(" ", ""), found.replace(" ", "")))
    return Score(word_edits(expected, found), character_edits(expected, found))


@cache
def normaliser(language: str) -> Callable[[str], str]:
    """Whisper's normaliser: the English one for "en", the basic one for the others."""
    if language == "en":
        english = _import("whisper_normalizer.english").EnglishTextNormalizer()
        return lambda text: " ".join(english(text).split())
    basic = _import("whisper_normalizer.basic").BasicTextNormalizer()
    return lambda text: " ".join(basic(text).split())


def word_edits(reference: str, hypothesis: str) -> Edits:
    """Word alignment by jiwer."""
    return _edits(_import("jiwer").process_words([reference], [hypothesis]))


def character_edits(reference: str, hypothesis: str) -> Edits:
    """Character alignment by jiwer."""
    return _edits(_import("jiwer").process_characters([reference], [hypothesis]))


def loops(hypothesis: str, reference: str | None, language: str) -> bool:
    """Whether the hypothesis repeats a phrase of 1 to 5 words 4 or more times running, and the reference does not."""
    clean = normaliser(language)
    if not has_loop(_units(clean(hypothesis), language)):
        return False
    return reference is None or not has_loop(_units(clean(reference), language))


def has_loop(units: Sequence[str], longest: int = LONGEST_PHRASE, times: int = LOOP_TIMES) -> bool:
    """Whether a phrase of 1 to `longest` units stands `times` times in a row.

    A phrase of n units stands `times` times where (times - 1) * n units in a row equal the ones n places before.
    """
    for size in range(1, longest + 1):
        run = 0
        for index in range(size, len(units)):
            run = run + 1 if units[index] == units[index - size] else 0
            if run >= (times - 1) * size:
                return True
    return False


def _units(text: str, language: str) -> list[str]:
    return list(text.replace(" ", "")) if language in UNSPACED else text.split()


def _edits(aligned: Any) -> Edits:
    units = aligned.hits + aligned.substitutions + aligned.deletions
    return Edits(aligned.substitutions, aligned.insertions, aligned.deletions, units)


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingDependencyError(f"{package} is not installed: pip install 'quasr[eval]'") from error
