"""From a network, or a folder of 16-bit weights, to a network quantised as a recipe says."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from quasr.errors import OptionError, ResourceError
from quasr.quant.bitsandbytes import LLMInt8Linear, NF4Linear
from quasr.quant.embedding import Int8Embedding
from quasr.quant.linear import Int4Linear, Int8Linear, QuantisedLinear
from quasr.weights.load import assign, load_model, place_whole

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe
    from quasr.quant.scheme import Kind, Scheme
    from quasr.weights.staging import Stored

LINEARS: dict[Kind, type[Int8Linear | Int4Linear | LLMInt8Linear | NF4Linear]] = {
    "int8": Int8Linear,
    "int4": Int4Linear,
    "llm-int8": LLMInt8Linear,
    "nf4": NF4Linear,
}


def quantise_layer(layer: nn.Module, scheme: Scheme) -> nn.Module:
    """The quantised form of a linear or an embedding, rounded to nearest.

    Raises OptionError where the scheme does not fit the layer.
    """
    if isinstance(layer, nn.Embedding):
        return Int8Embedding.from_embedding(layer)
    if not isinstance(layer, nn.Linear):
        raise OptionError(f"a {type(layer).__name__} cannot be quantised: only linears and embeddings")
    return LINEARS[scheme.kind].from_linear(layer, scheme)


def shaped_layer(layer: nn.Module, scheme: Scheme) -> nn.Module:
    """What `quantise_layer` gives, without memory."""
    if isinstance(layer, nn.Embedding):
        return Int8Embedding.shaped_like(layer)
    return LINEARS[scheme.kind].shaped_like(cast("nn.Linear", layer), scheme)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` where `name` is."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, layer.eval())


def quantise(model: Qwen3ASR, recipe: Recipe) -> None:
    """Exchanges the layers of a network in place, one after the other, rounding to nearest.

    Raises OptionError where the recipe does not fit.
    """
    for name, scheme in recipe.assign(model.config).items():
        replace_layer(model, name, quantise_layer(model.get_submodule(name), scheme))


def load_quantising(
    folder: Path, config: ModelConfig, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> Qwen3ASR:
    """Loads a 16-bit checkpoint straight into `recipe`, on `device`: each weight is quantised while it is read.

    Beside the finished layers a block of a weight's rows is held at a time, and fp32 copies of a few of them; with
    bitsandbytes one weight. Raises as `load_model`, and OptionError where the recipe does not fit.
    """
    schemes = recipe.assign(config)

    def place(model: Qwen3ASR, name: str, stored: Stored) -> None:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in schemes:
            # The bias, still without memory, moves over and is filled when its turn comes.
            replace_layer(model, path, _read_layer(model.get_submodule(path), schemes[path], stored))
            if device.type == "cpu":
                _trim_heap()
        else:
            place_whole(model, name, stored)

    try:
        return load_model(folder, config, dtype, device, place=place)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"out of memory on {device} while quantising: quantise on the CPU and save") from error


def _trim_heap() -> None:
    """Gives the system what temporaries left free in glibc's heap between tensors that stay: 8 MB a layer of 1.7B.

    See malloc_trim(3). Elsewhere nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _read_layer(layer: nn.Module, scheme: Scheme, stored: Stored) -> nn.Module:
    """As `quantise_layer`, of a weight that is still to be read."""
    if isinstance(layer, nn.Embedding):
        return Int8Embedding.from_blocks(layer, stored.blocks(), stored.device)
    kind = LINEARS[scheme.kind]
    if isinstance(layer, nn.Linear) and issubclass(kind, QuantisedLinear):
        return kind.from_blocks(layer, scheme, stored.blocks(), stored.device)
    assign(layer, "weight", stored.whole())
    return quantise_layer(layer, scheme)
