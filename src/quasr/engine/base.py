"""The protocol between the pipeline and whatever runs the network: submit clips, get tokens. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from quasr.types import FinishReason

AUDIO_TOKENS_PER_SECOND = 13
BUDGET_MARGIN = 32


def token_budget(seconds: float) -> int:
    """Most new tokens that a clip of `seconds` may take.

    Fast speech makes about 4 tokens a second with the 151,936-entry vocabulary and about 10 with a small one.
    The audio's own 13 tokens a second, and 32 for the language head, is therefore more than any real transcript.
    """
    return round(seconds * AUDIO_TOKENS_PER_SECOND) + BUDGET_MARGIN


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip. `samples` is (n,) float32 at 16 kHz, of which the engine makes log-mel frames where that is fastest;
    the prompt is `prefix`, one position an audio token, `suffix`.

    With `stop_loops` decoding ends in a loop of tokens (`quasr.text.loops`) and not at the budget.
    """

    samples: NDArray[np.float32]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    max_new_tokens: int
    stop_loops: bool = False


@dataclass(frozen=True, slots=True)
class ClipResult:
    """New tokens without the stop token, with the natural-log probability of each. "loop": they end in one, whole."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What runs, where, and why: printed by `quasr doctor` and in the timing lines.

    `dtype` is what is computed in, `scheme` the recipe that the weights are quantised by, `weight_bytes` their memory
    with scales and all.
    """

    name: str
    device: str
    dtype: str
    weight_bytes: int
    reasons: tuple[str, ...] = ()
    scheme: str = "none"


@dataclass(slots=True)
class EngineStats:
    """Seconds and tokens summed over all runs of an engine."""

    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0
    tokens: int = 0


class Engine(Protocol):
    """Runs clips through the network. Not thread-safe: one caller at a time."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """Decodes all clips as one batch, results in the order of `requests`."""
        ...

    def close(self) -> None:
        """Gives the memory back. The engine cannot be used afterwards."""
        ...
