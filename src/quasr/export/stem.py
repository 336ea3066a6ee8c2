"""The graph of the convolutional stem: chunks of mel frames in, tokens with their positions out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from quasr.export.graph import Graph
from quasr.export.layers import linear
from quasr.model.encoder import sinusoids

if TYPE_CHECKING:
    from quasr.export.collect import Collected
    from quasr.export.datafile import DataFile
    from quasr.export.layers import Activations
    from quasr.model.config import AudioConfig

PREFIX = "encoder.stem."


def build_stem(config: AudioConfig, collected: Collected, activations: Activations, file: DataFile) -> Graph:
    """`mel` (chunks, mel_bins, chunk_frames) -> `tokens` (chunks, chunk_tokens, width)."""
    graph = Graph("stem")
    mel = graph.input("mel", TensorProto.FLOAT, ("chunks", config.mel_bins, config.chunk_frames))
    x = graph.add("Unsqueeze", [mel, graph.integers(1)])
    for name in ("conv2d1", "conv2d2", "conv2d3"):
        weights = [graph.weight(key, collected.tensors[key]) for key in _names(name)]
        x = graph.add("Conv", [x, *weights], strides=[2, 2], pads=[1, 1, 1, 1])
        x = graph.add("Gelu", [x])
    x = graph.add("Transpose", [x], perm=[0, 3, 1, 2])
    x = graph.add("Reshape", [x, graph.integers(0, 0, -1)])
    x = linear(graph, f"{PREFIX}conv_out", collected, x, activations)
    positions = file.add(sinusoids(config.chunk_tokens, config.width).numpy())
    shape = ("chunks", config.chunk_tokens, config.width)
    graph.add("Add", [x, graph.weight("positions", positions)], graph.output("tokens", TensorProto.FLOAT, shape))
    return graph


def _names(convolution: str) -> list[str]:
    return [f"{PREFIX}{convolution}.{leaf}" for leaf in ("weight", "bias")]
