"""Shape arithmetic that exporters leave in the graph, where the answer is already known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.passes.integer_forms import substitute
from octavo.passes.rewrite import constant, is_op

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.passes.rewrite import Rewrite


def fold_dimension(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """`Gather(Shape(x), i)` is a constant where dimension `i` of `x` is one."""
    dims = _dimensions(node)
    if dims is None:
        return False
    substitute(node, "Constant", [], {"value": onnx_ir.tensor(dims)})
    return rewrite.done("dimension-folded", node, f"is {dims.tolist()}")


def infer_reshape(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """A Reshape to a Concat of constants and one computed size infers that size (`-1`)."""
    target = node.inputs[1] if len(node.inputs) > 1 else None
    joined = target.producer() if target is not None else None
    if joined is None or not is_op(joined, "Concat") or "allowzero" in node.attributes:
        return False
    parts = [_part(value) for value in joined.inputs]
    if sum(part is None for part in parts) != 1:
        return False
    sizes = [-1 if s is None else s for p in parts for s in (p if p is not None else [None])]
    if any(size == 0 for size in sizes) or sizes.count(-1) != 1:
        return False
    rewrite.set_constant(node, 1, np.array(sizes, np.int64), "shape")
    return rewrite.done("shape-folded", node, f"to {sizes}")


def _dimensions(node: onnx_ir.Node) -> NDArray[np.int64] | None:
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    index = constant(node.inputs[1])
    if source is None or index is None or not is_op(source, "Shape") or source.attributes:
        return None
    shape = source.inputs[0].shape if source.inputs[0] is not None else None
    places = [int(i) for i in index.reshape(-1)]
    if shape is None or not all(-len(shape) <= place < len(shape) for place in places):
        return None
    known = [d for place in places if isinstance(d := shape[place], int)]
    return np.array(known, np.int64).reshape(index.shape) if len(known) == len(places) else None


def _part(value: onnx_ir.Value | None) -> list[int] | None:
    """The sizes one input of the Concat holds; `None` for a single computed one."""
    array = constant(value)
    if array is not None:
        return [int(size) for size in array.reshape(-1)]
    shape = value.shape if value is not None else None
    # More than one computed size cannot be inferred: two zeros make the caller refuse.
    return None if shape is not None and shape == [1] else [0, 0]
