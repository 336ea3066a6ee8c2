"""The prompt around the audio, and the cleaning of what a user may put into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quasr.text.parse import ASR_TEXT

if TYPE_CHECKING:
    from quasr.text.tokenizer import Tokenizer

_TAGS = (ASR_TEXT, "<timestamp>", "<non_speech>")
_OPEN, _CLOSE = "<|", "|>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids before and after the audio positions. The whole prompt is `prefix`, N x `audio_pad`, `suffix`."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def build_prompt(tokenizer: Tokenizer, context: str = "", language: str | None = None) -> Prompt:
    """Prompt of Qwen3-ASR's chat template; `context` is cleaned, `language` is an English name, None to detect it.

    The text between two control tokens is tokenised on its own, as a tokenizer that reads the whole template does:
    `<|im_start|>system\\n{context}<|im_end|>\\n<|im_start|>user\\n<|audio_start|>`, the audio,
    `<|audio_end|><|im_end|>\\n<|im_start|>assistant\\n` and, if forced, `language {language}<asr_text>`.
    """
    special, encode = tokenizer.special, tokenizer.encode
    turn = [special.im_end, *encode("\n"), special.im_start]
    prefix = [special.im_start, *encode(f"system\n{clean_context(context)}"), *turn]
    prefix += [*encode("user\n"), special.audio_start]
    suffix = [special.audio_end, *turn]
    if language:
        suffix += [*encode(f"assistant\nlanguage {language}"), special.asr_text]
    else:
        suffix += encode("assistant\n")
    return Prompt(tuple(prefix), tuple(suffix))


def clean_context(text: str) -> str:
    """`text` without `<|...|>`, `<asr_text>`, `<timestamp>` and `<non_speech>`, also those that a removal uncovers.

    One pass over the characters with the open `<|` on a stack, so nesting costs no more than length. Lone surrogates,
    which undecodable command-line bytes turn into, become U+FFFD.
    """
    kept: list[str] = []
    opened: list[int] = []
    for char in text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"):
        kept.append(char)
        if char == "|" and kept[-2:] == ["<", "|"]:
            opened.append(len(kept) - len(_OPEN))
        elif char == ">":
            del kept[_marker_start(kept, opened) :]
            while opened and opened[-1] >= len(kept):
                opened.pop()
    return "".join(kept)


def _marker_start(kept: list[str], opened: list[int]) -> int:
    """Where the marker that ends with the last character begins; the length of `kept` if there is none."""
    if kept[-2:] == list(_CLOSE):
        # In `<|>` the bar is shared, which makes no marker with that opening, but may with one before it.
        starts = [start for start in opened[-2:] if start + len(_OPEN) <= len(kept) - len(_CLOSE)]
        return starts[-1] if starts else len(kept)
    tail = "".join(kept[-max(map(len, _TAGS)) :])
    return next((len(kept) - len(tag) for tag in _TAGS if tail.endswith(tag)), len(kept))
