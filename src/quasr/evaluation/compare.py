"""Several precisions of one model over the same clips: each in its own process, side by side in one table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasr.errors import OptionError
from quasr.evaluation.bootstrap import Interval, difference_interval, rate_interval
from quasr.evaluation.manifest import DEFAULT_LANGUAGE, Clip, read_manifest
from quasr.evaluation.process import ask
from quasr.evaluation.run import summarise
from quasr.evaluation.score import Edits, score
from quasr.evaluation.worker import Job, Measurement
from quasr.quant.recipe import recipe_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from quasr.evaluation.run import Outcome, Summary

COLUMNS = (
    "precision", "load s", "weights MB", "peak MB", "prefill ms", "ms/token", "RTF", "agree %", "changed", "WER %",
    "95 % interval", "difference", "ins", "empty", "repeated", "failed",
)  # fmt: skip

LEGEND = (
    "peak: most main memory of the process, or on a GPU most memory that torch held there",
    "prefill: milliseconds a clip to encode it and read its prompt; ms/token: of decoding, both shared by a batch",
    "agree: characters as in the first precision's text, after normalisation; changed: hypotheses that differ from it",
    "difference: 95 % interval of WER minus the first's, in points; both intervals by bootstrap over the same clips",
    "ins: inserted words; empty: no text; repeated: a phrase four times or more where the reference has it not",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One precision. Of a failure there is `error` alone; `base` marks the one that the others are compared with.

    Rates and intervals are fractions. `prefill_ms` is for a clip, `token_ms` for a token.
    """

    precision: str
    error: str | None = None
    measurement: Measurement | None = None
    summary: Summary | None = None
    base: bool = False
    agreement: float | None = None
    changed: int | None = None
    interval: Interval | None = None
    difference: Interval | None = None

    @property
    def prefill_ms(self) -> float:
        if self.measurement is None:
            return 0.0
        return 1000 * self.measurement.prefill_seconds / max(1, len(self.measurement.outcomes))

    @property
    def token_ms(self) -> float:
        if self.measurement is None:
            return 0.0
        return 1000 * self.measurement.generate_seconds / max(1, self.measurement.tokens)

    @property
    def peak(self) -> int | None:
        """Bytes on the GPU where there is one, otherwise in main memory."""
        found = self.measurement
        return None if found is None else found.peak_host if found.peak_gpu is None else found.peak_gpu

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        if self.measurement is None or self.summary is None:
            return {"precision": self.precision, "error": self.error}
        measured = {name: getattr(self.measurement, name) for name in Measurement.__slots__ if name != "outcomes"}
        return {
            "precision": self.precision,
            **measured,
            "prefill_ms": self.prefill_ms,
            "token_ms": self.token_ms,
            **self.summary.to_dict(),
            "base": self.base,
            "agreement": self.agreement,
            "changed": self.changed,
            "wer_interval": asdict(self.interval) if self.interval else None,
            "difference_interval": asdict(self.difference) if self.difference else None,
            "outcomes": [one.to_dict() for one in self.measurement.outcomes],
        }


def read_clips(source: str) -> list[Clip]:
    """The clips of a manifest (.jsonl), or one audio file as a clip without reference. Raises OptionError."""
    path = Path(source).absolute()
    if path.suffix == ".jsonl":
        return [replace(clip, path=clip.path.absolute()) for clip in read_manifest(path)]
    if not path.is_file():
        raise OptionError(f"no file {source}: give an audio file or a manifest (.jsonl)")
    return [Clip(path, path.name, None, "all", DEFAULT_LANGUAGE, float(path.stat().st_size))]


def parse_precisions(text: str) -> list[str]:
    """`fp32,int8,int4` -> names. Raises OptionError for unknown ones, before anything runs."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise OptionError("no precisions: give some such as bf16,int8,int4")
    for name in names:
        recipe_for(name)
        if names.count(name) > 1:
            raise OptionError(f"the precision {name} is given twice")
    return names


def compare(job: Job, precisions: Sequence[str], told: Callable[[str], None] | None = None) -> list[Row]:
    """A row for each precision, in order; one that fails says why and does not stop the others.

    `job.precision` is replaced by each. `told` gets the name of a precision when it starts.
    """
    rows: list[Row] = []
    for name in precisions:
        if told:
            told(name)
        rows.append(_measured(replace(job, precision=name)))
    return _side_by_side(rows)


def _measured(job: Job) -> Row:
    found = run_worker(job)
    if isinstance(found, str):
        return Row(job.precision, error=found)
    return Row(job.precision, measurement=found, summary=summarise(found.outcomes), interval=_interval(found))


def run_worker(job: Job) -> Measurement | str:
    """The measurement of a fresh process, or in one line why there is none."""
    found = ask("quasr.evaluation.worker", job.to_json())
    return found.error if found.text is None else Measurement.from_json(found.text, job)


def _interval(found: Measurement) -> Interval | None:
    edits = [_edits(one) for one in found.outcomes]
    return rate_interval([_wrong(one) for one in edits], [one.units for one in edits])


def _side_by_side(rows: Sequence[Row]) -> list[Row]:
    """Adds what only a comparison tells, with the first precision that did not fail as the base."""
    base = next((row for row in rows if row.measurement), None)
    return [
        row if base is None or row.measurement is None else replace(_against(row, base), base=row is base)
        for row in rows
    ]


def _against(row: Row, base: Row) -> Row:
    pairs = list(_pairs(base, row))
    both = sum((score(one.hypothesis, other.hypothesis, one.clip.language).characters for one, other in pairs), Edits())
    first, second = [_edits(one) for one, _ in pairs], [_edits(other) for _, other in pairs]
    return replace(
        row,
        agreement=1.0 if not _wrong(both) else None if both.rate is None else max(0.0, 1 - both.rate),
        changed=sum(one.hypothesis != other.hypothesis for one, other in pairs),
        difference=None if row is base else _difference(first, second),
    )


def _difference(first: Sequence[Edits], second: Sequence[Edits]) -> Interval | None:
    """Over clips that both have scored."""
    both = [(one, other) for one, other in zip(first, second, strict=True) if one.units and other.units]
    return difference_interval(
        [_wrong(one) for one, _ in both], [_wrong(other) for _, other in both], [one.units for one, _ in both]
    )


def _pairs(base: Row, row: Row) -> Iterator[tuple[Outcome, Outcome]]:
    if base.measurement and row.measurement:
        yield from zip(base.measurement.outcomes, row.measurement.outcomes, strict=True)


def _edits(one: Outcome) -> Edits:
    """Over words, as the summary's WER: a clip without words or without reference counts nothing."""
    return (one.score.words if one.score else None) or Edits()


def _wrong(edits: Edits) -> int:
    return edits.substitutions + edits.insertions + edits.deletions


def cells(row: Row) -> tuple[str, ...]:
    """What stands under COLUMNS; of a failure the name and the reason."""
    found, summary = row.measurement, row.summary
    if found is None or summary is None:
        return (row.precision, f"failed: {row.error}")
    return (
        row.precision,
        f"{found.load_seconds:.2f}",
        f"{found.weight_bytes / 1e6:.1f}",
        "-" if row.peak is None else f"{row.peak / 1e6:.0f}",
        f"{row.prefill_ms:.1f}",
        f"{row.token_ms:.2f}",
        f"{summary.real_time_factor:.3f}",
        _percent(row.agreement),
        "-" if row.changed is None else str(row.changed),
        _percent(summary.words.rate),
        _points(row.interval),
        _points(row.difference, signed=True),
        str(summary.words.insertions) if summary.words.units else "-",
        str(summary.empty),
        str(summary.repeated),
        str(summary.failed),
    )


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f}"


def _points(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    plus = "+" if signed else ""
    return f"{100 * interval.low:{plus}.2f} to {100 * interval.high:{plus}.2f}"


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A page with the table, failures below it, and what the columns mean."""
    body = [cells(row) for row in rows if row.measurement]
    lines = [f"# {title}", "", *(f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *body])]
    lines += ["", *(f"- **{row.precision}** failed: {row.error}" for row in rows if row.error), ""]
    return "\n".join([*lines, *(f"- {line}" for line in LEGEND)]) + "\n"


def save(folder: Path, title: str, job: Job, rows: Sequence[Row]) -> list[Path]:
    """Writes compare.md and compare.json into `folder`, which is made. Raises OptionError where that fails."""
    report = {"model": job.model, "batch_size": job.options.batch_size, "rows": [row.to_dict() for row in rows]}
    texts = {
        "compare.md": markdown(title, rows),
        "compare.json": json.dumps(report, ensure_ascii=False, indent=2) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{folder} cannot be written ({error.strerror}): choose another place") from error
    return [folder / name for name in texts]
