"""How a positive scale per channel passes through operators that compute no product of it.

Labels tell to which channel every element of a value belongs: an integer array of the value's
rank whose axes are as long as the value's, or 1 where the channel does not change along an
axis. -1 stands for elements that the scale does not reach. An operator f passes the scale when
f(x * s) = f(x) * s for every positive s, element by element; then its outputs have labels too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from octavo.passes.reshaped_labels import compressed, reshaped
from octavo.passes.rewrite import constant, is_op, scalar

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    Labels = NDArray[np.int64]

Rule = Callable[["onnx_ir.Node", Mapping[int, "Labels"]], "list[Labels] | str"]


def passed(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    """Labels of every output, given those of the inputs that carry them; or why there are none."""
    if is_op(node, "Clip"):
        return f"'{node.name}' (Clip) would need bounds per channel"
    rule = _RULES.get(node.op_type) if is_op(node, *_RULES) else None
    if rule is None:
        return f"'{node.name}' ({node.op_type}) passes no scale"
    found = rule(node, carried)
    return f"'{node.name}' ({node.op_type}) {found}" if isinstance(found, str) else found


def rank_of(value: onnx_ir.Value | None) -> int | None:
    """The number of axes of a value, `None` where it is unknown."""
    return len(value.shape) if value is not None and value.shape is not None else None


def _elementwise(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    if set(carried) != {0} or len(node.outputs) != 1:
        return "reads it otherwise than as its data"
    return [carried[0]]


def _product(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    if len(carried) != 1:
        return "multiplies it by itself"
    index, labels = next(iter(carried.items()))
    if is_op(node, "Div") and index == 1:
        return "divides by it"
    return _widened(labels, node.inputs[1 - index])


def _sum(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    if len(carried) != len(node.inputs):
        return "adds what does not carry its scale"
    first = carried[0]
    same = all(other.shape == first.shape and np.all(other == first) for other in carried.values())
    return [first] if same else "adds channels of different scales"


def _widened(labels: Labels, other: onnx_ir.Value | None) -> list[Labels] | str:
    """Labels of a broadcast with a value that carries none."""
    rank = rank_of(other)
    if rank is None:
        return "has an operand of unknown rank"
    return [labels.reshape((1,) * (rank - labels.ndim) + labels.shape)]


def _pooled(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels = carried[0]
    if max(labels.shape[2:], default=1) > 1:
        return "mixes elements of different scales"
    return [labels] if len(node.outputs) == 1 else "returns indices"


def _reduced(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels = carried[0]
    given = _integers(node, 1, "axes")
    if given is None:
        return "reduces axes that are not constant"
    axes = {axis % labels.ndim for axis in given} or set(range(labels.ndim))
    if any(labels.shape[axis] > 1 for axis in axes):
        return "mixes elements of different scales"
    if node.attributes.get_int("keepdims", 1):
        return [labels]
    return [labels.squeeze(tuple(axes))]


def _transposed(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    return [carried[0].transpose(node.attributes.get_ints("perm", None))]


def _squeezed(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels, axes = carried[0], _integers(node, 1, "axes")
    if not axes or any(labels.shape[axis] > 1 for axis in axes):
        return "removes axes that are not known"
    return [labels.squeeze(tuple(axis % labels.ndim for axis in axes))]


def _unsqueezed(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    axes = _integers(node, 1, "axes")
    return [np.expand_dims(carried[0], tuple(axes))] if axes else "adds axes that are not known"


def _expanded(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    if set(carried) != {0} or shape is None or not isinstance(length := shape[0], int):
        return "has an unknown shape"
    labels = carried[0]
    return [labels.reshape((1,) * (length - labels.ndim) + labels.shape)]


def _split(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels, count = carried[0], len(node.outputs)
    axis = node.attributes.get_int("axis", 0) % labels.ndim
    if labels.shape[axis] == 1:
        return [labels] * count
    sizes = _integers(node, 1, "split")
    if not sizes:
        each = -(-labels.shape[axis] // count)
        sizes = [each] * (count - 1) + [labels.shape[axis] - each * (count - 1)]
    return [compressed(part) for part in np.split(labels, np.cumsum(sizes)[:-1], axis)]


def _sliced(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels = carried[0]
    starts, ends = _integers(node, 1, "starts"), _integers(node, 2, "ends")
    if not starts or not ends:
        return "takes a range that is not constant"
    axes = _integers(node, 3, "axes") or list(range(len(starts)))
    steps = _integers(node, 4, "steps") or [1] * len(starts)
    ranges = [slice(None)] * labels.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if labels.shape[axis] > 1:
            # The end of a descending range may stand before the first element.
            stop = None if step < 0 and end < -labels.shape[axis] else end
            ranges[axis] = slice(start, stop, step)
    return [compressed(labels[tuple(ranges)])]


def _gathered(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    rank = rank_of(node.inputs[1])
    if set(carried) != {0} or rank is None:
        return "has indices of unknown rank"
    labels = carried[0]
    axis = node.attributes.get_int("axis", 0) % labels.ndim
    if labels.shape[axis] == 1:
        return [labels.reshape((*labels.shape[:axis], *(1,) * rank, *labels.shape[axis + 1 :]))]
    places = constant(node.inputs[1])
    if places is None:
        return "picks channels that are not constant"
    return [compressed(np.take(labels, places.astype(np.int64), axis))]


def _concatenated(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    rank = next(iter(carried.values())).ndim
    axis = node.attributes.get_int("axis", 0) % rank
    parts = [carried.get(k, np.full((1,) * rank, -1)) for k in range(len(node.inputs))]
    first = parts[0]
    same = all(part.shape == first.shape and np.all(part == first) for part in parts)
    if same and first.shape[axis] == 1:
        return [first]
    sizes = [v.shape[axis] if v is not None and v.shape is not None else None for v in node.inputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(parts):
        return "joins parts of unknown size"
    other = [max(part.shape[k] for part in parts) for k in range(rank)]
    wide = [
        np.broadcast_to(part, (*other[:axis], size, *other[axis + 1 :]))
        for part, size in zip(parts, known, strict=True)
    ]
    return [compressed(np.concatenate(wide, axis))]


def _padded(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels, pads = carried[0], _integers(node, 1, "pads")
    if not pads or len(pads) != 2 * labels.ndim:
        return "pads by what is not constant"
    filler = scalar(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
    if node.attributes.get_string("mode", "constant") == "constant" and (
        filler != 0.0 or node.attributes.get_float("value", 0.0) != 0.0
    ):
        return "pads with another number than zero"
    around = (pads[axis] or pads[axis + labels.ndim] for axis in _varying(labels))
    return "pads the channels" if any(around) else [labels]


def _multiplied(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    """MatMul whose sum runs over elements of one scale: attention mixes tokens, not channels."""
    if len(carried) != 1:
        return "multiplies it by itself"
    index, labels = next(iter(carried.items()))
    rank = rank_of(node.inputs[1 - index])
    if rank is None or rank < 2 or labels.ndim < 2:
        return "has an operand of unknown rank"
    if labels.shape[-2 if index == 1 else -1] > 1:
        return "adds up elements of different scales"
    return [labels.reshape((1,) * (rank - labels.ndim) + labels.shape)]


def _shape_only(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    """The sizes of a value tell nothing of its elements."""
    return [np.full(1, -1)]


def _reshaped(node: onnx_ir.Node, carried: Mapping[int, Labels]) -> list[Labels] | str:
    labels = reshaped(node, carried[0]) if set(carried) == {0} else None
    return "moves channels to places that are not known" if labels is None else [labels]


def _varying(labels: Labels) -> list[int]:
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def _integers(node: onnx_ir.Node, index: int, name: str) -> Sequence[int] | None:
    """Constant integers from an input or, in old operator sets, an attribute; [] for neither."""
    if name in node.attributes:
        return list(node.attributes.get_ints(name, ()))
    if index >= len(node.inputs) or node.inputs[index] is None:
        return []
    array = constant(node.inputs[index])
    return None if array is None else [int(i) for i in array.reshape(-1)]


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity", "Neg", "Abs"), _elementwise),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pooled),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduced),
    **dict.fromkeys(("Reshape", "Flatten"), _reshaped),
    **dict.fromkeys(("Shape", "Size"), _shape_only),
    "Transpose": _transposed,
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "Expand": _expanded,
    "Split": _split,
    "Slice": _sliced,
    "Gather": _gathered,
    "Concat": _concatenated,
    "Pad": _padded,
    "MatMul": _multiplied,
}
