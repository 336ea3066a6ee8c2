"""Whole prompts that lie one after the other, and what the kernels must be told of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quasr.kernels.state import Places, Prompts
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """Prompts one after the other: where each token goes, how they are attended, and `last` (prompts,), the last token
    of each."""

    places: Places
    prompts: Prompts
    last: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], offsets: Sequence[int], device: torch.device) -> Packed:
        """Prompts of `lengths` tokens whose rows begin at `offsets` of the pool. The host waits for nothing."""
        tokens = sum(lengths)
        found = cls.read(to_device(lay_out(lengths, offsets, tokens, len(lengths)), device), tokens)
        return replace(found, prompts=replace(found.prompts, lengths=tuple(lengths), offsets=tuple(offsets)))

    @classmethod
    def read(cls, layout: Tensor, tokens: int) -> Packed:
        """Of what `lay_out` wrote for so many tokens, on a device. The host is told nothing, as in a CUDA graph."""
        prompts = (len(layout) - 3 * tokens) // 3
        sizes = [tokens, tokens, tokens, prompts + 1, prompts, prompts]
        begins, rows, idle, starts, offsets, last = layout.split(sizes)
        return cls(Places(begins, rows, idle.bool()), Prompts((), (), starts, offsets), last)


def lay_out(lengths: Sequence[int], offsets: Sequence[int], tokens: int, prompts: int) -> NDArray[np.int64]:
    """All numbers of a `Packed` in one array, which reaches a device at once.

    Tokens behind the last prompt, up to `tokens`, are idle; prompts behind it, up to `prompts`, are empty, and what is
    called their last token is another's.
    """
    spread = [*lengths, tokens - sum(lengths)]
    first = np.cumsum([0, *spread])
    ends = np.cumsum([*lengths, *[0] * (prompts - len(lengths))])
    return np.concatenate(
        [
            np.repeat([*offsets, 0], spread),
            np.arange(tokens) - np.repeat(first[:-1], spread),
            np.arange(tokens) >= first[-2],
            [0, *ends],
            [*offsets, *[0] * (prompts - len(offsets))],
            ends - 1,
        ],
        dtype=np.int64,
    )
