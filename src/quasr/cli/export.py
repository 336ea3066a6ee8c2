"""`quasr export`: a checkpoint as ONNX graphs, as a folder that runs without torch."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003  (Typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasr.cli.options import HubOption, OfflineOption, RevisionOption  # noqa: TC001  (Typer reads the annotations)
from quasr.cli.terminal import aligned, megabytes, note, result
from quasr.errors import MissingDependencyError, OptionError

if TYPE_CHECKING:
    from quasr.export.manifest import Manifest

GROUPS = (128, 64, 32, 0)
ACTIVATIONS = ("int8", "fp32")


def export(
    model: Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="fp32, int8 or int4. Default: what the checkpoint has, int8 if 16 bits."),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option("--group", help="Weights that share a scale: 128, 64, 32; 0: a row (int8). Default: what fits."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option("--head", help="Of int4 weights the head and the token table: int8, or int4. Default: int8."),
    ] = None,
    activations: Annotated[
        str,
        typer.Option("--activations", help="int8, or fp32: not rounded; 8-bit weights then take 32."),
    ] = "int8",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> int:
    """Write a checkpoint as ONNX graphs."""
    _check(group, activations)
    exporter = _exporter()
    from quasr.weights.hub import HubOptions, resolve

    source = resolve(model, HubOptions(hub=hub, revision=revision, offline=offline))
    started = time.perf_counter()
    options = exporter.ExportOptions(weights, group, activations, head)
    manifest = exporter.export_folder(source, output, options)
    result(aligned(_rows(manifest)))
    note(f"wrote {output} ({manifest.weights}) in {time.perf_counter() - started:.1f} s")
    return 0


def _check(group: int | None, activations: str) -> None:
    if group is not None and group not in GROUPS:
        raise OptionError(f"no group of {group}: there is {', '.join(map(str, GROUPS))}")
    if activations not in ACTIVATIONS:
        raise OptionError(f"unknown activations {activations[:40]!r}: there is {', '.join(ACTIVATIONS)}")


def _exporter() -> Any:
    """The module, which needs torch and onnx."""
    try:
        from quasr.export import folder
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"export needs {error.name}: install the extra with pip install 'quasr[quant]'"
        ) from error
    return folder


def _rows(manifest: Manifest) -> list[tuple[str, ...]]:
    return [("file", "bytes"), *((name, megabytes(file.size)) for name, file in manifest.files.items())]
