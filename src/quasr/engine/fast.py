"""The decoder without modules: fused matrices, kernels from a table, everything of a step on the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from quasr.engine.matrices import QUANTISED, fuse, matrix_of
from quasr.engine.packed import Packed
from quasr.errors import OptionError
from quasr.kernels.matrix import Heads, Norm
from quasr.kernels.state import CachePool, DecodeState, Places

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quasr.kernels.dispatch import Kernels
    from quasr.kernels.matrix import Matrix
    from quasr.model.config import TextConfig
    from quasr.model.decoder import Decoder, DecoderLayer, RMSNorm


@dataclass(frozen=True, slots=True)
class FastLayer:
    """One decoder layer. `qkv` and `gate_up` are several matrices, one below the other."""

    input_norm: Norm
    qkv: Matrix
    heads: Heads
    output: Matrix
    inner_norm: Norm
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class Draft:
    """What `FastDecoder.verify` found. tokens, logprobs: (rows, drafted), the likeliest after each given token;
    accepted: (rows,) how many of the given tokens were right, and are now decoded."""

    tokens: Tensor
    logprobs: Tensor
    accepted: Tensor


class FastDecoder:
    """Greedy decoding of many rows. The residual stream is fp32, products are in the weights' dtype."""

    def __init__(self, layers: Sequence[FastLayer], norm: Norm, table: Matrix, head: Matrix, kernels: Kernels) -> None:
        self.layers = tuple(layers)
        self.norm = norm
        self.table = table
        self.head = head
        self.kernels = kernels

    @classmethod
    def from_model(cls, decoder: Decoder, kernels: Kernels) -> FastDecoder:
        """Shares the memory of the network's weights: q, k, v and gate, up become views of one matrix each.

        The network goes on working. Raises OptionError, in one line, for layers that cannot run here (see `refusal`).
        """
        reason = refusal(decoder)
        if reason:
            raise OptionError(reason)
        layers = [_fast_layer(layer, decoder.config) for layer in cast("Iterable[DecoderLayer]", decoder.layers)]
        table = matrix_of(decoder.embed_tokens)
        head = table if decoder.lm_head is None else matrix_of(decoder.lm_head)
        return cls(layers, _norm(decoder.norm), table, head, kernels)

    def allocate_cache(self, positions: int) -> CachePool:
        """A pool for all rows together."""
        heads = self.layers[0].heads
        shape = (len(self.layers), heads.kv_count, positions, heads.size)
        return CachePool.allocate(shape, self.norm.weight.dtype, self.norm.weight.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """(n,) ids -> (n, hidden) fp32."""
        return self.kernels.embed(tokens, self.table)

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (rows, hidden) -> the likeliest tokens (rows,) and their log-probabilities."""
        return self.kernels.choose(hidden, self.norm, self.head)

    def rows_for(self, lengths: Sequence[int]) -> int:
        """Embeddings that `prefill` takes for such prompts: one for each token."""
        return sum(lengths)

    def prefill(self, embeddings: Tensor, lengths: Sequence[int], offsets: Sequence[int], cache: CachePool) -> Tensor:
        """Fills the cache with whole prompts; hidden states (prompts, hidden) fp32 of their last positions.

        embeddings: (sum of lengths, hidden), prompt after prompt; offsets: where each prompt's row begins in the pool.
        """
        x = embeddings.to(torch.float32, copy=True)
        return self.prefill_packed(x, Packed.of(lengths, offsets, x.device), cache)

    def prefill_packed(self, x: Tensor, packed: Packed, cache: CachePool) -> Tensor:
        """As `prefill` of embeddings x (tokens, hidden) fp32, overwritten.

        Only `kernels.attend_prompts` may ask what the host knows of the prompts, and only the reference's does.
        """
        kernels, y = self.kernels, None
        for index, layer in enumerate(self.layers):
            keys, values = cache.layer(index)
            qkv = kernels.linear(kernels.add_rms_norm(x, y, layer.input_norm), layer.qkv)
            # A name would hold what has been used through the stages that are fullest.
            y = None
            q = kernels.rotate_write(qkv, keys, values, packed.places, layer.heads)
            del qkv
            mixed = kernels.attend_prompts(q, keys, values, packed.prompts, layer.heads)
            del q
            if index == len(self.layers) - 1:
                # Of what comes now only the last positions are asked for.
                x, mixed = x[packed.last], mixed[packed.last]
            h = kernels.add_rms_norm(x, kernels.linear(mixed, layer.output), layer.inner_norm)
            del mixed
            y = kernels.linear(kernels.gated_linear(h, layer.gate_up), layer.down)
            del h
        return x if y is None else x.add_(y)

    def prefill_tokens(self, x: Tensor, places: Places, cache: CachePool) -> Tensor:
        """As `prefill` of embeddings x (m, hidden) fp32, overwritten, whose tokens go to `places`: (m, hidden) fp32.

        Each token reads the cache for itself. That is more work, but a CUDA graph can hold it even where the reference
        attends prompts.
        """
        return self._through(x, places, cache, fused=False)

    def step(self, state: DecodeState, cache: CachePool) -> None:
        """One more token for every row that is not finished; `state` and `cache` change in place.

        Nothing is read on the host where `kernels.capturable`, so a CUDA graph of it feeds itself.
        """
        x = self._forward(state.tokens, state.places, cache, fused=True)
        self.kernels.advance(state, *self.choose(x))

    def verify(self, state: DecodeState, drafts: Tensor, cache: CachePool) -> Draft:
        """Feeds the newest token and `drafts` (rows, n) at once, and keeps what greedy decoding would have written.

        Of a draft its longest right beginning is kept, and the token that follows it: 1 to n + 1 tokens a row. The
        cache beyond that holds positions of wrong tokens, which are overwritten before they are seen.
        """
        rows, count = drafts.shape[0], drafts.shape[1] + 1
        given = torch.cat([state.tokens[:, None], drafts], dim=1)
        x = self._forward(given.flatten(), _draft_places(state, count), cache, fused=False)
        best, logprobs = (found.view(rows, count) for found in self.choose(x))
        before = state.cursor.clone()
        right = torch.ones(rows, dtype=torch.bool, device=drafts.device)
        for place in range(count):
            # Rows whose draft has ended are as good as finished until all have had their turn.
            waiting = ~right & ~state.finished
            state.finished.logical_or_(waiting)
            self.kernels.advance(state, best[:, place].contiguous(), logprobs[:, place].contiguous())
            state.finished.logical_and_(~waiting)
            if place < drafts.shape[1]:
                right &= best[:, place] == drafts[:, place]
        return Draft(best, logprobs, state.cursor - before)

    def _forward(self, tokens: Tensor, places: Places, cache: CachePool, *, fused: bool) -> Tensor:
        """One token for each of `places` -> hidden states (m, hidden) fp32."""
        return self._through(self.embed(tokens), places, cache, fused=fused)

    def _through(self, x: Tensor, places: Places, cache: CachePool, *, fused: bool) -> Tensor:
        """x (m, hidden) fp32, overwritten. y is what is still to be added to it."""
        y = None
        for index, layer in enumerate(self.layers):
            keys, values = cache.layer(index)
            qkv = self.kernels.linear(*self._normed(x, y, layer.input_norm, layer.qkv))
            if fused:
                mixed = self.kernels.attend_step(qkv, keys, values, places, layer.heads)
            else:
                q = self.kernels.rotate_write(qkv, keys, values, places, layer.heads)
                mixed = self.kernels.attend(q, keys, values, places, layer.heads)
            y = self._product(mixed, layer.output, x)
            inner = self.kernels.gated_linear(*self._normed(x, y, layer.inner_norm, layer.gate_up))
            y = self._product(inner, layer.down, x)
        return x if y is None else x.add_(y)

    def _normed(self, x: Tensor, y: Tensor | None, norm: Norm, matrix: Matrix) -> tuple[Tensor, Matrix, Norm | None]:
        """What a product of norm(x) takes, x += y first: the norm too, unless the sum had to be made."""
        return (x, matrix, norm) if y is None else (self.kernels.add_rms_norm(x, y, norm), matrix, None)

    def _product(self, x: Tensor, matrix: Matrix, residual: Tensor) -> Tensor | None:
        """residual += x W^T; or x W^T, where the sum would be a kernel of its own: then the next norm makes it."""
        if self.kernels.sums_apart(matrix, len(x)):
            return self.kernels.linear(x, matrix)
        self.kernels.add_linear(x, matrix, residual)
        return None


def _draft_places(state: DecodeState, count: int) -> Places:
    """`count` neighbouring places for each row; those beyond the row's budget are idle."""
    steps = torch.arange(count, device=state.tokens.device)
    beyond = steps >= (state.limits - state.cursor)[:, None]
    return Places(
        state.offsets.repeat_interleave(count),
        (state.lengths[:, None] + steps).flatten(),
        (state.finished[:, None] | beyond).flatten(),
    )


def refusal(decoder: Decoder) -> str | None:
    """Why the fast decoder cannot run these layers, in one line, or None where it can."""
    if len({weight.device for weight in chain(decoder.parameters(), decoder.buffers())}) > 1:
        return "the fast decoder needs all layers on one device"
    for index, layer in enumerate(cast("Iterable[DecoderLayer]", decoder.layers)):
        attention, mlp = layer.self_attn, layer.mlp
        groups: list[tuple[nn.Module, ...]] = [
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
            (attention.o_proj,),
            (mlp.down_proj,),
        ]
        for group in groups:
            reason = _why_not(group)
            if reason:
                return f"the fast decoder cannot run layer {index}: {reason}"
    head = decoder.lm_head
    return _why_not((head,)) if head is not None else None


def _why_not(group: Sequence[nn.Module]) -> str | None:
    for module in group:
        if type(module) not in (nn.Linear, *QUANTISED):
            return f"it has no kernel for {type(module).__name__}"
        if module.bias is not None:
            return "its kernels add no bias"
    first, *others = (matrix_of(module) for module in group)
    if any((other.bits, other.group, other.columns) != (first.bits, first.group, first.columns) for other in others):
        return "matrices that are to be fused have different schemes"
    return None


def _norm(module: RMSNorm) -> Norm:
    return Norm(module.weight.detach(), module.eps)


def _fast_layer(layer: DecoderLayer, config: TextConfig) -> FastLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return FastLayer(
        input_norm=_norm(layer.input_layernorm),
        qkv=fuse((attention.q_proj, attention.k_proj, attention.v_proj)),
        heads=_heads(layer, config),
        output=matrix_of(attention.o_proj),
        inner_norm=_norm(layer.post_attention_layernorm),
        gate_up=fuse((mlp.gate_proj, mlp.up_proj)),
        down=matrix_of(mlp.down_proj),
    )


def _heads(layer: DecoderLayer, config: TextConfig) -> Heads:
    q_norm, k_norm = _norm(layer.self_attn.q_norm), _norm(layer.self_attn.k_norm)
    steps = torch.arange(0, config.head_dim, 2, device=q_norm.weight.device)
    # As a quotient, as `rope_angles` computes it.
    rates = 1.0 / config.rope_theta ** (steps.float() / config.head_dim)
    return Heads(config.heads, config.kv_heads, config.head_dim, q_norm, k_norm, rates)
