from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasr.errors import OptionError
from quasr.output.cues import Cue, LineRules, cue_text, display_width, one_line, split_cues
from quasr.types import Segment, Word


def cues(segment: Segment, width: int | None = None, count: int | None = None) -> list[Cue]:
    return list(split_cues([segment], LineRules(width, count)))


def test_without_rules_a_segment_is_one_cue_of_one_line() -> None:
    segments = [Segment(0, 0.0, 2.0, "One."), Segment(1, 2.0, 3.0, "  "), Segment(2, 3.0, 5.0, " Two\nlines.")]
    assert list(split_cues(segments, LineRules())) == [Cue(0.0, 2.0, ("One.",)), Cue(3.0, 5.0, ("Two lines.",))]


def test_lines_break_between_words_inside_the_cue() -> None:
    segment = Segment(0, 1.0, 9.0, " the quick brown fox jumps")
    assert cues(segment, 10) == [Cue(1.0, 9.0, ("the quick", "brown fox", "jumps"))]


def test_full_cue_is_split_and_its_time_shared_by_characters() -> None:
    # 20 characters in 10 s: "aaaa bbbb" ends at 9 of 20.
    segment = Segment(0, 10.0, 20.0, "aaaa bbbb cccc ddddd")
    assert cues(segment, 9, 1) == [
        Cue(10.0, 14.5, ("aaaa bbbb",)),
        Cue(14.5, 17.0, ("cccc",)),
        Cue(17.0, 20.0, ("ddddd",)),
    ]
    assert cues(segment, 9, 2) == [Cue(10.0, 17.0, ("aaaa bbbb", "cccc")), Cue(17.0, 20.0, ("ddddd",))]


def test_a_word_wider_than_the_line_is_not_cut() -> None:
    segment = Segment(0, 0.0, 1.0, "a incomprehensibilities b")
    assert cues(segment, 5)[0].lines == ("a", "incomprehensibilities", "b")


def test_cjk_takes_two_columns_and_keeps_its_punctuation() -> None:
    segment = Segment(0, 0.0, 1.0, "你好世界，再见「朋友」。")
    assert cues(segment, 8)[0].lines == ("你好世", "界，再见", "「朋", "友」。")
    assert cues(Segment(0, 0.0, 1.0, "用Python写的"), 6)[0].lines == ("用", "Python", "写的")


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("你好", 4), ("é", 1), ("e\u0301", 1), ("ｱ", 1), ("Ａ", 2), ("한글", 4), ("", 0)]
)
def test_display_width(text: str, width: int) -> None:
    assert display_width(text) == width


WORDS = (Word("hello", 0.0, 0.5), Word("there", 0.6, 1.0), Word("my", 5.0, 5.2), Word("friend", 5.3, 6.0))


def test_words_times_are_used_and_a_long_pause_ends_the_cue() -> None:
    segment = Segment(0, 0.0, 7.0, ' Hello, there! "my friend."', words=(Word("Hello", 0.0, 0.5), *WORDS[1:]))
    assert cues(segment, 40) == [Cue(0.0, 1.0, ("Hello, there!",)), Cue(5.0, 6.0, ('"my friend."',))]
    assert cues(segment, 8, 1) == [
        Cue(0.0, 0.5, ("Hello,",)),
        Cue(0.6, 1.0, ("there!",)),
        Cue(5.0, 5.2, ('"my',)),
        Cue(5.3, 6.0, ('friend."',)),
    ]


def test_a_pause_of_three_seconds_is_not_yet_long() -> None:
    words = (Word("a", 0.0, 1.0), Word("b", 4.0, 5.0))
    assert cues(Segment(0, 0.0, 5.0, "a b", words=words), 40) == [Cue(0.0, 5.0, ("a b",))]


def test_a_word_that_the_text_lacks_widens_the_one_before() -> None:
    words = (Word("one", 0.0, 1.0), Word("zzz", 1.0, 2.0), Word("two", 2.0, 3.0))
    assert cues(Segment(0, 0.0, 3.0, "one two", words=words), 4, 1) == [
        Cue(0.0, 2.0, ("one",)),
        Cue(2.0, 3.0, ("two",)),
    ]


def test_words_that_fit_nowhere_fall_back_to_shared_time() -> None:
    assert cues(Segment(0, 0.0, 4.0, "ab cd", words=(Word("zzz", 1.0, 2.0),)), 40) == [Cue(0.0, 4.0, ("ab cd",))]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a --> b", "a -> b"),
        ("a ---> b", "a -> b"),
        ("a->b -- c", "a->b -- c"),
        (" a\r\n\r\nb\tc\u2028d ", "a b c d"),
        ("\n", ""),
    ],
)
def test_cue_text_can_hold_neither_arrow_nor_line_end(text: str, clean: str) -> None:
    assert cue_text(text) == clean


def test_a_plain_line_keeps_its_arrow() -> None:
    assert one_line("a --> b\nc") == "a --> b c"


texts = st.text(
    st.one_of(st.sampled_from("ab .,「」。、你好カー\n\t-><"), st.characters(exclude_categories=["Cs"])), max_size=60
)


@given(texts, st.integers(1, 20), st.one_of(st.none(), st.integers(1, 3)))
def test_nothing_is_lost_and_times_run_on(text: str, width: int, count: int | None) -> None:
    found = cues(Segment(0, 3.0, 7.0, text), width, count)
    kept = "".join(line for cue in found for line in cue.lines)
    assert "".join(kept.split()) == "".join(cue_text(text).split())
    assert [cue.end for cue in found[:-1]] == [cue.start for cue in found[1:]]
    assert all(cue.start < cue.end for cue in found)
    if found:
        assert (found[0].start, found[-1].end) == (3.0, 7.0)
    assert all(line == line.strip() and line for cue in found for line in cue.lines)
    assert all(len(cue.lines) <= (count or len(cue.lines)) for cue in found)


@given(st.lists(st.text("abcdef", min_size=1, max_size=9), min_size=1, max_size=30), st.integers(1, 20))
def test_only_a_single_word_may_be_wider_than_the_line(words: list[str], width: int) -> None:
    (cue,) = cues(Segment(0, 0.0, 1.0, " ".join(words)), width)
    assert " ".join(cue.lines).split() == words
    assert all(len(line) <= width or " " not in line for line in cue.lines)


@pytest.mark.parametrize(("width", "count"), [(0, None), (-1, None), (40, 0), (None, 2)])
def test_rules_that_make_no_sense_are_refused(width: int | None, count: int | None) -> None:
    with pytest.raises(OptionError, match="max_line"):
        LineRules(width, count)
