"""Quantised networks as folders, and the one way in for every kind of folder.

A folder holds `model.safetensors` with the layers' own buffers under the names of the original layout, the source's
config and tokenizer files, and `quasr_quantization.json`, which says by what recipe, how, and of what it was made.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from quasr.errors import CheckpointError, OptionError
from quasr.model.config import read_json
from quasr.quant.apply import load_quantising, replace_layer, shaped_layer
from quasr.quant.bitsandbytes import ROW_MAJOR, LLMInt8Linear
from quasr.quant.recipe import NO_RECIPE, Recipe
from quasr.quant.scheme import DEFAULT_THRESHOLD, Scheme, llm_int8
from quasr.weights.layout import checkpoint_name
from quasr.weights.load import INDEX_FILE, SINGLE_FILE, load_model
from quasr.weights.record import RECORD_FILE, digest, read_record, wanted
from quasr.weights.save import fresh_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import Layout, ModelConfig
    from quasr.weights.shard import Entry

METADATA_FILE = "quasr_quantization.json"

VERSION = 1
"""Of the folder's format. A reader refuses what is newer than itself."""

COPIED = (".json", ".txt", ".jinja", ".md")
"""Endings of what comes along from the source, beside its licence: config, tokenizer, model card."""

LAYOUTS: tuple[Layout, ...] = ("original", "hf")


@dataclass(frozen=True, slots=True)
class Saved:
    """What METADATA_FILE says. `metadata` is whatever the maker noted: method, calibration, measurements."""

    recipe: Recipe
    dtype: str
    source: dict[str, Any]
    metadata: dict[str, Any]
    version: int = VERSION
    quasr: str = installed_version("quasr")


def save_quantised(
    model: Qwen3ASR,
    recipe: Recipe,
    source_folder: Path,
    output: Path,
    metadata: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a quantised network as `output`, whole or not at all; every buffer as it is, bit for bit.

    `model` must have the layers of `recipe`. The other files come from `source_folder`, except those in `files`
    (name -> text), which replace or join them: a changed vocabulary brings its own config.json and tokenizer.json.
    Raises OptionError for an output that exists, ResourceError where the disk is full or may not be written.
    """
    check_output(output)
    tensors = {
        checkpoint_name(name, "original"): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    dtype = str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    saved = Saved(recipe, dtype, source_record(source_folder), dict(metadata))
    with fresh_folder(output) as fresh:
        save_file(tensors, fresh / SINGLE_FILE, metadata={"format": "pt"})
        copy_others(source_folder, fresh)
        for name, text in (files or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")
        write_json(fresh / METADATA_FILE, {**asdict(saved), "recipe": recipe.to_json()})
        # Safetensors makes files that only their owner may read.
        shutil.copymode(fresh / METADATA_FILE, fresh / SINGLE_FILE)


def check_output(output: Path) -> None:
    """Raises OptionError where something is already there. Worth asking before the work begins."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise OptionError(f"{output} already exists: give a new folder, or remove it")


def read_saved(folder: Path) -> Saved | None:
    """What is known of a folder that `save_quantised` wrote; None for any other folder.

    Raises CheckpointError if the file is damaged or of a newer version.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        return None
    raw = read_json(path)
    version = raw.get("version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} tells no version: quantise the model again")
    if version > VERSION:
        raise CheckpointError(
            f"{folder} was written by a newer quasr (format {version}, this one reads up to {VERSION}): upgrade quasr"
        )
    try:
        recipe = Recipe.from_json(raw["recipe"])
        return Saved(recipe, str(raw["dtype"]), dict(raw["source"]), dict(raw["metadata"]), version, str(raw["quasr"]))
    except (KeyError, TypeError, ValueError, OptionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): quantise the model again") from error


def load_network(
    folder: Path, config: ModelConfig, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> tuple[Qwen3ASR, str]:
    """The network of any folder, and the name of the recipe that it then has.

    A 16-bit checkpoint is quantised by `recipe` while it is read. A folder that is already quantised, by
    `save_quantised` or by transformers with LLM.int8, is loaded as it was saved; `recipe` must be "none" or its own.
    Raises OptionError where it is another, and as `load_model`.
    """
    saved, threshold = read_saved(folder), transformers_threshold(folder)
    if saved is not None:
        _check_same(folder, saved.recipe.name, recipe)
        return _load_saved(folder, config, saved.recipe, dtype, device), saved.recipe.name
    if threshold is not None:
        scheme = llm_int8(threshold)
        _check_same(folder, str(scheme), recipe)
        return _load_transformers(folder, config, scheme, dtype, device), str(scheme)
    if recipe.rules:
        return load_quantising(folder, config, recipe, dtype, device), recipe.name
    return load_model(folder, config, dtype, device), NO_RECIPE.name


def check_unquantised(folder: Path) -> None:
    """Raises OptionError for a folder that `load_network` would load as it was saved."""
    saved = read_saved(folder)
    if saved is not None or transformers_threshold(folder) is not None:
        name = "llm-int8" if saved is None else saved.recipe.name
        raise OptionError(f"{folder} is already quantised as {name}: give the 16-bit original")


def _check_same(folder: Path, own: str, asked: Recipe) -> None:
    if asked.name not in (NO_RECIPE.name, own):
        raise OptionError(
            f"{folder} is already quantised as {own}: leave the compute type at auto, or give the 16-bit original"
        )


def _load_saved(
    folder: Path, config: ModelConfig, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> Qwen3ASR:
    def prepare(model: Qwen3ASR, _: Mapping[str, Entry]) -> None:
        for name, scheme in recipe.assign(config).items():
            replace_layer(model, name, shaped_layer(model.get_submodule(name), scheme))

    try:
        return load_model(folder, replace(config, layout="original"), dtype, device, prepare=prepare)
    except OptionError as error:
        raise CheckpointError(f"{folder}: {METADATA_FILE} does not fit config.json ({error})") from error


def transformers_threshold(folder: Path) -> float | None:
    """The LLM.int8 threshold of a folder that transformers' `save_pretrained` wrote; None for any other folder.

    Raises CheckpointError for bitsandbytes' 4-bit folders.
    """
    found = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "bitsandbytes":
        return None
    if not found.get("load_in_8bit", found.get("_load_in_8bit")):
        raise CheckpointError(
            f"{folder} holds 4-bit weights saved by transformers, which quasr does not read: "
            "give the 16-bit original with compute type nf4"
        )
    try:
        return llm_int8(found.get("llm_int8_threshold", DEFAULT_THRESHOLD)).threshold
    except (OptionError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: llm_int8_threshold makes no sense ({error})") from error


def _load_transformers(
    folder: Path, config: ModelConfig, scheme: Scheme, dtype: torch.dtype, device: torch.device
) -> Qwen3ASR:
    """Which linears are quantised is told by the types of their stored weights, not by a recipe."""

    def prepare(model: Qwen3ASR, stored: Mapping[str, Entry]) -> None:
        for name, layer in list(model.named_modules()):
            stored_as = [checkpoint_name(f"{name}.weight", layout) for layout in LAYOUTS] if name else []
            types = {stored[weight].dtype for weight in stored_as if weight in stored}
            if isinstance(layer, nn.Linear) and types == {"I8"}:
                replace_layer(model, name, LLMInt8Linear.shaped_like(layer, scheme))

    model = load_model(folder, config, dtype, device, prepare=prepare)
    for name, layer in model.named_modules():
        if isinstance(layer, LLMInt8Linear) and int(layer.weight_format) != ROW_MAJOR:
            raise CheckpointError(
                f"{folder}: {name} was saved by an old bitsandbytes in a GPU's own order: "
                "save it again with bitsandbytes 0.45 or newer, or give the 16-bit original"
            )
    return model


def source_record(folder: Path) -> dict[str, Any]:
    """Where the weights came from, with size and SHA-256 of each file."""
    record = read_record(folder)
    if record is not None:
        return asdict(record)
    paths = (path for path in sorted(folder.iterdir()) if path.is_file() and wanted(path.name))
    return {"name": folder.name, "files": {path.name: asdict(digest(path)) for path in paths}}


def copy_others(source: Path, target: Path) -> None:
    """Copies config, tokenizer, model card and licence of a checkpoint folder: all but weights and their records."""
    left = (INDEX_FILE, METADATA_FILE, RECORD_FILE)
    for path in source.iterdir():
        comes = path.suffix in COPIED or path.name.upper().startswith("LICENSE")
        if comes and path.is_file() and path.name not in left:
            shutil.copyfile(path, target / path.name)
