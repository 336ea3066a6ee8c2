"""A smaller vocabulary: the rows of embedding and head that are never needed go, and the tokens are renumbered.

What is kept: the 256 bytes, so that any text still has tokens; all added tokens; what the prompts and all language
names consist of, so that detection stays honest; the ids that config files name; and, as asked, the tokens that fit the
letters of some languages, and those that a text consists of.

Exactness. A token comes into being by merges alone, and the parts of every kept token are kept with the merges between
them. So where all tokens of a text are kept, each merge that makes them is still there, the order of merges is the old
one, and the text falls into the same pieces. The logits of kept rows are the old ones; greedy decoding differs only
from the first step on at which the whole model would have taken a token that is gone.
"""

from __future__ import annotations

import json
import lzma
import time
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from quasr.errors import CheckpointError, OptionError
from quasr.model.config import read_json
from quasr.text.languages import LANGUAGES, code, resolve
from quasr.text.prompt import build_prompt
from quasr.weights.load import assign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR
    from quasr.text.tokenizer import Tokenizer

LATIN_LETTERS = {
    "cs": "áčďéěíňóřšťúůýž", "da": "æøåéü", "nl": "áéèêëïóöü", "en": "àâäçèéêëîïñôöùûü", "fil": "ñáéíóú",
    "fi": "äöåšž", "fr": "àâæçéèêëîïôœùûüÿ", "de": "äöüßéà", "hu": "áéíóöőúüű", "id": "é", "it": "àèéìíîòóùú",
    "ms": "é", "pl": "ąćęłńóśźż", "pt": "àáâãçéêíóôõúü", "ro": "ăâîșțşţ", "es": "áéíñóúü", "sv": "åäöéü",
    "tr": "çğıöşüâîûİ", "vi": "àáảãạăằắẳẵặâầấẩẫậèéẻẽẹêềếểễệìíỉĩịòóỏõọôồốổỗộơờớởỡợùúủũụưừứửữựỳýỷỹỵđ",
}  # fmt: skip
"""Letters beyond a to z, as lower case, of the languages in Latin script; English has those of its loanwords."""

SCRIPTS = {
    "ar": ("ARABIC ",), "fa": ("ARABIC ",), "el": ("GREEK ",), "hi": ("DEVANAGARI ",), "ko": ("HANGUL ",),
    "mk": ("CYRILLIC ",), "ru": ("CYRILLIC ",), "th": ("THAI ",),
    "zh": ("CJK UNIFIED ", "CJK COMPATIBILITY IDEOGRAPH"), "yue": ("CJK UNIFIED ", "CJK COMPATIBILITY IDEOGRAPH"),
    "ja": ("CJK UNIFIED ", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC"),
}  # fmt: skip
"""How the Unicode names of a language's characters begin, for languages in other scripts."""

EAST_ASIAN = frozenset({"zh", "yue", "ja", "ko"})
ASCII_TEXT = frozenset("abcdefghijklmnopqrstuvwxyz0123456789 .,?!'\":;%$&()/-")
"""Every language has these: foreign names and words occur in all."""
PUNCTUATION = frozenset(
    map(chr, [*range(0xA0, 0xC0), 0x200C, 0x200D, *range(0x2010, 0x2028), *range(0x2030, 0x203B), 0x20AC])
)
EAST_ASIAN_PUNCTUATION = frozenset(map(chr, [*range(0x3000, 0x3040), *range(0xFF00, 0xFF66)]))

SCRIPT_RANGES = (range(0x80, 0x10000), range(0x1F000, 0x32000))
"""Code points that have names of letters; the rest are private or unassigned."""

TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
CONFIG_FILES = ("config.json", "generation_config.json")
HEAD_RUNS = 5


@dataclass(frozen=True, slots=True)
class Keep:
    """What the smaller vocabulary must still say: languages as ISO codes, and the lines of a text file."""

    languages: tuple[str, ...] = ()
    text: Path | None = None


@dataclass(frozen=True, slots=True)
class Pruning:
    """`ids`: the old ids that stay, ascending; the new id of each is its place. `rows`: how many there were."""

    ids: tuple[int, ...]
    rows: int
    languages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For a folder's metadata."""
        return {"languages": list(self.languages), "kept": len(self.ids), "of": self.rows}


def parse_keep(languages: str | None, text: Path | None) -> Keep | None:
    """`en,zh` and a text file; None where neither is given. Raises UnknownLanguageError, OptionError."""
    if languages is None and text is None:
        return None
    asked = [word for word in (languages or "").split(",") if word.strip()]
    if languages is not None and not asked:
        raise OptionError("--languages names no language: write codes, such as en,zh")
    return Keep(tuple(dict.fromkeys(code(resolve(word)) for word in asked)), text)


def choose_tokens(tokenizer: Tokenizer, folder: Path, rows: int, keep: Keep) -> Pruning:
    """Which of the `rows` tokens of the checkpoint `folder` stay.

    Raises UnknownLanguageError for a language that the checkpoint does not know, OptionError for a text that cannot
    be read or a folder whose vocabulary is pruned of a language already.
    """
    known = _support_languages(read_json(folder / "config.json"))
    names = tuple(resolve(LANGUAGES[iso], known) for iso in keep.languages)
    model = tokenizer.to_json()["model"]
    vocabulary: dict[str, int] = model["vocab"]
    needed = set(_prompt_ids(tokenizer, {*LANGUAGES.values(), *known, "None"}))
    if keep.languages:
        fits = language_rule(keep.languages)
        needed.update(index for token, index in vocabulary.items() if fits(token))
    if keep.text is not None:
        needed.update(text_ids(tokenizer, keep.text))
    byte_ids = {vocabulary[letter] for letter in byte_letters() if letter in vocabulary}
    closed = _with_parts(needed | byte_ids, vocabulary, model["merges"])
    named = {index for file in CONFIG_FILES for index in _named_ids(_read(folder / file)) if index < rows}
    return Pruning(tuple(sorted(closed | named | tokenizer.added_ids())), rows, names)


def _support_languages(raw: dict[str, Any]) -> tuple[str, ...]:
    found = raw.get("support_languages") or raw.get("thinker_config", {}).get("support_languages") or ()
    return tuple(map(str, found))


def _prompt_ids(tokenizer: Tokenizer, names: Iterable[str]) -> Iterator[int]:
    """Tokens of every prompt, and of the language heads that the model itself writes."""
    for name in (None, *names):
        prompt = build_prompt(tokenizer, "", name)
        yield from (*prompt.prefix, *prompt.suffix)
        yield from tokenizer.encode(f"language {name}")


def text_ids(tokenizer: Tokenizer, path: Path) -> set[int]:
    """Tokens of a text file, plain or .xz: of each line, and of its first word after a space, as within a transcript.

    Of a line with tabs only the last column counts. Raises OptionError where the file cannot be read, or is empty.
    """
    found: set[int] = set()
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            for line in file:
                sentence = line.rstrip("\r\n").rsplit("\t", 1)[-1].strip()
                found.update(tokenizer.encode(sentence))
                found.update(tokenizer.encode(" " + sentence.partition(" ")[0]))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read as UTF-8 text ({error}): give a .txt or .xz file") from error
    if not found:
        raise OptionError(f"{path} is empty: give the text whose tokens must stay")
    return found


def language_rule(codes: Sequence[str]) -> Callable[[str], bool]:
    """Whether a token of the byte-level vocabulary fits some languages.

    It does if each of its characters is one of theirs: a to z in both cases, digits, the marks of running text, and the
    letters in LATIN_LETTERS or SCRIPTS; or if it is one ASCII character, perhaps after a space. Of a character that a
    token holds in part, beginning bytes fit if some letter begins so, and ending bytes always do.
    """
    letters = alphabet(tuple(codes))
    beginnings = {
        encoded[:end] for char in letters if len(encoded := char.encode()) > 1 for end in range(1, len(encoded))
    }

    def fits(token: str) -> bool:
        spelled = byte_letters()
        if not all(letter in spelled for letter in token):
            return False
        text, tail = _characters(bytes(spelled[letter] for letter in token))
        if not tail and len(text.strip(" ")) <= 1 and text.isascii():
            return True
        return all(char in letters or char.lower() in letters for char in text) and (not tail or tail in beginnings)

    return fits


@cache
def alphabet(codes: tuple[str, ...]) -> frozenset[str]:
    """Characters of running text in the languages `codes`; those that have a case as lower case."""
    letters = set(ASCII_TEXT | PUNCTUATION)
    letters.update(*(LATIN_LETTERS.get(iso, "") for iso in codes))
    if EAST_ASIAN.intersection(codes):
        letters |= EAST_ASIAN_PUNCTUATION
    prefixes = tuple(prefix for iso in codes for prefix in SCRIPTS.get(iso, ()))
    if prefixes:
        characters = (chr(point) for points in SCRIPT_RANGES for point in points)
        letters.update(char for char in characters if unicodedata.name(char, "").startswith(prefixes))
    return frozenset(letters)


def _characters(data: bytes) -> tuple[str, bytes]:
    """The whole characters in some bytes, and the beginning of another one at their end; ending bytes are left out."""
    start = next((place for place, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
    for end in range(len(data), max(start, len(data) - 4) - 1, -1):
        try:
            return data[start:end].decode(), data[end:]
        except UnicodeDecodeError:
            continue
    return "\ufffd", b""


@cache
def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (Radford et al. 2019) -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _with_parts(ids: set[int], vocabulary: dict[str, int], merges: Sequence[Sequence[str]]) -> set[int]:
    """`ids`, the parts that they are merged from, the parts of those, and so on; by every merge that can make them."""
    parts: dict[int, set[int]] = {}
    for left, right in merges:
        parts.setdefault(vocabulary[left + right], set()).update((vocabulary[left], vocabulary[right]))
    closed, waiting = set(ids), list(ids)
    while waiting:
        fresh = parts.get(waiting.pop(), set()) - closed
        closed |= fresh
        waiting.extend(fresh)
    return closed


def pruned_files(tokenizer: Tokenizer, folder: Path, pruning: Pruning) -> dict[str, str]:
    """Name -> text of the files of checkpoint `folder` that hold tokens or ids, for the new vocabulary."""
    new = {old: place for place, old in enumerate(pruning.ids)}
    spec = pruned_tokenizer(tokenizer.to_json(), new)
    files = {"tokenizer.json": spec}
    files |= {name: _renumber(read_json(folder / name), new, pruning) for name in CONFIG_FILES if _has(folder, name)}
    texts = {name: _dump(value) for name, value in files.items()}
    return texts | {name: _old_file(name, folder, spec) for name in TOKENIZER_FILES if _has(folder, name)}


def pruned_tokenizer(spec: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """The content of tokenizer.json with only the tokens in `new` (old id -> new id) and the merges among them."""
    vocabulary = {token: new[old] for token, old in spec["model"]["vocab"].items() if old in new}
    merges = [[a, b] for a, b in spec["model"]["merges"] if a in vocabulary and b in vocabulary and a + b in vocabulary]
    added = [{**entry, "id": new[entry["id"]]} for entry in spec["added_tokens"]]
    return {**spec, "added_tokens": added, "model": {**spec["model"], "vocab": vocabulary, "merges": merges}}


def _renumber(value: Any, new: dict[int, int], pruning: Pruning, key: str = "") -> Any:
    """A config with new ids under every `..._token_id`, the new size, and the languages that are left."""
    if key.endswith(("token_id", "token_ids")):
        return [new.get(old) for old in value] if isinstance(value, list) else new.get(value)
    if key == "vocab_size" and value == pruning.rows:
        return len(pruning.ids)
    if key == "support_languages" and pruning.languages:
        return list(pruning.languages)
    if isinstance(value, dict):
        return {name: _renumber(item, new, pruning, name) for name, item in value.items()}
    return value


def _named_ids(value: Any, key: str = "") -> Iterator[int]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _named_ids(item, name)
    elif key.endswith(("token_id", "token_ids")):
        yield from (
            item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int) and item >= 0
        )


def _old_file(name: str, folder: Path, spec: dict[str, Any]) -> str:
    """One of the files of the layout without tokenizer.json, for tools that read it."""
    added = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    if name == "merges.txt":
        return "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in spec["model"]["merges"])
    if name == "vocab.json":
        return _dump({token: index for token, index in spec["model"]["vocab"].items() if token not in added})
    if name == "added_tokens.json":
        return _dump(added)
    raw = read_json(folder / name)
    entries = raw.get("added_tokens_decoder", {}).values()
    return _dump({**raw, "added_tokens_decoder": {str(added[entry["content"]]): entry for entry in entries}})


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def prune(model: Qwen3ASR, pruning: Pruning) -> None:
    """Takes the rows away in place, from a 16-bit or quantised embedding, and from a head of its own.

    Raises CheckpointError if the network has another number of rows.
    """
    text = model.config.text
    if text.vocab_size != pruning.rows:
        raise CheckpointError(f"the network has {text.vocab_size} rows where {pruning.rows} are to be pruned")
    for layer in (model.decoder.embed_tokens, model.decoder.lm_head):
        if layer is not None:
            _keep_rows(layer, pruning.ids)
    new = {old: place for place, old in enumerate(pruning.ids)}
    config = model.config
    model.config = replace(
        config,
        text=replace(text, vocab_size=len(pruning.ids)),
        audio_token_id=None if config.audio_token_id is None else new[config.audio_token_id],
        eos_token_ids=tuple(new[old] for old in config.eos_token_ids if old in new),
        languages=pruning.languages or config.languages,
    )
    model.decoder.config = model.config.text


def _keep_rows(layer: nn.Module, ids: Sequence[int]) -> None:
    for name, tensor in layer.state_dict().items():
        assign(layer, name, tensor[torch.tensor(ids, device=tensor.device)])
    if isinstance(layer, nn.Embedding):
        layer.num_embeddings = len(ids)
    elif isinstance(layer, nn.Linear):
        layer.out_features = len(ids)


@torch.inference_mode()
def head_milliseconds(model: Qwen3ASR) -> float:
    """Time of the head for one token, where the network is: the shortest of some, since other programs only add."""
    norm = cast("torch.Tensor", model.decoder.norm.weight)
    hidden = torch.ones(1, len(norm), dtype=norm.dtype, device=norm.device)
    times = []
    for _ in range(HEAD_RUNS):
        started = time.perf_counter()
        model.decoder.logits(hidden).argmax(-1).tolist()  # as a list, so that a GPU has to finish
        times.append(time.perf_counter() - started)
    return 1000 * min(times)
