"""The memory plan of a folder: what is stored there decides which schemes there are to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from quasr.engine.plan import Candidate, Plan, Target, Wish, candidates, plan
from quasr.errors import OptionError
from quasr.model.config import read_json
from quasr.quant.recipe import NO_RECIPE, Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.config import ModelConfig

METADATA_FILE = "quasr_quantization.json"


@dataclass(frozen=True, slots=True)
class Precision:
    """What was asked for, as in `load`. `device` is cpu or cuda."""

    device: str
    dtype: str = "auto"
    compute_type: str = "auto"
    threshold: float | None = None


def plan_folder(folder: Path, config: ModelConfig, precision: Precision, wish: Wish) -> Plan:
    """The plan for a checkpoint folder, whose weights are not read. Raises OptionError and CheckpointError.

    A quantised folder has one candidate: itself.
    """
    device = cast("Literal['cpu', 'cuda']", precision.device)
    found = candidates(device, precision.dtype, precision.compute_type, precision.threshold)
    stored = stored_recipe(folder)
    if stored is not None:
        if precision.compute_type not in ("auto", stored.name):
            raise OptionError(f"{folder} is already quantised as {stored.name}: leave the compute type at auto")
        found = [Candidate(stored.name, stored, Target(device, found[0].target.dtype))]
    return plan(config, found, wish)


def stored_recipe(folder: Path) -> Recipe | None:
    """The recipe of a quantised folder; None for 16-bit weights, which need no torch to be planned for."""
    saved = (folder / METADATA_FILE).is_file()
    if not saved and "quantization_config" not in read_json(folder / "config.json"):
        return None
    from quasr.quant.store import read_saved, transformers_threshold

    known, threshold = read_saved(folder), transformers_threshold(folder)
    if known is not None:
        return known.recipe
    return NO_RECIPE if threshold is None else candidates("cpu", "auto", "llm-int8", threshold)[0].recipe
