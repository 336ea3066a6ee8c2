"""What the graphs share: a linear from collected weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quasr.export.linear import FLOAT

if TYPE_CHECKING:
    from quasr.export.collect import Collected
    from quasr.export.graph import Graph

Activations = Literal["int8", "fp32"]
"""What the numbers that meet quantised weights are multiplied in."""

ACCURACY_LEVEL: dict[Activations, int] = {"int8": 4, "fp32": 1}
"""MatMulNBits' names for that."""


def linear(
    graph: Graph, name: str, collected: Collected, x: str, activations: Activations, output: str | None = None
) -> str:
    """x W^T + bias with the matrix `name`: (..., columns) -> (..., rows)."""
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
