"""Pruning of the vocabulary: pieces, rows, files and refusals; on the demo model and on Qwen's own vocabulary."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import quasr
from quasr.audio.decode import load as load_audio
from quasr.audio.mel import log_mel
from quasr.errors import CheckpointError, OptionError, UnknownLanguageError
from quasr.model.config import read_config
from quasr.model.decoder import KVCache
from quasr.pipeline.engines import stop_ids
from quasr.quant.apply import quantise
from quasr.quant.recipe import NO_RECIPE, recipe_for
from quasr.quant.store import save_quantised
from quasr.quant.vocabulary import (
    Keep,
    Pruning,
    choose_tokens,
    head_milliseconds,
    language_rule,
    parse_keep,
    prune,
    pruned_files,
    text_ids,
)
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "../shared"
REAL = SHARED / "tokenizer"
SPEECH = SHARED / "speech"
DEMO = Path(str(files("quasr"))) / "demo" / "model"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not in this checkout")
needs_speech = pytest.mark.skipif(not SPEECH.is_dir(), reason="the test speech is not beside the repository")
needs_vocabulary = pytest.mark.skipif(not REAL.is_dir(), reason="Qwen's vocabulary is not beside the repository")

ROWS = 151_936


def write_pruned(tokenizer: Tokenizer, source: Path, pruning: Pruning, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    for name, text in pruned_files(tokenizer, source, pruning).items():
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer.from_folder(folder)


def mapped_back(ids: list[int], pruning: Pruning) -> list[int]:
    return [pruning.ids[index] for index in ids]


# Letters: token strings are byte-level, so they are made here from text by the vocabulary itself or typed as ASCII.


@pytest.mark.parametrize("token", ["hello", "Ġworld", "iPhone", "'ve", "Ġ@", "}", "Ċ", "é".encode().decode("latin-1")])
def test_english_takes(token: str) -> None:
    assert language_rule(("en",))(token)


@pytest.mark.parametrize("token", ["({", "_name", "ĉĉ", "ä½ł", "Ð¿", "ÅĤ", "ä½"])
def test_english_leaves(token: str) -> None:
    """Code, tabs, a Chinese character, a Cyrillic one, a Polish one, the beginning of a Chinese one."""
    assert not language_rule(("en",))(token)


@pytest.mark.parametrize(
    ("language", "token"), [("zh", "ä½ł"), ("zh", "ä½"), ("zh", "ï¼Į"), ("ru", "Ð¿"), ("pl", "ÅĤ"), ("pl", "ÅģÃ³d")]
)
def test_each_language_takes_its_own(language: str, token: str) -> None:
    """你; its first two bytes; the comma ，; п; ł; Łód with a capital."""
    assert language_rule((language,))(token)
    assert not language_rule(("id",))(token)


@pytest.mark.parametrize(
    ("languages", "error", "message"),
    [
        ("en,klingon", UnknownLanguageError, "'klingon' is not known"),
        (",", OptionError, "names no language"),
    ],
)
def test_wrong_languages(languages: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_keep(languages, None)


def test_languages_are_codes_once() -> None:
    assert parse_keep("English, zh,en", None) == Keep(("en", "zh"))
    assert parse_keep(None, None) is None


@needs_demo
def test_a_language_that_the_checkpoint_lacks_is_refused() -> None:
    with pytest.raises(UnknownLanguageError, match="this model does not know German"):
        choose_tokens(Tokenizer.from_folder(DEMO), DEMO, 1792, Keep(("de",)))


@needs_demo
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_texts_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match="is empty" if content == b"" else "cannot be read"):
        text_ids(Tokenizer.from_folder(DEMO), path)


@needs_demo
def test_xz_and_columns(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(DEMO)
    (tmp_path / "a.tsv.xz").write_bytes(lzma.compress(b"source\tMove these files.\n"))
    expected = {*tokenizer.encode("Move these files."), *tokenizer.encode(" Move")}
    assert text_ids(tokenizer, tmp_path / "a.tsv.xz") == expected


@dataclass(frozen=True)
class Pruned:
    """The demo model before and after, in fp32."""

    tokenizer: Tokenizer
    smaller: Tokenizer
    pruning: Pruning
    model: Qwen3ASR
    small: Qwen3ASR
    folder: Path

    def texts(self) -> dict[str, str]:
        return pruned_files(self.tokenizer, DEMO, self.pruning)


def load_demo() -> Qwen3ASR:
    return load_model(DEMO, read_config(DEMO), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return make_pruned(tmp_path_factory.mktemp("zh"), Keep(("zh",)))


def make_pruned(folder: Path, keep: Keep) -> Pruned:
    if not DEMO.is_dir():
        pytest.skip("the demo model is not in this checkout")
    tokenizer, model, small = Tokenizer.from_folder(DEMO), load_demo(), load_demo()
    pruning = choose_tokens(tokenizer, DEMO, model.config.text.vocab_size, keep)
    prune(small, pruning)
    return Pruned(tokenizer, write_pruned(tokenizer, DEMO, pruning, folder), pruning, model, small, folder)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Only the tokens of forty transcripts stay."""
    folder = tmp_path_factory.mktemp("spoken")
    text = folder / "text.txt"
    text.write_text("\n".join(clip["text"] for clip in clips(count=40)), encoding="utf-8")
    return make_pruned(folder, Keep((), text))


def clips(subset: str = "ljspeech", count: int = 6) -> list[dict[str, Any]]:
    path = SPEECH / "public" / "manifest.jsonl"
    if not path.is_file():
        pytest.skip("the test speech is not beside the repository")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return sorted((row for row in rows if row["subset"] == subset), key=lambda row: row["seconds"])[:count]


@torch.inference_mode()
def greedy(
    model: Qwen3ASR, tokenizer: Tokenizer, clip: dict[str, Any], language: str | None = None
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logits of each step (steps, rows)."""
    samples = load_audio(SPEECH / "public" / clip["path"])
    prompt = build_prompt(tokenizer, "", language)
    encoded = model.encode([torch.from_numpy(log_mel(samples))])
    x, lengths = model.embed_prompts(encoded, [torch.tensor(prompt.prefix)], [torch.tensor(prompt.suffix)])
    cache = KVCache.allocate(model.config.text, 1, lengths[0] + 60, torch.float32, torch.device("cpu"))
    logits = [model.prefill(x, lengths, cache)]
    ends = stop_ids(model.config, tokenizer)
    tokens = [int(logits[-1].argmax())]
    while tokens[-1] not in ends and len(tokens) < 60:
        filled = torch.tensor(lengths) + len(tokens) - 1
        logits.append(model.step(torch.tensor(tokens[-1:]), filled, int(filled), cache))
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.cat(logits)


def test_pieces_of_the_kept_text_are_the_same(spoken: Pruned) -> None:
    assert len(spoken.pruning.ids) < 0.7 * spoken.pruning.rows
    for clip in clips():
        text = clip["text"]
        assert mapped_back(spoken.smaller.encode(text), spoken.pruning) == spoken.tokenizer.encode(text)


def test_any_text_still_has_tokens(spoken: Pruned) -> None:
    for text in ("Zürich 東京 \U0001f600 <|im_end|>", "\t{}\n"):
        assert spoken.smaller.decode(spoken.smaller.encode(text)) == text


@pytest.mark.parametrize("language", [None, "English", "Chinese", "German"])
def test_prompts_are_the_same(spoken: Pruned, language: str | None) -> None:
    new, old = (build_prompt(tokenizer, "", language) for tokenizer in (spoken.smaller, spoken.tokenizer))
    assert mapped_back(list(new.prefix), spoken.pruning) == list(old.prefix)
    assert mapped_back(list(new.suffix), spoken.pruning) == list(old.suffix)


def test_config_is_renumbered(spoken: Pruned) -> None:
    config, old = read_config(spoken.folder), read_config(DEMO)
    assert config.text.vocab_size == len(spoken.pruning.ids) == spoken.small.config.text.vocab_size
    assert config.audio_token_id == spoken.smaller.special.audio_pad == spoken.small.config.audio_token_id
    assert mapped_back(list(config.eos_token_ids), spoken.pruning) == list(old.eos_token_ids)
    assert spoken.small.config.eos_token_ids == config.eos_token_ids


def test_languages_that_are_gone_are_no_longer_told(chinese: Pruned, spoken: Pruned) -> None:
    """A text by itself does not say what language it is in."""
    told = [json.loads((case.folder / "config.json").read_text())["support_languages"] for case in (chinese, spoken)]
    assert told == [["Chinese"], ["English", "Chinese"]]


@needs_speech
@pytest.mark.slow
@pytest.mark.parametrize("language", [None, "English"])
def test_greedy_tokens_are_the_same(spoken: Pruned, language: str | None) -> None:
    """And the logits of the kept rows, where the model's own words are all kept."""
    covered = 0
    for clip in clips(count=3):
        tokens, logits = greedy(spoken.model, spoken.tokenizer, clip, language)
        if not set(tokens) <= set(spoken.pruning.ids):
            continue
        covered += 1
        fewer, kept = greedy(spoken.small, spoken.smaller, clip, language)
        assert mapped_back(fewer, spoken.pruning) == tokens
        torch.testing.assert_close(kept, logits[:, list(spoken.pruning.ids)], rtol=0, atol=1e-4)
    assert covered >= 2


@needs_speech
def test_greedy_tokens_of_mandarin_are_the_same(chinese: Pruned) -> None:
    for clip in clips("zh_words", 4):
        tokens, _ = greedy(chinese.model, chinese.tokenizer, clip, "Chinese")
        assert set(tokens) <= set(chinese.pruning.ids)
        fewer, _ = greedy(chinese.small, chinese.smaller, clip, "Chinese")
        assert mapped_back(fewer, chinese.pruning) == tokens


@needs_speech
@pytest.mark.slow
def test_a_saved_folder_says_the_same(spoken: Pruned, tmp_path: Path) -> None:
    """In int8, whose scale is a row's own: pruned after quantising is quantised after pruning."""
    model, recipe = load_demo(), recipe_for("int8")
    quantise(model, recipe)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    prune(model, spoken.pruning)
    gone = spoken.pruning.rows - len(spoken.pruning.ids)
    # Beside each row of 384 bytes its scale in fp32.
    assert before - sum(tensor.nbytes for tensor in model.state_dict().values()) == gone * (384 + 4)
    save_quantised(model, recipe, DEMO, tmp_path / "q", {"vocabulary": spoken.pruning.to_json()}, spoken.texts())
    with (
        quasr.load(tmp_path / "q", device="cpu") as small,
        quasr.load(DEMO, device="cpu", compute_type="int8", dtype="fp32") as whole,
    ):
        covered = 0
        for clip in clips(count=4):
            text = whole.transcribe(SPEECH / "public" / clip["path"]).text
            if set(spoken.tokenizer.encode(text)) <= set(spoken.pruning.ids):
                covered += 1
                assert small.transcribe(SPEECH / "public" / clip["path"]).text == text
        assert covered >= 1


def test_a_language_that_is_gone_cannot_be_forced(chinese: Pruned) -> None:
    save_quantised(chinese.small, NO_RECIPE, DEMO, chinese.folder / "saved", {}, chinese.texts())
    with quasr.load(chinese.folder / "saved", device="cpu") as transcriber:
        assert transcriber.info.scheme == "none"
        with pytest.raises(UnknownLanguageError, match="this model does not know English"):
            transcriber.transcribe((np.zeros(16_000, np.float32), 16_000), language="en")


@needs_demo
def test_the_head_takes_time_and_other_networks_are_refused() -> None:
    model = load_demo()
    assert head_milliseconds(model) > 0
    with pytest.raises(CheckpointError, match="1792 rows where 5"):
        prune(model, Pruning((0, 1), 5))


@dataclass(frozen=True)
class Real:
    tokenizer: Tokenizer
    folder: Path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((REAL / name).read_bytes())
    body = {"audio_token_id": 151676, "text_config": {"vocab_size": ROWS}}
    config = {"model_type": "qwen3_asr", "support_languages": ["English", "Chinese"], "thinker_config": body}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [151643, 151645], "pad_token_id": 151645})
    )
    return Real(Tokenizer.from_folder(folder), folder)


@needs_vocabulary
@pytest.mark.slow
def test_qwens_vocabulary_in_english_and_chinese(real: Real, tmp_path: Path) -> None:
    pruning = choose_tokens(real.tokenizer, real.folder, ROWS, Keep(("en", "zh")))
    smaller = write_pruned(real.tokenizer, real.folder, pruning, tmp_path)
    assert 100_000 < len(pruning.ids) < 120_000
    for text in ("I've paid $12.50 at the café, haven't I?", "阿姨，您好！北京欢迎你。2024年", "language Chinese"):
        assert mapped_back(smaller.encode(text), pruning) == real.tokenizer.encode(text)
    # Neither language has these, so fewer tokens than characters cannot be hoped for, but the text survives.
    assert smaller.decode(smaller.encode("สวัสดีชาวโลก")) == "สวัสดีชาวโลก"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert mapped_back(generation["eos_token_id"], pruning) == [151643, 151645]
    (tmp_path / "tokenizer.json").unlink()
    parts = Tokenizer.from_folder(tmp_path)
    assert parts.encode("北京 café") == smaller.encode("北京 café")
    assert parts.special == smaller.special


@needs_vocabulary
@needs_speech
@pytest.mark.slow
def test_qwens_vocabulary_over_real_sentences(real: Real, tmp_path: Path) -> None:
    """Every hundredth of 50,948 Mandarin sentences decides; each of them falls into the same pieces."""
    with lzma.open(SPEECH / "text" / "train_sentences_zh.txt.xz", "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[::100]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    pruning = choose_tokens(real.tokenizer, real.folder, ROWS, Keep((), text))
    smaller = write_pruned(real.tokenizer, real.folder, pruning, tmp_path)
    assert 1_000 < len(pruning.ids) < 6_000
    for line in lines:
        assert mapped_back(smaller.encode(line), pruning) == real.tokenizer.encode(line)
