"""Activations that saturate (Relu, Clip, Max, Min) as the fewest Relu and Clip nodes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.passes.rewrite import is_op, only_reader, operand, scalar

if TYPE_CHECKING:
    from octavo.passes.rewrite import Rewrite

Bounds = tuple[float, float]
_FREE: Bounds = (-math.inf, math.inf)
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE)


def merge_activation(node: onnx_ir.Node, rewrite: Rewrite) -> bool:
    """Max(x, 0) and Clip(x, 0) become Relu; an activation merges with the one before it."""
    index, own = bounds_of(node)
    source = node.inputs[index] if own is not None else None
    if own is None or source is None:
        return False
    if own == _FREE:
        node.replace_input_with(0, source)
        return rewrite.drop(node) and rewrite.done("activation-merged", node, "does nothing")
    producer = source.producer()
    inner_index, inner = bounds_of(producer) if producer is not None else (0, None)
    if producer is None or inner is None or producer.graph is not node.graph:
        return _become(node, index, own, rewrite)
    both = max(own[0], inner[0]), min(own[1], inner[1])
    if both[0] > both[1]:
        return False
    if both == inner and not source.is_graph_output():
        rewrite.absorb(node, producer)
        return rewrite.done("activation-merged", node, f"'{producer.name}' saturates earlier")
    if only_reader(source) is not node or not _can_become(node, both, rewrite):
        return _become(node, index, own, rewrite)
    origin = producer.inputs[inner_index]
    assert origin is not None
    rewrite.bypass(node, index, origin)
    _become(node, index, both, rewrite)
    return rewrite.done("activation-merged", node, f"includes '{producer.name}'")


def bounds_of(node: onnx_ir.Node) -> tuple[int, Bounds | None]:
    """Which input a node saturates, and at what bounds; `None` for other operators."""
    if not node.outputs or node.outputs[0].dtype not in _FLOATS:
        return 0, None
    if is_op(node, "Relu"):
        return 0, (0.0, math.inf)
    if is_op(node, "Clip"):
        return 0, _clip_bounds(node)
    if is_op(node, "Max", "Min") and (index := operand(node, scalar)) >= 0:
        bound, other = scalar(node.inputs[1 - index]), node.inputs[1 - index]
        if bound is None or not _keeps_rank(node.inputs[index], other):
            return 0, None
        return index, (bound, math.inf) if node.op_type == "Max" else (-math.inf, bound)
    return 0, None


def _clip_bounds(node: onnx_ir.Node) -> Bounds | None:
    low, high = _FREE
    low = node.attributes.get_float("min", low)
    high = node.attributes.get_float("max", high)
    given = [*node.inputs[1:], None, None][:2]
    numbers = [scalar(value) for value in given]
    if any(value is not None and n is None for value, n in zip(given, numbers, strict=True)):
        return None
    low, high = (n if n is not None else old for n, old in zip(numbers, (low, high), strict=True))
    largest = float(np.finfo(node.outputs[0].dtype.numpy()).max)  # type: ignore[union-attr]
    if math.isnan(low) or math.isnan(high) or low > high:
        return None
    return -math.inf if low <= -largest else low, math.inf if high >= largest else high


def _keeps_rank(value: onnx_ir.Value | None, other: onnx_ir.Value | None) -> bool:
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    return other is not None and other.shape is not None and len(other.shape) <= rank


def _can_become(node: onnx_ir.Node, bounds: Bounds, rewrite: Rewrite) -> bool:
    """Clip takes its bounds as inputs from opset 11 on."""
    return bounds == (0.0, math.inf) or rewrite.model.graph.opset_imports.get("", 1) >= 11


def _become(node: onnx_ir.Node, index: int, bounds: Bounds, rewrite: Rewrite) -> bool:
    """Turn a node into the Relu or Clip of its bounds; only Relu and merged bounds are worth it."""
    current = bounds_of(node)[1]
    relu = bounds == (0.0, math.inf)
    if current == bounds and (not relu or is_op(node, "Relu")):
        return False
    node.replace_input_with(0, node.inputs[index])
    node.op_type = "Relu" if relu else "Clip"
    node.attributes.clear()
    node.resize_inputs(1)
    dtype = node.outputs[0].dtype.numpy()  # type: ignore[union-attr]
    for position, bound in enumerate(bounds, start=1):
        if not relu and math.isfinite(bound):
            rewrite.set_constant(node, position, np.array(bound, dtype), "bound")
    if current == bounds:
        return rewrite.done("activation-merged", node, "is a Relu")
    return True
