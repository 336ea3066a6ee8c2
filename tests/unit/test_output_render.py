from __future__ import annotations

import html
import json
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasr.errors import OptionError
from quasr.output import FORMATS, LineRules, render
from quasr.types import Notice, Segment, Transcript, Word

Read = list[tuple[int, int, str]]


def transcript(*segments: Segment) -> Transcript:
    return Transcript("".join(s.text for s in segments), "English", 60.0, segments)


TWO = transcript(Segment(0, 0.0, 1.5, "Hello, world."), Segment(1, 3661.25, 3662.0, " Привет & 你好 <b>."))


def read_clock(text: str, decimal: str) -> int:
    hours, minutes, seconds, ms = map(int, re.fullmatch(rf"(\d\d+):(\d\d):(\d\d){decimal}(\d{{3}})", text).groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms


def read_cues(blocks: list[str], decimal: str) -> Read:
    found = []
    for block in blocks:
        times, *lines = block.split("\n")
        start, end = times.split(" --> ")
        found.append((read_clock(start, decimal), read_clock(end, decimal), "\n".join(lines)))
    return found


def read_srt(text: str) -> Read:
    if not text:
        return []
    assert text.endswith("\n")
    blocks = text[:-1].split("\n\n")
    numbers, rest = zip(*(block.split("\n", 1) for block in blocks), strict=True)
    assert list(numbers) == [str(index + 1) for index in range(len(blocks))]
    return read_cues(list(rest), ",")


def read_vtt(text: str) -> Read:
    assert text.endswith("\n")
    head, *blocks = text[:-1].split("\n\n")
    assert head.rstrip("\n") == "WEBVTT"
    assert not any("<" in block or re.search("&(?!amp;|lt;)", block) for block in blocks)
    return [(start, end, html.unescape(line)) for start, end, line in read_cues(blocks, r"\.")]


def read_tsv(text: str) -> Read:
    head, *rows = text.removesuffix("\n").split("\n")
    assert head == "start\tend\ttext"
    return [(int(start), int(end), line) for start, end, line in (row.split("\t") for row in rows)]


READERS = {"srt": read_srt, "vtt": read_vtt, "tsv": read_tsv}


def test_srt_as_players_expect_it() -> None:
    assert render(TWO, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello, world.\n\n2\n01:01:01,250 --> 01:01:02,000\nПривет & 你好 <b>.\n"
    )


def test_vtt_as_browsers_expect_it() -> None:
    assert render(TWO, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello, world.\n"
        "\n01:01:01.250 --> 01:01:02.000\nПривет &amp; 你好 &lt;b>.\n"
    )


def test_tsv_and_txt() -> None:
    assert render(TWO, "tsv") == "start\tend\ttext\n0\t1500\tHello, world.\n3661250\t3662000\tПривет & 你好 <b>.\n"
    assert render(TWO, "txt") == "Hello, world.\nПривет & 你好 <b>.\n"


def test_json_holds_everything() -> None:
    words = (Word("Hé", 0.0, 0.5, 0.9),)
    logprobs = (-0.2, -1e-07)
    segment = Segment(0, 0.0, 1.0, "Hé -->", "French", -0.25, "length", words, (7, 151643), logprobs)
    full = Transcript("Hé -->", "French", 1.0, (segment,), "length", (Notice("cut", "cut short", 0.0, 1.0),))
    text = render(full, "json")
    assert "Hé -->" in text
    read = json.loads(text)
    assert read["segments"][0]["words"] == [{"text": "Hé", "start": 0.0, "end": 0.5, "probability": 0.9}]
    assert read["segments"][0]["avg_logprob"] == -0.25
    assert (read["segments"][0]["tokens"], read["segments"][0]["token_logprobs"]) == ([7, 151643], [-0.2, -1e-07])
    assert '"tokens": [7, 151643],\n' in text
    notice = {
        "code": "cut",
        "message": "cut short",
        "start": 0.0,
        "end": 1.0,
        "retry_helped": None,
        "retry_weights": None,
    }
    assert read["warnings"] == [notice]
    assert set(read) == {"text", "language", "duration", "segments", "finish_reason", "warnings", "timings"}


TRICKY = st.text(st.sampled_from('a"\\\\[]{}:, \\n\\u2028é1')) | st.just('"segments": []')


@given(texts=st.lists(TRICKY, max_size=3), words=st.booleans())
def test_json_is_that_of_the_whole_at_once(texts: list[str], words: bool) -> None:
    """Indented by two, and the lists of numbers alone on one line."""
    said = (Word("é", 0.0, 0.5),) if words else ()
    segments = [Segment(n, 0.0, 1.0, text, words=said, tokens=(n, 7)) for n, text in enumerate(texts)]
    whole = transcript(*segments)
    text = json.dumps(whole.to_dict(), ensure_ascii=False, indent=2)
    flat = re.sub(r"\[\n +(\d+),\n +(\d+)\n +\]", r"[\1, \2]", text)
    assert render(whole, "json") == flat + "\n"


@pytest.mark.slow
def test_json_of_long_audio_takes_few_times_its_size() -> None:
    """Ten hours have some 5,000 segments of 80 tokens; a tenth of that here."""
    logprobs = tuple(-0.1 - 1e-6 * n for n in range(80))
    segments = [Segment(n, 0.0, 1.0, " a few words" * 8, tokens=(7,) * 80, token_logprobs=logprobs) for n in range(500)]
    whole = transcript(*segments)
    tracemalloc.start()
    size = len(render(whole, "json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 500_000
    assert peak < 5 * size


def test_no_speech_makes_valid_files() -> None:
    for empty in (transcript(), transcript(Segment(0, 0.0, 1.0, " \n"))):
        assert render(empty, "srt") == render(empty, "txt") == ""
        assert render(empty, "vtt").rstrip("\n") == "WEBVTT"
        assert render(empty, "tsv") == "start\tend\ttext\n"
        assert json.loads(render(empty, "json"))["language"] == "English"


def test_line_rules_reach_the_subtitles() -> None:
    long = transcript(Segment(0, 0.0, 3.0, "aaa bbb ccc"))
    assert read_srt(render(long, "srt", LineRules(7))) == [(0, 3000, "aaa bbb\nccc")]
    assert read_vtt(render(long, "vtt", LineRules(3, 2))) == [
        (0, 1909, "aaa\nbbb"),
        (1909, 3000, "ccc"),
    ]  # 7 of 11 characters
    assert render(long, "txt", LineRules(3)) == "aaa bbb ccc\n"


hostile = st.text(
    st.one_of(st.sampled_from("-->& <\n\t\r01:,."), st.characters(exclude_categories=["Cs"])), max_size=30
)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**5), hostile), max_size=5))
def test_any_text_reads_back(parts: list[tuple[int, int, str]]) -> None:
    whole = transcript(*(Segment(i, a / 1000, (a + n) / 1000, text) for i, (a, n, text) in enumerate(parts)))
    for fmt, read in READERS.items():
        shown = [(a, a + n, re.sub(r"\s+", "", text)) for a, n, text in parts if text.strip()]
        if fmt != "tsv":
            shown = [(a, b, re.sub("-{2,}>", "->", text)) for a, b, text in shown]
        found = [(a, b, re.sub(r"\s+", "", text)) for a, b, text in read(render(whole, fmt))]
        assert [(a, b) for a, b, _ in found] == [(a, b) for a, b, _ in shown]
        assert [re.sub("-{2,}>", "->", text) for *_, text in found] == [re.sub("-{2,}>", "->", t) for *_, t in shown]


def test_unknown_format_names_the_known_ones() -> None:
    assert FORMATS == ("txt", "srt", "vtt", "tsv", "json")
    with pytest.raises(OptionError, match="'docx' is not known: use one of txt, srt, vtt, tsv, json"):
        render(TWO, "docx")
