"""`WhisperModel` of faster-whisper (1.2), on quasr's engine.

    from quasr.compat.faster_whisper import WhisperModel  # was: from faster_whisper import WhisperModel

`transcribe` gives a lazy generator of segments, and the info. As there, the whole audio is decoded at the call, and
without `language` the first batch too. Segments are pieces cut at pauses; decoding is greedy. Arguments that steer
Whisper's search are accepted and ignored, with a UserWarning where they ask for something else than what happens.
"""

from __future__ import annotations

import inspect
import math
import re
import zlib
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from quasr.audio.decode import load as decode
from quasr.compat import ArgumentError, warn_ignored
from quasr.errors import UnknownLanguageError
from quasr.pipeline.transcriber import load
from quasr.text.languages import LANGUAGES, resolve
from quasr.types import SAMPLE_RATE, TranscribeOptions
from quasr.weights.hub import HubOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from quasr import types

FRAMES_PER_SECOND = 100

COMPUTE_TYPES = {
    "default": ("auto", "auto"),
    "int8_float32": ("int8", "fp32"),
    "int8_float16": ("int8", "fp16"),
    "int8_bfloat16": ("int8", "bf16"),
    "float16": ("auto", "fp16"),
    "bfloat16": ("auto", "bf16"),
    "float32": ("auto", "fp32"),
}
"""CTranslate2's names to our compute type and dtype; our own names are accepted too."""

_WHISPER_SIZES = re.compile(r"(distil-)?(tiny|base|small|medium|large|turbo)(\.en|-v\d(\.\d)?)?(-turbo)?")


@dataclass
class Word:
    """Declared for type annotations: there are no word times yet."""

    start: float
    end: float
    word: str
    probability: float


@dataclass
class Segment:
    """Times in seconds. `tokens` is empty: they are of another vocabulary. `no_speech_prob` is 0: it spoke."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None
    temperature: float | None


@dataclass
class TranscriptionInfo:
    """`language` is a code, "" if nobody speaks; durations in seconds.

    `language_probability` of a detected language is the first segment's mean token probability; 0 if nobody speaks.
    """

    language: str
    language_probability: float
    duration: float
    duration_after_vad: float
    all_language_probs: list[tuple[str, float]] | None
    transcription_options: TranscribeOptions
    vad_options: Any = field(default=None)


class WhisperModel:
    """A Qwen3-ASR model behind faster-whisper's interface. Threads may share it: they take turns."""

    def __init__(
        self,
        model_size_or_path: str,
        device: str = "auto",
        device_index: int | list[int] = 0,
        compute_type: str = "default",
        cpu_threads: int = 0,
        num_workers: int = 1,
        download_root: str | None = None,
        local_files_only: bool = False,
        files: dict[str, Any] | None = None,
        revision: str | None = None,
        use_auth_token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> None:
        """Loads `demo`, a folder or a hub id. Raises ArgumentError, and what `quasr.load` raises."""
        if _WHISPER_SIZES.fullmatch(str(model_size_or_path)) and not Path(model_size_or_path).is_dir():
            raise ArgumentError(f"{model_size_or_path} is a Whisper model: use Qwen/Qwen3-ASR-0.6B or -1.7B instead")
        if files:
            raise ArgumentError("quasr does not load a model from `files` in memory: give its folder")
        given = {"cpu_threads": cpu_threads, "num_workers": num_workers - 1, "use_auth_token": use_auth_token}
        warn_ignored([name for name, value in given.items() if value] + list(model_kwargs))
        ours, dtype = COMPUTE_TYPES.get(compute_type, (compute_type, "auto"))
        hub = HubOptions(
            revision=revision,
            offline=local_files_only,
            cache_dir=None if download_root is None else Path(download_root),
        )
        where = _device(device, device_index)
        self._transcriber = load(model_size_or_path, device=where, dtype=dtype, compute_type=ours, hub=hub)

    @property
    def supported_languages(self) -> list[str]:
        """Codes of the languages that the model knows."""
        return [_code(name) for name in self._transcriber.languages]

    def transcribe(
        self,
        audio: str | BinaryIO | NDArray[Any],
        language: str | None = None,
        task: str = "transcribe",
        log_progress: bool = False,
        beam_size: int = 5,
        best_of: int = 5,
        patience: float = 1,
        length_penalty: float = 1,
        repetition_penalty: float = 1,
        no_repeat_ngram_size: int = 0,
        temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        compression_ratio_threshold: float | None = 2.4,
        log_prob_threshold: float | None = -1.0,
        no_speech_threshold: float | None = 0.6,
        condition_on_previous_text: bool = True,
        prompt_reset_on_temperature: float = 0.5,
        initial_prompt: str | Iterable[int] | None = None,
        prefix: str | None = None,
        suppress_blank: bool = True,
        suppress_tokens: Sequence[int] | None = (-1,),
        without_timestamps: bool = False,
        max_initial_timestamp: float = 1.0,
        word_timestamps: bool = False,
        prepend_punctuations: str = "\"'“¿([{-",
        append_punctuations: str = "\"'.。,，!！?？:：”)]}、",
        multilingual: bool = False,
        vad_filter: bool = False,
        vad_parameters: Any = None,
        max_new_tokens: int | None = None,
        chunk_length: int | None = None,
        clip_timestamps: str | list[float] = "0",
        hallucination_silence_threshold: float | None = None,
        hotwords: str | None = None,
        language_detection_threshold: float | None = 0.5,
        language_detection_segments: int = 1,
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        """Segments, lazily, and the info. `audio` is a path, URL, open binary file, or samples at 16 kHz.

        `initial_prompt` and `hotwords` become the context, `chunk_length` is the longest piece in seconds.
        Raises ArgumentError, a ValueError, for translation, word times, clips and unknown languages, and AudioError.
        """
        given = locals()
        _refuse(task, word_timestamps, clip_timestamps, initial_prompt)
        warn_ignored(_ignored(given))
        context = " ".join(str(hint) for hint in (initial_prompt, hotwords) if hint)
        overrides: dict[str, Any] = {"language": self._language(language), "context": context}
        overrides["max_new_tokens"] = max_new_tokens
        if chunk_length is not None:
            overrides["piece_seconds"] = float(chunk_length)
        return self._transcribe(audio, overrides)

    def _transcribe(
        self, audio: str | BinaryIO | NDArray[Any], overrides: dict[str, Any]
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        samples = decode((audio, SAMPLE_RATE) if isinstance(audio, np.ndarray) else audio)
        options = TranscribeOptions(**overrides)
        segments = self._transcriber.stream_segments((samples, SAMPLE_RATE), **overrides)
        first = next(segments, None) if options.language is None else None
        info = _info(options, first, len(samples) / SAMPLE_RATE)
        return map(_segment, segments if first is None else chain([first], segments)), info

    def _language(self, language: str | None) -> str | None:
        try:
            return None if language is None else resolve(language, self._transcriber.languages)
        except UnknownLanguageError as error:
            raise ArgumentError(str(error)) from error


_HONOURED = frozenset({
    "self", "audio", "language", "task", "initial_prompt", "word_timestamps", "max_new_tokens", "chunk_length",
    "clip_timestamps", "hotwords",
})  # fmt: skip

_SAME_ANYWAY: dict[str, tuple[object, ...]] = {
    "beam_size": (1,),
    "best_of": (1,),
    "temperature": (0, (0,)),
    "condition_on_previous_text": (False,),
    "multilingual": (True,),
    "suppress_tokens": (None, ()),
    "vad_filter": (True,),
    "without_timestamps": (True,),
}
"""Values that ask for what quasr does: greedy decoding, each piece for itself, without silence, in its language."""


def _ignored(given: dict[str, Any]) -> list[str]:
    """Names of the arguments that ask for something that does not happen."""
    defaults = inspect.signature(WhisperModel.transcribe).parameters
    asked = {name: tuple(value) if isinstance(value, list | np.ndarray) else value for name, value in given.items()}
    return [
        name
        for name in sorted(asked.keys() - _HONOURED)
        if asked[name] not in (defaults[name].default, *_SAME_ANYWAY.get(name, ()))
    ]


def _refuse(task: str, word_timestamps: bool, clips: str | list[float], initial_prompt: Any) -> None:
    """Raises ArgumentError for what would give another result than was asked for."""
    if task != "transcribe":
        raise ArgumentError(f"task is {task!r}: Qwen3-ASR only transcribes; translate the text with another model")
    if word_timestamps:
        raise ArgumentError("word_timestamps=True needs a forced aligner, which quasr does not have yet")
    if (clips if isinstance(clips, str) else list(clips)) not in ("0", "0.0", [0], []):
        raise ArgumentError("clip_timestamps is not supported: cut the samples and give them as an array")
    if initial_prompt is not None and not isinstance(initial_prompt, str):
        raise ArgumentError("initial_prompt must be text: token ids are of another vocabulary")


def _device(device: str, index: int | list[int]) -> str:
    numbers = index if isinstance(index, list) else [index]
    if len(numbers) != 1:
        raise ArgumentError(f"device_index names {len(numbers)} devices: quasr runs a model on one")
    return f"cuda:{numbers[0]}" if device == "cuda" or (device == "auto" and numbers[0]) else device


def _info(options: TranscribeOptions, first: types.Segment | None, duration: float) -> TranscriptionInfo:
    if options.language is not None:
        language, probability = _code(options.language), 1.0
    elif first is not None:
        language, probability = _code(first.language), math.exp(first.avg_logprob or 0.0)
    else:
        language, probability = "", 0.0
    return TranscriptionInfo(language, probability, duration, duration, None, options)


def _segment(segment: types.Segment) -> Segment:
    raw = segment.text.encode()
    return Segment(
        id=segment.id + 1,
        seek=round(segment.start * FRAMES_PER_SECOND),
        start=segment.start,
        end=segment.end,
        text=segment.text,
        tokens=[],
        avg_logprob=segment.avg_logprob or 0.0,
        compression_ratio=len(raw) / len(zlib.compress(raw)),
        no_speech_prob=0.0,
        words=None,
        temperature=0.0,
    )


def _code(name: str) -> str:
    """The ISO code; the name itself of a language that only this model knows."""
    return next((code for code, known in LANGUAGES.items() if known == name), name)
