"""The stand-in for qwen-asr: its signatures, its errors, and how its arguments reach our transcriber."""

from __future__ import annotations

import ast
import base64
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig

from quasr.compat import qwen_asr as module
from quasr.compat.qwen_asr import ASRTranscription, Qwen3ASRModel
from quasr.engine.base import token_budget
from quasr.errors import AudioDecodeError, OptionError
from quasr.types import Notice, Segment, TranscribeOptions, Transcript
from quasr.weights.hub import HubOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

RATE = 16_000
TONE = np.sin(np.arange(RATE)).astype(np.float32)

# Parameters of qwen-asr 0.0.6, with their defaults.
OFFICIAL: dict[str, dict[str, Any]] = {
    "from_pretrained": {
        "pretrained_model_name_or_path": inspect.Parameter.empty, "forced_aligner": None,
        "forced_aligner_kwargs": None, "max_inference_batch_size": 32, "max_new_tokens": 512,
        "kwargs": inspect.Parameter.empty,
    },
    "transcribe": {
        "self": inspect.Parameter.empty, "audio": inspect.Parameter.empty, "context": "", "language": None,
        "return_time_stamps": False,
    },
    "get_supported_languages": {"self": inspect.Parameter.empty},
}  # fmt: skip


class FakeTranscriber:
    """Keeps what it is asked; answers with the context, and with the language or English."""

    languages = ("Chinese", "English", "German")

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], dict[str, Any]]] = []
        self.answers: list[Transcript | AudioDecodeError] = []

    def transcribe_batch(self, audios: list[Any], **options: Any) -> Iterator[Transcript | AudioDecodeError]:
        self.calls.append((audios, options))
        if self.answers:
            return iter(self.answers)
        name = options["language"] or "English"
        texts = [f"{options['context']}:{len(self.calls)}.{index}" for index in range(len(audios))]
        return iter([Transcript(text, name, 1.0, (Segment(0, 0.0, 1.0, text, name),)) for text in texts])


@pytest.fixture
def fake() -> FakeTranscriber:
    return FakeTranscriber()


@pytest.fixture
def model(fake: FakeTranscriber) -> Qwen3ASRModel:
    return Qwen3ASRModel(fake)  # type: ignore[arg-type]


def defaults(function: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_signatures_are_those_of_the_official_package(name: str) -> None:
    assert defaults(getattr(Qwen3ASRModel, name)) == OFFICIAL[name]
    assert list(defaults(getattr(Qwen3ASRModel, name))) == list(OFFICIAL[name])


@pytest.mark.skipif(
    find_spec("qwen_asr") is None, reason="qwen-asr is not installed: its signatures are a known vector"
)
@pytest.mark.parametrize("name", OFFICIAL)
def test_signatures_are_those_of_the_installed_package(name: str) -> None:
    """Read and not imported: it starts with one version of transformers alone, and not the one that we test with."""
    package = find_spec("qwen_asr")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "inference" / "qwen3_asr.py"
    classes = [
        node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)
    ]
    (theirs,) = [node for node in classes if node.name == "Qwen3ASRModel"]
    (found,) = [node for node in theirs.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert OFFICIAL[name] == read_defaults(found)


def read_defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """As `defaults`, of source code. `cls` is left out, as in bound methods."""
    names = [one.arg for one in function.args.args if one.arg != "cls"]
    given = [ast.literal_eval(value) for value in function.args.defaults]
    values = [inspect.Parameter.empty] * (len(names) - len(given)) + given
    more = {function.args.kwarg.arg: inspect.Parameter.empty} if function.args.kwarg else {}
    return dict(zip(names, values, strict=True)) | more


def test_one_audio_gives_a_list_of_one(model: Qwen3ASRModel, fake: FakeTranscriber) -> None:
    assert model.transcribe("talk.wav") == [ASRTranscription(language="English", text=":1.0", time_stamps=None)]
    ((sources, options),) = fake.calls
    assert sources == ["talk.wav"]
    assert options == {"context": "", "language": None, "max_new_tokens": None, "batch_size": 32}


def test_lists_keep_their_order_and_equal_ones_are_batched(model: Qwen3ASRModel, fake: FakeTranscriber) -> None:
    results = model.transcribe(["a", "b", "c"], context=["x", "y", "x"], language=["de", None, "GERMAN"])
    assert [(result.language, result.text) for result in results] == [
        ("German", "x:1.0"), ("English", "y:2.0"), ("German", "x:1.1"),
    ]  # fmt: skip
    assert [sources for sources, _ in fake.calls] == [["a", "c"], ["b"]]


def test_one_value_counts_for_all(model: Qwen3ASRModel, fake: FakeTranscriber) -> None:
    model.transcribe(["a", "b"], context="names", language=["Chinese"])
    ((_, options),) = fake.calls
    assert (options["context"], options["language"]) == ("names", "Chinese")
    model.transcribe("a", language=" ")
    assert fake.calls[-1][1]["language"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"audio": ["a", "b", "c"], "context": ["x", "y"]}, "Batch size mismatch: audio=3, context=2"),
        ({"audio": ["a"], "language": ["en", "de"]}, "Batch size mismatch: audio=1, language=2"),
        ({"audio": []}, "Batch size mismatch: audio=0"),
        ({"audio": "a", "language": "Klingon"}, "Unsupported language"),
        ({"audio": "a", "language": "French"}, "Unsupported language"),
        ({"audio": "a", "return_time_stamps": True}, "forced aligner"),
        ({"audio": "data:audio/wav;base64,UklGR"}, "base64"),
    ],
)
def test_its_value_errors(model: Qwen3ASRModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model.transcribe(**arguments)
    assert isinstance(caught.value, OptionError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("audio", [3, None, (1, 2), {"array": TONE}])
def test_what_is_no_audio_is_a_type_error(model: Qwen3ASRModel, audio: Any) -> None:
    with pytest.raises(TypeError, match="Unsupported audio input type"):
        model.transcribe(audio)


def test_base64_is_decoded_and_paths_are_not(model: Qwen3ASRModel, fake: FakeTranscriber, tmp_path: Path) -> None:
    data = bytes(range(256)) * 2
    text = base64.b64encode(data).decode()
    long_path = str(tmp_path / ("a" * 250) / "talk.wav")
    model.transcribe([text, f"data:audio/wav;base64,{text}", "UklGR", long_path])
    ((sources, _),) = fake.calls
    assert sources == [data, data, "UklGR", long_path]


def test_floats_out_of_range_are_scaled_by_their_peak(model: Qwen3ASRModel, fake: FakeTranscriber) -> None:
    integers = (TONE * 32767).astype(np.int16)
    model.transcribe([(TONE * 4, RATE), (TONE, RATE), (integers, RATE)])
    (loud, soft, whole), _ = fake.calls[0]
    np.testing.assert_allclose(loud[0], TONE / np.abs(TONE).max(), rtol=1e-6)
    assert soft[0] is TONE
    assert whole[0] is integers


def test_languages_that_change_are_joined(model: Qwen3ASRModel, fake: FakeTranscriber) -> None:
    spoken = ["Chinese", "", "English", "English", "Chinese"]
    segments = tuple(Segment(index, 0.0, 1.0, "x", name) for index, name in enumerate(spoken))
    fake.answers = [Transcript("xxxxx", "Chinese", 5.0, segments)]
    assert model.transcribe("a")[0].language == "Chinese,English,Chinese"
    fake.answers = [Transcript("", "", 5.0)]
    assert model.transcribe("a") == [ASRTranscription("", "")]


def test_bad_audio_is_raised_and_warnings_are_logged(
    model: Qwen3ASRModel, fake: FakeTranscriber, caplog: pytest.LogCaptureFixture
) -> None:
    fake.answers = [Transcript("x", "English", 1.0, warnings=(Notice("token_budget", "cut short"),))]
    model.transcribe("a")
    assert caplog.messages == ["cut short"]
    fake.answers = [AudioDecodeError("not audio")]
    with pytest.raises(AudioDecodeError, match="not audio"):
        model.transcribe("a")


@pytest.mark.parametrize(("given", "budget"), [(512, None), (None, None), (16, 16), (4096, None)])
def test_the_smaller_budget_counts(fake: FakeTranscriber, given: int | None, budget: int | None) -> None:
    assert 16 < token_budget(TranscribeOptions().piece_seconds) < 512
    Qwen3ASRModel(fake, -1, given).transcribe(["a", "b", "c"])  # type: ignore[arg-type]
    assert fake.calls[0][1]["max_new_tokens"] == budget
    assert fake.calls[0][1]["batch_size"] == 3


def loaded_with(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        module, "load", lambda model, **options: asked.update(options, model=model) or FakeTranscriber()
    )
    assert Qwen3ASRModel.from_pretrained("some/model", **arguments).get_supported_languages() == [
        "Chinese", "English", "German",
    ]  # fmt: skip
    assert asked.pop("model") == "some/model"
    return asked


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"device": "auto", "dtype": "auto"}),
        ({"dtype": torch.bfloat16, "device_map": "cuda:0"}, {"device": "cuda:0", "dtype": "bf16"}),
        ({"torch_dtype": "float16", "device_map": {"": 1}}, {"device": "cuda:1", "dtype": "fp16"}),
        ({"dtype": "auto", "device_map": torch.device("cpu")}, {"device": "cpu", "dtype": "auto"}),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)},
            {"device": "auto", "dtype": "auto", "compute_type": "llm-int8", "threshold": 5.0},
        ),
        (
            {"quantization_config": {"load_in_4bit": True}},
            {"device": "auto", "dtype": "auto", "compute_type": "nf4"},
        ),
    ],
)  # fmt: skip
def test_keywords_for_transformers(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    asked = loaded_with(monkeypatch, **arguments)
    assert asked.pop("hub") == HubOptions()
    assert asked == expected


def test_keywords_for_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = loaded_with(monkeypatch, revision="v1", cache_dir=str(tmp_path), local_files_only=True)
    assert asked["hub"] == HubOptions(revision="v1", offline=True, cache_dir=tmp_path)


def test_other_keywords_are_ignored_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="attn_implementation, trust_remote_code") as caught:
        loaded_with(monkeypatch, attn_implementation="flash_attention_2", trust_remote_code=True)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forced_aligner": "Qwen/Qwen3-ForcedAligner-0.6B"}, "forced aligner"),
        ({"dtype": torch.int8}, "int8"),
        ({"device_map": {"encoder": 0, "decoder": 1}}, "2 devices"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_what_cannot_be_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen3ASRModel.from_pretrained("demo", **arguments)
