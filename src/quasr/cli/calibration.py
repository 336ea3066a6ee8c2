"""What `quasr quantize` does for gptq and awq: clips are read and transcribed, layers calibrated, and all kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quasr.cli.terminal import note
from quasr.errors import CheckpointError, OptionError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from quasr.engine.device import Placement
    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import ModelConfig
    from quasr.quant.calibrate import Method
    from quasr.quant.recipe import Recipe

ANSWERS_FILE = "answers.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """`work` holds what is done until the folder is saved; `resume` allows it to be there already."""

    method: Method
    manifest: Path
    work: Path
    resume: bool

    def check(self) -> None:
        """Raises OptionError where an earlier run's work would be lost. Worth asking before the work begins."""
        if self.work.exists() and not self.resume:
            raise OptionError(f"{self.work} holds an interrupted calibration: add --resume, or remove it")

    def run(self, source: Path, config: ModelConfig, recipe: Recipe, placement: Placement) -> tuple[Qwen3ASR, int]:
        """The quantised network of the checkpoint `source`, and the number of clips that it was calibrated on.

        Raises as `read_manifest`, `load_model` and `calibrate`, and AudioError for a clip that cannot be read.
        """
        from quasr.evaluation.manifest import read_manifest
        from quasr.quant.calibrate import CalibrateOptions, calibrate
        from quasr.quant.prompts import read_clips, teach
        from quasr.text.tokenizer import Tokenizer
        from quasr.weights.load import load_model

        paths = [clip.path for clip in read_manifest(self.manifest)]
        heard = list(read_clips(paths))
        model = load_model(source, config, placement.dtype, placement.device)
        tokenizer = Tokenizer.from_folder(source)
        clips = teach(tokenizer, heard, config.audio.mel_bins, self._answers(model, tokenizer, heard, placement))
        calibrate(model, recipe, clips, CalibrateOptions(self.method), self.work, _say_layer)
        return model, len(clips)

    def _answers(
        self, model: Qwen3ASR, tokenizer: Any, clips: Sequence[NDArray[np.float32]], placement: Placement
    ) -> list[tuple[int, ...]]:
        from quasr.engine.torch_engine import TorchEngine
        from quasr.pipeline.engines import stop_ids
        from quasr.quant.prompts import transcribe

        path = self.work / ANSWERS_FILE
        if path.is_file():
            return _read_answers(path, len(clips))
        engine = TorchEngine(model, stop_ids(model.config, tokenizer), placement)
        answers = transcribe(
            engine, tokenizer, clips, progress=lambda done: note(f"transcribed {done} of {len(clips)}")
        )
        _write_answers(path, answers)
        return answers


def _say_layer(done: int, count: int) -> None:
    note(f"calibrated decoder layer {done} of {count}")


def _read_answers(path: Path, count: int) -> list[tuple[int, ...]]:
    try:
        answers = [tuple(map(int, answer)) for answer in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: remove {path.parent} and start again") from error
    if len(answers) != count:
        raise OptionError(
            f"{path.parent} is of {len(answers)} clips, the manifest has {count}: give the same, or remove it"
        )
    return answers


def _write_answers(path: Path, answers: list[tuple[int, ...]]) -> None:
    fresh = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(answers), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise ResourceError(f"cannot write to {path.parent}: {error.strerror}") from error


def calibration_for(method: str, manifest: Path | None, resume: bool, output: Path) -> Calibration | None:
    """None for rtn. Raises OptionError for what does not go together."""
    if method == "rtn":
        if manifest is not None or resume:
            raise OptionError("--calibration and --resume go with --method gptq or awq: rtn needs no clips")
        return None
    if manifest is None:
        raise OptionError(f"--method {method} needs --calibration MANIFEST: 128 clips or more of the speech you expect")
    return Calibration("awq" if method == "awq" else "gptq", manifest, output.with_name(f"{output.name}.work"), resume)
