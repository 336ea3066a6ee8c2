"""The 30 languages of Qwen3-ASR: ISO codes, the English names that the prompt uses, and what people type."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from quasr.errors import UnknownLanguageError

if TYPE_CHECKING:
    from collections.abc import Sequence

LANGUAGES: dict[str, str] = {
    "ar": "Arabic",
    "yue": "Cantonese",
    "zh": "Chinese",
    "cs": "Czech",
    "da": "Danish",
    "nl": "Dutch",
    "en": "English",
    "fil": "Filipino",
    "fi": "Finnish",
    "fr": "French",
    "de": "German",
    "el": "Greek",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "mk": "Macedonian",
    "ms": "Malay",
    "fa": "Persian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "es": "Spanish",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "vi": "Vietnamese",
}
"""ISO 639 code (639-1 where there is one) to the English name used in the prompt."""

# ISO 639-2 and 639-3 codes, both the bibliographic and the terminological form.
_LONG_CODES = {
    "ara": "ar", "cmn": "zh", "zho": "zh", "chi": "zh", "ces": "cs", "cze": "cs", "dan": "da", "nld": "nl",
    "dut": "nl", "eng": "en", "tl": "fil", "tgl": "fil", "fin": "fi", "fra": "fr", "fre": "fr", "deu": "de",
    "ger": "de", "ell": "el", "gre": "el", "hin": "hi", "hun": "hu", "ind": "id", "ita": "it", "jpn": "ja",
    "kor": "ko", "mkd": "mk", "mac": "mk", "msa": "ms", "may": "ms", "zsm": "ms", "fas": "fa", "per": "fa",
    "pol": "pl", "por": "pt", "ron": "ro", "rum": "ro", "rus": "ru", "spa": "es", "swe": "sv", "tha": "th",
    "tur": "tr", "vie": "vi",
}  # fmt: skip

_OTHER_NAMES = {
    "mandarin": "zh",
    "mandarin chinese": "zh",
    "putonghua": "zh",
    "zh yue": "yue",
    "yue chinese": "yue",
    "tagalog": "fil",
    "pilipino": "fil",
    "farsi": "fa",
    "castilian": "es",
    "flemish": "nl",
    "bahasa indonesia": "id",
    "bahasa melayu": "ms",
    "bahasa malaysia": "ms",
    "moldovan": "ro",
}

_CODES = {**{code: code for code in LANGUAGES}, **_LONG_CODES}
_NAMES = {**{name.lower(): code for code, name in LANGUAGES.items()}, **_OTHER_NAMES}
_UNSPACED = frozenset({"Chinese", "Cantonese", "Japanese", "Thai"})


def resolve(name_or_code: str, known: Sequence[str] = ()) -> str:
    """English name of a language given by name, ISO 639 code or locale, in any case ("en-US" is "English").

    `known`, where not empty, is the checkpoint's own list of names: it may hold names beyond the 30, and a language
    outside it is refused. Raises UnknownLanguageError, which names the close ones.
    """
    typed = name_or_code.strip().lower()
    key = " ".join(re.split(r"[\s_-]+", typed))
    own = {name.lower(): name for name in known}
    if key in own:
        return own[key]
    code = _NAMES.get(key) or _CODES.get(re.split("[_-]", typed)[0])
    if code is None:
        raise UnknownLanguageError(_unknown(name_or_code, key, known))
    name = LANGUAGES[code]
    if own and name.lower() not in own:
        raise UnknownLanguageError(f"this model does not know {name}: it knows {', '.join(known)}")
    return own.get(name.lower(), name)


def code(name: str) -> str:
    """ISO code of an English name: "en" for "English". Raises UnknownLanguageError."""
    key = name.strip().lower()
    if key not in _NAMES:
        raise UnknownLanguageError(_unknown(name, key, ()))
    return _NAMES[key]


def separator(language: str) -> str:
    """What stands between two pieces of text: nothing where the script has no spaces, else one space."""
    return "" if language in _UNSPACED else " "


def _unknown(typed: str, key: str, known: Sequence[str]) -> str:
    names = {name.lower(): name for name in known}
    if not names:
        names = {alias: LANGUAGES[iso] for alias, iso in _NAMES.items()}
    close = dict.fromkeys(names[match] for match in difflib.get_close_matches(key[:40], names, n=3))
    head = f"language {typed[:40]!r} is not known: "
    if close:
        return head + f"did you mean {' or '.join(close)}?"
    return head + f"use one of {', '.join(known or LANGUAGES)}"
