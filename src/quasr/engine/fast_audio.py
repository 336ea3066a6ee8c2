"""The audio encoder without modules: channels last in the stem, tokens packed without padding, kernels from a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasr.engine.matrices import QUANTISED, fuse, matrix_of
from quasr.errors import OptionError
from quasr.kernels.matrix import LayerNorm, Matrix
from quasr.model.encoder import STEM_SLICE, own_precision, residual_dtype, sinusoids, split_chunks, window_tokens
from quasr.model.transfer import to_device
from quasr.weights.load import assign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from quasr.kernels.dispatch import Kernels
    from quasr.model.config import AudioConfig
    from quasr.model.encoder import AudioEncoder, EncoderLayer, Stem

LARGE_SLICE = 30
"""Chunks that go through the stem at once where memory is not planned: those of a piece of 30 s, 115 MB."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear: its weights, and its bias (rows,)."""

    matrix: Matrix
    bias: Tensor


@dataclass(frozen=True, slots=True)
class FastEncoderLayer:
    """One layer. `qkv` is three matrices, one below the other."""

    attention_norm: LayerNorm
    qkv: Dense
    output: Dense
    inner_norm: LayerNorm
    fc1: Dense
    fc2: Dense


@dataclass(frozen=True, slots=True)
class FastStem:
    """Weights and biases of the convolutions, channels last, and of the projection; positions (chunk_tokens, width)."""

    convolutions: tuple[tuple[Tensor, Tensor], ...]
    projection: Tensor
    positions: Tensor


class FastEncoder:
    """What `AudioEncoder` computes; see there for chunks, windows and the dtype of the residual."""

    def __init__(
        self,
        config: AudioConfig,
        stem: FastStem,
        layers: Sequence[FastEncoderLayer],
        last: tuple[LayerNorm, Dense, Dense],
        kernels: Kernels,
        stem_slice: int,
    ) -> None:
        self.config = config
        self.layers = tuple(layers)
        self.kernels = kernels
        self.slice = stem_slice
        self._stem = stem
        self._last = last

    @classmethod
    def from_model(cls, encoder: AudioEncoder, kernels: Kernels, stem_slice: int = STEM_SLICE) -> FastEncoder:
        """Shares the memory of the network's weights: q, k and v become views of one matrix, convolutions get their
        channels last. `stem_slice` chunks go through the stem at once.

        The network goes on working. Raises OptionError, in one line, for layers that cannot run here (see `refusal`).
        """
        reason = refusal(encoder)
        if reason:
            raise OptionError(reason)
        layers = [_fast_layer(layer) for layer in cast("Iterable[EncoderLayer]", encoder.layers)]
        last = _norm(encoder.ln_post), _dense(encoder.linear_1), _dense(encoder.linear_2)
        return cls(encoder.config, _fast_stem(encoder.stem), layers, last, kernels, stem_slice)

    def encode(self, mel: Tensor, frames: Sequence[int]) -> Tensor:
        """As `AudioEncoder.encode`."""
        return self.run(mel, frames, self.stem, self.transform)

    def run(
        self,
        mel: Tensor,
        frames: Sequence[int],
        stem: Callable[[Tensor], Tensor],
        transform: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`encode`, with `stem` and `transform` or what takes their places."""
        config, device = self.config, mel.device
        chunks = split_chunks(config, mel, frames)
        tokens = mel.new_empty(len(chunks), config.chunk_tokens, config.width, dtype=self._stem.projection.dtype)
        for part, out in zip(chunks.split(self.slice), tokens.split(self.slice), strict=True):
            out.copy_(stem(part))
        windows = [window for count in frames for window in window_tokens(config, count)]
        starts = to_device(np.cumsum([0, *windows], dtype=np.int32), device)
        # The last chunk of a clip may give fewer tokens than it has room for.
        x = tokens.flatten(0, 1).index_select(0, to_device(_filled(config, frames), device))
        return transform(x.to(residual_dtype(x.dtype)), starts)

    def stem(self, chunks: Tensor) -> Tensor:
        """(chunks, mel_bins, chunk_frames) -> (chunks, chunk_tokens, width)."""
        first, second, third = self._stem.convolutions
        with own_precision(self._stem.projection.dtype):
            x = self.kernels.convolve_mel(chunks, *first)
            x = self.kernels.add_gelu(_convolve(x, second[0]), second[1])
            x = self.kernels.stem_features(_convolve(x, third[0]), third[1])
        return F.linear(x, self._stem.projection) + self._stem.positions

    def transform(self, x: Tensor, starts: Tensor) -> Tensor:
        """All that follows the stem: packed tokens (tokens, width), overwritten -> (tokens, output).

        starts: (windows + 1,) int32, as `reference_audio.attend_windows` takes them.
        """
        kernels, config = self.kernels, self.config
        longest = config.window_chunks * config.chunk_tokens
        y = None
        for layer in self.layers:
            h = kernels.add_norm(x, y, layer.attention_norm)
            h = kernels.attend_windows(self._linear(h, layer.qkv), starts, config.heads, longest)
            h = kernels.add_norm(x, self._linear(h, layer.output), layer.inner_norm)
            y = self._linear(self._gelu_linear(h, layer.fc1), layer.fc2)
        norm, first, second = self._last
        return self._linear(self._gelu_linear(kernels.add_norm(x, y, norm), first), second)

    def _linear(self, x: Tensor, dense: Dense) -> Tensor:
        return F.linear(x, self.kernels.dequantise(dense.matrix), dense.bias)

    def _gelu_linear(self, x: Tensor, dense: Dense) -> Tensor:
        return self.kernels.add_gelu(F.linear(x, self.kernels.dequantise(dense.matrix)), dense.bias)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """3x3, stride 2, padding 1, without bias; channels last in and out."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1)
    return y.permute(0, 2, 3, 1).contiguous()


def _filled(config: AudioConfig, frames: Sequence[int]) -> np.ndarray:
    """Of the places for `chunk_tokens` of each chunk, clip after clip, those that hold a token."""
    chunks = np.array([math.ceil(count / config.chunk_frames) for count in frames])
    begins = (np.cumsum(chunks) - chunks) * config.chunk_tokens
    counts = [config.token_count(count) for count in frames]
    return np.concatenate([np.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)])


def refusal(encoder: AudioEncoder) -> str | None:
    """Why the fast encoder cannot run these layers, in one line, or None where it can."""
    for index, layer in enumerate(cast("Iterable[EncoderLayer]", encoder.layers)):
        attention = layer.self_attn
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        for module in (*qkv, attention.out_proj, layer.fc1, layer.fc2):
            if type(module) not in (nn.Linear, *QUANTISED):
                return f"the fast encoder cannot run layer {index}: it has no kernel for {type(module).__name__}"
        if len({(part.bits, part.group) for part in map(matrix_of, qkv)}) > 1:
            return f"the fast encoder cannot run layer {index}: q, k and v have different schemes"
    return None


def _fast_stem(stem: Stem) -> FastStem:
    convolutions = (stem.conv2d1, stem.conv2d2, stem.conv2d3)
    for convolution in convolutions[1:]:
        assign(convolution, "weight", convolution.weight.detach().contiguous(memory_format=torch.channels_last))
    weight, config = stem.conv_out.weight.detach(), stem.config
    return FastStem(
        tuple((one.weight.detach(), _bias(one)) for one in convolutions),
        weight,
        sinusoids(config.chunk_tokens, config.width, weight.device).to(weight.dtype),
    )


def _fast_layer(layer: EncoderLayer) -> FastEncoderLayer:
    attention = layer.self_attn
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return FastEncoderLayer(
        attention_norm=_norm(layer.self_attn_layer_norm),
        qkv=Dense(fuse(qkv), torch.cat([_bias(one) for one in qkv])),
        output=_dense(attention.out_proj),
        inner_norm=_norm(layer.final_layer_norm),
        fc1=_dense(layer.fc1),
        fc2=_dense(layer.fc2),
    )


def _dense(module: nn.Module) -> Dense:
    return Dense(matrix_of(module), _bias(module))


def _bias(module: nn.Module) -> Tensor:
    return cast("Tensor", module.bias).detach()


def _norm(module: nn.LayerNorm) -> LayerNorm:
    return LayerNorm(module.weight.detach(), module.bias.detach(), module.eps)
