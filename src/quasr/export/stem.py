"""The graph of the convolutional stem: chunks of mel frames in, tokens with their positions out.

In fp32 it is three convolutions. In 8 bits ONNX Runtime's own are slow or want fixed scales, so a convolution is a
matrix product there: channels stand last, every output's 3 x 3 neighbourhood is laid out as a row, and each chunk has a
scale of its own, so that it does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from quasr.export.collect import CONVOLUTIONS
from quasr.export.graph import Graph
from quasr.export.layers import GELU, audio_linear, from_codes, to_codes, unpacked
from quasr.export.linear import ROWS
from quasr.model.encoder import sinusoids

if TYPE_CHECKING:
    from quasr.export.collect import Collected
    from quasr.export.datafile import DataFile
    from quasr.export.layers import Activations
    from quasr.model.config import AudioConfig

KERNEL = 3
STRIDE = 2


def build_stem(config: AudioConfig, collected: Collected, activations: Activations, file: DataFile) -> Graph:
    """`mel` (chunks, mel_bins, chunk_frames) -> `tokens` (chunks, chunk_tokens, width)."""
    graph = Graph("stem")
    mel = graph.input("mel", TensorProto.FLOAT, ("chunks", config.mel_bins, config.chunk_frames))
    in_codes = collected.linears[CONVOLUTIONS[1]].format == ROWS and activations == "int8"
    x = _in_codes(graph, mel, config, collected) if in_codes else _in_floats(graph, mel, config, collected)
    rows = graph.add("Reshape", [x, graph.integers(-1, config.stem_features)])
    x = audio_linear(graph, "encoder.stem.conv_out", collected, rows, activations, GELU)
    x = graph.add("Reshape", [x, graph.integers(-1, config.chunk_tokens, config.width)])
    positions = file.add(sinusoids(config.chunk_tokens, config.width).numpy())
    shape = ("chunks", config.chunk_tokens, config.width)
    graph.add("Add", [x, graph.weight("positions", positions)], graph.output("tokens", TensorProto.FLOAT, shape))
    return graph


def _in_floats(graph: Graph, mel: str, config: AudioConfig, collected: Collected) -> str:
    """(chunks, chunk_tokens, channels, bins) after the last GELU."""
    x = graph.add("Unsqueeze", [mel, graph.integers(1)])
    for index, name in enumerate(CONVOLUTIONS):
        found = collected.linears[name]
        inputs = [x, _kernel(graph, name, collected, config.stem_channels if index else 1)]
        if found.bias is not None:
            inputs.append(graph.weight(f"{name}.bias", found.bias))
        x = graph.add("Gelu", [graph.add("Conv", inputs, strides=[STRIDE] * 2, pads=[1] * 4)])
    return graph.add("Transpose", [x], perm=[0, 3, 1, 2])


def _kernel(graph: Graph, name: str, collected: Collected, channels: int) -> str:
    """The weights of a convolution as Conv takes them: (rows, channels, height, width)."""
    found = collected.linears[name]
    if found.format != ROWS:
        return graph.weight(f"{name}.weight", replace(found.weight, shape=(found.rows, channels, KERNEL, KERNEL)))
    laid = graph.integers(KERNEL, KERNEL, channels, found.rows)
    return graph.add("Transpose", [graph.add("Reshape", [unpacked(graph, name, collected), laid])], perm=[3, 2, 0, 1])


def _in_codes(graph: Graph, mel: str, config: AudioConfig, collected: Collected) -> str:
    """As `_in_floats`. The first convolution stays in floats: it has 9 columns, and the sound passes there."""
    first = collected.linears[CONVOLUTIONS[0]]
    bins, frames = config.mel_bins, config.chunk_frames
    x = graph.add("Unsqueeze", [mel, graph.integers(-1)])
    x = _neighbourhoods(graph, x, bins, frames, _zero(graph, np.dtype(np.float32), 0))
    x = graph.add("FusedMatMul", [x, graph.weight("conv2d1.weight", first.weight)], transB=1)
    if first.bias is not None:
        x = graph.add("Add", [x, graph.weight("conv2d1.bias", first.bias)])
    for name in CONVOLUTIONS[1:]:
        bins, frames = -(-bins // STRIDE), -(-frames // STRIDE)
        codes, scale = to_codes(graph, graph.add("Gelu", [x]), [1, 2, 3], GELU)
        rows = _neighbourhoods(graph, codes, bins, frames, _zero(graph, np.dtype(np.uint8), GELU.zero))
        x = from_codes(graph, name, collected, rows, scale, GELU, (1, 2, 3))
    return graph.add("Transpose", [graph.add("Gelu", [x])], perm=[0, 2, 3, 1])


def _neighbourhoods(graph: Graph, x: str, bins: int, frames: int, zero: str) -> str:
    """(chunks, bins, frames, channels) -> (chunks, bins / 2, frames / 2, 9 x channels), zeros around the edge."""
    padded = graph.add("Pad", [x, graph.integers(0, 1, 1, 0, 0, 1, 1, 0), zero])
    parts = [
        graph.add(
            "Slice",
            [
                padded,
                graph.integers(row, column),
                # As far as the stride goes: the last start and one more.
                graph.integers(row + bins + bins % 2 - 1, column + frames + frames % 2 - 1),
                graph.integers(1, 2),
                graph.integers(STRIDE, STRIDE),
            ],
        )
        for row in range(KERNEL)
        for column in range(KERNEL)
    ]
    return graph.add("Concat", parts, axis=-1)


def _zero(graph: Graph, dtype: np.dtype[np.generic], value: int) -> str:
    return graph.constant(np.array(value, dtype=dtype))
