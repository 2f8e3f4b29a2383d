"""What the elements of a shape tensor are: numbers, sizes of other tensors, or unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.axis_sizes import AxisSizes

# A number, the size of an axis that is copied, or None.
Element = int | tuple[str, int] | None

# Operators that hand on the elements of a vector as they are.
_COPIES = ("Identity", "Cast", "Squeeze", "Unsqueeze")
# Inputs in which a size is the size of what the node gives.
_SHAPE_INPUTS = {("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0)}


def elements(value: onnx_ir.Value | None, sizes: AxisSizes) -> list[Element]:
    """The elements of an integer vector or scalar."""
    if value is None or not sizes.known(value):
        return []
    count = int(np.prod(sizes.shape(value), dtype=np.int64))
    if value.const_value is not None and not value.is_graph_input():
        return [int(e) for e in value.const_value.numpy().reshape(-1)]
    node = value.producer()
    found = _made(node, sizes) if node is not None and not node.domain else None
    return found if found is not None and len(found) == count else [None] * count


def _made(node: onnx_ir.Node, sizes: AxisSizes) -> list[Element] | None:
    source = node.inputs[0] if len(node.inputs) else None
    if source is None or not sizes.known(source):
        return None
    if node.op_type == "Shape":
        rank = len(sizes.shape(source))
        attributes = node.attributes
        kept = slice(attributes.get_int("start", 0), attributes.get_int("end", rank))
        return [(source.name or "", axis) for axis in range(rank)[kept]]
    if node.op_type in _COPIES:
        return elements(source, sizes)
    if node.op_type == "Concat":
        return [e for part in node.inputs for e in elements(part, sizes)]
    places = _places(node, sizes)
    if places is None:
        return None
    known = elements(source, sizes)
    return [known[k] for k in places]


def _places(node: onnx_ir.Node, sizes: AxisSizes) -> list[int] | None:
    """Which elements of its first input a Gather or Slice of a vector gives."""
    constants = [
        None if v is None or v.const_value is None else v.const_value.numpy().reshape(-1)
        for v in node.inputs[1:]
    ]
    source = node.inputs[0]
    if source is None or len(sizes.shape(source)) != 1 or not constants:
        return None
    count = sizes.shape(source)[0]
    if node.op_type == "Gather" and constants[0] is not None:
        return [int(k) % count for k in constants[0]]
    if node.op_type == "Slice" and constants[0] is not None and len(constants) > 1:
        if constants[1] is None or (len(constants) > 3 and constants[3] is None):
            return None
        step = int(constants[3][0]) if len(constants) > 3 and constants[3] is not None else 1
        return list(range(count))[int(constants[0][0]) : int(constants[1][0]) : step]
    return None


def why_size_is_read(value: onnx_ir.Value, at: int, sizes: AxisSizes) -> str:
    """The node that uses element `at` for anything but a shape, "" where there is none."""
    if value.is_graph_output():
        return "a graph output"
    for use in value.uses():
        node, name = use.node, f"'{use.node.name}'"
        if node.graph is not value.graph and value.graph is not None:
            return name
        given = (node.op_type, use.idx) in _SHAPE_INPUTS and not node.domain
        if given and sizes.known(node.outputs[0]):
            continue
        handed = _handed_on(node, use.idx, at, sizes)
        if handed is None:
            return name
        for place in handed:
            further = why_size_is_read(node.outputs[0], place, sizes)
            if further:
                return further
    return ""


def _handed_on(node: onnx_ir.Node, index: int, at: int, sizes: AxisSizes) -> list[int] | None:
    """Where an element of input `index` is in what the node gives; `None` if it computes."""
    if node.domain:
        return None
    if node.op_type in _COPIES and index == 0:
        return [at]
    if node.op_type == "Concat":
        before = [v for v in node.inputs[:index] if v is not None]
        return [at + sum(sizes.shape(v)[0] for v in before)]
    if node.op_type in ("Gather", "Slice") and index == 0:
        places = _places(node, sizes)
        return None if places is None else [k for k, place in enumerate(places) if place == at]
    return None
