"""What a measuring process is told and what it answers, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Task = Literal["first", "all", "bandwidth"]
"""first: load, and one call. all: everything. bandwidth: of the device's memory, without a model."""


@dataclass(frozen=True, slots=True)
class Job:
    """One system to measure. `folder`: absolute; `spawned`: the wall clock when the process was started.

    Clips have `seconds` of audio and get exactly `tokens` new tokens; `batches` rise; a figure is the median of at most
    `repeats` calls.
    """

    system: str
    folder: str
    device: str
    task: Task = "all"
    seconds: float = 30.0
    tokens: int = 120
    batches: tuple[int, ...] = (1,)
    repeats: int = 5
    threads: int | None = None
    spawned: float = 0.0

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        raw = json.loads(text)
        return cls(**{**raw, "batches": tuple(raw["batches"])})


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from process start to loaded (`ready`), of loading alone, and of the first call with one clip."""

    ready: float
    load: float
    first: float


@dataclass(frozen=True, slots=True)
class Batch:
    """`clips` at once: seconds from samples to all tokens, and the peak in bytes; or why it failed."""

    clips: int
    seconds: float | None = None
    peak: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one process. Seconds and bytes; `token_bytes`: weights that one decode step reads.

    `prefill`: from samples to the first token of one clip; `token`: each further one. None where the task was "first".
    `engine`: what ran; `reasons`: why.
    """

    start: Start
    engine: str
    device: str
    dtype: str
    scheme: str
    weight_bytes: int
    token_bytes: int
    reasons: tuple[str, ...] = ()
    prefill: float | None = None
    token: float | None = None
    batches: tuple[Batch, ...] = ()

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """What `to_json` wrote."""
        raw = json.loads(text)
        made = {
            "start": Start(**raw["start"]),
            "reasons": tuple(raw["reasons"]),
            "batches": tuple(Batch(**one) for one in raw["batches"]),
        }
        return cls(**{**raw, **made})


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second that the device's memory moves, how that was measured, and the device's name."""

    bytes_per_second: float
    method: str
    device: str
