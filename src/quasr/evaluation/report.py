"""The result of an evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from quasr.errors import OptionError
from quasr.evaluation.run import by_subset, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quasr.engine.base import EngineInfo
    from quasr.evaluation.run import Outcome, Summary

COLUMNS = (
    "subset", "clips", "scored", "audio s", "WER %", "CER %", "sub", "ins", "del", "empty", "repeated", "cut",
    "failed", "RTF",
)  # fmt: skip
"""`sub`, `ins` and `del` count words, or characters in a subset without words; `cut` stopped at the token budget."""


def table(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The cells under COLUMNS: a row for each subset, and one for all where there are several."""
    subsets = list(by_subset(outcomes))
    rows = [_row(name, summary) for name, summary in subsets]
    return rows if len(rows) == 1 else [*rows, _row("overall", summarise(outcomes))]


def _row(name: str, summary: Summary) -> tuple[str, ...]:
    edits = summary.edits
    counts = (edits.substitutions, edits.insertions, edits.deletions)
    return (
        name,
        str(summary.clips),
        str(summary.scored),
        f"{summary.seconds:.1f}",
        _percent(summary.words.rate),
        _percent(summary.characters.rate),
        *(str(count) if summary.scored else "-" for count in counts),
        str(summary.empty),
        str(summary.repeated),
        str(summary.cut),
        str(summary.failed),
        f"{summary.real_time_factor:.3f}",
    )


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f}"


def write_json(path: Path, model: str, engine: EngineInfo, outcomes: Sequence[Outcome]) -> None:
    """Writes model, engine, overall and subset summaries, and every clip. Raises OptionError where it cannot."""
    report = {
        "model": model,
        "engine": asdict(engine),
        "overall": summarise(outcomes).to_dict(),
        "subsets": {name: summary.to_dict() for name, summary in by_subset(outcomes)},
        "clips": [row.to_dict() for row in outcomes],
    }
    try:
        path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}): choose another place") from error
