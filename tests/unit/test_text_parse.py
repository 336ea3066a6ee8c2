from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasr.text.parse import Parsed, parse_output


@pytest.mark.parametrize(
    ("raw", "language", "text"),
    [
        ("language English<asr_text>Some text.", "English", "Some text."),
        ("  language English<asr_text> Some text. \n", "English", "Some text."),
        ("LANGUAGE english<asr_text>Some text.", "English", "Some text."),
        ("language CHINESE<asr_text>你好。", "Chinese", "你好。"),
        ("\nnoise\nlanguage French\nlanguage German<asr_text>Oui", "French", "Oui"),
        ("language None<asr_text>", "", ""),
        ("language none <asr_text>odd", "", "odd"),
        ("language <asr_text>odd", "", "odd"),
        ("English<asr_text>odd", "", "odd"),
        ("<asr_text>only", "", "only"),
        ("no tag at all", "", "no tag at all"),
        ("", "", ""),
        ("language English<asr_text>one<asr_text>two", "English", "one<asr_text>two"),
        ("language English<asr_text>" + "no " * 30 + "end", "English", "no end"),
    ],
)
def test_output_without_a_forced_language(raw: str, language: str, text: str) -> None:
    assert parse_output(raw) == Parsed(language, text)


def test_with_a_forced_language_everything_is_text() -> None:
    assert parse_output(" Some text. ", "German") == Parsed("German", "Some text.")
    assert parse_output("language English<asr_text>x", "German") == Parsed("German", "language English<asr_text>x")


@given(st.text(max_size=80), st.sampled_from([None, "English"]))
def test_any_output_is_read(raw: str, forced: str | None) -> None:
    parsed = parse_output(raw, forced)
    assert parsed.text == parsed.text.strip()
    assert parsed.text in raw
