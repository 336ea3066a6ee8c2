"""The graph of the text decoder: prompts and single steps through one graph, over a static key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from quasr.export.graph import Graph
from quasr.export.layers import linear
from quasr.model.decoder import rope_rates

if TYPE_CHECKING:
    from quasr.export.collect import Collected
    from quasr.export.layers import Activations
    from quasr.model.config import TextConfig


def build_decoder(config: TextConfig, collected: Collected, activations: Activations, positions: int) -> Graph:
    """Inputs and outputs as in docs/onnx.md; `positions` is the length of the rotary tables."""
    return _DecoderGraph(config, collected, activations).build(positions)


class _DecoderGraph:
    def __init__(self, config: TextConfig, collected: Collected, activations: Activations) -> None:
        self.config, self.collected, self.activations = config, collected, activations
        self.graph = Graph("decoder")

    def build(self, positions: int) -> Graph:
        graph, config = self.graph, self.config
        x = graph.input("embeddings", TensorProto.FLOAT, ("batch", "tokens", config.hidden))
        last = graph.add("Unsqueeze", [graph.input("last", TensorProto.INT64, ("batch",)), graph.integers(1)])
        lengths = [
            graph.input("seqlens_k", TensorProto.INT32, ("batch",)),
            graph.input("total_sequence_length", TensorProto.INT32, ()),
        ]
        places = [*lengths, *self._rotary(positions)]
        normed = self._rms_norm(x, "layers.0.input_layernorm.weight")
        for index in range(config.layers):
            attended = self._attention(index, normed, places)
            if index == config.layers - 1:
                # Only these positions' logits are asked for, so nothing after the last attention needs the others.
                x, attended = (graph.add("GatherND", [value, last], batch_dims=1) for value in (x, attended))
            x, normed = self._after_attention(index, x, attended)
        self._logits(normed)
        return graph

    def _rotary(self, positions: int) -> list[str]:
        """Cosines and sines of all positions, (positions, head_dim / 2) each, computed when the graph is loaded."""
        graph = self.graph
        bounds = [graph.constant(np.array(value, dtype=np.float32)) for value in (0, positions, 1)]
        column = graph.add("Unsqueeze", [graph.add("Range", bounds), graph.integers(1)])
        rates = graph.constant(rope_rates(self.config.head_dim, self.config.rope_theta).numpy())
        angles = graph.add("Mul", [column, rates])
        return [graph.add(function, [angles]) for function in ("Cos", "Sin")]

    def _attention(self, index: int, x: str, positions: list[str]) -> str:
        config, graph, name = self.config, self.graph, f"layers.{index}.self_attn"
        queries, pairs = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = graph.split(self._linear(f"{name}.qkv", x), [queries, pairs, pairs])
        q, k = self._head_norm(q, f"{name}.q_norm.weight", queries), self._head_norm(k, f"{name}.k_norm.weight", pairs)
        past = [self._cache("past", which, index) for which in ("key", "value")]
        present = [self._cache("present", which, index) for which in ("key", "value")]
        heads = {"num_heads": config.heads, "kv_num_heads": config.kv_heads}
        inputs = [q, k, v, *past, *positions]
        return graph.add_many("GroupQueryAttention", inputs, [f"{name}.output", *present], do_rotary=1, **heads)[0]

    def _after_attention(self, index: int, x: str, attended: str) -> tuple[str, str]:
        """The residual after the layer, and the norm of it that the next one reads."""
        config, graph, layer = self.config, self.graph, f"layers.{index}"
        projected = self._linear(f"{layer}.self_attn.o_proj", attended)
        x, normed = self._join(x, projected, f"{layer}.post_attention_layernorm.weight")
        gate, up = graph.split(self._linear(f"{layer}.mlp.gate_up", normed), [config.ffn] * 2)
        activated = graph.add("Mul", [graph.add("QuickGelu", [gate], alpha=1.0), up])
        last = index == config.layers - 1
        following = "norm.weight" if last else f"layers.{index + 1}.input_layernorm.weight"
        return self._join(x, self._linear(f"{layer}.mlp.down_proj", activated), following)

    def _logits(self, normed: str) -> None:
        name = "embed_tokens" if self.config.tied_head else "lm_head"
        output = self.graph.output("logits", TensorProto.FLOAT, ("batch", self.config.vocab_size))
        self._linear(name, normed, output)

    def _cache(self, time: str, which: str, index: int) -> str:
        declare = self.graph.input if time == "past" else self.graph.output
        shape = ("batch", self.config.kv_heads, "capacity", self.config.head_dim)
        return declare(f"{time}_{which}_{index}", TensorProto.FLOAT, shape)

    def _head_norm(self, x: str, weight: str, size: int) -> str:
        heads = self.graph.add("Reshape", [x, self.graph.integers(0, 0, -1, self.config.head_dim)])
        return self.graph.add("Reshape", [self._rms_norm(heads, weight), self.graph.integers(0, 0, size)])

    def _rms_norm(self, x: str, weight: str) -> str:
        return self.graph.add("RMSNormalization", [x, self._tensor(weight)], epsilon=self.config.rms_eps, axis=-1)

    def _join(self, x: str, branch: str, weight: str) -> tuple[str, str]:
        """x + branch, and the norm of that."""
        # Two nodes: in prompts SkipSimplifiedLayerNormalization takes twice as long as both, in steps as long.
        total = self.graph.add("Add", [branch, x])
        return total, self._rms_norm(total, weight)

    def _linear(self, name: str, x: str, output: str | None = None) -> str:
        return linear(self.graph, f"decoder.{name}", self.collected, x, self.activations, output)

    def _tensor(self, name: str) -> str:
        return self.graph.weight(f"decoder.{name}", self.collected.tensors[f"decoder.{name}"])
