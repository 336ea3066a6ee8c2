"""The stand-in for faster-whisper: its signatures, laziness, info, and what it says to Whisper's settings."""

from __future__ import annotations

import inspect
import io
import math
import zlib
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from quasr.compat import faster_whisper as module
from quasr.compat.faster_whisper import Segment, TranscriptionInfo, WhisperModel, Word
from quasr.errors import AudioDecodeError, AudioNotFoundError, OptionError
from quasr.types import Segment as OurSegment
from quasr.types import TranscribeOptions
from quasr.weights.hub import HubOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RATE = 16_000
SOUND = np.sin(np.arange(RATE * 3) / 10).astype(np.float32)

# Of faster-whisper 1.2.1: parameters in their order, and those defaults that callers rely on.
CONSTRUCTOR = [
    "self", "model_size_or_path", "device", "device_index", "compute_type", "cpu_threads", "num_workers",
    "download_root", "local_files_only", "files", "revision", "use_auth_token", "model_kwargs",
]  # fmt: skip
TRANSCRIBE = [
    "self", "audio", "language", "task", "log_progress", "beam_size", "best_of", "patience", "length_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "temperature", "compression_ratio_threshold", "log_prob_threshold",
    "no_speech_threshold", "condition_on_previous_text", "prompt_reset_on_temperature", "initial_prompt", "prefix",
    "suppress_blank", "suppress_tokens", "without_timestamps", "max_initial_timestamp", "word_timestamps",
    "prepend_punctuations", "append_punctuations", "multilingual", "vad_filter", "vad_parameters", "max_new_tokens",
    "chunk_length", "clip_timestamps", "hallucination_silence_threshold", "hotwords",
    "language_detection_threshold", "language_detection_segments",
]  # fmt: skip
FIELDS = {
    Segment: [
        "id", "seek", "start", "end", "text", "tokens", "avg_logprob", "compression_ratio", "no_speech_prob", "words",
        "temperature",
    ],
    Word: ["start", "end", "word", "probability"],
    TranscriptionInfo: [
        "language", "language_probability", "duration", "duration_after_vad", "all_language_probs",
        "transcription_options", "vad_options",
    ],
}  # fmt: skip


class FakeTranscriber:
    """Three segments, one at a time; keeps what it is asked and how far it has come."""

    languages = ("English", "Chinese", "Klingonese")

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.given = 0
        self.segments = [
            OurSegment(0, 0.0, 1.0, "你好。", "Chinese", -0.5),
            OurSegment(1, 1.0, 2.5, " Hello hello hello.", "English", -0.25),
            OurSegment(2, 2.5, 3.0, " End.", "English", None),
        ]

    def stream_segments(self, audio: Any, **options: Any) -> Iterator[OurSegment]:
        self.asked = {"audio": audio, **options}
        for segment in self.segments:
            self.given += 1
            yield segment


class Loading:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fake = FakeTranscriber()

    def __call__(self, model: str, **options: Any) -> FakeTranscriber:
        self.calls.append((model, options))
        return self.fake


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    made = Loading()
    monkeypatch.setattr(module, "load", made)
    return made


@pytest.fixture
def model(loading: Loading) -> WhisperModel:
    return WhisperModel("demo", device="cpu")


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def plain_defaults(function: Any) -> dict[str, Any]:
    found = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def test_signatures_and_fields_are_theirs() -> None:
    assert parameters(WhisperModel.__init__) == CONSTRUCTOR
    assert parameters(WhisperModel.transcribe) == TRANSCRIBE
    for kind, names in FIELDS.items():
        assert [field.name for field in fields(kind)] == names
    given = plain_defaults(WhisperModel.transcribe)
    assert (given["beam_size"], given["temperature"]) == (5, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    assert (given["clip_timestamps"], given["suppress_tokens"]) == ("0", (-1,))


@pytest.mark.skipif(
    find_spec("faster_whisper") is None, reason="faster-whisper is not installed: its signatures are a known vector"
)
def test_signatures_are_those_of_the_installed_package() -> None:
    from faster_whisper import WhisperModel as Theirs

    assert plain_defaults(WhisperModel.__init__) == plain_defaults(Theirs.__init__)
    assert plain_defaults(WhisperModel.transcribe) == plain_defaults(Theirs.transcribe)


def test_segments_are_lazy_and_the_info_is_not(model: WhisperModel, loading: Loading) -> None:
    segments, info = model.transcribe(SOUND, language="en")
    assert loading.fake.given == 0
    assert (info.language, info.language_probability) == ("en", 1.0)
    assert (info.duration, info.duration_after_vad) == (3.0, 3.0)
    assert next(segments).text == "你好。"
    assert loading.fake.given == 1
    assert [segment.id for segment in segments] == [2, 3]


def test_without_a_language_the_first_segment_tells_it(model: WhisperModel, loading: Loading) -> None:
    segments, info = model.transcribe(SOUND)
    assert loading.fake.given == 1
    assert (info.language, info.language_probability) == ("zh", math.exp(-0.5))
    assert "%s %f" % (info.language, info.language_probability) == "zh 0.606531"  # noqa: UP031
    assert [segment.id for segment in segments] == [1, 2, 3]
    loading.fake.segments = []
    segments, info = model.transcribe(SOUND)
    assert (info.language, info.language_probability, list(segments)) == ("", 0.0, [])
    loading.fake.segments = [OurSegment(0, 0.0, 1.0, "Qapla'", "Klingonese", None)]
    assert model.transcribe(SOUND)[1].language == "Klingonese"


def test_segment_fields(model: WhisperModel) -> None:
    first, second, third = model.transcribe(SOUND)[0]
    raw = second.text.encode()
    assert second == Segment(
        2, 100, 1.0, 2.5, " Hello hello hello.", [], -0.25, len(raw) / len(zlib.compress(raw)), 0.0, None, 0.0
    )
    assert (first.seek, third.seek, third.avg_logprob) == (0, 250, 0.0)


def test_what_is_honoured(model: WhisperModel, loading: Loading) -> None:
    segments, info = model.transcribe(
        SOUND, "zh", initial_prompt="Names:", hotwords="Ada", max_new_tokens=9, chunk_length=12
    )
    next(segments)
    samples, rate = loading.fake.asked.pop("audio")
    np.testing.assert_array_equal(samples, SOUND)
    assert rate == RATE
    expected = {"language": "Chinese", "context": "Names: Ada", "max_new_tokens": 9, "piece_seconds": 12.0}
    assert loading.fake.asked == expected
    assert info.transcription_options == TranscribeOptions(**expected)


def test_settings_that_ask_for_what_happens_give_no_warning(model: WhisperModel) -> None:
    settings: dict[str, Any] = {
        "beam_size": 1, "best_of": 1, "temperature": 0, "condition_on_previous_text": False, "vad_filter": True,
        "suppress_tokens": [-1], "multilingual": True, "without_timestamps": True,
    }  # fmt: skip
    assert len(list(model.transcribe(SOUND, **settings)[0])) == 3


def test_settings_may_be_arrays(model: WhisperModel) -> None:
    segments, _ = model.transcribe(SOUND, suppress_tokens=np.array([-1]), clip_timestamps=np.array([0]))
    assert [segment.text for segment in segments][-1] == " End."
    with pytest.raises(ValueError, match="clip_timestamps"):
        model.transcribe(SOUND, clip_timestamps=np.array([0.0, 2.0]))
    with pytest.warns(UserWarning, match="temperature"):
        model.transcribe(SOUND, temperature=np.array([0.0, 0.5]))


def test_the_model_may_be_a_path(loading: Loading, tmp_path: Path) -> None:
    WhisperModel(tmp_path)
    assert loading.calls[0][0] == tmp_path


def test_settings_of_whisper_s_search_are_named_in_one_warning(model: WhisperModel) -> None:
    with pytest.warns(UserWarning, match="no use for beam_size, temperature, vad_parameters and ignores") as caught:
        model.transcribe(SOUND, "en", beam_size=3, temperature=[0.4], vad_parameters={"threshold": 0.1})
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "translate"}, "only transcribes"),
        ({"task": "summarise"}, "summarise"),
        ({"word_timestamps": True}, "aligner"),
        ({"clip_timestamps": "0,10"}, "clip_timestamps"),
        ({"clip_timestamps": [3.0]}, "clip_timestamps"),
        ({"initial_prompt": [1, 2]}, "vocabulary"),
        ({"language": "xx"}, "xx"),
        ({"language": "fr"}, "French"),
    ],
)
def test_what_would_give_another_result_is_refused(
    model: WhisperModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model.transcribe(SOUND, **arguments)
    assert isinstance(caught.value, OptionError)


def test_bad_audio_is_raised_at_the_call(model: WhisperModel, tmp_path: Path) -> None:
    with pytest.raises(AudioNotFoundError):
        model.transcribe(str(tmp_path / "none.wav"))
    with pytest.raises(AudioDecodeError):
        model.transcribe(io.BytesIO(b"no audio"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"device": "auto", "dtype": "auto", "compute_type": "auto"}),
        ({"device": "cuda", "device_index": 1}, {"device": "cuda:1", "dtype": "auto", "compute_type": "auto"}),
        ({"device_index": [2]}, {"device": "cuda:2", "dtype": "auto", "compute_type": "auto"}),
        ({"device": "cpu", "compute_type": "int8"}, {"device": "cpu", "dtype": "auto", "compute_type": "int8"}),
        ({"compute_type": "int8_float16"}, {"device": "auto", "dtype": "fp16", "compute_type": "int8"}),
        ({"compute_type": "float32"}, {"device": "auto", "dtype": "fp32", "compute_type": "auto"}),
        ({"compute_type": "int4-g64"}, {"device": "auto", "dtype": "auto", "compute_type": "int4-g64"}),
    ],
)
def test_how_it_is_loaded(loading: Loading, arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    assert WhisperModel("some/model", **arguments).supported_languages == ["en", "zh", "Klingonese"]
    ((name, options),) = loading.calls
    assert (name, options.pop("hub")) == ("some/model", HubOptions())
    assert options == expected


def test_hub_options_and_ignored_settings(loading: Loading, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cpu_threads, num_workers, flash_attention") as caught:
        WhisperModel(
            "some/model", cpu_threads=4, num_workers=2, download_root=str(tmp_path), local_files_only=True,
            revision="v2", flash_attention=True,
        )  # fmt: skip
    assert [warning.filename for warning in caught] == [__file__]
    assert loading.calls[0][1]["hub"] == HubOptions(revision="v2", offline=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_size_or_path": "large-v3"}, "Whisper model"),
        ({"model_size_or_path": "distil-medium.en"}, "Whisper model"),
        ({"model_size_or_path": "large-v3-turbo"}, "Whisper model"),
        ({"model_size_or_path": "demo", "files": {"model.bin": b""}}, "files"),
        ({"model_size_or_path": "demo", "device": "cuda", "device_index": [0, 1]}, "2 devices"),
    ],
)
def test_what_cannot_be_loaded(loading: Loading, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WhisperModel(**arguments)
    assert loading.calls == []
