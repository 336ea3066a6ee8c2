"""How sure an error rate is: percentile bootstrap over clips (Efron 1979; for recognisers Bisani and Ney 2004)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ROUNDS = 2000
SEED = 20_240_101
TAIL = 2.5
"""Percent left out on each side of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """95 % of the resampled values lie between `low` and `high`."""

    low: float
    high: float


def rate_interval(errors: Sequence[int], units: Sequence[int], seed: int = SEED) -> Interval | None:
    """Of sum(errors) / sum(units), clips being drawn with replacement; None without any unit."""
    return _interval(_rates(errors, units, seed))


def difference_interval(
    first: Sequence[int], second: Sequence[int], units: Sequence[int], seed: int = SEED
) -> Interval | None:
    """Of the second rate minus the first, both over the same drawn clips (paired); None without any unit.

    All three are of the same clips in the same order.
    """
    return _interval(_rates(np.asarray(second) - np.asarray(first), units, seed))


def _rates(errors: Sequence[int] | NDArray[np.int64], units: Sequence[int], seed: int) -> NDArray[np.float64]:
    """One rate a round; rounds that draw no unit at all are left out."""
    wrong, counted = np.asarray(errors, np.int64), np.asarray(units, np.int64)
    random = np.random.default_rng(seed)
    rates = []
    for _ in range(ROUNDS if counted.sum() else 0):
        drawn = random.integers(len(counted), size=len(counted))
        if total := counted[drawn].sum():
            rates.append(wrong[drawn].sum() / total)
    return np.asarray(rates)


def _interval(rates: NDArray[np.float64]) -> Interval | None:
    if not rates.size:
        return None
    low, high = np.percentile(rates, [TAIL, 100 - TAIL])
    return Interval(float(low), float(high))
