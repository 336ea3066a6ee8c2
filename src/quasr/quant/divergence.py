"""How far a quantised network's next-token distributions are from the original's, over answers that both are told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quasr.quant.prompts import embed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from quasr.model.asr import Qwen3ASR
    from quasr.quant.prompts import TaughtClip


@dataclass(frozen=True, slots=True)
class Divergence:
    """`sums`: each clip's KL(original || quantised) in nats, summed over its `positions`.

    `agreeing` counts the positions where both find the same token likeliest.
    """

    sums: tuple[float, ...]
    positions: tuple[int, ...]
    agreeing: int

    @property
    def mean(self) -> float:
        """Nats a position."""
        return sum(self.sums) / sum(self.positions)

    @property
    def agreement(self) -> float:
        """Part of the positions with the same likeliest token."""
        return self.agreeing / sum(self.positions)

    @property
    def standard_error(self) -> float:
        """Of `mean`, with clips as the independent units."""
        return _ratio_error(self.sums, self.positions)

    def difference(self, other: Divergence) -> tuple[float, float]:
        """This mean minus the other's, on the same clips, and the standard error of that (paired by clip)."""
        gaps = [own - its for own, its in zip(self.sums, other.sums, strict=True)]
        return sum(gaps) / sum(self.positions), _ratio_error(gaps, self.positions)


def _ratio_error(sums: Sequence[float], positions: Sequence[int]) -> float:
    """Standard error of a ratio of sums over n clips (Cochran 1977, 6.3): sqrt(n / (n - 1) sum (y - r x)^2) / sum x."""
    count, total = len(sums), sum(positions)
    if count < 2:
        return math.nan
    ratio = sum(sums) / total
    squares = sum((own - ratio * size) ** 2 for own, size in zip(sums, positions, strict=True))
    return math.sqrt(count / (count - 1) * squares) / total


def answer_logprobs(model: Qwen3ASR, clip: TaughtClip) -> Tensor:
    """(answer, vocab_size) fp32: natural log-probabilities of the next token at each position of the answer."""
    with torch.inference_mode():
        hidden = model.decoder.prefill(embed(model, clip), None)[0, -len(clip.answer) :]
        return model.decoder.logits(hidden).float().log_softmax(-1)


def divergence(originals: Iterable[Tensor], model: Qwen3ASR, clips: Sequence[TaughtClip]) -> Divergence:
    """Compares `model` with what `answer_logprobs` of the original gave for the same clips, in their order."""
    sums, positions, agreeing = [], [], 0
    for original, clip in zip(originals, clips, strict=True):
        found = answer_logprobs(model, clip)
        sums.append(float((original.exp() * (original - found)).sum()))
        positions.append(len(clip.answer))
        agreeing += int((original.argmax(-1) == found.argmax(-1)).sum())
    return Divergence(tuple(sums), tuple(positions), agreeing)
