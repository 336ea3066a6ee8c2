"""`quasr bench`: speed and memory of our precisions and of other programs, on the same clips, in one run."""

from __future__ import annotations

import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.options import (  # noqa: TC001  (Typer reads the annotations)
    DeviceOption,
    HubOption,
    OfflineOption,
    RevisionOption,
)
from quasr.cli.terminal import aligned, note, result
from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quasr.bench.job import Job
    from quasr.bench.report import Report
    from quasr.weights.hub import HubOptions

BATCHES = {"cuda": "1,4,16,64,256", "cpu": "1,4"}
"""Default sizes by the device's type."""

ShapeOption = Annotated[
    str | None, typer.Option("--shape", help="Random weights of this shape: 0.6b, 1.7b or demo. Default: demo.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Instead of a shape: 'demo', a checkpoint folder, or a hub id.")
]
KeepOption = Annotated[
    Path | None, typer.Option("--keep", help="Folder for the made checkpoint, which is found there the next time.")
]
PrecisionsOption = Annotated[str, typer.Option("--precisions", help="Compute types with commas between, or none.")]
PeersOption = Annotated[
    str | None,
    typer.Option(
        "--peers",
        help="transformers, transformers-compile, llm-int8, nf4, with commas between, or none. Default: what is there.",
    ),
]
BatchesOption = Annotated[
    str | None, typer.Option("--batches", help="Clips at once. Default: 1,4,16,64,256 on a GPU, 1,4 on a CPU.")
]
SecondsOption = Annotated[float, typer.Option("--seconds", min=0.5, max=1200, help="Length of a clip.")]
TokensOption = Annotated[int, typer.Option("--tokens", min=2, help="New tokens of each clip; nothing stops earlier.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Calls at most, of which the median counts.")]
ColdOption = Annotated[
    bool, typer.Option("--cold/--no-cold", help="Start each once more before, with no compiled kernels on disk.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Of torch on the CPU.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Write all figures as JSON here.")]


def bench(
    shape: ShapeOption = None,
    model: ModelOption = None,
    keep: KeepOption = None,
    precisions: PrecisionsOption = "bf16,int8,int4",
    peers: PeersOption = None,
    batches: BatchesOption = None,
    seconds: SecondsOption = 30.0,
    tokens: TokensOption = 120,
    repeats: RepeatsOption = 5,
    cold: ColdOption = True,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    output: OutputOption = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> int:
    """Measure speed and memory of precisions and of peers, each in processes of its own."""
    from quasr.bench.job import Job
    from quasr.bench.subjects import parse_batches, parse_peers
    from quasr.engine.device import choose
    from quasr.weights.hub import HubOptions

    systems = [*_precisions(precisions), *parse_peers(peers)]
    if not systems:
        raise OptionError("there is nothing to measure: give --precisions or --peers")
    place = choose(device).device
    sizes = parse_batches(batches or BATCHES[place.type])
    job = Job(systems[0], "", str(place), "all", seconds, tokens, sizes, repeats, threads)
    with _checkpoint(shape, model, keep, HubOptions(hub=hub, revision=revision, offline=offline)) as (name, folder):
        report = _measure(name, replace(job, folder=str(folder)), systems, output, cold=cold)
    _show(report, output)
    return 1 if report.problems() else 0


def _precisions(text: str) -> list[str]:
    from quasr.evaluation.compare import parse_precisions

    return [] if text == "none" else parse_precisions(text)


@contextmanager
def _checkpoint(shape: str | None, model: str | None, keep: Path | None, hub: HubOptions) -> Iterator[tuple[str, Path]]:
    """Its name and folder: the model's, or that of random weights, which are gone afterwards if they are not kept."""
    if model is not None:
        if shape is not None or keep is not None:
            raise OptionError("--model is measured as it is: leave out --shape and --keep")
        from quasr.weights.hub import resolve

        yield model, resolve(model, hub).absolute()
        return
    name = shape or "demo"
    with tempfile.TemporaryDirectory(prefix="quasr-bench-") as temporary:
        yield f"random weights of the {name} shape", _made(name, (keep or Path(temporary)).absolute() / name)


def _made(name: str, folder: Path) -> Path:
    from quasr.bench.checkpoint import make_checkpoint
    from quasr.bench.shape import shape_named

    found = shape_named(name)
    if (folder / "config.json").is_file():
        note(f"{folder} is there already")
    else:
        note(f"making random weights of the {name} shape ...")
        make_checkpoint(folder, found)
    return folder


def _measure(name: str, job: Job, systems: list[str], output: Path | None, *, cold: bool) -> Report:
    """Each row is told, and written to `output`, as soon as it is there: a run that is cut off keeps what is done."""
    from quasr.bench.report import Report, write_json
    from quasr.bench.run import bandwidth
    from quasr.bench.run import bench as run

    memory = bandwidth(job)
    note(f"{memory.device}: {memory.bytes_per_second / 1e9:.1f} GB/s ({memory.method})")
    report = Report(name, job, memory, (), tuple(sys.argv))
    note("  ".join(report.columns()))
    for row in run(job, systems, lambda system: note(f"{system} ..."), cold=cold):
        report = replace(report, rows=(*report.rows, row))
        note("  ".join(report.cells(row)))
        if output is not None:
            write_json(output, report)
    return report


def _show(report: Report, output: Path | None) -> None:
    from quasr.bench.report import LEGEND

    result(aligned([report.columns(), *(report.cells(row) for row in report.rows if row.measured)]))
    for line in (*report.problems(), *LEGEND):
        note(line)
    if output is not None:
        note(f"wrote {output}")
