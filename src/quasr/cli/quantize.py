"""`quasr quantize`: a checkpoint in 8 or 4 bits, as a folder that loads without conversion."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.calibration import calibration_for
from quasr.cli.options import (  # noqa: TC001  (Typer reads the annotations)
    DeviceOption,
    HubOption,
    OfflineOption,
    RevisionOption,
    ThresholdOption,
)
from quasr.cli.target import Target
from quasr.cli.terminal import aligned, megabytes, note, result
from quasr.errors import MissingDependencyError, OptionError

if TYPE_CHECKING:
    from quasr.cli.calibration import Calibration
    from quasr.engine.device import Placement
    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe, Row
    from quasr.quant.vocabulary import Keep

METHODS = ("rtn", "gptq", "awq")
"""How weights become codes. rtn: rounding to nearest. The others are calibrated, for int4 decoder layers."""

COLUMNS = ("layers", "scheme", "count", "parameters", "bytes")


ModelArgument = Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub id.", show_default=False)]
ToOption = Annotated[str, typer.Option("--to", help="int8, int8-g64, int4, int4-g64, llm-int8, nf4, ...")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")]
GroupOption = Annotated[
    int | None, typer.Option("--group", help="Weights that share a scale, for int8 and int4: 128, 64 or 32.")
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option("--rule", help="PATTERN=SCHEME for some layers, such as 'decoder.layers.0.*=int8'. Repeatable."),
]
MethodOption = Annotated[
    str, typer.Option("--method", help="rtn: round to nearest. gptq, awq: for int4, calibrated on real clips.")
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="Of gptq and awq: JSONL, the path of a clip on each line.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with a calibration that was interrupted, from OUTPUT.work.")
]
LanguagesOption = Annotated[
    str | None, typer.Option("--languages", help="Drop the tokens that these never use: codes, such as en,zh.")
]
KeepOption = Annotated[
    Path | None, typer.Option("--keep-tokens-from", help="Text (.txt, .xz) whose tokens stay; others may go.")
]
FormatOption = Annotated[str, typer.Option("--format", help="quasr, or compressed-tensors: int4 for transformers.")]
StoredOption = Annotated[
    str, typer.Option("--dtype", help="Of scales and of what is not quantised. auto: the checkpoint's, or bf16.")
]


def quantize(
    model: ModelArgument,
    to: ToOption,
    output: OutputOption,
    group: GroupOption = None,
    rule: RuleOption = None,
    method: MethodOption = "rtn",
    calibration: CalibrationOption = None,
    resume: ResumeOption = False,
    languages: LanguagesOption = None,
    keep_tokens_from: KeepOption = None,
    folder_format: FormatOption = "quasr",
    threshold: ThresholdOption = None,
    device: DeviceOption = "auto",
    dtype: StoredOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> int:
    """Quantise a checkpoint and save it as a folder."""
    from quasr.engine.device import choose
    from quasr.model.config import read_config
    from quasr.weights.hub import HubOptions, resolve

    target = Target(output, folder_format, _keep(languages, keep_tokens_from))
    recipe = target.recipe(to if group is None else f"{to}-g{group}", threshold, rule or ())
    _check(recipe, method, target)
    guide = calibration_for(method, calibration, resume, output)
    source = resolve(model, HubOptions(hub=hub, revision=revision, offline=offline))
    config = read_config(source)
    recipe.assign(config)
    _quantise(source, config, recipe, target, guide, choose(device, _dtype(dtype, config)))
    return 0


def _keep(languages: str | None, text: Path | None) -> Keep | None:
    """What the vocabulary must still say; the first step here that needs torch."""
    try:
        from quasr.quant.vocabulary import parse_keep
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"quantize needs {error.name}: install the extra with pip install 'quasr[quant]'"
        ) from error
    return parse_keep(languages, text)


def _check(recipe: Recipe, method: str, target: Target) -> None:
    if method not in METHODS:
        raise OptionError(f"unknown method {method!r}: there is {', '.join(METHODS)}")
    if method != "rtn" and all(scheme.kind != "int4" for _, scheme in recipe.rules):
        raise OptionError(f"--method {method} is for 4 bits, and {recipe.name} has none: say int4, or rtn")
    if not recipe.rules and target.keep is None:
        raise OptionError(f"--to {recipe.name} quantises nothing: say int8, int4, or add a --rule")


def _dtype(asked: str, config: ModelConfig) -> str:
    """Floats are stored in 16 bits unless more is asked for."""
    if asked != "auto":
        return asked
    return "fp16" if config.dtype == "float16" else "bf16"


def _quantise(
    source: Path, config: ModelConfig, recipe: Recipe, target: Target, guide: Calibration | None, placement: Placement
) -> None:
    from quasr.quant.recipe import NO_RECIPE
    from quasr.quant.store import check_output, check_unquantised

    check_unquantised(source)
    check_output(target.folder)
    vocabulary = target.vocabulary(source, config)
    if guide is not None:
        guide.check()
    item = placement.dtype.itemsize
    result(aligned([COLUMNS, *map(_cells, recipe.table(config, item))]))
    started = time.perf_counter()
    network, metadata = _network(source, config, recipe, guide, placement)
    loaded = time.perf_counter()
    files = {}
    if vocabulary is not None:
        files, metadata["vocabulary"] = vocabulary.apply(network), vocabulary.pruning.to_json()
    target.save(network, recipe, source, metadata, files)
    if guide is not None:
        shutil.rmtree(guide.work)
    before, after = NO_RECIPE.weight_bytes(config, item), sum(tensor.nbytes for tensor in network.state_dict().values())
    result(f"{megabytes(before)} before, {megabytes(after)} after: {after / before:.1%}")
    note(f"wrote {target.folder}: quantised in {loaded - started:.1f} s, saved in {time.perf_counter() - loaded:.1f} s")


def _network(
    source: Path, config: ModelConfig, recipe: Recipe, guide: Calibration | None, placement: Placement
) -> tuple[Qwen3ASR, dict[str, object]]:
    """The quantised network, and what is noted about how it was made."""
    from quasr.quant.apply import load_quantising

    if guide is None:
        return load_quantising(source, config, recipe, placement.dtype, placement.device), {"method": "rtn"}
    network, clips = guide.run(source, config, recipe, placement)
    return network, {"method": guide.method, "calibration_clips": clips}


def _cells(row: Row) -> tuple[str, ...]:
    return row.pattern, row.scheme, str(row.layers or "-"), f"{row.parameters:,}", megabytes(row.bytes)
