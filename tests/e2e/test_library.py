"""`quasr.load` and what it loads, on a tiny random checkpoint in both layouts."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from made_sound import RATE, write_wav
from safetensors.torch import load_file, save_file

import quasr
from quasr.errors import CheckpointError, ModelNotFoundError, OptionError, UnknownLanguageError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def transcriber(hf: Path) -> Iterator[quasr.Transcriber]:
    with quasr.load(hf, device="cpu") as loaded:
        yield loaded


def test_all_kinds_of_input_give_the_same(transcriber: quasr.Transcriber, wav: Path) -> None:
    samples = np.frombuffer(wav.read_bytes()[44:], "<i2")
    with wav.open("rb") as file:
        sources = [str(wav), wav, wav.read_bytes(), io.BytesIO(wav.read_bytes()), file, (samples, RATE)]
        texts = {transcriber.transcribe(source, max_new_tokens=12).text for source in sources}
    assert len(texts) == 1
    assert texts != {""}


def test_both_layouts_give_the_same(transcriber: quasr.Transcriber, original: Path, wav: Path) -> None:
    with quasr.load(original, device="cpu") as other:
        assert other.transcribe(wav, max_new_tokens=12).text == transcriber.transcribe(wav, max_new_tokens=12).text


@pytest.mark.slow
def test_batch_equals_single_and_segments_are_the_text(transcriber: quasr.Transcriber, tmp_path: Path) -> None:
    files = [write_wav(tmp_path / f"{seconds}.wav", seconds, seed=1) for seconds in (0.02, 1.3, 9.0, 4.4)]
    options = quasr.TranscribeOptions(piece_seconds=3.0, batch_size=4, max_new_tokens=10)
    together = list(transcriber.transcribe_batch(files, options))
    for file, batched in zip(files, together, strict=True):
        alone = transcriber.transcribe(file, options, batch_size=1)
        assert isinstance(batched, quasr.Transcript)
        assert (alone.text, len(alone.segments)) == (batched.text, len(batched.segments))
        assert "".join(segment.text for segment in batched.segments) == batched.text


def test_a_decode_that_never_stops_is_cut_and_noticed(transcriber: quasr.Transcriber, wav: Path) -> None:
    result = transcriber.transcribe(wav, max_new_tokens=5)
    assert result.finish_reason == "length"
    found = [(notice.code, notice.start, notice.end) for notice in result.warnings]
    # The network is random and the sound a tone: that it writes words at all is doubtful too.
    assert found == [("token_budget", 0.0, 2.0), ("doubtful_speech", 0.0, 2.0)]
    assert result.timings.tokens == 5


def test_info_says_where_and_why(transcriber: quasr.Transcriber) -> None:
    assert (transcriber.info.name, transcriber.info.device, transcriber.info.dtype) == ("torch", "cpu", "fp32")
    why_torch, why_here = transcriber.info.reasons[:2]
    assert why_torch.startswith("torch, because the folder holds no such ONNX graphs")
    assert why_here == "the CPU was asked for"


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"language": "Klingon"}, UnknownLanguageError),
        ({"piece_seconds": 0.2}, OptionError),
        ({"piece_seconds": float("nan")}, OptionError),
        ({"batch_size": 0}, OptionError),
        ({"max_new_tokens": 0}, OptionError),
        ({"temperature": 1.0}, OptionError),
    ],
)
def test_options_are_checked(
    transcriber: quasr.Transcriber, wav: Path, overrides: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        transcriber.transcribe(wav, **overrides)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **entries: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **entries}))


def test_missing_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, CheckpointError, r"model-00001-of-00002\.safetensors")


def test_wrong_shape(folder: Path) -> None:
    name = "model.language_model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    refuse(folder, CheckpointError, name)


def test_corrupt_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    refuse(folder, CheckpointError, "model.safetensors")


def test_unknown_architecture(folder: Path) -> None:
    reconfigure(folder, model_type="whisper")
    refuse(folder, UnsupportedModelError, "whisper")


def test_tokenizer_of_another_checkpoint(folder: Path) -> None:
    reconfigure(folder, audio_token_id=3)
    refuse(folder, CheckpointError, "two checkpoints")


def test_vocabulary_larger_than_the_embedding(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    text = {**raw["text_config"], "vocab_size": raw["text_config"]["vocab_size"] - 1}
    reconfigure(folder, text_config=text)
    refuse(folder, CheckpointError, "two checkpoints")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, ModelNotFoundError, "config.json")


@pytest.fixture
def folder(hf: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def refuse(folder: Path, error: type[quasr.QuasrError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        quasr.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("language", 5, "a name or code of a language, or None"),
        ("context", None, "text"),
        ("batch_size", "8", "a whole number"),
        ("piece_seconds", "30", "a number of seconds"),
        ("max_new_tokens", 2.5, "a whole number or None"),
        ("chunk", None, "text"),
    ],
)
def test_an_option_of_another_type_is_told(name: str, value: object, meaning: str) -> None:
    with quasr.load("demo", engine="onnx") as transcriber, pytest.raises(OptionError) as caught:
        transcriber.transcribe((np.zeros(8000, np.float32), 16000), **{name: value})
    assert str(caught.value) == f"{name} is {value!r}: it must be {meaning}"
