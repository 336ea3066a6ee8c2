"""The text decoder: a Qwen3 with grouped-query attention and a static, ragged key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasr.model.encoder import residual_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quasr.model.config import TextConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (Zhang and Sennrich 2019). Returns the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(..., ) int positions -> cosines and sines (..., head_dim), fp32 (Su et al. 2021, NeoX half-split layout).

    Qwen3-ASR's three-row MRoPE collapses to this, because its three position rows are always equal.
    """
    angle = positions[..., None].float() * rope_rates(head_dim, theta, positions.device)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rope_rates(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """(head_dim / 2,) radians a position, fp32."""
    # As a quotient, as the checkpoints were trained: theta ** -x rounds otherwise, which a position of 800 multiplies.
    rates: Tensor = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    return rates


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to (batch, heads, tokens, head_dim) with angles (batch, tokens, head_dim)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


@dataclass(slots=True)
class KVCache:
    """Static keys and values: two tensors (layers, batch, kv_heads, capacity, head_dim).

    Row b is filled up to its own length; rows of different lengths need no padding in front.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, config: TextConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Zeros for `batch` rows of `capacity` positions."""
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def keep(self, rows: Tensor) -> KVCache:
        """A cache of the given rows only: (kept,) int."""
        return KVCache(self.keys[:, rows], self.values[:, rows])


class DecoderAttention(nn.Module):
    """Causal grouped-query attention with RMSNorm on every query and key head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        queries, pairs = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden, pairs, bias=False)
        self.v_proj = nn.Linear(config.hidden, pairs, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, tokens, hidden) -> rotated q, rotated k, v, each (batch, its heads, tokens, head_dim)."""
        split = (-1, self.config.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, split)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, split)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """All prompt tokens at once. Rows are padded at the end, where causality hides the padding."""
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            cache[0][:, :, : k.shape[2]] = k
            cache[1][:, :, : v.shape[2]] = v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One token a row. `mask` is (batch, capacity) bool: the positions that a row may see, its own last."""
        q, k, v = self.project(x, cos, sin)
        rows = torch.arange(x.shape[0], device=x.device)
        own = mask.sum(1) - 1
        cache[0][rows, :, own] = k[:, :, 0]
        cache[1][rows, :, own] = v[:, :, 0]
        seen = mask.shape[1]
        # The query heads that share a key head stand where tokens would: no copy of the cache is made.
        q = q.unflatten(1, (self.config.kv_heads, -1)).squeeze(3)
        y = F.scaled_dot_product_attention(
            q, cache[0][:, :, :seen], cache[1][:, :, :seen], attn_mask=mask[:, None, None]
        )
        return self.o_proj(y.flatten(1)[:, None])


class DecoderMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.mlp = DecoderMLP(config)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn.prefill(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn.step(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TokenEmbedding(nn.Embedding):
    """The embedding, which can serve as the head too."""

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: (..., hidden) -> (..., vocab_size)."""
        return F.linear(x, self.weight)


class Decoder(nn.Module):
    """Embedding, layers, final norm and the head, which is the embedding again where the two are tied."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.rms_eps)
        self.lm_head = None if config.tied_head else nn.Linear(config.hidden, config.vocab_size, bias=False)

    def prefill(self, embeddings: Tensor, cache: KVCache | None) -> Tensor:
        """(batch, tokens, hidden), padded at the end -> hidden states of the same shape; fills the cache."""
        x = embeddings.to(residual_dtype(embeddings.dtype))
        cos, sin = self._angles(torch.arange(x.shape[1], device=x.device)[None])
        for index, layer in enumerate(self._layers()):
            x = layer.prefill(x, cos, sin, (cache.keys[index], cache.values[index]) if cache else None)
        return x

    def step(self, tokens: Tensor, lengths: Tensor, longest: int, cache: KVCache) -> Tensor:
        """One more token for every row.

        tokens: (batch,) the newest token; lengths: (batch,) positions filled before it; longest: max of lengths.
        Returns the hidden states (batch, hidden).
        """
        x = self.embed_tokens(tokens)[:, None]
        x = x.to(residual_dtype(x.dtype))
        cos, sin = self._angles(lengths[:, None])
        mask = torch.arange(longest + 1, device=tokens.device) <= lengths[:, None]
        for index, layer in enumerate(self._layers()):
            x = layer.step(x, cos, sin, (cache.keys[index], cache.values[index]), mask)
        return x[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocab_size)."""
        x = self.norm(hidden)
        return self.embed_tokens.logits(x) if self.lm_head is None else self.lm_head(x)

    def _layers(self) -> Iterator[DecoderLayer]:
        return cast("Iterator[DecoderLayer]", iter(self.layers))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_angles(positions, self.config.head_dim, self.config.rope_theta)
