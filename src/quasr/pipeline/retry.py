"""The engine of second tries: one with 16-bit weights where those of the first try were quantised from them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from quasr.errors import QuasrError

if TYPE_CHECKING:
    from collections.abc import Callable

    from quasr.engine.base import Engine
    from quasr.types import RetryWeights

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retry:
    """What second tries run on. `make` builds the engine of "16-bit"; `reason` says why it is "quantised".

    `make` raises QuasrError where it cannot.
    """

    weights: RetryWeights = "same"
    reason: str = ""
    make: Callable[[], Engine] | None = None


SAME_WEIGHTS = Retry()
"""Of an engine that is not quantised."""


class Engines:
    """The engines of one call: the first tries', and the second tries', which is made when it is first needed.

    That one is kept for the rest of the call, because to load a model takes seconds and a sound that trips a guard is
    seldom alone; and it is closed with the call, because its memory is what quantising had saved.
    """

    def __init__(self, first: Engine, retry: Retry) -> None:
        self.first = first
        self.retry = retry
        self._made: Engine | None = None

    def second(self) -> Engine:
        """The engine of a second try. Where 16 bits cannot be had `retry` says why from then on, as does the log."""
        if self._made is None and self.retry.make is not None:
            try:
                self._made = self.retry.make()
            except QuasrError as error:
                _log.warning("second tries stay quantised: %s", error)
                self.retry = Retry("quantised", str(error))
        return self._made or self.first

    def close(self) -> None:
        """Closes the second tries' engine, if there is one. The first tries' belongs to the transcriber."""
        if self._made is not None:
            self._made.close()
            self._made = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
