"""The CUDA stream that engines of a GPU work on, graphs captured on it, and the wait that dropping these takes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@cache
def work_stream(device: int) -> torch.cuda.Stream:
    """The stream of a GPU that the fast engine computes on and that graphs are captured on.

    cuBLAS keeps a workspace for each stream, 32 MiB on Hopper, and graphs have its address in them: one stream for
    both, and for all models of a process, needs one.
    """
    return torch.cuda.Stream(device)


def capture(function: Callable[[], T], pool: torch.cuda._POOL_HANDLE | None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `function` on the current device, with its temporary memory in `pool`, and what `function` gave."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, work_stream(torch.cuda.current_device())):
        output = function()
    return graph, output


def finish_replays() -> None:
    """Waits for the device before graphs are dropped.

    Their memory belongs to the stream that captured them, and before it unmaps an expandable segment torch waits for
    that stream alone: without this, a graph that is still queued on another may find its memory gone.
    """
    torch.cuda.synchronize()
