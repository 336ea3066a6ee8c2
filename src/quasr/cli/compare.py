"""`quasr compare`: several precisions of one model, measured over the same audio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.options import (  # noqa: TC001  (Typer reads the annotations)
    BatchSizeOption,
    DeviceOption,
    HubOption,
    LanguageOption,
    MaxNewTokensOption,
    OfflineOption,
    RevisionOption,
    ThreadsOption,
)
from quasr.cli.outputs import check_place
from quasr.cli.terminal import aligned, note, result
from quasr.errors import MissingDependencyError
from quasr.types import TranscribeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.evaluation.compare import Row
    from quasr.evaluation.worker import Job


def compare(
    model: Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub id.", show_default=False)],
    audio: Annotated[str, typer.Argument(help="An audio file, or a manifest (.jsonl).", show_default=False)],
    precisions: Annotated[
        str, typer.Option("--precisions", help="Compute types with commas between; the first is the base.")
    ] = "bf16,int8,int4",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for compare.md, compare.json and compare.png.")
    ] = None,
    language: LanguageOption = None,
    device: DeviceOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    batch_size: BatchSizeOption = 8,
    max_new_tokens: MaxNewTokensOption = None,
    threads: ThreadsOption = None,
) -> int:
    """Compare precisions: memory, speed, and error, each measured in a process of its own."""
    from quasr.evaluation.compare import COLUMNS, LEGEND, cells, parse_precisions, read_clips
    from quasr.evaluation.compare import compare as run
    from quasr.evaluation.score import require_packages
    from quasr.evaluation.worker import Job

    require_packages()
    if output is not None:
        check_place(output)
    names, clips = parse_precisions(precisions), tuple(read_clips(audio))
    options = TranscribeOptions(language, max_new_tokens=max_new_tokens, batch_size=batch_size)
    source = {"hub": hub, "revision": revision, "offline": offline}
    job = Job(model, names[0], device, clips, options, source, threads)
    rows = run(job, names, lambda name: note(f"{name}: {len(clips)} clips ..."))
    result(aligned([COLUMNS, *(cells(row) for row in rows if row.measurement)]))
    for line in (*(f"{row.precision} failed: {row.error}" for row in rows if row.error), *LEGEND):
        note(line)
    if output is not None:
        _save(output, job, rows, audio)
    return 1 if any(row.error for row in rows) else 0


def _save(folder: Path, job: Job, rows: Sequence[Row], audio: str) -> None:
    from quasr.evaluation.chart import draw
    from quasr.evaluation.compare import save

    for path in save(folder, f"{job.model} on {Path(audio).name}, {len(job.clips)} clips", job, rows):
        note(f"wrote {path}")
    try:
        draw(rows, folder / "compare.png")
    except MissingDependencyError as error:
        note(f"no chart: {error}")
        return
    note(f"wrote {folder / 'compare.png'}")
