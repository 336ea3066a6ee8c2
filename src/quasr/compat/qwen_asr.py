"""`Qwen3ASRModel` of the official qwen-asr package (0.0.6), on quasr's engine.

    from quasr.compat.qwen_asr import Qwen3ASRModel  # was: from qwen_asr import Qwen3ASRModel

Different on purpose: long audio is cut at 30 s instead of 20 minutes and joined with a space where the language has
spaces; codes such as "en" are languages too; a device that is not named is a GPU where there is one.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.audio.decode import log_notice
from quasr.audio.source import kind_of
from quasr.compat import ArgumentError, warn_ignored
from quasr.engine.base import token_budget
from quasr.engine.device import DTYPES
from quasr.errors import AudioError, OptionError, UnknownLanguageError
from quasr.pipeline.transcriber import Transcriber, load
from quasr.text.languages import resolve
from quasr.types import TranscribeOptions
from quasr.weights.hub import HubOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quasr.audio.source import AudioInput
    from quasr.types import Transcript

BASE64_LENGTH = 256
"""A longer string of nothing but base64's letters is taken for audio, as the official package does."""

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")


@dataclass
class ASRTranscription:
    """`language` is a name, several names with commas where it changes, or "" for silence."""

    language: str
    text: str
    time_stamps: Any | None = None


class Qwen3ASRModel:
    """Made by `from_pretrained`, as the official one is."""

    def __init__(
        self, transcriber: Transcriber, max_inference_batch_size: int = 32, max_new_tokens: int | None = 512
    ) -> None:
        self._transcriber = transcriber
        self.max_inference_batch_size = max_inference_batch_size
        self.max_new_tokens = max_new_tokens

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        forced_aligner: str | None = None,
        forced_aligner_kwargs: dict[str, Any] | None = None,
        max_inference_batch_size: int = 32,
        max_new_tokens: int | None = 512,
        **kwargs: Any,
    ) -> Qwen3ASRModel:
        """Loads a folder or hub id.

        Of the keywords for transformers these have a meaning: dtype (or torch_dtype), device_map, revision, cache_dir,
        local_files_only and bitsandbytes' quantization_config; others are ignored with a UserWarning.
        Raises ArgumentError for a forced aligner, which quasr does not have yet, and what `quasr.load` raises.
        """
        if forced_aligner is not None:
            raise ArgumentError("quasr has no forced aligner yet: leave forced_aligner out")
        warn_ignored([name for name in kwargs if name not in _KNOWN])
        cache = kwargs.get("cache_dir")
        hub = HubOptions(
            revision=kwargs.get("revision"),
            offline=bool(kwargs.get("local_files_only", False)),
            cache_dir=None if cache is None else Path(cache),
        )
        transcriber = load(
            pretrained_model_name_or_path,
            device=_device(kwargs.get("device_map")),
            dtype=_dtype(kwargs.get("dtype", kwargs.get("torch_dtype"))),
            hub=hub,
            **_quantisation(kwargs.get("quantization_config")),
        )
        return cls(transcriber, max_inference_batch_size, max_new_tokens)

    def get_supported_languages(self) -> list[str]:
        """English names of the languages that the model knows."""
        return list(self._transcriber.languages)

    def transcribe(
        self,
        audio: str | tuple[NDArray[Any], int] | list[str | tuple[NDArray[Any], int]],
        context: str | list[str] = "",
        language: str | list[str | None] | None = None,
        return_time_stamps: bool = False,
    ) -> list[ASRTranscription]:
        """A result for each audio, which is a path, a URL, base64 text or (array, rate), or a list of those.

        Raises ArgumentError, a ValueError, for time stamps (there is no aligner yet), for lists of different lengths,
        an unknown language and broken base64, TypeError for what is no audio, and AudioError for audio that fails.
        """
        if return_time_stamps:
            raise ArgumentError("return_time_stamps=True needs a forced aligner, which quasr does not have yet")
        audios = audio if isinstance(audio, list) else [audio]
        contexts = _spread("context", context, len(audios))
        languages = [self._language(name) for name in _spread("language", language, len(audios))]
        groups: dict[tuple[str, str | None], list[int]] = {}
        for index, key in enumerate(zip(contexts, languages, strict=True)):
            groups.setdefault(key, []).append(index)
        sources = [_source(one) for one in audios]
        results: dict[int, ASRTranscription] = {}
        for (text, name), members in groups.items():
            found = self._transcribe([sources[index] for index in members], text, name)
            results.update(zip(members, found, strict=True))
        return [results[index] for index in range(len(audios))]

    def _transcribe(self, sources: list[AudioInput], context: str, language: str | None) -> list[ASRTranscription]:
        outcomes = self._transcriber.transcribe_batch(
            sources,
            context=context or "",
            language=language,
            max_new_tokens=self._budget(),
            batch_size=len(sources) if self.max_inference_batch_size < 0 else self.max_inference_batch_size,
        )
        return [_transcription(outcome) for outcome in outcomes]

    def _budget(self) -> int | None:
        """None, the budget by the clip's length, unless `max_new_tokens` is less than that of the longest piece."""
        most = token_budget(TranscribeOptions().piece_seconds)
        return self.max_new_tokens if self.max_new_tokens is not None and self.max_new_tokens < most else None

    def _language(self, name: str | None) -> str | None:
        if name is None or not name.strip():
            return None
        try:
            return resolve(name, self._transcriber.languages)
        except UnknownLanguageError as error:
            raise ArgumentError(f"Unsupported language: {error}") from error


_KNOWN = (
    "dtype", "torch_dtype", "device_map", "revision", "cache_dir", "local_files_only", "quantization_config",
)  # fmt: skip


def _transcription(outcome: Transcript | AudioError) -> ASRTranscription:
    if isinstance(outcome, AudioError):
        raise outcome
    for notice in outcome.warnings:
        log_notice(notice)
    changes: list[str] = []
    for segment in outcome.segments:
        if segment.language and segment.language not in changes[-1:]:
            changes.append(segment.language)
    return ASRTranscription(language=",".join(changes), text=outcome.text)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """A value for each audio: the one for all, or the list's own."""
    values = value if isinstance(value, list) else [value]
    if len(values) == 1 and count > 1:
        return values * count
    if len(values) != count:
        raise ArgumentError(f"Batch size mismatch: audio={count}, {name}={len(values)}")
    return values


def _source(audio: Any) -> AudioInput:
    if isinstance(audio, str) and _is_base64(audio):
        return _decoded(audio)
    try:
        kind_of(audio)
    except OptionError as error:
        raise TypeError(f"Unsupported audio input type: {error}") from error
    return _in_range(audio) if isinstance(audio, tuple) else audio


def _is_base64(text: str) -> bool:
    return text.startswith("data:") or (len(text) > BASE64_LENGTH and _BASE64.fullmatch(text) is not None)


def _decoded(text: str) -> bytes:
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise ArgumentError(f"the base64 audio is broken ({error}): encode the file's bytes again") from error


def _in_range(audio: tuple[NDArray[Any], int]) -> tuple[NDArray[Any], int]:
    """Floats beyond [-1, 1], such as 16-bit samples converted to float, scaled by their peak."""
    samples, rate = audio
    peak = np.abs(samples).max(initial=0.0) if samples.dtype.kind == "f" else 0.0
    return (samples / peak if 1.0 < peak < np.inf else samples), rate


def _device(device_map: Any) -> str:
    """Our name of transformers' `device_map`: a device, its number, or a dict that puts everything on one."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(places) != 1:
        raise ArgumentError(f"device_map names {len(places)} devices: quasr runs a model on one")
    (place,) = places
    if isinstance(place, int):
        return f"cuda:{place}"
    return "auto" if place is None else str(place)


def _dtype(dtype: Any) -> str:
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    short = {"auto": "auto", **{full: short for short, full in DTYPES.items()}, **{short: short for short in DTYPES}}
    if name not in short:
        raise ArgumentError(f"dtype is {name}: use one of {', '.join(DTYPES.values())}")
    return short[name]


def _quantisation(config: Any) -> dict[str, Any]:
    """`quasr.load`'s arguments for a BitsAndBytesConfig, or for a dict of its fields."""
    given = config if isinstance(config, dict) else vars(config) if config is not None else {}
    if given.get("load_in_8bit", given.get("_load_in_8bit")):
        return {"compute_type": "llm-int8", "threshold": float(given.get("llm_int8_threshold", 6.0))}
    if given.get("load_in_4bit", given.get("_load_in_4bit")):
        return {"compute_type": "nf4"}
    if given:
        raise ArgumentError("quantization_config is not one of bitsandbytes: load with 8 or 4 bits, or use quasr.load")
    return {}
