"""What decoding keeps on the device between two tokens: the cache and where each row stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class CachePool:
    """Keys and values of all rows: two tensors (layers, kv_heads, positions, head_dim).

    A row owns neighbouring positions, which begin at its offset.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Self:
        """Zeros of (layers, kv_heads, positions, head_dim)."""
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def positions(self) -> int:
        return self.keys.shape[2]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (kv_heads, positions, head_dim) of one layer."""
        return self.keys[index], self.values[index]


@dataclass(frozen=True, slots=True)
class Places:
    """Where a token of each row goes: position `length` of the row, which is `offset + length` of the pool.

    offsets, lengths: (rows,) int64; idle: (rows,) bool, rows that neither write nor attend.
    """

    offsets: Tensor
    lengths: Tensor
    idle: Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts packed one after the other: prompt i has `lengths[i]` tokens, whose positions begin at `offsets[i]`.

    The host knows both, so that nothing waits for the device, or neither: in a CUDA graph, which other prompts will use
    again. The device knows `starts` (prompts + 1,), which token each prompt begins with and where the last one ends,
    and `begins` (prompts,), the offsets; both int64. There a prompt may be empty, and tokens may lie behind the last.
    """

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    starts: Tensor
    begins: Tensor


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Static tensors that a captured step reads and writes; all (rows,) but where it says otherwise.

    tokens: the newest token, not yet in the cache; offsets, lengths: int64, the row's begin in the pool and what of it
    is filled; limits: the cursor at which the row's budget ends; finished: bool, rows that stay as they are, empty
    ones too; stop_ids: (stops,); history, logprobs: (rows, capacity), tokens without the stop token and the natural
    logarithms of their probabilities; cursor: how much of them is filled. A row that is finished with
    `cursor == limits` used up its budget; before that, it met a stop token.
    """

    tokens: Tensor
    offsets: Tensor
    lengths: Tensor
    limits: Tensor
    finished: Tensor
    stop_ids: Tensor
    history: Tensor
    logprobs: Tensor
    cursor: Tensor

    @classmethod
    def allocate(cls, rows: int, capacity: int, stop_ids: Sequence[int], device: torch.device) -> Self:
        """`rows` empty rows of at most `capacity` new tokens each."""

        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=numbers(rows),
            offsets=numbers(rows),
            lengths=numbers(rows),
            limits=numbers(rows),
            finished=torch.ones(rows, dtype=torch.bool, device=device),
            stop_ids=torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device),
            history=numbers(rows, capacity),
            logprobs=numbers(rows, capacity, dtype=torch.float32),
            cursor=numbers(rows),
        )

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def places(self) -> Places:
        """Where the newest tokens go."""
        return Places(self.offsets, self.lengths, self.finished)

    def admit(self, rows: Tensor, places: Places, limits: Tensor, first: tuple[Tensor, Tensor]) -> None:
        """Fills `rows` (n,) with prefilled clips, no host sync. `first`: their first tokens (n,) and log-probabilities.

        `places.lengths` are the prompts' lengths; limits: (n,) new tokens that each may take, at least 1.
        """
        tokens, logprobs = first
        stopped = torch.isin(tokens, self.stop_ids)
        self.tokens[rows] = tokens
        self.offsets[rows] = places.offsets
        self.lengths[rows] = places.lengths
        self.limits[rows] = limits
        self.cursor[rows] = (~stopped).long()
        self.finished[rows] = stopped | (limits <= 1) | places.idle
        self.history[rows, 0] = tokens
        self.logprobs[rows, 0] = logprobs
