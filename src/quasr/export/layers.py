"""What the graphs share: matrix products with collected weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from quasr.export.linear import FLOAT, ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.export.collect import Collected
    from quasr.export.graph import Graph

Activations = Literal["int8", "fp32"]
"""What the numbers that meet quantised weights are multiplied in."""

ACCURACY_LEVEL: dict[Activations, int] = {"int8": 4, "fp32": 1}
"""MatMulNBits' names for that."""

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
        product = graph.add("FusedMatMul", [x, weight], None if bias else output, transB=1)
        return graph.add("Add", [product, *bias], output) if bias else product
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
    if collected.linears[name].format != ROWS:
        return linear(graph, name, collected, x, activations)
    codes, scale = to_codes(graph, x, [-1], span)
    return from_codes(graph, name, collected, codes, scale, span)


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
    if found.scale is None:
        raise ValueError(f"{name} has no scales")
    zero = graph.constant(np.array(span.zero, dtype=np.uint8))
    matrix = [
        graph.weight(f"{name}.{part}", placed) for part, placed in (("weight", found.weight), ("scale", found.scale))
    ]
    inputs = [codes, matrix[0], _number(graph, 1.0), matrix[1], zero]
    product = graph.add("MatMulIntegerToFloat", inputs)
    product = graph.add("Mul", [product, graph.add("Unsqueeze", [scale, graph.integers(*axes)])])
    return product if found.bias is None else graph.add("Add", [product, graph.weight(f"{name}.bias", found.bias)])


def _number(graph: Graph, value: float) -> str:
    return graph.constant(np.array(value, dtype=np.float32))
