"""The weights that multiply what the units of an axis group give, and which columns are whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.mapped import reading
from octavo.passes.weight_matrix import WeightMatrix, operand, why_no_matrix

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.model import Model

    Index = NDArray[np.int64]
    Float32 = NDArray[np.float32]


@final
@dataclass(frozen=True, eq=False)
class Reader:
    """A weight read as input `index` of `node`; `units` `[K]` are the units of its columns.

    Columns that belong to no unit of the group have -1.
    """

    node: onnx_ir.Node
    index: int
    matrix: WeightMatrix
    units: Index

    @property
    def key(self) -> tuple[str, int]:
        return self.node.name or "", self.index

    @property
    def operand(self) -> str:
        return operand(self.node, self.index).name or ""

    def rows(self) -> Float32:
        """The weight as `[groups, N, K]`."""
        value = self.node.inputs[self.index]
        assert value is not None
        assert value.const_value is not None
        return reading(value.const_value, self.matrix.rows)


def readers(model: Model, group: AxisGroup) -> list[Reader]:
    """The readers of a group, in the order of the graph."""
    nodes, found = set(group.nodes), []
    for node in model.graph:
        if node.name in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and value.const_value is not None:
                    reader = _reader(node, index, group)
                    if reader is not None:
                        found.append(reader)
    return found


def _reader(node: onnx_ir.Node, index: int, group: AxisGroup) -> Reader | None:
    value = node.inputs[index]
    name = value.name or "" if value is not None else ""
    if not any((name, axis) in group.labels for axis in range(4)) or why_no_matrix(node, index):
        return None
    matrix = WeightMatrix.of(node, index)
    for at, axis in enumerate(matrix.column_axes):
        labels = group.labels.get((name, axis))
        if labels is not None:
            sizes = [matrix.shape[a] for a in matrix.column_axes]
            along = labels.reshape([-1 if k == at else 1 for k in range(len(sizes))])
            return Reader(node, index, matrix, np.broadcast_to(along, sizes).reshape(-1))
    return None


def linear_layers(model: Model) -> list[Reader]:
    """Every weight that multiplies an input of its node, without units."""
    found = []
    for node in model.graph:
        if node.op_type in ("Conv", "MatMul", "Gemm") and not why_no_matrix(node, 1):
            value = node.inputs[1]
            if value is not None and value.const_value is not None:
                matrix = WeightMatrix.of(node, 1)
                found.append(Reader(node, 1, matrix, np.full(matrix.width, -1, np.int64)))
    return found


def wanted(some: Iterable[Reader]) -> list[tuple[str, int]]:
    """Names and inputs of the weights of some readers, each once."""
    return list(dict.fromkeys(reader.key for reader in some))
