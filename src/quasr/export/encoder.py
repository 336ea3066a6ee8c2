"""The graph of the windowed transformer: the stem's tokens in, vectors of the decoder's width out.

Linears and norms see the tokens of all windows one after the other; only attention sees windows as rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from quasr.export.graph import Graph
from quasr.export.layers import EVEN, GELU, Span, audio_linear

if TYPE_CHECKING:
    from quasr.export.collect import Collected
    from quasr.export.layers import Activations
    from quasr.model.config import AudioConfig

NORM_EPS = 1e-5
"""torch's default, which the checkpoints were trained with."""


def build_encoder(config: AudioConfig, collected: Collected, activations: Activations) -> Graph:
    """`tokens` (tokens, width), `window_lengths` (windows,) -> `audio` (tokens, output)."""
    return _EncoderGraph(config, collected, activations).build()


class _EncoderGraph:
    def __init__(self, config: AudioConfig, collected: Collected, activations: Activations) -> None:
        self.config, self.collected, self.activations = config, collected, activations
        self.graph = Graph("encoder")

    def build(self) -> Graph:
        graph = self.graph
        x = graph.input("tokens", TensorProto.FLOAT, ("tokens", self.config.width))
        windows = _Windows(graph, graph.input("window_lengths", TensorProto.INT64, ("windows",)))
        normed = self._layer_norm(x, "layers.0.self_attn_layer_norm")
        for index in range(self.config.layers):
            layer = f"layers.{index}"
            last = index == self.config.layers - 1
            following = "ln_post" if last else f"layers.{index + 1}.self_attn_layer_norm"
            x, normed = self._join(x, self._attention(layer, normed, windows), f"{layer}.final_layer_norm")
            x, normed = self._join(x, self._feed_forward(layer, normed), following)
        hidden = graph.add("Gelu", [self._linear("linear_1", normed)])
        audio = self._linear("linear_2", hidden, GELU)
        graph.add("Identity", [audio], graph.output("audio", TensorProto.FLOAT, ("tokens", self.config.output)))
        return graph

    def _attention(self, layer: str, x: str, windows: _Windows) -> str:
        packed = windows.spread(self._linear(f"{layer}.self_attn.qkv", x))
        q, k, v = self.graph.split(packed, [self.config.width] * 3)
        y = self.graph.add("MultiHeadAttention", [q, k, v, "", windows.mask], num_heads=self.config.heads)
        return self._linear(f"{layer}.self_attn.out_proj", windows.gather(y, self.config.width))

    def _feed_forward(self, layer: str, x: str) -> str:
        return self._linear(f"{layer}.fc2", self.graph.add("Gelu", [self._linear(f"{layer}.fc1", x)]), GELU)

    def _join(self, x: str, branch: str, norm: str) -> tuple[str, str]:
        """x + branch, and the norm of that."""
        # Two nodes: SkipLayerNormalization takes four times as long as both.
        total = self.graph.add("Add", [branch, x])
        return total, self._layer_norm(total, norm)

    def _layer_norm(self, x: str, norm: str) -> str:
        weights = [self._tensor(f"{norm}.{leaf}") for leaf in ("weight", "bias")]
        return self.graph.add("LayerNormalization", [x, *weights], epsilon=NORM_EPS, axis=-1)

    def _linear(self, name: str, x: str, span: Span = EVEN) -> str:
        return audio_linear(self.graph, f"encoder.{name}", self.collected, x, self.activations, span)

    def _tensor(self, name: str) -> str:
        return self.graph.weight(f"encoder.{name}", self.collected.tensors[f"encoder.{name}"])


class _Windows:
    """Tokens one after the other, and as rows (windows, longest) with `mask` 1 where there is a token."""

    def __init__(self, graph: Graph, lengths: str) -> None:
        self._graph = graph
        zero, one = (graph.constant(np.array(value, dtype=np.int64)) for value in (0, 1))
        longest = graph.add("ReduceMax", [lengths], keepdims=0)
        places = graph.add("Range", [zero, longest, one])
        valid = graph.add("Less", [places, graph.add("Unsqueeze", [lengths, graph.integers(1)])])
        self.mask = graph.add("Cast", [valid], to=TensorProto.INT32)
        flat = graph.add("Reshape", [valid, graph.integers(-1)])
        self._taken = graph.add("Reshape", [graph.add("NonZero", [flat]), graph.integers(-1)])
        # Padding repeats the token before it: any will do, the mask hides it.
        counted = graph.add("CumSum", [graph.add("Cast", [flat], to=TensorProto.INT64), zero])
        slots = graph.add("Sub", [counted, one])
        self._slots = graph.add("Reshape", [slots, graph.add("Shape", [self.mask])])

    def spread(self, x: str) -> str:
        """(tokens, n) -> (windows, longest, n)."""
        return self._graph.add("Gather", [x, self._slots], axis=0)

    def gather(self, x: str, width: int) -> str:
        """(windows, longest, width) -> (tokens, width)."""
        flat = self._graph.add("Reshape", [x, self._graph.integers(-1, width)])
        return self._graph.add("Gather", [flat, self._taken], axis=0)
