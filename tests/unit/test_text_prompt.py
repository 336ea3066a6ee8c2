from __future__ import annotations

import re
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from quasr.text.prompt import Prompt, build_prompt, clean_context
from quasr.text.tokenizer import Tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
TAGS = ["<asr_text>", "<timestamp>", "<non_speech>"]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One id a byte, and the control tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    full = tokenizers.Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.decoder = decoders.ByteLevel()
    full.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    full.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return full


FULL = byte_tokenizer()
TOKENIZER = Tokenizer(FULL)


def template(context: str, language: str | None, audio_tokens: int) -> str:
    head = f"<|im_start|>system\n{context}<|im_end|>\n<|im_start|>user\n<|audio_start|>"
    tail = "<|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    forced = f"language {language}<asr_text>" if language else ""
    return head + "<|audio_pad|>" * audio_tokens + tail + forced


@pytest.mark.parametrize("context", ["", "Names: Ada, 北京.", " \n"])
@pytest.mark.parametrize("language", [None, "English"])
def test_prompt_is_the_whole_template_tokenised(context: str, language: str | None) -> None:
    prompt = build_prompt(TOKENIZER, context, language)
    whole = [*prompt.prefix, *[TOKENIZER.special.audio_pad] * 3, *prompt.suffix]
    assert whole == FULL.encode(template(context, language, 3)).ids


def test_audio_goes_between_its_marks() -> None:
    prompt = build_prompt(TOKENIZER, "some words", "German")
    assert isinstance(prompt, Prompt)
    assert prompt.prefix[-1] == TOKENIZER.special.audio_start
    assert prompt.suffix[0] == TOKENIZER.special.audio_end
    assert prompt.suffix[-1] == TOKENIZER.special.asr_text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain text, 1 < 2 | 3 > 2", "plain text, 1 < 2 | 3 > 2"),
        ("a<|im_end|>b", "ab"),
        ("a<|im<|x|>_end|>b", "ab"),
        ("a<<|x|>|im_end|>b", "ab"),
        ("a<asr_<asr_text>text>b", "ab"),
        ("a<asr_<|x|>text>b", "ab"),
        ("<timestamp><non_speech>", ""),
        ("<|>", "<|>"),
        ("<|<|>", ""),
        ("a <| b", "a <| b"),
        ("a |> b <| c", "a |> b <| c"),
        ("<|two\nlines|>", ""),
        ("bad \udcff byte", "bad � byte"),
        ("", ""),
    ],
)
def test_control_markers_are_stripped(text: str, cleaned: str) -> None:
    assert clean_context(text) == cleaned


fragments = ["<", "|", ">", "<|", "|>", "<asr_", "text>", "im_end", "<timestamp>", "<non_speech>", "x", " ", "é"]
hostile = st.lists(st.sampled_from([*fragments, *SPECIALS]), max_size=30).map("".join)


@given(st.one_of(hostile, st.text(max_size=60)))
def test_no_marker_survives_and_no_control_token_is_made(text: str) -> None:
    cleaned = clean_context(text)
    assert not re.search(r"<\|.*?\|>", cleaned, re.DOTALL)
    assert not any(tag in cleaned for tag in TAGS)
    assert clean_context(cleaned) == cleaned
    assert max(TOKENIZER.encode(cleaned), default=0) < 256
    # Even a tokenizer that does read markers finds none.
    assert max(FULL.encode(cleaned).ids, default=0) < 256
    controls = [index for index in build_prompt(TOKENIZER, text).prefix if index >= 256]
    assert len(controls) == 4


@given(st.text(st.characters(exclude_characters="<>|", exclude_categories=["Cs"])))
def test_text_without_markers_is_left_alone(text: str) -> None:
    assert clean_context(text) == text


@pytest.mark.parametrize("text", ["<|" * 50_000, "<|" * 25_000 + "|>" * 25_000, "<asr_" * 20_000 + "text>" * 20_000])
def test_cleaning_is_linear(text: str) -> None:
    start = time.process_time()
    cleaned = clean_context(text)
    assert time.process_time() - start < 3.0
    assert cleaned in ("", text)
