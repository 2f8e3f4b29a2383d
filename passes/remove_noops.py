"""Nodes that hand on what they get, and chains of data movement that one node can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.passes.rewrite import constant, is_op, operand, static_shape

if TYPE_CHECKING:
    from octavo.passes.rewrite import Rewrite

_NUMBERS = {
    onnx_ir.DataType[name]
    for name in (
        *("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
        *("FLOAT16", "FLOAT", "DOUBLE"),
    )
}


def remove_identity(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Identity, and Dropout as inference sees it."""
    if is_op(node, "Dropout") and not _is_inference(node):
        return rewrite.miss(node, "it is in training mode or its mask is read")
    return rewrite.drop(node) and rewrite.done("noop-removed", node, "hands on its input")


def remove_cast(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Cast to the type it gets; Cast of a Cast that lost nothing."""
    source = node.inputs[0]
    if source is None or source.dtype is None:
        return False
    to = onnx_ir.DataType(node.attributes.get_int("to", 0))
    if source.dtype == to:
        return rewrite.drop(node) and rewrite.done("noop-removed", node, "casts to its own type")
    inner = source.producer()
    origin = inner.inputs[0] if inner is not None and is_op(inner, "Cast") else None
    if origin is None or origin.dtype is None or not _lossless(origin.dtype, source.dtype, to):
        return False
    rewrite.bypass(node, 0, origin)
    return rewrite.done("chain-merged", node, "casts what was cast without loss")


def remove_arithmetic(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Mul or Div by one, Add or Sub of zero, where the shape stays."""
    neutral = 1 if is_op(node, "Mul", "Div") else 0
    index = operand(node, constant)
    if index < 0 or (index == 1 and is_op(node, "Div", "Sub")):
        return False
    source, array = node.inputs[index], constant(node.inputs[1 - index])
    if source is None or array is None or array.size > 65536 or not np.all(array == neutral):
        return False
    if not _keeps_shape(source, array.shape):
        return False
    node.replace_input_with(0, source)
    return rewrite.drop(node) and rewrite.done("noop-removed", node, f"{node.op_type} {neutral}")


def merge_transpose(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Transpose of a Transpose as one, and none where the axes stay in place."""
    source, perm = node.inputs[0], _perm(node)
    if source is None or perm is None:
        return False
    if perm == sorted(perm):
        return rewrite.drop(node) and rewrite.done("noop-removed", node, "keeps the axes in place")
    inner = source.producer()
    first = _perm(inner) if inner is not None and is_op(inner, "Transpose") else None
    origin = inner.inputs[0] if inner is not None and first is not None else None
    if first is None or origin is None:
        return False
    node.attributes["perm"] = onnx_ir.AttrInt64s("perm", [first[axis] for axis in perm])
    rewrite.bypass(node, 0, origin)
    return rewrite.done("chain-merged", node, "transposes once")


def merge_reshape(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Reshape of what was only reshaped, to a shape that copies no dimension."""
    source, target = node.inputs[0], constant(node.inputs[1])
    if source is None or target is None:
        return False
    shape = static_shape(source)
    if shape is not None and shape == static_shape(node.outputs[0]):
        return rewrite.drop(node) and rewrite.done("noop-removed", node, "keeps the shape")
    inner = source.producer()
    if inner is None or not is_op(inner, "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return False
    origin = inner.inputs[0]
    if origin is None or np.any(target == 0):
        return False
    rewrite.bypass(node, 0, origin)
    return rewrite.done("chain-merged", node, "reshapes once")


def _is_inference(node: onnx_ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(training)
    off = training is None or (array is not None and not array.any())
    return off and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


def _lossless(origin: onnx_ir.DataType, middle: onnx_ir.DataType, to: onnx_ir.DataType) -> bool:
    """Whether `to` cannot tell that a value went through `middle`."""
    if not {origin, middle, to} <= _NUMBERS:
        return False
    a, b, c = origin.numpy(), middle.numpy(), to.numpy()
    if a.kind in ("i", "u") and b.kind == "f":  # out of range, integers wrap and floats do not
        return a.itemsize < 4 and c.kind == "f" and c.itemsize >= 4
    return bool(np.can_cast(a, b, "safe"))


def _keeps_shape(value: onnx_ir.Value, shape: tuple[int, ...]) -> bool:
    if value.shape is None or len(shape) > len(value.shape):
        return False
    pairs = zip(reversed(shape), reversed(list(value.shape)), strict=False)
    return all(size in (1, dim) for size, dim in pairs)


def _perm(node: onnx_ir.Node) -> list[int] | None:
    if given := node.attributes.get_ints("perm", ()):
        return list(given)
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else 0
    return list(reversed(range(rank))) if rank else None
