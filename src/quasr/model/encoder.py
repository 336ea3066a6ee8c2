"""The audio encoder: mel frames in, one vector for every 80 ms out.

Three levels of time (docs/model.md):
a *frame* is 10 ms of mel; a *chunk* is 100 frames, which the convolutional stem sees alone and turns into 13 tokens;
a *window* is 8 chunks = 104 tokens, inside which attention is bidirectional and outside which it sees nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.model.config import AudioConfig

STEM_SLICE = 32
"""Chunks that go through the stem at once: bounds its memory whatever the clip's length."""

MAX_TIMESCALE = 1e4


def sinusoids(length: int, channels: int, device: torch.device | None = None) -> Tensor:
    """(length, channels) positions, sine half then cosine half; timescales 1 to 1e4 (Vaswani et al. 2017, 3.5)."""
    half = channels // 2
    rate = torch.exp(-math.log(MAX_TIMESCALE) / (half - 1) * torch.arange(half, device=device).float())
    angle = torch.arange(length, device=device).float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalises in the residual's precision and returns the weights' dtype (they differ in fp16)."""
    if x.dtype == norm.weight.dtype:
        return norm(x)
    y = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return y.to(norm.weight.dtype)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Where every clip's chunks go when windows are rows of one tensor.

    slots: (chunks,) position of each chunk among `windows * window_chunks` places.
    lengths: (windows,) valid tokens of each window.
    """

    slots: Tensor
    lengths: Tensor
    windows: int
    window_chunks: int


def plan_windows(config: AudioConfig, frames: Sequence[int], device: torch.device) -> WindowPlan:
    """Lays the chunks of all clips into windows; windows are as wide as the widest clip needs, at most full."""
    chunks = [math.ceil(n / config.chunk_frames) for n in frames]
    wide = min(config.window_chunks, max(chunks))
    slots: list[int] = []
    lengths: list[int] = []
    for count, n in zip(chunks, frames, strict=True):
        base = len(lengths) * wide
        slots.extend(range(base, base + count))
        tokens = config.token_count(n)
        full, rest = divmod(tokens, wide * config.chunk_tokens)
        lengths.extend([wide * config.chunk_tokens] * full + [rest] * (rest > 0))
    return WindowPlan(
        slots=torch.tensor(slots, device=device),
        lengths=torch.tensor(lengths, device=device),
        windows=len(lengths),
        window_chunks=wide,
    )


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
        for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
            x = F.gelu(conv(x))
        x = self.conv_out(x.permute(0, 3, 1, 2).flatten(2))
        positions = sinusoids(x.shape[1], x.shape[2], x.device)
        return x + positions.to(x.dtype)


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
        """Clips of (mel_bins, frames), ragged -> (all tokens, output), clip after clip.

        Clip i owns `config.token_count(frames_i)` rows. A clip's rows do not depend on the other clips.
        """
        frames = [mel.shape[1] for mel in mels]
        plan = plan_windows(self.config, frames, mels[0].device)
        tokens = self._stem_in_slices(mels)
        x = tokens.new_zeros(plan.windows * plan.window_chunks, *tokens.shape[1:])
        x = x.index_copy(0, plan.slots, tokens).view(plan.windows, -1, self.config.width)
        valid = torch.arange(x.shape[1], device=x.device) < plan.lengths[:, None]
        return self.project(self.transform(x, valid)[valid])

    def transform(self, x: Tensor, valid: Tensor) -> Tensor:
        """The transformer layers on (windows, tokens, width), `valid` (windows, tokens) bool; no final norm."""
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        x = x.to(residual_dtype(x.dtype))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Final norm and projector: (..., width) -> (..., output)."""
        return self.linear_2(F.gelu(self.linear_1(layer_norm(self.ln_post, x))))

    def _stem_in_slices(self, mels: Sequence[Tensor]) -> Tensor:
        chunks = torch.cat([self._chunk(mel) for mel in mels])
        return torch.cat([self.stem(part) for part in chunks.split(STEM_SLICE)])

    def _chunk(self, mel: Tensor) -> Tensor:
        """(mel_bins, frames) -> (chunks, mel_bins, chunk_frames), the last chunk padded with zeros."""
        size = self.config.chunk_frames
        padded = F.pad(mel, (0, -mel.shape[1] % size))
        return padded.unflatten(1, (-1, size)).transpose(0, 1)


def residual_dtype(weights: torch.dtype) -> torch.dtype:
    """fp16 weights keep the residual in fp32: its sums overflow fp16's 65,504. Others keep their own."""
    return torch.float32 if weights == torch.float16 else weights
