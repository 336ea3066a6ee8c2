"""Reads what the model wrote: `language English<asr_text>Some text.` into a language and a text."""

from __future__ import annotations

from dataclasses import dataclass

from quasr.text.repetition import fix_repetition

ASR_TEXT = "<asr_text>"
_PREFIX = "language "


@dataclass(frozen=True, slots=True)
class Parsed:
    """`language` is the English name, "" where the model named none or heard no speech."""

    language: str
    text: str


def parse_output(raw: str, forced_language: str | None = None) -> Parsed:
    """Language and text of decoded output, in the order of the official `qwen-asr` package.

    Loops are collapsed first. With a forced language everything is text. Without a tag everything is text and the
    language "". Only the first `<asr_text>` splits; a later one stays in the text.
    """
    cleaned = fix_repetition(raw.strip())
    if forced_language:
        return Parsed(forced_language, cleaned)
    head, tag, text = cleaned.partition(ASR_TEXT)
    if not tag:
        return Parsed("", cleaned)
    return Parsed(_language(head), text.strip())


def _language(head: str) -> str:
    for line in head.splitlines():
        name = line.strip()
        if name.lower().startswith(_PREFIX):
            name = name[len(_PREFIX) :].strip().capitalize()
            return "" if name == "None" else name
    return ""
