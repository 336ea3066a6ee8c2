from __future__ import annotations

import random
import sys

import pytest

from quasr.errors import MissingDependencyError
from quasr.evaluation.score import Edits, has_loop, loops, require_packages, score


def levenshtein(a: list[str], b: list[str]) -> int:
    """Textbook dynamic programme (Wagner and Fischer 1974)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_english_is_normalised_before_it_is_compared() -> None:
    result = score("AFTER MISTER CROW, I'm FLYING!", "after mister crow i am flying", "en")
    assert result.words == Edits(0, 0, 0, 6)
    assert result.characters.rate == 0


def test_kinds_of_edits_by_hand() -> None:
    result = score("one cat sat on the mat", "cat sit on the big mat", "en")
    assert result.words == Edits(substitutions=1, insertions=1, deletions=1, units=6)
    assert result.words is not None
    assert result.words.rate == pytest.approx(3 / 6)


def test_chinese_has_characters_and_no_words() -> None:
    result = score("今天天气很好。", "今天 天汽好", "zh")
    assert result.words is None
    assert result.characters == Edits(substitutions=1, insertions=0, deletions=1, units=6)


def test_an_empty_reference_counts_insertions_and_has_no_rate() -> None:
    result = score("Uh.", "two words", "en")
    assert result.words == Edits(0, 2, 0, 0)
    assert result.words is not None
    assert result.words.rate is None
    assert score("all gone", "", "en").words == Edits(0, 0, 2, 2)


def test_counts_sum_to_the_edit_distance() -> None:
    rng = random.Random(3)
    for _ in range(60):
        reference = [rng.choice("abcd") + "x" for _ in range(rng.randint(1, 9))]
        found = [rng.choice("abcd") + "x" for _ in range(rng.randint(1, 9))]
        words = score(" ".join(reference), " ".join(found), "de").words
        assert words is not None
        assert words.substitutions + words.insertions + words.deletions == levenshtein(reference, found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a a a a", True),
        ("a a a b a", False),
        ("so we said so we said so we said so we said", True),
        ("so we said so we said so we said so we", False),
        (
            "x the five word phrase here the five word phrase here the five word phrase here the five word phrase here",
            True,
        ),
        ("a b c d e f " * 4, False),
        ("", False),
    ],
)
def test_loop_of_one_to_five_words_four_times(text: str, found: bool) -> None:
    assert has_loop(text.split()) is found


def test_loops_that_the_reference_has_too_are_speech() -> None:
    assert loops("no no no no", "No, no, no, no!", "en") is False
    assert loops("no no no no", "no", "en") is True
    assert loops("no no no no", None, "en") is True
    assert loops("哈哈哈哈", "哈", "zh") is True


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages()
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingDependencyError, match=r"jiwer is not installed: pip install 'quasr\[eval\]'"):
        require_packages()
