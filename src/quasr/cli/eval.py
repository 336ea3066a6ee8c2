"""`quasr eval`: error rates of a model over a manifest."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (Typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.interrupt import Interrupt
from quasr.cli.options import (
    BatchSizeOption,
    ComputeTypeOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    HubOption,
    LanguageOption,
    MaxNewTokensOption,
    ModelChoice,
    ModelOption,
    OfflineOption,
    ProviderOption,
    RevisionOption,
    ThreadsOption,
    ThresholdOption,
)
from quasr.cli.outputs import check_place
from quasr.cli.terminal import ProgressLine, aligned, note, result
from quasr.errors import OptionError
from quasr.types import TranscribeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.evaluation.manifest import Clip
    from quasr.evaluation.run import Outcome
    from quasr.pipeline.transcriber import Transcriber


def evaluate(
    manifest: Annotated[Path, typer.Argument(help="JSONL: path, text, and optionally subset, lang, seconds.")],
    model: ModelOption = "demo",
    language: LanguageOption = None,
    context: ContextOption = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write figures and hypotheses as JSON.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compute_type: ComputeTypeOption = "auto",
    threshold: ThresholdOption = None,
    engine: EngineOption = "auto",
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    batch_size: BatchSizeOption = 16,
    max_new_tokens: MaxNewTokensOption = None,
) -> int:
    """Measure word and character error rates. Rows without text are run, but not scored."""
    from quasr.evaluation.manifest import read_manifest
    from quasr.evaluation.report import COLUMNS, table, write_json
    from quasr.evaluation.score import require_packages

    require_packages()
    if output is not None:
        _prepare(output)
    clips = read_manifest(manifest)
    options = TranscribeOptions(language, context, max_new_tokens, batch_size=batch_size)
    choice = ModelChoice(
        model, device, dtype, hub, revision, offline, compute_type, threshold,
        engine=engine, provider=provider, threads=threads,
    )  # fmt: skip
    with choice.load() as transcriber:
        outcomes = _run(transcriber, clips, options)
        result(aligned([COLUMNS, *table(outcomes)]))
        if output is not None:
            write_json(output, model, transcriber.info, outcomes)
    return _exit_code(outcomes)


def _prepare(output: Path) -> None:
    """Makes the file's folder. Raises OptionError where that cannot be, before hours of work and not after them."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{output} cannot be written ({error.strerror}): choose another place") from error
    check_place(output.parent)
    if output.is_dir():
        raise OptionError(f"{output} is a folder: give the name of a file")


def _run(transcriber: Transcriber, clips: Sequence[Clip], options: TranscribeOptions) -> list[Outcome]:
    from quasr.evaluation.run import evaluate as run

    progress, interrupt = ProgressLine(), Interrupt()

    def show(seconds: float) -> None:
        progress(seconds)
        # At once, and not a batch later: half an evaluation is none, so there are no results to look at.
        interrupt.rest()

    try:
        with interrupt:
            outcomes = run(transcriber, clips, options, show)
            interrupt.rest()
    except KeyboardInterrupt:
        progress.clear()
        note("interrupted: no figures, because an evaluation is of all clips")
        raise
    progress.clear()
    return outcomes


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        note(f"error: {outcome.error}")
    return 1 if failed else 0
