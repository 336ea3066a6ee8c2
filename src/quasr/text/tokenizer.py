"""Byte-level BPE of Qwen2, read from a checkpoint in either file layout. Every id comes from the checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from quasr.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenisation: words with the space before them, single digits, punctuation, line ends, spaces."""

_STRINGS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "endoftext": "<|endoftext|>",
    "audio_start": "<|audio_start|>",
    "audio_end": "<|audio_end|>",
    "audio_pad": "<|audio_pad|>",
    "asr_text": "<asr_text>",
}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that structure prompt and output."""

    im_start: int
    im_end: int
    endoftext: int
    audio_start: int
    audio_end: int
    audio_pad: int
    asr_text: int


class Tokenizer:
    """Text to ids and back. Safe to share between threads."""

    def __init__(self, full: tokenizers.Tokenizer, largest: int | None = None) -> None:
        """Wraps a loaded tokenizer, whose `largest` id may be known; raises CheckpointError where a structural token is
        missing."""
        self._full = full
        self._largest = largest
        self._plain = _without_added_tokens(full)
        self.special = _special_tokens(full)
        flagged = {index for index, token in full.get_added_tokens_decoder().items() if token.special}
        structural = {getattr(self.special, field.name) for field in fields(SpecialTokens)}
        self._hidden = (flagged | structural) - {self.special.asr_text}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads `tokenizer.json`, else `vocab.json`, `merges.txt` and the tokens added in `tokenizer_config.json`.

        Raises ModelNotFoundError where there are no such files, CheckpointError where one is damaged.
        """
        if (folder / "tokenizer.json").is_file():
            return cls(_from_single_file(folder / "tokenizer.json"))
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ModelNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor {name} is there")
        return cls(*_from_parts(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        if self._largest is None:
            # A dictionary of all tokens: 0.1 s.
            self._largest = max(self._full.get_vocab(with_added_tokens=True).values())
        return self._largest + 1

    def to_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json`, whichever files it was read from; merges are pairs."""
        content: dict[str, Any] = json.loads(self._full.to_str())
        return content

    def added_ids(self) -> frozenset[int]:
        """Ids of all added tokens, special or not."""
        return frozenset(self._full.get_added_tokens_decoder())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: `<|im_end|>` and the like inside it are spelled out, never control tokens."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: control tokens are dropped, `<asr_text>` stays, bytes that are not UTF-8 become U+FFFD."""
        shown = [index for index in ids if index not in self._hidden]
        return str(self._full.decode(shown, skip_special_tokens=False))


def _without_added_tokens(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    # `encode_special_tokens` would not do: it spares tokens such as <asr_text>, which are added but not special.
    plain = tokenizers.Tokenizer(full.model)
    if full.normalizer is not None:
        plain.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        plain.pre_tokenizer = full.pre_tokenizer
    return plain


def _special_tokens(full: tokenizers.Tokenizer) -> SpecialTokens:
    ids = {name: full.token_to_id(text) for name, text in _STRINGS.items()}
    missing = [_STRINGS[name] for name, index in ids.items() if index is None]
    if missing:
        raise CheckpointError(f"the tokenizer has no {', '.join(missing)}: it is not that of a Qwen3-ASR checkpoint")
    return SpecialTokens(**{name: index for name, index in ids.items() if index is not None})


def _from_single_file(path: Path) -> tokenizers.Tokenizer:
    text = _read(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise _damaged(path, error) from error


def _from_parts(folder: Path) -> tuple[tokenizers.Tokenizer, int]:
    """With its largest id."""
    vocab = _vocab(folder / "vocab.json")
    merges = _merges(folder / "merges.txt")
    added = _added_tokens(folder / "tokenizer_config.json")
    # Stating the ids in the vocabulary keeps them where the list has gaps; add_tokens alone would count up.
    vocab.update({token.content: index for index, token in added.items()})
    try:
        full = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise _damaged(folder / "merges.txt", error) from error
    full.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    full.pre_tokenizer = pre_tokenizers.Sequence([split, bytelevel])
    full.decoder = decoders.ByteLevel()
    full.add_tokens(list(added.values()))
    return full, max(vocab.values())


def _vocab(path: Path) -> dict[str, int]:
    vocab = _read_object(path)
    if not vocab or not all(isinstance(index, int) and 0 <= index < 2**32 for index in vocab.values()):
        raise _damaged(path, "an id is missing or not a number")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    pairs = (line.split(" ") for line in _read(path).split("\n") if line and not line.startswith("#version"))
    try:
        return [(left, right) for left, right in pairs]
    except ValueError as error:
        raise _damaged(path, "a line does not hold two parts") from error


def _added_tokens(path: Path) -> dict[int, AddedToken]:
    if not path.is_file():
        return {}
    try:
        entries = _read_object(path).get("added_tokens_decoder", {}).items()
        return {int(index): _added_token(entry) for index, entry in entries}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "added_tokens_decoder is malformed") from error


def _added_token(entry: dict[str, Any]) -> AddedToken:
    return AddedToken(
        str(entry["content"]),
        special=bool(entry.get("special", False)),
        normalized=bool(entry.get("normalized", False)),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not UTF-8") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is not valid JSON") from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    return value


def _damaged(path: Path, why: object) -> CheckpointError:
    reason = " ".join(str(why).split())[:200]
    return CheckpointError(f"{path} is damaged ({reason}): download the checkpoint again")
