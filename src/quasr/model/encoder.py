"""The audio encoder: mel frames in, one vector for every 80 ms out.

Three levels of time (docs/model.md):
a *frame* is 10 ms of mel; a *chunk* is 100 frames, which the convolutional stem sees alone and turns into 13 tokens;
a *window* is 8 chunks = 104 tokens, inside which attention is bidirectional and outside which it sees nothing.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quasr.model.config import AudioConfig

STEM_SLICE = 16
"""Chunks that go through the stem at once: bounds its memory whatever the clip's length."""

MAX_TIMESCALE = 1e4


def sinusoids(length: int, channels: int, device: torch.device | None = None) -> Tensor:
    """(length, channels) positions, sine half then cosine half; timescales 1 to 1e4 (Vaswani et al. 2017, 3.5).

    In fp32, rounded from fp64: the last bits of fp32's own functions are not the same on every processor.
    """
    half = channels // 2
    rate = torch.exp(-math.log(MAX_TIMESCALE) / (half - 1) * torch.arange(half, device=device).double())
    angle = torch.arange(length, device=device).double()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalises in the residual's precision and returns the weights' dtype (they differ in fp16)."""
    if x.dtype == norm.weight.dtype:
        return norm(x)
    y = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return y.to(norm.weight.dtype)


@contextmanager
def own_precision(dtype: torch.dtype) -> Iterator[None]:
    """In fp32, convolutions of cuDNN multiply in fp32 too; left to itself it rounds what it multiplies to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@cache
def _positions(length: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return sinusoids(length, channels, device).to(dtype)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Where everything stands when windows lie in rows of `row_chunks` chunks, short ones beside each other.

    slots: (chunks,) place of each chunk among `rows * row_chunks`; tokens: (tokens,) place of each token among
    `rows * row_chunks * chunk_tokens`, clip after clip; owners: (rows, places of a row) the window that a place belongs
    to, -1 where it holds no token; None where every row is one full window.
    """

    slots: Tensor
    tokens: Tensor
    owners: Tensor | None
    rows: int
    row_chunks: int


def window_mask(owners: Tensor | None) -> Tensor | None:
    """`WindowPlan.owners` -> (rows, 1, places, places) bool: a token sees its own window; None for None.

    Places without token see each other.
    """
    return None if owners is None else owners[:, None, :, None] == owners[:, None, None, :]


def plan_windows(config: AudioConfig, frames: Sequence[int], device: torch.device) -> WindowPlan:
    """Lays the windows of all clips into rows, first fit; rows are as wide as the widest window.

    It is made on the host, so that nothing waits for the device.
    """
    windows = [window for count in frames for window in window_tokens(config, count)]
    chunks = [math.ceil(tokens / config.chunk_tokens) for tokens in windows]
    wide = max(chunks)
    begins, rows = _first_fit(chunks, wide)
    owners = np.full(rows * wide * config.chunk_tokens, -1)
    for window, (begin, tokens) in enumerate(zip(begins, windows, strict=True)):
        owners[begin * config.chunk_tokens :][:tokens] = window
    full = all(tokens == wide * config.chunk_tokens for tokens in windows)
    return WindowPlan(
        slots=to_device(_ranges(begins, chunks), device),
        tokens=to_device(_ranges([begin * config.chunk_tokens for begin in begins], windows), device),
        owners=None if full else to_device(owners, device).view(rows, -1),
        rows=rows,
        row_chunks=wide,
    )


def window_tokens(config: AudioConfig, frames: int) -> Iterator[int]:
    """Tokens of each window of a clip."""
    for start in range(0, frames, config.window_frames):
        yield config.token_count(min(config.window_frames, frames - start))


def split_chunks(config: AudioConfig, mel: Tensor, frames: Sequence[int]) -> Tensor:
    """Frames of all clips (all, mel_bins) -> (chunks, mel_bins, chunk_frames), a clip's last one padded by zeros."""
    size = config.chunk_frames
    counts = [math.ceil(count / size) for count in frames]
    begins = np.cumsum([0, *counts[:-1]]) * size
    places = to_device(_ranges(begins.tolist(), frames), mel.device)
    padded = mel.new_zeros(sum(counts) * size, mel.shape[1]).index_copy_(0, places, mel)
    return padded.unflatten(0, (-1, size)).transpose(1, 2)


def _first_fit(sizes: Sequence[int], wide: int) -> tuple[list[int], int]:
    """Begins of parts of these sizes, none of which crosses a multiple of `wide`; and how many multiples it takes."""
    rows: list[int] = []
    begins = []
    for size in sizes:
        row = next((index for index, used in enumerate(rows) if used + size <= wide), len(rows))
        rows[row:] = rows[row:] or [0]
        begins.append(row * wide + rows[row])
        rows[row] += size
    return begins, len(rows)


def _ranges(begins: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """begin, begin + 1, ... of each size, one after the other."""
    return np.concatenate([np.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)])


class Stem(nn.Module):
    """Three 3x3 stride-2 convolutions and a projection: (chunks, mel_bins, 100) -> (chunks, 13, width)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.stem_channels
        self.conv2d1 = nn.Conv2d(1, channels, 3, 2, padding=1)
        self.conv2d2 = nn.Conv2d(channels, channels, 3, 2, padding=1)
        self.conv2d3 = nn.Conv2d(channels, channels, 3, 2, padding=1)
        self.conv_out = nn.Linear(config.stem_features, config.width, bias=False)

    def forward(self, chunks: Tensor) -> Tensor:
        x = chunks[:, None].to(self.conv2d1.weight.dtype)
        with own_precision(x.dtype):
            for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
                x = F.gelu(conv(x))
        x = self.conv_out(x.permute(0, 3, 1, 2).flatten(2))
        return x + _positions(x.shape[1], x.shape[2], x.device, x.dtype)


class EncoderAttention(nn.Module):
    """Bidirectional multi-head attention inside windows: (windows, tokens, width) -> the same."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.self_attn = EncoderAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(layer_norm(self.self_attn_layer_norm, x), mask)
        return x + self.fc2(F.gelu(self.fc1(layer_norm(self.final_layer_norm, x))))


class AudioEncoder(nn.Module):
    """Stem, windowed transformer, final norm and projector into the decoder's width."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(config.width)
        self.linear_1 = nn.Linear(config.width, config.width)
        self.linear_2 = nn.Linear(config.width, config.output)

    def forward(self, mels: Sequence[Tensor]) -> Tensor:
        """Clips of (mel_bins, frames), ragged -> (all tokens, output), clip after clip. As `encode`."""
        return self.encode(torch.cat([mel.T for mel in mels]), [mel.shape[1] for mel in mels])

    def encode(self, mel: Tensor, frames: Sequence[int]) -> Tensor:
        """Frames (all, mel_bins), clip after clip, of which clip i has `frames[i]` -> (all tokens, output).

        Clip i owns `config.token_count(frames[i])` rows, which do not depend on the other clips.
        """
        plan = plan_windows(self.config, frames, mel.device)
        tokens = torch.cat([self.stem(part) for part in split_chunks(self.config, mel, frames).split(STEM_SLICE)])
        x = tokens.new_zeros(plan.rows * plan.row_chunks, *tokens.shape[1:])
        x = x.index_copy_(0, plan.slots, tokens).view(plan.rows, -1, self.config.width)
        del tokens
        return self.project(self.transform(x, plan.owners).flatten(0, 1)[plan.tokens])

    def transform(self, x: Tensor, owners: Tensor | None) -> Tensor:
        """The transformer layers on (rows, places, width), `owners` as `WindowPlan.owners`; no final norm."""
        mask = window_mask(owners)
        x = x.to(residual_dtype(x.dtype))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Final norm and projector: (..., width) -> (..., output)."""
        return self.linear_2(F.gelu(self.linear_1(layer_norm(self.ln_post, x))))


def residual_dtype(weights: torch.dtype) -> torch.dtype:
    """fp16 weights keep the residual in fp32: its sums overflow fp16's 65,504. Others keep their own."""
    return torch.float32 if weights == torch.float16 else weights
