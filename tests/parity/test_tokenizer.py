"""Tokens, prompts and the repetition rule against transformers, on Qwen's own vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasr.text.parse import parse_output
from quasr.text.prompt import build_prompt
from quasr.text.repetition import fix_repetition
from quasr.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import Qwen2TokenizerFast

FOLDER = Path(__file__).resolve().parents[2] / "../shared/tokenizer"
needs_vocabulary = pytest.mark.skipif(not FOLDER.is_dir(), reason="Qwen's vocabulary is not beside the repository")

STRINGS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces \t tab\n\n\nnew lines\r\n end  ",
    "It's he'll WE'VE I'm they'd",
    "Call 0123456789 or 3.14159, 1,000,000 €",
    "阿姨，您好！北京欢迎你。",
    "東京タワーへ行きましょう。カタカナ・ひらがな",
    "안녕하세요 세계",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم، كيف الحال؟",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Xin chào thế giới",
    "Γειά σου Κόσμε",
    "e\u0301 is é, \u1100\u1161 is 가",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "\u200b\u00a0\u3000\ufeff",
    "a" * 500,
    "<|not_a_token|> < | > <asr text>",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def theirs() -> Qwen2TokenizerFast:
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast.from_pretrained(FOLDER)


@needs_vocabulary
@pytest.mark.parametrize("text", STRINGS)
def test_encodes_and_decodes_as_transformers(ours: Tokenizer, theirs: Qwen2TokenizerFast, text: str) -> None:
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@needs_vocabulary
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=80))
def test_any_text_encodes_as_transformers(ours: Tokenizer, theirs: Qwen2TokenizerFast, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@needs_vocabulary
@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 151_704), max_size=30))
def test_any_ids_decode_as_transformers(ours: Tokenizer, theirs: Qwen2TokenizerFast, ids: list[int]) -> None:
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@needs_vocabulary
def test_special_ids_are_those_of_the_checkpoint(ours: Tokenizer, theirs: Qwen2TokenizerFast) -> None:
    special = ours.special
    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
    found = [special.im_start, special.im_end, special.endoftext]
    found += [special.audio_start, special.audio_end, special.audio_pad, special.asr_text]
    assert found == theirs.convert_tokens_to_ids([*names, "<asr_text>"])
    assert found == [151644, 151645, 151643, 151669, 151670, 151676, 151704]
    assert ours.vocab_size == len(theirs)


@needs_vocabulary
@pytest.mark.parametrize("context", ["", "Ada Lovelace, Grace Hopper", "  spaced \n", "上下文：北京。", "e\u0301"])
@pytest.mark.parametrize("language", [None, "English", "Chinese", "Cantonese", "Filipino"])
def test_prompt_is_the_template_as_transformers_reads_it(
    ours: Tokenizer, theirs: Qwen2TokenizerFast, context: str, language: str | None
) -> None:
    template = f"<|im_start|>system\n{context}<|im_end|>\n<|im_start|>user\n<|audio_start|>" + "<|audio_pad|>" * 13
    template += "<|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    template += f"language {language}<asr_text>" if language else ""
    prompt = build_prompt(ours, context, language)
    whole = [*prompt.prefix, *[ours.special.audio_pad] * 13, *prompt.suffix]
    assert whole == theirs.encode(template, add_special_tokens=False)


loops = st.lists(st.tuples(st.text("ab 好", max_size=5), st.integers(0, 30)), max_size=5)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(parts=loops)
def test_repetition_is_fixed_as_in_transformers(parts: list[tuple[str, int]]) -> None:
    from transformers.models.qwen3_asr import processing_qwen3_asr as reference

    text = "".join(piece * times for piece, times in parts)
    assert fix_repetition(text) == reference._detect_and_fix_repetitions(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "raw",
    [
        "language English<asr_text> Hello there. ",
        "language None<asr_text>",
        "no tag",
        "language German<asr_text>" + "ja " * 40 + "gut",
        "language French<asr_text>un<asr_text>deux",
    ],
)
def test_output_is_read_as_in_transformers(raw: str) -> None:
    from transformers.models.qwen3_asr import processing_qwen3_asr as reference

    expected = reference._parse_single_output(raw)
    parsed = parse_output(raw)
    assert (parsed.language or None, parsed.text) == (expected["language"], expected["transcription"])
