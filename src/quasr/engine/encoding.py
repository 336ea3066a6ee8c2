"""The encoder's part of the clip that comes next, beside the decoding of those before it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from quasr.engine.base import belongs

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from quasr.engine.base import Ticket

    Floats = NDArray[np.float32]


class Encoding:
    """`encode`, on the caller's thread, or with `ahead` on another one for one clip that waits."""

    def __init__(self, encode: Callable[[Floats], Floats], *, ahead: bool) -> None:
        self._encode: Callable[[Floats], Floats] | None = encode
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1, "quasr-encoder")
        self._begun: tuple[Ticket, Future[Floats]] | None = None

    @property
    def wants(self) -> bool:
        """Whether a clip may be begun now."""
        return self._ahead and self._begun is None

    def begin(self, ticket: Ticket, samples: Floats) -> None:
        """Begins a clip; whoever calls asks `wants` before."""
        assert self._encode is not None
        self._begun = ticket, self._pool.submit(self._encode, samples)

    def take(self, ticket: Ticket, samples: Floats) -> Floats:
        """The clip's (tokens, hidden), of what has been begun or now. Raises what `encode` does."""
        assert self._encode is not None
        if self._begun is None or self._begun[0] != ticket:
            return self._encode(samples)
        (_, future), self._begun = self._begun, None
        return future.result()

    def forget(self, what: Hashable) -> None:
        """Drops what has been begun of one clip, by its ticket, or of a group."""
        if self._begun is not None and belongs(self._begun[0], what):
            self.drop()

    def drop(self) -> None:
        """Nobody wants what has been begun: it is not waited for."""
        self._begun = None

    def close(self) -> None:
        """Lets go of the graphs, when the thread has."""
        self.drop()
        self._pool.shutdown()
        self._encode = None
