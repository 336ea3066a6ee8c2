"""The values that travel between stages and out to the user: frozen, plain, serialisable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SAMPLE_RATE = 16_000
"""Samples a second of everything between decoding and the mel frames."""

FinishReason = Literal["stop", "length", "loop"]
"""Why decoding ended: the model said so, the token budget ran out, or the model repeated itself and was stopped."""


RetryWeights = Literal["same", "16-bit", "quantised"]
"""What a second try of a piece ran on: see `Notice`."""

CHUNK_RULES = ("vad", "qwen", "none")
"""The values of `TranscribeOptions.chunk`."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word; `start` and `end` in seconds from the beginning of the audio."""

    text: str
    start: float
    end: float
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """A machine-readable warning about a result; `start` and `end` in seconds where it concerns a part.

    Codes about the audio: "damaged_audio" (it could be read in part), "energy_vad" (cut without Silero), "memory_cut"
    (by the official rule, but into the shorter pieces that a memory plan allows), "long_piece" (longer than what the
    model was trained on, by its own config.json; told of the first such piece).
    Codes of the guards about one piece: "repetition" (the model repeated itself; one copy is kept), "token_budget" (it
    stopped at its budget), "empty_on_speech" (no text where somebody speaks), "context_echo" (only words of the context
    where nobody does, or by a bad guess), "language_flip" (another language than nearly all other pieces of the file),
    "doubtful_speech" (words, and unsure ones, where next to no speech is heard: music or noise).
    `retry_helped`: whether a second try of the piece was kept and is free of the fault; None where there was none.
    `retry_weights`: what that try ran on: "same" as the first; "16-bit" where the first's were quantised;
    "quantised" where 16 bits were not to be had, for the reason that the message gives.
    """

    code: str
    message: str
    start: float | None = None
    end: float | None = None
    retry_helped: bool | None = None
    retry_weights: RetryWeights | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of the audio and its text. `"".join(s.text for s in segments) == transcript.text`.

    `text` carries the separator that joins it to the piece before, so it may begin with a space.
    `tokens` are ids of the model's vocabulary, with a natural-log probability each in `token_logprobs`: all that the
    model wrote, so the language and `<asr_text>` too where the language was not forced, but neither the stop token nor
    a loop's further copies. `avg_logprob` is their mean; None without tokens.
    """

    id: int
    start: float
    end: float
    text: str
    language: str = ""
    avg_logprob: float | None = None
    finish_reason: FinishReason = "stop"
    words: tuple[Word, ...] = ()
    tokens: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent, by stage, and what was produced."""

    audio: float = 0.0
    decode: float = 0.0
    prefill: float = 0.0
    generate: float = 0.0
    total: float = 0.0
    tokens: int = 0

    @property
    def real_time_factor(self) -> float:
        """Wall seconds for each second of audio; smaller is faster."""
        return self.total / self.audio if self.audio else 0.0


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said. `language` is the English name of the commonest segment language, "" if no speech."""

    text: str
    language: str
    duration: float
    segments: tuple[Segment, ...] = ()
    finish_reason: FinishReason = "stop"
    warnings: tuple[Notice, ...] = ()
    timings: Timings = field(default_factory=Timings)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """How to transcribe. `language` None detects it; `max_new_tokens` None derives it from the clip's length.

    `chunk` says how long audio is cut: "vad" in its pauses, into pieces of at most `piece_seconds`, without
    silence; "qwen" by the official rule, every 20 minutes; "none" not at all, up to the model's 20 minutes.
    With `guards`, loops are stopped and a piece whose result is suspect is decoded a second time (`Notice`); with
    `precise_retry` in 16 bits where the weights were quantised while they were loaded.
    """

    language: str | None = None
    context: str = ""
    max_new_tokens: int | None = None
    piece_seconds: float = 30.0
    batch_size: int = 8
    chunk: str = "vad"
    guards: bool = True
    precise_retry: bool = True
