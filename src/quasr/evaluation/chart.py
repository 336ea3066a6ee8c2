"""A comparison as a picture: memory, speed and error, one bar for each precision."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quasr.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quasr.evaluation.compare import Row

BLUE, GREY, RED = "#3b6fb6", "#b8c4d6", "#c0504d"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG of the rows that have not failed. Raises MissingDependencyError without matplotlib."""
    try:
        figures = import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingDependencyError("matplotlib is not installed: pip install 'quasr[chart]'") from error
    good = [row for row in rows if row.measurement and row.summary]
    # The object interface: pyplot would look for a screen and keep the figure alive.
    figure = figures.Figure(figsize=(12, 1.6 + 0.45 * len(good)), layout="constrained")
    memory, speed, wrong = figure.subplots(1, 3, sharey=True)
    _memory(memory, good)
    _speed(speed, good)
    _error(wrong, good)
    memory.invert_yaxis()
    figure.savefig(path, dpi=150)


def _memory(axes: Any, rows: Sequence[Row]) -> None:
    names = [row.precision for row in rows]
    axes.barh(names, [(row.peak or 0) / 1e6 for row in rows], color=GREY, label="peak")
    axes.barh(names, [row.measurement.weight_bytes / 1e6 if row.measurement else 0 for row in rows], color=BLUE,
              height=0.4, label="weights")  # fmt: skip
    axes.set_xlabel("MB")
    axes.set_title("memory")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)


def _speed(axes: Any, rows: Sequence[Row]) -> None:
    bars = axes.barh([row.precision for row in rows], [row.token_ms for row in rows], color=BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.2)
    axes.set_xlabel("ms a token")
    axes.set_title("decoding")


def _error(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        rate = row.summary.words.rate if row.summary else None
        if rate is not None and row.interval is not None:
            axes.plot([100 * row.interval.low, 100 * row.interval.high], [row.precision] * 2, color=RED, linewidth=2)
            axes.plot([100 * rate], [row.precision], "o", color=RED)
    axes.set_xlabel("WER %, with its 95 % interval")
    axes.set_title("error")
