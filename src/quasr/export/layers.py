"""What the graphs share: matrix products with collected weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from onnx import TensorProto

from quasr.export.linear import FLOAT, ROWS, TABLE
from quasr.export.manifest import ZERO_POINT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.export.collect import Collected
    from quasr.export.graph import Graph
    from quasr.export.linear import Linear

Activations = Literal["int8", "fp32"]
"""What the numbers that meet quantised weights are multiplied in."""

ACCURACY_LEVEL: dict[Activations, int] = {"int8": 4, "fp32": 1}
"""MatMulNBits' names for that. In 8 bits level 1 unpacks all weights in every call: they are unpacked once instead."""

CODE_BITS = 8

HIGHEST = 255
"""Of uint8."""


@dataclass(frozen=True, slots=True)
class Span:
    """How numbers become uint8: number = (code - zero) * scale, the scale being that of the largest number.

    `lowest` is what no number is below, None where they are as low as high.
    """

    zero: int
    lowest: float | None = None


EVEN = Span(128)

GELU = Span(32, -0.17)
"""For what comes out of a GELU, which is never below -0.17: nearly one bit more than EVEN."""

SMALLEST_SCALE = 1e-12


def linear(
    graph: Graph, name: str, collected: Collected, x: str, activations: Activations, output: str | None = None
) -> str:
    """x W^T + bias with the matrix `name`, in groups or fp32: (..., columns) -> (..., rows)."""
    found = collected.linears[name]
    weight = graph.weight(f"{name}.weight", found.weight)
    bias = [] if found.bias is None else [graph.weight(f"{name}.bias", found.bias)]
    if found.format == FLOAT or found.scale is None:
        return _in_floats(graph, x, weight, bias, output)
    if found.format.bits == CODE_BITS and activations == "fp32":
        on_its_side = found.format == ROWS
        return _in_floats(graph, x, unpacked(graph, name, collected), bias, output, on_its_side=on_its_side)
    if not found.format.group:
        return _by_tokens(graph, name, found, x, output)
    inputs = [x, weight, graph.weight(f"{name}.scale", found.scale)]
    return graph.add(
        "MatMulNBits",
        [*inputs, "", "", *bias] if bias else inputs,
        output,
        N=found.rows,
        K=found.columns,
        bits=found.format.bits,
        block_size=found.format.group,
        accuracy_level=ACCURACY_LEVEL[activations],
    )


def audio_linear(
    graph: Graph, name: str, collected: Collected, x: str, activations: Activations, span: Span = EVEN
) -> str:
    """As `linear` for any format, on (tokens, columns): with ROWS every token's numbers get a scale of their own."""
    if collected.linears[name].format != ROWS or activations == "fp32":
        return linear(graph, name, collected, x, activations)
    codes, scale = to_codes(graph, x, [-1], span)
    return from_codes(graph, name, collected, codes, scale, span)


def _by_tokens(graph: Graph, name: str, found: Linear, x: str, output: str | None) -> str:
    """x W^T + bias for int8 with a scale a row, with a scale for every token: (..., columns) -> (..., rows).

    A token of zeros makes codes of 0 / 0, whatever they are, times a scale of 0.
    """
    # Fewer nodes than `to_codes`, because in a step of one token a node costs more than its numbers do.
    top = graph.add("ReduceMax", [graph.add("Abs", [x]), graph.integers(-1)], keepdims=1)
    zero, step = graph.constant(np.array(EVEN.zero, dtype=np.uint8)), _number(graph, 1 / (HIGHEST - EVEN.zero))
    codes = graph.add("QuantizeLinear", [graph.add("Div", [x, top]), step, zero])
    product = graph.add("MatMulIntegerToFloat", [codes, *_sideways(graph, name, found, step), zero])
    product = graph.add("Mul", [product, top], None if found.bias else output)
    return graph.add("Add", [product, graph.weight(f"{name}.bias", found.bias)], output) if found.bias else product


def _sideways(graph: Graph, name: str, found: Linear, step: str) -> Sequence[str]:
    """What MatMulIntegerToFloat takes after the codes: weights (columns, rows), the codes' scale and the weights'."""
    if found.scale is None:
        raise ValueError(f"{name} has no scales")
    weight = graph.weight(f"{name}.weight", found.weight)
    if found.format == TABLE:
        # Of a constant: done once, when the graph is loaded.
        weight = graph.add("Transpose", [weight], perm=[1, 0])
    return weight, step, graph.weight(f"{name}.scale", found.scale)


def _in_floats(
    graph: Graph, x: str, weight: str, bias: Sequence[str], output: str | None, *, on_its_side: bool = False
) -> str:
    """x W^T + bias, W (rows, columns), or (columns, rows) `on_its_side`, in fp32."""
    product = graph.add("FusedMatMul", [x, weight], None if bias else output, transB=int(not on_its_side))
    return graph.add("Add", [product, *bias], output) if bias else product


def unpacked(graph: Graph, name: str, collected: Collected) -> str:
    """The 8-bit matrix `name` in fp32, (rows, columns), or (columns, rows) for ROWS.

    All of it are constants, so ONNX Runtime computes it once, when it loads the graph.
    """
    found = collected.linears[name]
    if found.scale is None:
        raise ValueError(f"{name} has no scales")
    codes = graph.add("Cast", [graph.weight(f"{name}.weight", found.weight)], to=TensorProto.FLOAT)
    scale = graph.weight(f"{name}.scale", found.scale)
    if not found.format.group:
        by_row = scale if found.format == ROWS else graph.add("Unsqueeze", [scale, graph.integers(1)])
        return graph.add("Mul", [codes, by_row])
    codes = graph.add("Sub", [codes, _number(graph, ZERO_POINT)])
    groups = graph.add("Mul", [codes, graph.add("Unsqueeze", [scale, graph.integers(-1)])])
    return graph.add("Reshape", [groups, graph.integers(found.rows, found.columns)])


def to_codes(graph: Graph, x: str, axes: Sequence[int], span: Span) -> tuple[str, str]:
    """x as uint8, and one scale for each entry of its first axis, (entries,): `axes` are all the others."""
    zero = graph.constant(np.array(span.zero, dtype=np.uint8))
    top = graph.add("ReduceMax", [x if span.lowest else graph.add("Abs", [x]), graph.integers(*axes)], keepdims=0)
    scale = graph.add("Mul", [top, _number(graph, 1 / (HIGHEST - span.zero))])
    floor = SMALLEST_SCALE if span.lowest is None else -span.lowest / span.zero
    scale = graph.add("Max", [scale, _number(graph, floor)])
    zeros = graph.add("Expand", [zero, graph.add("Shape", [scale])])
    return graph.add("QuantizeLinear", [x, scale, zeros], axis=0), scale


def from_codes(
    graph: Graph, name: str, collected: Collected, codes: str, scale: str, span: Span, axes: Sequence[int] = (1,)
) -> str:
    """The codes times the matrix `name` of format ROWS, plus bias; `axes` make the scale broadcast over the codes."""
    found = collected.linears[name]
    zero = graph.constant(np.array(span.zero, dtype=np.uint8))
    product = graph.add("MatMulIntegerToFloat", [codes, *_sideways(graph, name, found, _number(graph, 1.0)), zero])
    product = graph.add("Mul", [product, graph.add("Unsqueeze", [scale, graph.integers(*axes)])])
    return product if found.bias is None else graph.add("Add", [product, graph.weight(f"{name}.bias", found.bias)])


def _number(graph: Graph, value: float) -> str:
    return graph.constant(np.array(value, dtype=np.float32))
