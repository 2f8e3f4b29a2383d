"""How axes go through operators that move, join, cut or repeat elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.axis_rules_elementwise import broadcast
from octavo.ir.axis_shapes import elements, why_size_is_read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir

    from octavo.ir.axis_links import NodeLinks


def _reshape(links: NodeLinks) -> None:
    """Axes that are merged or divided; a merged free axis has to be inferred by the runtime."""
    target = elements(links.input(1), links.sizes) if len(links.node.inputs) > 1 else None
    value, output = links.input(0), links.output
    assert value is not None
    for left, right in links.sizes.cuts(value.name or "", output.name or ""):
        wide_left = [a for a in left if links.shape(value)[a] != 1]
        wide_right = [a for a in right if links.shape(output)[a] != 1]
        if len(wide_left) == len(wide_right) == 1:
            links.same((value, wide_left[0]), (output, wide_right[0]))
        elif wide_left:
            sides = [links.axis(value, a) for a in left], [links.axis(output, a) for a in right]
            links.block(*sides)
        free = [a for a in wide_right if not links.sizes.fixed(output.name or "", a)]
        if len(wide_left) > 1 and target and any(target[a] not in (-1, 0) for a in free):
            for axis in right:
                links.freeze(output, axis, "the size it reshapes to is computed")


def _transpose(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    rank = len(links.shape(value))
    order = links.node.attributes.get_ints("perm", None) or range(rank)[::-1]
    for at, axis in enumerate(order):
        links.same((value, axis), (output, at))


def _concat(links: NodeLinks) -> None:
    axis = links.node.attributes.get_int("axis", 0)
    _joined(links, axis, [v for v in links.node.inputs if v is not None], links.output)


def _split(links: NodeLinks) -> None:
    axis, value = links.node.attributes.get_int("axis", 0), links.input(0)
    assert value is not None
    _joined(links, axis, [v for v in links.node.outputs if v.name], value)


def _joined(links: NodeLinks, axis: int, parts: list[onnx_ir.Value], whole: onnx_ir.Value) -> None:
    """Parts that follow each other along an axis of the whole."""
    rank, start = len(links.shape(whole)), 0
    for part in parts:
        size = links.shape(part)[axis]
        inside = np.arange(size)
        for other in range(rank):
            if other != axis % rank:
                links.same((part, other), (whole, other))
        links.same((part, axis), (whole, axis), inside, inside + start)
        start += size


def _slice(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    rank = len(links.shape(value))
    starts, axes, steps = (links.constant(i) for i in (1, 3, 4))
    if links.input(3) is not None and axes is None:
        links.freeze_all("the axes it slices are computed")
        return
    count = links.shape(links.node.inputs[1])[0] if links.node.inputs[1] is not None else 0
    sliced = [int(a) % rank for a in (axes if axes is not None else range(count))]
    known = starts is not None and links.constant(2) is not None
    regular = links.input(4) is None or (steps is not None and bool((steps == 1).all()))
    for axis in range(rank):
        size = links.shape(value)[axis]
        fixed = links.sizes.fixed(value.name or "", axis)
        if axis not in sliced:
            links.same((value, axis), (output, axis))
        elif known and regular and fixed and starts is not None:
            first = int(starts[sliced.index(axis)])
            first = min(max(first + size if first < 0 else first, 0), size)
            inside = np.arange(links.shape(output)[axis])
            links.same((value, axis), (output, axis), inside + first, inside)
        else:
            links.freeze(value, axis, "what it takes of this axis is computed or not contiguous")
            links.freeze(output, axis, "what it takes of this axis is computed or not contiguous")


def _expand(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    broadcast(links, value, output)
    _freeze_free(links, output)


def _constant_of_shape(links: NodeLinks) -> None:
    _freeze_free(links, links.output)


def _freeze_free(links: NodeLinks, output: onnx_ir.Value) -> None:
    for axis in range(len(links.shape(output))):
        if not links.sizes.fixed(output.name or "", axis):
            links.freeze(output, axis, "the size it stretches to is computed")


def _tile(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    for axis, size in enumerate(links.shape(value)):
        if size == links.shape(output)[axis]:
            links.same((value, axis), (output, axis))
        else:
            links.freeze(value, axis, "it repeats this axis")
            links.freeze(output, axis, "it repeats this axis")


def _pad(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    rank, pads = len(links.shape(value)), links.constant(1)
    chosen = links.constant(3)
    if pads is None or (links.input(3) is not None and chosen is None):
        links.freeze_all("what it pads is computed")
        return
    axes = [int(a) % rank for a in chosen] if chosen is not None else list(range(rank))
    zeros = links.node.attributes.get_string("mode", "constant") == "constant"
    for axis in range(rank):
        begin, end = (
            int(pads[axes.index(axis) + k]) if axis in axes else 0 for k in (0, len(axes))
        )
        inside = np.arange(links.shape(value)[axis])
        if (zeros and min(begin, end) >= 0) or begin == end == 0:
            links.same((value, axis), (output, axis), inside, inside + begin)
        else:
            links.freeze(value, axis, "it repeats or cuts the ends of this axis")
            links.freeze(output, axis, "it repeats or cuts the ends of this axis")


def _gather(links: NodeLinks) -> None:
    """Rows of a table, or chosen indices of an axis."""
    data, places = links.input(0), links.input(1)
    assert data is not None
    assert places is not None
    output, rank = links.output, len(links.shape(data))
    axis, more = links.node.attributes.get_int("axis", 0) % rank, len(links.shape(places))
    for other in range(rank):
        if other != axis:
            links.same((data, other), (output, other if other < axis else other + more - 1))
    chosen, size = links.constant(1), links.shape(data)[axis]
    if chosen is None or more > 1 or not links.sizes.fixed(data.name or "", axis):
        links.freeze(data, axis, "which indices are read is computed")
        for at in range(more):
            links.same((places, at), (output, axis + at))
        return
    index = np.asarray(chosen, np.int64).reshape(-1) % size
    if more == 0:
        links.freeze(data, axis, "this index is read by its place", index)
    else:
        links.same((data, axis), (output, axis), index, np.arange(index.size))
        links.freeze_all("indices are renumbered", [places])


def _resize(links: NodeLinks) -> None:
    value, output = links.input(0), links.output
    assert value is not None
    crops = links.node.attributes.get_string("coordinate_transformation_mode", "") or ""
    for axis in range(len(links.shape(value))):
        sizes = links.shape(value)[axis], links.shape(output)[axis]
        if sizes[0] == sizes[1] and crops != "tf_crop_and_resize":
            links.same((value, axis), (output, axis))
        else:
            links.freeze(value, axis, "neighbours along this axis are combined")
            links.freeze(output, axis, "neighbours along this axis are combined")


def _shape(links: NodeLinks) -> None:
    """Sizes may go into the shapes of other values, and nowhere else."""
    value = links.input(0)
    assert value is not None
    rank = len(links.shape(value))
    start = links.node.attributes.get_int("start", 0)
    for axis in range(rank):
        start = start + rank if start < 0 else start
        if start <= axis < start + links.shape(links.output)[0]:
            reader = why_size_is_read(links.output, axis - start, links.sizes)
            if reader:
                links.freeze(value, axis, f"its size is read by {reader}")


RULES: Mapping[str, Callable[[NodeLinks], None]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Tile": _tile,
    "Pad": _pad,
    "Gather": _gather,
    "Resize": _resize,
    "Shape": _shape,
}
