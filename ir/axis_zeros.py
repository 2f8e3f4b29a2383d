"""Whether a tensor is zero along an axis once all weights of the removed indices are zero."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.axis_rules_elementwise import ZERO_TO_ZERO

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.axis_links import Axis

# A product is zero where one factor is; a sum where all terms are.
_PRODUCTS = frozenset({"Mul", "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
_TERMS = (
    "Add Sub Sum Concat Split Slice Reshape Flatten Transpose Squeeze Unsqueeze Expand Tile Gather"
    " AveragePool GlobalAveragePool MaxPool GlobalMaxPool Resize ReduceSum ReduceMean LSTM GRU"
    " BatchNormalization InstanceNormalization"
)
_ALL_TERMS = frozenset(_TERMS.split())
_FIRST_ONLY = frozenset({"Pow", "Div"})


def vanishes(value: onnx_ir.Value, labelled: Collection[Axis], depth: int = 200) -> bool:
    """Whether zero weights make `value` zero at the removed indices of its labelled axes.

    `labelled` are the axes of the group; only what is labelled needs to vanish.
    """
    if value.const_value is not None:
        return not value.is_graph_input()
    node = value.producer()
    if node is None or node.domain or not depth:
        return False
    touched = {name for name, _ in labelled}
    inputs = [v for v in node.inputs if v is not None and v.name in touched]
    op = node.op_type
    if op == "ConstantOfShape":
        given = node.attributes.get("value")
        return given is None or not np.any(given.as_tensor().numpy())
    if op in ZERO_TO_ZERO and _zero_inside(node):
        return vanishes(inputs[0], labelled, depth - 1) if inputs else False
    if op in _PRODUCTS:
        factors = inputs if op == "Mul" else [v for v in inputs if _gives(node, v, labelled)]
        biased = op in ("Gemm", "Conv", "ConvTranspose") or not factors
        return any(vanishes(v, labelled, depth - 1) for v in factors[: 2 if biased else None])
    if op in _FIRST_ONLY:
        return (
            bool(inputs)
            and inputs[0] is node.inputs[0]
            and vanishes(inputs[0], labelled, depth - 1)
        )
    if op in _ALL_TERMS and inputs:
        if op in ("Add", "Sub", "Sum") and len(inputs) < len(node.inputs):
            return False
        return all(vanishes(v, labelled, depth - 1) for v in inputs)
    return False


def _gives(node: onnx_ir.Node, value: onnx_ir.Value, labelled: Collection[Axis]) -> bool:
    """Whether a labelled axis of an operand is one that the product has, not one it sums."""
    axes = {axis for name, axis in labelled if name == value.name}
    rank = len(value.shape) if value.shape is not None else 0
    summed = {
        "MatMul": (rank - 1 if value is node.inputs[0] else max(rank - 2, 0)),
        "Gemm": 1 - node.attributes.get_int("transA", 0)
        if value is node.inputs[0]
        else node.attributes.get_int("transB", 0),
        "Conv": 1,
        "ConvTranspose": 1 if value is node.inputs[0] else 0,
    }.get(node.op_type, -1)
    return bool(axes - {summed})


def _zero_inside(node: onnx_ir.Node) -> bool:
    """Whether a Clip lets zero through; other operators always do."""
    if node.op_type != "Clip":
        return True
    bounds = [
        float(v.const_value.numpy().reshape(())) if v is not None and v.const_value else sign
        for v, sign in zip([*node.inputs[1:], None, None], (-np.inf, np.inf), strict=False)
    ]
    return bounds[0] <= 0 <= bounds[1]
