"""The front door: `load` a model once, transcribe many times."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Self

from quasr.audio.chunk import OFFICIAL_SECONDS
from quasr.audio.fetch import FetchLimits
from quasr.engine.device import DTYPES, check_names, choose, spare_memory, use_threads
from quasr.engine.plan import Wish, parse_memory
from quasr.errors import AudioError, CheckpointError, OptionError
from quasr.model.config import read_config
from quasr.pipeline.engines import Source, second_tries, stop_ids, torch_engine
from quasr.pipeline.onnx import EngineWish, choose_engine, onnx_engine, onnx_retry, torch_reason
from quasr.pipeline.planning import Precision, plan_folder
from quasr.pipeline.retry import SAME_WEIGHTS
from quasr.pipeline.shared import Lender, SharedEngine
from quasr.pipeline.start import head_start
from quasr.pipeline.transcribe import Setup, stream_segments, transcribe
from quasr.quant.recipe import recipe_for
from quasr.text.languages import LANGUAGES
from quasr.text.languages import resolve as resolve_language
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.types import CHUNK_RULES, TranscribeOptions, Transcript
from quasr.weights.hub import HubOptions
from quasr.weights.hub import resolve as resolve_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from quasr.audio.source import AudioInput
    from quasr.engine.base import Engine, EngineInfo, EngineStats
    from quasr.engine.device import Placement
    from quasr.engine.plan import Plan, Work
    from quasr.model.config import ModelConfig
    from quasr.pipeline.retry import Retry
    from quasr.pipeline.transcribe import Progress
    from quasr.quant.recipe import Recipe
    from quasr.types import Segment

OPTION_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "language": ((str, type(None)), "a name or code of a language, or None"),
    "context": ((str,), "text"),
    "max_new_tokens": ((Integral, type(None)), "a whole number or None"),
    "piece_seconds": ((Real,), "a number of seconds"),
    "batch_size": ((Integral,), "a whole number"),
    "chunk": ((str,), "text"),
}
"""What callers mistake most easily, because another library has other types there."""


def load(
    model: str | Path = "demo",
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    compute_type: str = "auto",
    threshold: float | None = None,
    memory: str | None = None,
    batch_size: int | None = None,
    offload: int = 0,
    provider: str = "auto",
    threads: int | None = None,
    hub: HubOptions | None = None,
) -> Transcriber:
    """Loads a checkpoint: `demo` (bundled), a folder, or a hub id such as `Qwen/Qwen3-ASR-0.6B`.

    engine: onnx runs ONNX folders, into which checkpoints are converted on first use; torch runs checkpoints. auto is
    onnx for ONNX folders, the demo, and on a CPU what comes from a hub (in int8 where compute_type says nothing else).
    provider of onnx: auto (cpu), cpu, cuda or tensorrt; threads on a CPU: None is one for each physical core.
    device: auto, cpu, cuda or cuda:N; dtype, which is computed in: auto, bf16, fp16 or fp32.
    compute_type, which the weights have: auto (as they are stored), a dtype, int8, int8-gN, int4, int4-gN (N is 128,
    64 or 32), llm-int8 or nf4; 16-bit weights are quantised while they are read. threshold goes with llm-int8. What
    onnx has not (bf16, fp16, llm-int8, nf4, memory, offload, a CUDA device) means torch.
    memory, such as "4GB": with compute_type auto the most precise weights that fit, and clips and batches (of at most
    `batch_size`) that fit too, which become the transcriber's `defaults`. offload: so many decoder layers stay in main
    memory and are copied to the device for each use: slow, same text.
    Raises ModelError (not found, damaged, another architecture), ResourceError (device, memory, nothing fits),
    OptionError and MissingDependencyError (no torch, no such provider).
    """
    check_names(device, dtype)
    asked = _Asked(device, dtype, compute_type, recipe_for(compute_type, threshold), threshold, memory, offload)
    wish = EngineWish(engine, provider, threads, device, asked.precision(), asked.torch_only())
    if memory is not None:
        spare_memory()
    defaults = TranscribeOptions() if batch_size is None else TranscribeOptions(batch_size=batch_size)
    with head_start(str(model), wish):
        return _load(str(model), asked, wish, hub or HubOptions(), defaults)


def _load(model: str, asked: _Asked, wish: EngineWish, hub: HubOptions, defaults: TranscribeOptions) -> Transcriber:
    # What is missing here is said before anything is fetched.
    placement = choose(asked.device, asked.place_dtype()) if torch_reason(wish) else None
    folder = resolve_model(model, hub)
    config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
    check_vocabulary(config, tokenizer)
    source = Source(folder, config, stop_ids(config, tokenizer))
    choice = choose_engine(model, folder, wish)
    if choice.graphs is not None:
        return Transcriber(onnx_engine(choice, source.stops, wish), tokenizer, config, defaults, onnx_retry(choice))
    placement = placement or choose(asked.device, asked.place_dtype())
    running, retry, most = asked.in_torch(
        source, replace(placement, reasons=(choice.why, *placement.reasons)), defaults
    )
    if wish.threads is not None:
        use_threads(wish.threads)
    return Transcriber(running, tokenizer, config, defaults, retry, most)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `load` was asked for in torch's terms."""

    device: str
    dtype: str
    compute_type: str
    recipe: Recipe
    threshold: float | None
    memory: str | None
    offload: int

    def precision(self) -> str:
        """What decides between the engines: a 16-bit dtype, else the compute type, else the dtype."""
        if self.dtype in ("bf16", "fp16") or self.compute_type == "auto":
            return self.dtype
        return self.compute_type

    def torch_only(self) -> str:
        """Why only torch can do it, or ""."""
        if self.memory is not None:
            return "a memory plan is torch's alone"
        return "offloading layers is torch's alone" if self.offload else ""

    def place_dtype(self) -> str:
        """The dtype that both ask for."""
        if self.compute_type not in DTYPES:
            return self.dtype
        if self.dtype not in ("auto", self.compute_type):
            raise OptionError(
                f"compute type {self.compute_type} and dtype {self.dtype} contradict each other: give one of them"
            )
        return self.compute_type

    def in_torch(
        self, source: Source, placement: Placement, defaults: TranscribeOptions
    ) -> tuple[Engine, Retry, Work | None]:
        """The engine, that of second tries, and what a memory plan allows."""
        if self.memory is None:
            retry = second_tries(source, placement, self.recipe, planned=False)
            return torch_engine(source, placement, self.recipe, self.offload), retry, None
        _check_planned_alone(self.offload)
        wish = Wish(parse_memory(self.memory), largest_batch=defaults.batch_size)
        precision = Precision(placement.device.type, self.place_dtype(), self.compute_type, self.threshold)
        planned = plan_folder(source.folder, source.config, precision, wish)
        recipe, placement = planned.chosen.candidate.recipe, _as_planned(placement, planned)
        retry = second_tries(source, placement, recipe, planned=True)
        running = torch_engine(source, placement, recipe, cache_bytes=planned.chosen.cache)
        return running, retry, planned.chosen.work


class Transcriber:
    """A loaded model. Usable as a context manager, and by several threads at once, whose calls take turns.

    with quasr.load("demo") as transcriber:
        print(transcriber.transcribe("talk.mp3").text)
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        config: ModelConfig,
        defaults: TranscribeOptions | None = None,
        retry: Retry = SAME_WEIGHTS,
        most: Work | None = None,
    ) -> None:
        """`retry`: what second tries run on. `most`: what a memory plan allows at once; the defaults keep to it."""
        chosen = defaults or TranscribeOptions()
        self.defaults = replace(chosen, piece_seconds=most.seconds, batch_size=most.batch) if most else chosen
        self._engine = SharedEngine(engine)
        self._retry = retry if retry.make is None else replace(retry, make=Lender(retry.make))
        self._most = most
        self._tokenizer = tokenizer
        self._config = config

    @property
    def info(self) -> EngineInfo:
        """What runs, where, in what precision, and why."""
        return self._engine.engine.info

    @property
    def stats(self) -> EngineStats:
        """Seconds and tokens of this engine. Second tries in 16 bits are in the transcripts' timings alone."""
        return self._engine.engine.stats

    @property
    def languages(self) -> tuple[str, ...]:
        """English names of the languages that this model knows."""
        return self._config.languages or tuple(LANGUAGES.values())

    def transcribe(
        self,
        audio: AudioInput,
        options: TranscribeOptions | None = None,
        *,
        limits: FetchLimits | None = None,
        progress: Progress | None = None,
        **overrides: object,
    ) -> Transcript:
        """Transcribes one path, URL, bytes, file object or (array, rate).

        Keywords other than `limits` (of URLs) and `progress` (called with the seconds done) override fields of
        `options`: `transcribe(audio, language="en")`. Raises AudioError for the audio and OptionError for the rest.
        """
        (result,) = self.transcribe_batch([audio], options, limits=limits, progress=progress, **overrides)
        if isinstance(result, AudioError):
            raise result
        return result

    def transcribe_batch(
        self,
        audios: Iterable[AudioInput],
        options: TranscribeOptions | None = None,
        *,
        limits: FetchLimits | None = None,
        progress: Progress | None = None,
        **overrides: object,
    ) -> Iterator[Transcript | AudioError]:
        """A transcript for each input, lazily and in order; an input that fails gives its AudioError in its place."""
        return transcribe(self._engine.client(), self._setup(options, overrides, limits), audios, progress)

    def stream_segments(
        self,
        audio: AudioInput,
        options: TranscribeOptions | None = None,
        *,
        limits: FetchLimits | None = None,
        progress: Progress | None = None,
        **overrides: object,
    ) -> Iterator[Segment]:
        """The segments of `transcribe`, each as soon as its batch is decoded: a smaller `batch_size` gives them sooner.

        Options are checked at once. An AudioError comes after the segments before the place that cannot be read.
        """
        return stream_segments(self._engine.client(), self._setup(options, overrides, limits), audio, progress)

    def _setup(
        self, options: TranscribeOptions | None, overrides: dict[str, object], limits: FetchLimits | None
    ) -> Setup:
        chosen = _checked(options or self.defaults, overrides, self._most)
        known = self._config.languages
        language = None if chosen.language is None else resolve_language(chosen.language, known)
        return Setup(
            tokenizer=self._tokenizer,
            prompt=build_prompt(self._tokenizer, chosen.context, language),
            language=language,
            options=chosen,
            limits=limits or FetchLimits(),
            retry=self._retry,
            longest=self._most.seconds if self._most else OFFICIAL_SECONDS,
            trained=self._config.max_audio_seconds,
        )

    def close(self) -> None:
        """Gives the memory back. The transcriber cannot be used afterwards: that is a RuntimeError, in calls that other
        threads are in the midst of, too."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError where tokenizer and network cannot belong together."""
    stated, pad = config.audio_token_id, tokenizer.special.audio_pad
    if stated is not None and stated != pad:
        raise CheckpointError(
            f"config.json says audio_token_id {stated}, the tokenizer says {pad}: the files are of two checkpoints"
        )
    if tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the network {config.text.vocab_size}: "
            "the files are of two checkpoints"
        )


def _check_planned_alone(offload: int) -> None:
    if offload:
        raise OptionError("a memory plan keeps all layers on the device: give either memory or offload")


def _as_planned(placement: Placement, planned: Plan) -> Placement:
    """In the chosen dtype, and with the plan among the reasons."""
    chosen = choose(str(placement.device), planned.chosen.candidate.target.dtype)
    return replace(chosen, reasons=(*placement.reasons, planned.why()))


def _checked(options: TranscribeOptions, overrides: dict[str, object], most: Work | None) -> TranscribeOptions:
    known = [field.name for field in fields(TranscribeOptions)]
    for name in overrides:
        if name not in known:
            raise OptionError(f"unknown option {name!r}: there are {', '.join(known)}")
    chosen = replace(options, **overrides)  # type: ignore[arg-type]
    for name, (kinds, meaning) in OPTION_TYPES.items():
        if not isinstance(getattr(chosen, name), kinds):
            raise OptionError(f"{name} is {getattr(chosen, name)!r}: it must be {meaning}")
    if not (math.isfinite(chosen.piece_seconds) and chosen.piece_seconds >= 1):
        raise OptionError(f"piece_seconds is {chosen.piece_seconds}: it must be at least 1")
    if chosen.batch_size < 1:
        raise OptionError(f"batch_size is {chosen.batch_size}: it must be at least 1")
    if chosen.max_new_tokens is not None and chosen.max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {chosen.max_new_tokens}: it must be at least 1")
    if chosen.chunk not in CHUNK_RULES:
        raise OptionError(f"chunk is {chosen.chunk!r}: use {', '.join(CHUNK_RULES)}")
    if most and (chosen.piece_seconds > most.seconds or chosen.batch_size > most.batch):
        raise OptionError(
            f"pieces of {chosen.piece_seconds:g} s in batches of {chosen.batch_size} are beyond the memory plan, which "
            f"allows {most.seconds:g} s and {most.batch}: change single options of the transcriber's `defaults`"
        )
    return chosen
