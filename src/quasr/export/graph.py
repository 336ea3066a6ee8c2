"""Building one ONNX graph by hand: nodes, weights in an external data file, small constants inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.export.datafile import Placed

OPSET = 23
"""The first with RMSNormalization."""

IR_VERSION = 11
"""What ONNX wrote when that opset was new."""

CONTRIB = "com.microsoft"
"""ONNX Runtime's own operators."""

CONTRIB_OPS = frozenset(
    {"FusedMatMul", "GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "QuickGelu"}
)

Shape = tuple[int | str, ...]


class Graph:
    """Values are names; every method returns those of what it adds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares an input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares an output; some node must write to that name."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def add(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """A node with one output."""
        return self.add_many(op, inputs, [output or self._fresh(op)], **attributes)[0]

    def add_many(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        """A node with the outputs named; an empty name leaves one out."""
        domain = CONTRIB if op in CONTRIB_OPS else ""
        node = helper.make_node(op, inputs, outputs, name=self._fresh(op), domain=domain, **attributes)
        self._nodes.append(node)
        return outputs

    def split(self, value: str, sizes: Sequence[int]) -> Sequence[str]:
        """Cuts the last axis."""
        names = [f"{self._fresh('Split')}_{index}" for index in range(len(sizes))]
        return self.add_many("Split", [value, self.integers(*sizes)], names, axis=-1)

    def weight(self, name: str, stored: Placed) -> str:
        """A tensor of the data file."""
        if name not in self._weights:
            tensor = TensorProto(name=name, dims=stored.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(stored.dtype)
            for key, value in (("location", stored.file), ("offset", stored.offset), ("length", stored.bytes)):
                tensor.external_data.add(key=key, value=str(value))
            self._weights[name] = tensor
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """A small tensor inside the graph; equal ones share a name."""
        name = f"constant_{value.dtype}_{'x'.join(map(str, value.shape))}_{'_'.join(map(str, value.ravel().tolist()))}"
        self._weights.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def integers(self, *values: int) -> str:
        """A vector of int64."""
        return self.constant(np.array(values, dtype=np.int64))

    def save(self, path: Path) -> None:
        """Writes the graph, checked by onnx with the data files that already lie beside it."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._weights.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="quasr")
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path))

    def _fresh(self, op: str) -> str:
        return f"{op}_{len(self._nodes)}"
