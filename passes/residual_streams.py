"""Residual streams that can be rotated: axes that only linear layers and root mean squares read.

x·Q with an orthogonal Q has the root mean square of x, and a linear layer takes Qᵀ·W for W. What
gives the stream takes W·Q, what reads it Qᵀ·W: either way Q along the axis that is theirs. A norm
with a scale per channel is in the way, until the layers behind it take the scale (Ashkboos et al.
2024, SliceGPT, arXiv 2401.15024, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.axis_groups import Refusal, axis_groups
from octavo.ir.axis_rules_elementwise import reduced_axes
from octavo.ir.extract import values_by_name
from octavo.ir.mapped import reading
from octavo.passes.rewrite import constant, is_op, only_reader, owned, scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.axis_links import Axis
    from octavo.ir.model import Model

_LINEAR = ("MatMul", "Gemm", "Gather", "Transpose", "Identity", "Cast", "Dropout")
_LAYOUT = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Concat", "Slice")
_MEANS = ("ReduceMean", "ReduceSum")
_NORMS = ("ReduceL2", "ReduceSumSquare")


@final
@dataclass(frozen=True, eq=False)
class Stream:
    """An axis group that commutes with rotations once the `scales`, Mul by node, are folded.

    `layers` are the linear nodes that read the stream along their contracted axis.
    """

    group: AxisGroup
    scales: tuple[onnx_ir.Node, ...]


def residual_streams(model: Model) -> tuple[list[Stream], list[Refusal]]:
    """The streams of the top-level graph, and why the other groups are none."""
    nodes = {node.name or "": node for node in model.graph}
    every = axis_groups(model)
    found, refused = [], list(every.refused)
    for group in every.groups:
        why = _divided(group)
        scales = []
        for node in (nodes[name] for name in group.nodes):
            if why is None and (reason := why_fixed(node, group.labels)):
                why = Refusal(group.name, node.name or "", reason)
            if _is_scale(node, group.labels):
                scales.append(node)
        if why is None:
            found.append(Stream(group, tuple(scales)))
        else:
            refused.append(why)
    return found, refused


def rotated_constants(model: Model, group: AxisGroup) -> dict[str, list[int]]:
    """The constants of a group with the axes that a rotation multiplies."""
    values = values_by_name(model)
    found: dict[str, list[int]] = {}
    for name, axis in group.labels:
        value = values.get(name)
        if value is not None and value.const_value is not None:
            found.setdefault(name, []).append(axis)
    return found


def rotate_constants(
    model: Model,
    group: AxisGroup,
    rotated: Callable[[Axis, NDArray[np.generic]], NDArray[np.generic]],
) -> None:
    """Replace the constants of a group by what they are with each of their axes rotated."""
    values = values_by_name(model)
    for name, axes in rotated_constants(model, group).items():
        value = values[name]
        for axis in axes:
            assert value.const_value is not None
            array = reading(value.const_value, partial(rotated, (name, axis)))
            value.const_value = onnx_ir.tensor(array, value.const_value.dtype, name=name)


def folds(scale: onnx_ir.Node) -> list[onnx_ir.Node]:
    """The layers that can take a norm's scale into their own weights, none if one cannot."""
    found = []
    for use in scale.outputs[0].uses():
        weight = use.node.inputs[1] if len(use.node.inputs) > 1 else None
        known = is_op(use.node, "MatMul", "Gemm") and use.idx == 0 and weight is not None
        turned = bool(use.node.attributes.get_int("transA", 0))
        if not known or turned or weight is None or constant(weight) is None or not owned(weight):
            return []
        found.append(use.node)
    return [] if scale.outputs[0].is_graph_output() else found


def scale_input(node: onnx_ir.Node) -> int:
    """Which input of a Mul is a constant vector, -1 where none is."""
    sizes = [0 if (array := constant(value)) is None else array.size for value in node.inputs]
    return int(np.argmax(sizes)) if max(sizes) > 1 else -1


def _divided(group: AxisGroup) -> Refusal | None:
    every = np.arange(group.units)
    for (name, axis), labels in group.labels.items():
        if not np.array_equal(labels, every):
            reason = f"its channels share axis {axis} of '{name}' with others"
            return Refusal(group.name, "", reason)
    return None


def _is_scale(node: onnx_ir.Node, labels: Collection[Axis]) -> bool:
    if not is_op(node, "Mul") or len(_labelled(node, labels)) < 2:
        return False
    return scale_input(node) >= 0


def _labelled(node: onnx_ir.Node, labels: Collection[Axis]) -> list[onnx_ir.Value]:
    """The operands that have the axis of the stream."""
    names = {name for name, _ in labels}
    return [value for value in node.inputs if value is not None and value.name in names]


def why_fixed(node: onnx_ir.Node, labels: Collection[Axis]) -> str:
    """Why a node does not commute with rotations of the axis, "" where it does."""
    own = _labelled(node, labels)
    if not own or is_op(node, *_LINEAR, *_LAYOUT):
        return ""
    if is_op(node, "Add", "Sub") and len(own) == len(node.inputs):
        return ""
    if is_op(node, "Mul", "Div") and (len(own) == 1 or _is_scale(node, labels)):
        divides = is_op(node, "Div") and node.inputs[1] is own[0]
        return "it divides by the channels" if divides else ""
    if is_op(node, "Pow") and scalar(node.inputs[1]) == 2.0 and _summed(node, labels):
        return ""
    if is_op(node, "Mul") and node.inputs[0] is node.inputs[1] and _summed(node, labels):
        return ""
    if is_op(node, *_MEANS) and _squared(own[0]) and _over(node, labels):
        return ""
    if is_op(node, *_NORMS) and _over(node, labels):
        return ""
    return f"{node.op_type} treats every channel by itself, and a rotation mixes them"


def _summed(node: onnx_ir.Node, labels: Collection[Axis]) -> bool:
    """Whether the squares of a node are only ever summed over the axis."""
    reader = only_reader(node.outputs[0])
    return reader is not None and is_op(reader, *_MEANS) and _over(reader, labels)


def _squared(value: onnx_ir.Value) -> bool:
    node = value.producer()
    if node is not None and is_op(node, "Pow"):
        return scalar(node.inputs[1]) == 2.0
    return node is not None and is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def _over(node: onnx_ir.Node, labels: Collection[Axis]) -> bool:
    """Whether a reduction runs over the axis of the stream and no other."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return False
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    reduced = reduced_axes(node, len(value.shape), axes)
    return reduced is not None and [(value.name, axis) for axis in reduced] == [
        axis for axis in labels if axis[0] == value.name
    ]
