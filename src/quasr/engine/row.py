"""One clip of a batch while it is decoded: what it has said so far, and why it ends. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quasr.engine.base import ClipRequest, ClipResult
from quasr.text.loops import LoopDetector

if TYPE_CHECKING:
    from quasr.types import FinishReason


@dataclass(slots=True)
class Row:
    """One clip while it is decoded. `position` is how much of its cache is filled; `loops` None lets it loop."""

    position: int
    budget: int
    tokens: list[int]
    logprobs: list[float]
    loops: LoopDetector | None = None
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: ClipRequest, length: int) -> Row:
        """The row of a clip whose prompt is `length` positions long."""
        return cls(length, request.max_new_tokens, [], [], LoopDetector() if request.stop_loops else None)

    def take(self, token: int, logprob: float, stop_ids: frozenset[int]) -> None:
        """Appends one token, or ends the row at a stop token, in a loop, or when the budget is used up."""
        if token in stop_ids:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.loops and self.loops.found(self.tokens):
            self.finish_reason = "loop"
        elif len(self.tokens) >= self.budget:
            self.finish_reason = "length"

    def result(self) -> ClipResult:
        """What was said, once the row is finished."""
        return ClipResult(tuple(self.tokens), tuple(self.logprobs), self.finish_reason or "length")
