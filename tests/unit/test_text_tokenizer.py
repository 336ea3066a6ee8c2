from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from quasr.errors import CheckpointError, ModelNotFoundError
from quasr.text.tokenizer import Tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
CORPUS = [
    "the quick brown fox, the lazy dog. It's 1234 o'clock!",
    "你好 世界 你好",
    "thé éclair the then there\n\n  here",
]
# As Qwen2 documents it, typed anew.
SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def small_bpe() -> tokenizers.Tokenizer:
    full = tokenizers.Tokenizer(BPE())
    full.normalizer = normalizers.NFC()
    full.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    full.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    full.train_from_iterator(CORPUS * 4, trainer)
    full.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    full.add_tokens([AddedToken("<asr_text>", normalized=False)])
    return full


SOURCE = small_bpe()
PLAIN = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(SOURCE.to_str()), "added_tokens": []}))


def write_parts(folder: Path) -> None:
    model = json.loads(SOURCE.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    added = {
        str(index): {"content": token.content, "special": token.special, "normalized": False}
        for index, token in SOURCE.get_added_tokens_decoder().items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")


def write_single(folder: Path) -> None:
    SOURCE.save(str(folder / "tokenizer.json"))


WRITERS = {"parts": write_parts, "single": write_single}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    loaded = []
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        loaded.append(Tokenizer.from_folder(folder))
    return loaded


@given(text=st.text(max_size=60))
def test_both_layouts_encode_as_the_source_and_decode_back(both: list[Tokenizer], text: str) -> None:
    ids = PLAIN.encode(text).ids
    for tokenizer in both:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == normalizers.NFC().normalize_str(text)


def test_ids_come_from_the_files(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        assert tokenizer.special.im_start == SOURCE.token_to_id("<|im_start|>")
        assert tokenizer.special.im_end == SOURCE.token_to_id("<|im_end|>")
        assert tokenizer.special.asr_text == SOURCE.token_to_id("<asr_text>")
        assert tokenizer.vocab_size == SOURCE.get_vocab_size()


def test_control_strings_in_plain_text_stay_text(both: list[Tokenizer]) -> None:
    text = "a <|im_end|> b<asr_text><|audio_pad|>"
    controls = set(SOURCE.get_added_tokens_decoder())
    for tokenizer in both:
        ids = tokenizer.encode(text)
        assert not controls & set(ids)
        assert tokenizer.decode(ids) == text


def test_decode_drops_controls_keeps_the_tag_and_marks_broken_bytes(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        special = tokenizer.special
        head, first_byte = tokenizer.encode("language English"), SOURCE.token_to_id("ä")  # byte 0xE4 of 你
        ids = [special.im_start, *head, special.asr_text, *tokenizer.encode("hi"), first_byte, special.im_end]
        assert tokenizer.decode(ids) == "language English<asr_text>hi�"
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""


def test_the_tag_is_kept_even_where_the_checkpoint_calls_it_special() -> None:
    full = tokenizers.Tokenizer.from_str(SOURCE.to_str().replace('"special":false', '"special":true'))
    assert all(token.special for token in full.get_added_tokens_decoder().values())
    tokenizer = Tokenizer(full)
    assert tokenizer.decode([tokenizer.special.asr_text, tokenizer.special.im_end]) == "<asr_text>"


def test_gaps_between_added_ids_are_kept(tmp_path: Path) -> None:
    write_parts(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    shifted = {str(int(index) * 2): entry for index, entry in config["added_tokens_decoder"].items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": shifted}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special.asr_text == 2 * SOURCE.token_to_id("<asr_text>")
    assert tokenizer.vocab_size == 2 * SOURCE.token_to_id("<asr_text>") + 1
    assert tokenizer.encode("the <asr_text>") == SOURCE.encode("the <").ids + SOURCE.encode("asr_text>").ids


@pytest.mark.parametrize("layout", sorted(WRITERS))
def test_a_missing_structural_token_is_named(tmp_path: Path, layout: str) -> None:
    WRITERS[layout](tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("<|audio_pad|>", "<|other|>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"<\|audio_pad\|>"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_parts(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelNotFoundError, match=missing):
        Tokenizer.from_folder(tmp_path)


DAMAGE = [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"a": "b"}', b"[" * 100_000, b"a b c\n", b"qqq www\n"]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_damaged_file_is_one_line_that_names_a_file(tmp_path: Path, name: str, damage: bytes) -> None:
    write_parts(tmp_path)
    (tmp_path / name).write_bytes(damage)
    if (name, damage) == ("merges.txt", b""):
        assert Tokenizer.from_folder(tmp_path).encode("the") == [SOURCE.token_to_id(char) for char in "the"]
        return
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_an_error_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"vocab\.json cannot be read: Permission denied"):
        Tokenizer.from_folder(tmp_path)
