"""Where the channels of a value are after a Reshape or Flatten, as far as that is provable."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from octavo.passes.rewrite import constant, is_op, scalar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir
    from numpy.typing import NDArray

    Labels = NDArray[np.int64]

# A size: a number, the name of an unknown one, or `None` where nothing is known.
Size = int | str | None
_INFERRED = -1


def reshaped(node: onnx_ir.Node, labels: Labels) -> Labels | None:
    """The labels (see scale_paths) of the output, `None` where the sizes do not tell.

    Elements keep their order, so that runs of axes of equal size before and after hold the same
    elements, counted from the last axis or from the first, as far as sizes are known.
    """
    before = sizes_of(node.inputs[0])
    if before is None:
        return None
    before = [n if n > 1 else size for n, size in zip(labels.shape, before, strict=True)]
    after = _target(node, before)
    if after is None:
        return None
    pairs = _paired(before[::-1], after[::-1])
    backwards = [(a[::-1], b[::-1]) for a, b in reversed(pairs)]
    ends = [
        [([len(before) - 1 - k for k in a], [len(after) - 1 - k for k in b]) for a, b in backwards],
        _paired(before, after),
    ]
    moved = (_moved(labels, before, after, pairs) for pairs in ends)
    return next((found for found in moved if found is not None), None)


def compressed(labels: Labels) -> Labels:
    """The same labels with length 1 along every axis on which they do not change."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and np.all(labels == labels.take([0], axis)):
            labels = labels.take([0], axis)
    return labels


def sizes_of(value: onnx_ir.Value | None) -> list[Size] | None:
    """The sizes of a value's axes; equal names are equal sizes."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _paired(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that are as large before as after, from the first axis on."""
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        i, j = i + 1, j + 1
        if before[left[0]] != after[right[0]] or before[left[0]] is None:
            while (sizes := (_product(before, left), _product(after, right)))[0] != sizes[1]:
                small = sizes[0] is not None and sizes[1] is not None and sizes[0] < sizes[1]
                if None in sizes or (i if small else j) == len(before if small else after):
                    return pairs
                if small:
                    left.append(i)
                    i += 1
                else:
                    right.append(j)
                    j += 1
            if None in sizes:
                return pairs
        pairs.append((left, right))
    return pairs


def _moved(
    labels: Labels,
    before: Sequence[Size],
    after: Sequence[Size],
    pairs: Sequence[tuple[list[int], list[int]]],
) -> Labels | None:
    """The labels where each run of axes holds what it held before."""
    wide, turned = [1] * len(before), [1] * len(after)
    varying = {axis for axis, size in enumerate(labels.shape) if size > 1}
    for left, right in pairs:
        if varying & set(left):
            sizes = [size for size in (before[k] for k in left) if isinstance(size, int)]
            others = [size for size in (after[k] for k in right) if isinstance(size, int)]
            for k, size in zip(left, sizes, strict=True):
                wide[k] = size
            for k, size in zip(right, others, strict=True):
                turned[k] = size
            varying -= set(left)
    if varying:
        return None
    return compressed(np.broadcast_to(labels, wide).reshape(turned))


def _target(node: onnx_ir.Node, before: Sequence[Size]) -> list[Size] | None:
    """The sizes a Reshape or Flatten gives its output."""
    known = sizes_of(node.outputs[0])
    if is_op(node, "Flatten"):
        axis = node.attributes.get_int("axis", 1)
        axis = axis + len(before) if axis < 0 else axis
        halves = range(axis), range(axis, len(before))
        return [_product(before, half) for half in halves]
    asked = _asked(node.inputs[1], before, bool(node.attributes.get_int("allowzero", 0)))
    if asked is None or known is None or len(known) != len(asked):
        return known if asked is None else _inferred(asked, before)
    asked = _inferred(asked, before)
    both = zip(known, asked, strict=True)
    return [
        k if a is None or (isinstance(k, int) and not isinstance(a, int)) else a for k, a in both
    ]


def _asked(
    value: onnx_ir.Value | None, before: Sequence[Size], allow_zero: bool
) -> list[Size] | None:
    """The entries of a target shape, -1 among them."""
    array = constant(value)
    if array is not None:
        given = [int(size) for size in array.reshape(-1)]
        stays = [size == 0 and not allow_zero for size in given]
        return [before[k] if kept else given[k] for k, kept in enumerate(stays)]
    joined = value.producer() if value is not None else None
    if joined is None or not is_op(joined, "Concat"):
        return None
    entries: list[Size] = []
    for part in joined.inputs:
        array = constant(part)
        entries += [int(s) for s in array.reshape(-1)] if array is not None else [_dimension(part)]
        if array is None and (part is None or part.shape is None or part.shape != [1]):
            return None
    return entries if 0 not in entries else None


def _dimension(value: onnx_ir.Value | None) -> Size:
    """The size that a value of one entry holds: an axis of some Shape, taken out of it."""
    node = value.producer() if value is not None else None
    while node is not None and is_op(node, "Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or not is_op(node, "Gather", "Shape"):
        return None
    if is_op(node, "Shape"):
        begin = node.attributes.get_int("start", 0)
        return _axis_of(node, begin)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    index = scalar(node.inputs[1])
    if source is None or index is None or not is_op(source, "Shape") or source.attributes:
        return None
    return _axis_of(source, int(index))


def _axis_of(shape: onnx_ir.Node, axis: int) -> Size:
    sizes = sizes_of(shape.inputs[0])
    return sizes[axis] if sizes is not None and -len(sizes) <= axis < len(sizes) else None


def _inferred(asked: Sequence[Size], before: Sequence[Size]) -> list[Size]:
    """The target with its -1 computed where the sizes before and after cancel."""
    if _INFERRED not in asked:
        return list(asked)
    others = [size for size in asked if size != _INFERRED]
    names = Counter(s for s in before if isinstance(s, str))
    names.subtract(s for s in others if isinstance(s, str))
    total, rest = _known(before), _known(others)
    certain = None not in before and None not in others and not any(names.values())
    inferred = total // rest if certain and rest > 0 and total % rest == 0 else None
    return [inferred if size == _INFERRED else size for size in asked]


def _known(sizes: Sequence[Size]) -> int:
    return math.prod(size for size in sizes if isinstance(size, int))


def _product(sizes: Sequence[Size], axes: Sequence[int]) -> int | None:
    numbers = [size for size in (sizes[k] for k in axes) if isinstance(size, int)]
    return math.prod(numbers) if len(numbers) == len(axes) else None
