"""`quasr plan`: what a model needs in each scheme, what fits a budget, and what would be chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.options import (  # noqa: TC001  (Typer reads the annotations)
    ComputeTypeOption,
    DtypeOption,
    HubOption,
    OfflineOption,
    RevisionOption,
    ThresholdOption,
)
from quasr.cli.terminal import aligned, megabytes, note, result
from quasr.errors import OptionError

if TYPE_CHECKING:
    from quasr.engine.plan import Estimate, Plan, Row

COLUMNS = (
    "compute type", "dtype", "clip s", "batch", "weights", "cache", "activations", "context", "peak", "fits",
)  # fmt: skip

ELSEWHERE = "what CUDA itself takes was measured on one GPU (H200): leave some room on others"


def plan(
    model: Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub id.", show_default=False)],
    memory: Annotated[str, typer.Option("--memory", help="The budget: 4GB, 800MB, 4GiB.")],
    audio: Annotated[str | None, typer.Option("--audio", help="Length of what is transcribed: 90s, 30m, 1h.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Exactly so many clips at once.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, or cuda, which need not be here.")] = "auto",
    dtype: DtypeOption = "auto",
    compute_type: ComputeTypeOption = "auto",
    threshold: ThresholdOption = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> int:
    """Show what fits into an amount of memory, from the model's config alone: no weights are fetched or read."""
    from quasr.engine.plan import Wish, parse_duration, parse_memory
    from quasr.model.config import read_config
    from quasr.pipeline.planning import Precision, plan_folder
    from quasr.weights.hub import HubOptions, resolve_config

    wish = Wish(parse_memory(memory), None if audio is None else parse_duration(audio), batch)
    precision = Precision(_device(device), _dtype(dtype), compute_type, threshold)
    folder = resolve_config(model, HubOptions(hub=hub, revision=revision, offline=offline))
    found = plan_folder(folder, read_config(folder), precision, wish)
    result(aligned([COLUMNS, *map(_cells, found.rows)]))
    _explain(found, precision.device)
    return 0


def _device(name: str) -> str:
    """A GPU may be planned for on a machine that has none."""
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"unknown device {name!r}: a plan is for auto, cpu or cuda")
    if name != "auto":
        return name
    from quasr.engine.device import choose

    return choose().device.type


def _dtype(name: str) -> str:
    from quasr.engine.plan import DTYPE_BYTES

    if name != "auto" and name not in DTYPE_BYTES:
        raise OptionError(f"unknown dtype {name!r}: use auto, {', '.join(DTYPE_BYTES)}")
    return name


def _explain(found: Plan, device: str) -> None:
    """Raises ResourceError where nothing fits, after the table has shown why."""
    for row in found.rows:
        if row.problem:
            note(f"{row.candidate.name}: {row.problem}")
    if device == "cuda":
        note(ELSEWHERE)
    result(f"chosen: {found.why()}")


def _cells(row: Row) -> tuple[str, ...]:
    name, dtype = row.candidate.name, row.candidate.target.dtype
    if row.best is None:
        return (name, dtype, *["-"] * (len(COLUMNS) - 3), "no")
    return (name, dtype, *_figures(row.best), "yes" if row.fits else "no")


def _figures(best: Estimate) -> tuple[str, ...]:
    sizes = (best.weights, best.cache, best.activations, best.candidate.target.context, best.peak)
    return f"{best.work.seconds:g}", str(best.work.batch), *map(megabytes, sizes)
