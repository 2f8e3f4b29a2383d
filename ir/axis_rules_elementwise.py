"""How axes go through elementwise operators, normalizations and reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir

    from octavo.ir.axis_links import NodeLinks

# Operators of one operand that map zero to zero, and those that do not.
_ZERO_TO_ZERO = (
    "Abs Atan Asin Cast Ceil Celu Clip Dropout Elu Erf Floor Gelu HardSwish Identity LeakyRelu Mish"
    " Neg Relu Round Selu Sign Sin Sinh Sqrt Swish Tan Tanh ThresholdedRelu QuickGelu"
)
ZERO_TO_ZERO = frozenset(_ZERO_TO_ZERO.split())
_OTHER_UNARY = "Exp Log Cos Cosh HardSigmoid Sigmoid Softplus Softsign Reciprocal Not IsNaN"
_BROADCAST = (
    "Add Sub Mul Div Pow Max Min Mean Sum Where PRelu And Or Xor Equal Less Greater"
    " LessOrEqual GreaterOrEqual Mod BiasGelu"
)
_OF_ZEROS = ("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2")
_OTHER_REDUCTIONS = "ReduceMax ReduceMin ReduceProd ReduceLogSum ReduceLogSumExp ArgMax ArgMin"


def _unary(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    for axis in range(len(links.shape(value))):
        links.same((value, axis), (output, axis))


def _broadcast(links: NodeLinks) -> None:
    """Axes aligned at the end; one of size 1 is stretched and has nothing to remove."""
    output = links.output
    for value in links.node.inputs:
        if value is not None:
            broadcast(links, value, output)


def broadcast(links: NodeLinks, value: onnx_ir.Value, output: onnx_ir.Value, skip: int = 0) -> None:
    """Tie the axes of an operand to those of the output, the last `skip` ones left out."""
    shape, wide = links.shape(value), links.shape(output)
    for back in range(1 + skip, len(shape) + 1):
        if shape[-back] == wide[-back]:
            links.same((value, -back), (output, -back))


def _batch_norm(links: NodeLinks) -> None:
    _unary(links)
    if links.node.attributes.get_int("training_mode", 0):
        links.freeze(links.output, 1, "it is normalized by the batch")
    for parameter in links.node.inputs[1:]:
        if parameter is not None:
            links.same((parameter, 0), (links.output, 1))


def _layer_norm(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    first = links.node.attributes.get_int("axis", -1) % len(links.shape(value))
    for axis in range(len(links.shape(value))):
        if axis < first:
            links.same((value, axis), (output, axis))
        else:
            links.freeze(value, axis, "it normalizes over this axis")
            links.freeze(output, axis, "it normalizes over this axis")
    for parameter in links.node.inputs[1:]:
        if parameter is not None:
            links.freeze_all("it normalizes over this axis", [parameter])
    for more in links.node.outputs[1:]:
        if more.name:
            links.freeze_all("a mean or deviation is read", [more])


def _instance_norm(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    for axis in range(len(links.shape(value))):
        if axis < 2:
            links.same((value, axis), (output, axis))
        else:
            links.freeze(value, axis, "it normalizes over this axis")
    for parameter in links.node.inputs[1:]:
        if parameter is not None and links.shape(parameter)[0] == links.shape(output)[1]:
            links.same((parameter, 0), (output, 1))
        elif parameter is not None:
            links.freeze(output, 1, "its scale belongs to groups of channels")


def _group_norm(links: NodeLinks) -> None:
    """Whole groups may go; channels within one are normalized together."""
    value, output = links.input(0), links.output
    assert value is not None
    shape, count = links.shape(value), links.node.attributes.get_int("num_groups", 1)
    _instance_norm(links)
    group = links.own("group", count)
    within = links.own("within", shape[1] // count)
    links.block([links.axis(output, 1)], [group, within])


def _softmax(links: NodeLinks) -> None:
    _unary(links)
    value = links.input(0)
    assert value is not None
    axis = links.node.attributes.get_int("axis", -1)
    links.freeze(value, axis, "the rest would share what it takes away")


def _lrn(links: NodeLinks) -> None:
    _unary(links)
    value = links.input(0)
    assert value is not None
    links.freeze(value, 1, "it normalizes over neighbours along this axis")


def _reduce(links: NodeLinks) -> None:
    """Sums and means of zeros stay what they are; a mean is rescaled when its axis shrinks."""
    value, output = links.input(0), links.output
    assert value is not None
    rank = len(links.shape(value))
    reduced = reduced_axes(links.node, rank, links.constant(1))
    if reduced is None:
        links.freeze_all("the axes it reduces are computed")
        return
    keep = bool(links.node.attributes.get_int("keepdims", 1))
    kept = [a for a in range(rank) if a not in reduced]
    for at, axis in enumerate(kept):
        links.same((value, axis), (output, axis if keep else at))
    for axis in reduced:
        if links.node.op_type in _OF_ZEROS:
            what = "it sums values that are not zero where their weights are"
            links.vanish(what, links.axis(value, axis))
        else:
            links.freeze(value, axis, f"{links.node.op_type} looks at all of this axis")


def reduced_axes(
    node: onnx_ir.Node, rank: int, axes: object, default: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """The axes a reduction runs over, `None` where they are computed."""
    if node.op_type in ("ArgMax", "ArgMin"):
        return (node.attributes.get_int("axis", 0) % rank,)
    given = node.attributes.get_ints("axes", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        if axes is None:
            return None
        given = [int(a) for a in np.asarray(axes).reshape(-1)]
    if given is None or not len(given):
        none = bool(node.attributes.get_int("noop_with_empty_axes", 0))
        return () if none else tuple(range(rank))
    return tuple(int(a) % rank for a in given)


RULES: Mapping[str, Callable[[NodeLinks], None]] = {
    **dict.fromkeys((*ZERO_TO_ZERO, *_OTHER_UNARY.split()), _unary),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys((*_OF_ZEROS, *_OTHER_REDUCTIONS.split()), _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"), _softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LRN": _lrn,
}
