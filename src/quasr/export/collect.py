"""A checkpoint's tensors into the data files, each as soon as it is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from quasr.errors import CheckpointError, OptionError
from quasr.export.linear import FLOAT, ROWS, TABLE, Format, Layer, Linear, fitting_group, write_linear
from quasr.quant.apply import replace_layer, shaped_layer
from quasr.quant.linear import Int4Linear, QuantisedLinear
from quasr.quant.recipe import EMBEDDING
from quasr.quant.store import METADATA_FILE, read_saved
from quasr.weights.load import assign, load_model, place_whole
from quasr.weights.shard import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from quasr.export.datafile import DataFile, Placed
    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe
    from quasr.quant.scheme import Scheme
    from quasr.weights.shard import Entry
    from quasr.weights.staging import Stored

WEIGHTS = ("fp32", "int8", "int4")

HEADS = ("int8", "int4")

JOINED = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Layers that read the same input, as one matrix."""

WHOLE_ROW = 0
"""The group that means one scale for every row."""

CONVOLUTIONS = tuple(f"encoder.stem.conv2d{number}" for number in (1, 2, 3))

ENCODER_PARTS = ("self_attn.qkv", "self_attn.out_proj", "fc1", "fc2")
DECODER_PARTS = ("self_attn.qkv", "self_attn.o_proj", "mlp.gate_up", "mlp.down_proj")


def matrices(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every matrix of the graphs and the layers that it is made of."""
    for name in (*CONVOLUTIONS, "encoder.stem.conv_out", "encoder.linear_1", "encoder.linear_2", EMBEDDING):
        yield name, (name,)
    if not config.text.tied_head:
        yield "decoder.lm_head", ("decoder.lm_head",)
    for room, count, parts in (
        ("encoder", config.audio.layers, ENCODER_PARTS),
        ("decoder", config.text.layers, DECODER_PARTS),
    ):
        for prefix in (f"{room}.layers.{index}" for index in range(count)):
            for part in parts:
                yield f"{prefix}.{part}", tuple(f"{prefix}.{layer}" for layer in JOINED.get(part, (part,)))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the matrices become. `weights` is one of WEIGHTS, or None for what the source has (int8 if nothing);
    `group` None for what the source has, or the largest that fits, or WHOLE_ROW; the encoder always has that. `head`:
    int8, int4, or None for what the source has (int8 if nothing).
    """

    weights: str | None = None
    group: int | None = None
    head: str | None = None


@dataclass(slots=True)
class Collected:
    """Where everything lies: other tensors by their own names, matrices by those of `matrices`."""

    weights: str
    tensors: dict[str, Placed] = field(default_factory=dict)
    linears: dict[str, Linear] = field(default_factory=dict)


def collect(folder: Path, config: ModelConfig, wanted: Wanted, files: Mapping[str, DataFile]) -> Collected:
    """Reads the checkpoint `folder`, of 16 bits or quantised by quasr, into `files` (keys stem, encoder, decoder).

    At most one matrix is in memory at a time. Raises as `load_model`, and OptionError for what does not fit.
    """
    saved = read_saved(folder)
    recipe = None if saved is None else saved.recipe
    weights = _weights(wanted, recipe, folder)
    collector = _Collector(files, config, replace(wanted, weights=weights), quantised=recipe is not None)
    if recipe is None:
        load_model(folder, config, torch.float32, torch.device("cpu"), place=collector.place)
        return collector.found

    schemes = _schemes(recipe, config, folder)

    def prepare(model: Qwen3ASR, _: Mapping[str, Entry]) -> None:
        for name, scheme in schemes.items():
            replace_layer(model, name, shaped_layer(model.get_submodule(name), scheme))

    original = replace(config, layout="original")
    load_model(folder, original, torch.float32, torch.device("cpu"), prepare=prepare, place=collector.place)
    return collector.found


def _schemes(recipe: Recipe, config: ModelConfig, folder: Path) -> dict[str, Scheme]:
    try:
        return recipe.assign(config)
    except OptionError as error:
        raise CheckpointError(f"{folder}: {METADATA_FILE} does not fit config.json ({error})") from error


def _weights(wanted: Wanted, recipe: Recipe | None, folder: Path) -> str:
    if wanted.weights is not None and wanted.weights not in WEIGHTS:
        raise OptionError(f"unknown weights {wanted.weights[:40]!r}: there is {', '.join(WEIGHTS)}")
    if wanted.weights == "int4" and wanted.group == WHOLE_ROW:
        raise OptionError("4 bits need a scale for every group: take --group 128, or leave it out")
    if wanted.weights == "fp32" and wanted.group is not None:
        raise OptionError("fp32 weights have no scales: leave --group out")
    _check_head(wanted)
    if recipe is None:
        return wanted.weights or "int8"
    kinds = {scheme.kind for _, scheme in recipe.rules if scheme.kind != "none"}
    if not kinds <= {"int8", "int4"}:
        raise OptionError(f"{folder} is quantised as {recipe.name}, which ONNX cannot hold: give the 16-bit original")
    own = "int4" if "int4" in kinds else "int8" if kinds else "fp32"
    if wanted.weights not in (None, "fp32", own):
        raise OptionError(
            f"{folder} is already quantised as {recipe.name}: leave --weights out, or give the 16-bit original"
        )
    if wanted.head is not None:
        raise OptionError(
            f"{folder} is already quantised as {recipe.name}: leave --head out, or give the 16-bit original"
        )
    return wanted.weights or own


def _check_head(wanted: Wanted) -> None:
    if wanted.head not in (None, *HEADS):
        raise OptionError(f"unknown head {wanted.head[:40]!r}: there is {', '.join(HEADS)}")
    if wanted.head is not None and wanted.weights != "int4":
        raise OptionError("--head is a choice beside --weights int4; other weights have a head of their own kind")


class _Collector:
    """Holds the layers of a matrix until they are whole."""

    def __init__(self, files: Mapping[str, DataFile], config: ModelConfig, wanted: Wanted, *, quantised: bool) -> None:
        self.found = Collected(str(wanted.weights))
        self._files, self._wanted, self._quantised = files, wanted, quantised
        self._parts = dict(matrices(config))
        self._head = EMBEDDING if config.text.tied_head else "decoder.lm_head"
        self._matrix = {layer: name for name, layers in self._parts.items() for layer in layers}
        self._missing: dict[str, set[str]] = {}

    def place(self, model: Qwen3ASR, name: str, stored: Stored) -> None:
        # In its own type, which costs the least memory and loses nothing.
        stored = replace(stored, dtype=DTYPES[stored.shard.entries[stored.name].dtype])
        path = name.rpartition(".")[0]
        if path not in self._matrix:
            self.found.tensors[name] = self._file(name).add(stored.whole().float().numpy())
            return
        matrix = self._matrix[path]
        missing = self._missing.setdefault(matrix, set(_names(model, self._parts[matrix])))
        place_whole(model, name, stored)
        missing.discard(name)
        if not missing:
            self._write(model, matrix)

    def _write(self, model: Qwen3ASR, matrix: str) -> None:
        parts = self._parts[matrix]
        layers = [cast("Layer", model.get_submodule(part)) for part in parts]
        forms = {self._format(part, layer) for part, layer in zip(parts, layers, strict=True)}
        if len(forms) > 1:
            raise OptionError(f"{', '.join(parts)} are quantised differently, but run as one: quantise them alike")
        self.found.linears[matrix] = write_linear(self._file(matrix), layers, forms.pop())
        for name in _names(model, parts):
            assign(model, name, torch.empty(0, device="meta"))

    def _format(self, name: str, layer: Layer) -> Format:
        plain = isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d))
        if self._wanted.weights == "fp32" or (plain and self._quantised) or name == CONVOLUTIONS[0]:
            return FLOAT
        by_rows = name.startswith("encoder.")
        if plain:
            return self._chosen(name, layer, by_rows)
        own, columns = _group(layer), _columns(layer)
        if own == columns and not isinstance(layer, Int4Linear):
            return ROWS if by_rows else self._eight_bits(name, columns)
        if self._wanted.group not in (None, own):
            raise OptionError(f"{name} is quantised in groups of {own}: leave --group out")
        return Format(4 if isinstance(layer, Int4Linear) else 8, own)

    def _chosen(self, name: str, layer: Layer, by_rows: bool) -> Format:
        """Of a layer of a 16-bit source."""
        if by_rows:
            return ROWS
        in_four_bits = name.startswith("decoder.layers.") or (name == self._head and self._wanted.head == "int4")
        if self._wanted.weights == "int4" and in_four_bits:
            return Format(4, fitting_group(name, _columns(layer), self._wanted.group))
        return self._eight_bits(name, _columns(layer))

    def _eight_bits(self, name: str, columns: int) -> Format:
        """Of a matrix of the decoder. The head has groups only if they are asked for: it takes a quarter less time."""
        group = self._wanted.group
        if group == WHOLE_ROW or (group is None and not name.startswith("decoder.layers.")):
            return TABLE if name == EMBEDDING else ROWS
        return Format(8, fitting_group(name, columns, group))

    def _file(self, name: str) -> DataFile:
        room = "stem" if name.startswith("encoder.stem.") else name.partition(".")[0]
        return self._files[room]


def _names(model: Qwen3ASR, layers: Iterable[str]) -> list[str]:
    return [f"{layer}.{leaf}" for layer in layers for leaf in model.get_submodule(layer).state_dict()]


def _columns(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, QuantisedLinear) else layer.weight.shape[1]


def _group(layer: Layer) -> int:
    return layer.group if isinstance(layer, QuantisedLinear) else _columns(layer)
