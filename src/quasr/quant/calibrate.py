"""4 bits that know what the network hears: GPTQ or AWQ, decoder layer by decoder layer.

Each layer sees the activations that the already quantised layers before it make of real clips. In memory are, beside
the network, those activations of one layer and the Hessians of one layer's linears.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from quasr.errors import OptionError, ResourceError
from quasr.model.config import read_json
from quasr.model.decoder import rope_angles
from quasr.model.encoder import residual_dtype
from quasr.quant.apply import quantise_layer, replace_layer, shaped_layer
from quasr.quant.awq import fold_norm, fold_up, fold_values, search_factors
from quasr.quant.clip import round_codes, search_scales
from quasr.quant.gptq import GPTQOptions, gptq_codes
from quasr.quant.linear import Int4Linear, bias_of
from quasr.quant.prompts import TEXT_WEIGHT, embed, position_weights
from quasr.weights.load import assign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from quasr.model.asr import Qwen3ASR
    from quasr.model.decoder import DecoderLayer
    from quasr.quant.prompts import TaughtClip
    from quasr.quant.recipe import Recipe
    from quasr.quant.scheme import Scheme

Method = Literal["gptq", "awq"]

QUERIES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATES = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
STAGES = (QUERIES, OUTPUT, GATES, DOWN)
"""Linears of a decoder layer that share their input, in the order of the computation."""

BATCH_CLIPS = 8
"""Clips that go through a layer together."""

DECODER = "decoder.layers."
RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """`text_weight`: of positions that predict the answer, others count 1. `gptq` counts for that method only."""

    method: Method = "gptq"
    text_weight: float = TEXT_WEIGHT
    gptq: GPTQOptions = field(default_factory=GPTQOptions)


def calibrate(
    model: Qwen3ASR,
    recipe: Recipe,
    clips: Sequence[TaughtClip],
    options: CalibrateOptions,
    work: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Exchanges the layers of `model` in place as `recipe` says: int4 in the decoder by `options.method`, the rest by
    rounding to nearest.

    In the folder `work` each finished layer is kept; a run of the same network, clips and options takes it from there
    and comes to the same bits. `progress` is called with the layers done and their number.
    Raises OptionError where the recipe has no int4 decoder layer or `work` is of another run, ModelError for
    activations that are not finite, ResourceError where `work` cannot be written.
    """
    schemes = recipe.assign(model.config)
    if not any(name.startswith(DECODER) and scheme.kind == "int4" for name, scheme in schemes.items()):
        raise OptionError(f"{options.method} makes 4-bit decoder layers, and {recipe.name} has none: use rtn, or int4")
    if not clips:
        raise OptionError("no clip of the calibration set has an answer: give clips with speech")
    if work is not None:
        _claim(work, _fingerprint(model, recipe, clips, options))
    with torch.no_grad():
        for name in [name for name in schemes if not name.startswith(DECODER)]:
            replace_layer(model, name, quantise_layer(model.get_submodule(name), schemes[name]))
        _calibrate_decoder(model, schemes, clips, options, work, progress)


def _calibrate_decoder(
    model: Qwen3ASR,
    schemes: dict[str, Scheme],
    clips: Sequence[TaughtClip],
    options: CalibrateOptions,
    work: Path | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    inputs, weights = lay_out(model, clips, options.text_weight)
    for index, module in enumerate(model.decoder.layers):
        layer, prefix = cast("DecoderLayer", module), f"{DECODER}{index}."
        own = {name.removeprefix(prefix): scheme for name, scheme in schemes.items() if name.startswith(prefix)}
        if work is None or not _restore(work, index, layer, own):
            _quantise_layer(Observer(layer, inputs, weights), own, options)
            if work is not None:
                _keep(work, index, layer)
        inputs = [forward(layer, x) for x in inputs]
        if progress:
            progress(index + 1, len(model.decoder.layers))


def lay_out(model: Qwen3ASR, clips: Sequence[TaughtClip], text_weight: float) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of clips of like lengths: decoder inputs (batch, tokens, hidden), and weights (batch, tokens).

    Rows are padded at the end with zeros of weight 0.
    """
    inputs, weights = [], []
    order = sorted(clips, key=lambda clip: clip.mel.shape[1])
    for start in range(0, len(order), BATCH_CLIPS):
        batch = order[start : start + BATCH_CLIPS]
        rows = [embed(model, clip)[0] for clip in batch]
        own = [position_weights(clip, len(row), text_weight) for clip, row in zip(batch, rows, strict=True)]
        inputs.append(nn.utils.rnn.pad_sequence(rows, batch_first=True).to(residual_dtype(rows[0].dtype)))
        weights.append(nn.utils.rnn.pad_sequence(own, batch_first=True).to(rows[0].device))
    return inputs, weights


def forward(layer: DecoderLayer, x: Tensor) -> Tensor:
    """One decoder layer on one batch: (batch, tokens, hidden) -> the same."""
    config = layer.self_attn.config
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return layer.prefill(x, *rope_angles(positions, config.head_dim, config.rope_theta), None)


@dataclass(frozen=True, slots=True)
class Observer:
    """A decoder layer, its inputs batch by batch, and the weight of every position."""

    layer: DecoderLayer
    inputs: Sequence[Tensor]
    weights: Sequence[Tensor]

    def hessians(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The weighted mean of x x^T, fp32 (columns, columns), over the inputs of each linear, the layer as it is."""
        sums: dict[str, Tensor] = {}
        current = self.weights[0]

        def add(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = (arguments[0].float() * current.sqrt()[..., None]).flatten(0, 1)
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

        hooks = [self.layer.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in names]
        try:
            for x, current in zip(self.inputs, self.weights, strict=True):  # noqa: B007  (the hooks read it)
                forward(self.layer, x)
        finally:
            for hook in hooks:
                hook.remove()
        total = sum(float(weight.sum()) for weight in self.weights)
        return {name: found / total for name, found in sums.items()}


def _quantise_layer(observer: Observer, schemes: dict[str, Scheme], options: CalibrateOptions) -> None:
    if options.method == "awq":
        _awq_layer(observer, schemes)
        return
    for stage in STAGES:
        names = _int4(stage, schemes)
        hessian = observer.hessians(names[:1]).get(names[0]) if names else None
        _exchange(observer.layer, stage, schemes, hessian, options.gptq)


def _awq_layer(observer: Observer, schemes: dict[str, Scheme]) -> None:
    """All four inputs are seen before anything changes. Values and ups are divided before their own rounding."""
    layer = observer.layer
    names = [stage[0] for stage in STAGES if _int4(stage, schemes)]
    hessians = observer.hessians(names)
    config = layer.self_attn.config
    shared = (config.kv_heads, config.heads // config.kv_heads)
    folds: dict[tuple[str, ...], Callable[[Tensor], None]] = {
        OUTPUT: partial(fold_values, layer, shared),
        DOWN: partial(fold_up, layer),
        QUERIES: partial(fold_norm, layer, "input_layernorm", QUERIES),
        GATES: partial(fold_norm, layer, "post_attention_layernorm", GATES),
    }
    for stage, fold in folds.items():
        if stage[0] not in hessians:
            continue
        int4 = _int4(stage, schemes)
        factors = search_factors(
            [layer.get_parameter(f"{name}.weight") for name in int4],
            [schemes[name].group for name in int4],
            hessians[stage[0]],
            shared if stage == OUTPUT else None,
        )
        fold(factors)
        hessians[stage[0]] /= factors[:, None] * factors
    for stage in STAGES:
        _exchange(layer, stage, schemes, hessians.get(stage[0]), None)


def _int4(stage: Sequence[str], schemes: dict[str, Scheme]) -> list[str]:
    return [name for name in stage if name in schemes and schemes[name].kind == "int4"]


def _exchange(
    layer: DecoderLayer,
    stage: Sequence[str],
    schemes: dict[str, Scheme],
    hessian: Tensor | None,
    gptq: GPTQOptions | None,
) -> None:
    """Replaces the linears of one stage; `gptq` None rounds to nearest, with the searched scales."""
    for name in stage:
        if name not in schemes:
            continue
        linear = cast("nn.Linear", layer.get_submodule(name))
        if schemes[name].kind != "int4" or hessian is None:
            replace_layer(layer, name, quantise_layer(linear, schemes[name]))
            continue
        replace_layer(layer, name, int4_linear(linear, hessian, schemes[name].group, gptq))


def int4_linear(linear: nn.Linear, hessian: Tensor, group: int, gptq: GPTQOptions | None) -> Int4Linear:
    """`linear` in 4 bits with searched scales; codes by GPTQ or, where `gptq` is None, to nearest."""
    weight = linear.weight.detach()
    if gptq is not None:
        # Errors of correlated inputs make up for each other later, so each input counts for itself here.
        scale = search_scales(weight, hessian.diagonal().diag(), group, weight.dtype)
        return Int4Linear.from_codes(gptq_codes(weight, hessian, scale, gptq), scale, bias_of(linear))
    scale = search_scales(weight, hessian, group, weight.dtype)
    codes = round_codes(weight.float().unflatten(1, (-1, group)), scale.float()[..., None]).flatten(1)
    return Int4Linear.from_codes(codes.to(torch.int8), scale, bias_of(linear))


def _fingerprint(
    model: Qwen3ASR, recipe: Recipe, clips: Sequence[TaughtClip], options: CalibrateOptions
) -> dict[str, object]:
    """What a finished layer depends on."""
    return {
        "recipe": recipe.to_json(),
        "options": asdict(options),
        "network": _digest(_tensor_bytes(model)),
        "clips": _digest(_clip_bytes(clips)),
    }


def _digest(parts: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _tensor_bytes(model: Qwen3ASR) -> Iterator[bytes]:
    for name, tensor in model.state_dict().items():
        yield name.encode()
        yield tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()


def _clip_bytes(clips: Sequence[TaughtClip]) -> Iterator[bytes]:
    for clip in clips:
        yield clip.mel.tobytes()
        yield repr((clip.mel.shape, clip.prompt, clip.answer)).encode()


def _claim(work: Path, fingerprint: dict[str, object]) -> None:
    """Makes the folder `work` this run's, or raises OptionError where it is another's."""
    path = work / RUN_FILE
    if path.is_file():
        if read_json(path) != json.loads(json.dumps(fingerprint)):
            raise OptionError(f"{work} holds another calibration: use the same model, clips and options, or remove it")
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fingerprint, indent=2))
    except OSError as error:
        raise ResourceError(f"cannot write to {work}: {error.strerror}") from error


def _layer_file(work: Path, index: int) -> Path:
    return work / f"layer-{index:03}.safetensors"


def _keep(work: Path, index: int, layer: DecoderLayer) -> None:
    path = _layer_file(work, index)
    fresh = path.with_suffix(".part")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in layer.state_dict().items()}, fresh)
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"cannot write to {work}: {error}") from error


def _restore(work: Path, index: int, layer: DecoderLayer, schemes: dict[str, Scheme]) -> bool:
    """Fills `layer` from what an earlier run has kept; False where it has not come that far."""
    path = _layer_file(work, index)
    if not path.is_file():
        return False
    device = layer.input_layernorm.weight.device
    for name, scheme in schemes.items():
        replace_layer(layer, name, shaped_layer(layer.get_submodule(name), scheme))
    for name, tensor in load_file(path).items():
        assign(layer, name, tensor.to(device))
    return True
