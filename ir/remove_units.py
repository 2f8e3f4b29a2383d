"""Removing units of axis groups from a graph: weights, attributes, shapes and indices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.axis_rules_elementwise import reduced_axes
from octavo.ir.axis_rules_matrix import GATES
from octavo.ir.axis_shapes import elements
from octavo.ir.axis_sizes import AxisSizes
from octavo.ir.errors import UsageError
from octavo.ir.extract import values_by_name
from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.axis_links import Axis
    from octavo.ir.model import Model

    Mask = NDArray[np.bool_]


def remove_units(
    model: Model, groups: Mapping[str, AxisGroup], removed: Mapping[str, Collection[int]]
) -> None:
    """Remove units, given by the name of their group, from a model that the caller owns.

    The groups have to be those of this model. Raises UsageError where nothing would be left of
    an axis, or where two groups are alternatives for the same axis.
    """
    sizes = AxisSizes.of(model)
    kept = kept_indices({groups[name]: units for name, units in removed.items() if units})
    edit = _Edit(model, sizes, kept)
    for node in list(model.graph):
        patch = _PATCHES.get(node.op_type)
        if patch is not None and not node.domain:
            patch(edit, node)
    for name, value in values_by_name(model).items():
        axes = {axis: mask for (tensor, axis), mask in kept.items() if tensor == name}
        if axes:
            _shrink(value, axes)


def kept_indices(removed: Mapping[AxisGroup, Collection[int]]) -> dict[Axis, Mask]:
    """Which indices of every touched axis stay."""
    kept: dict[Axis, Mask] = {}
    owner: dict[Axis, list[tuple[AxisGroup, Mask]]] = {}
    for group, units in removed.items():
        chosen = np.fromiter(units, np.int64)
        for axis, labels in group.labels.items():
            for other, labelled in owner.setdefault(axis, []):
                if np.any(labelled & (labels >= 0)):
                    raise _alternatives(group, other, axis)
            owner[axis].append((group, labels >= 0))
            gone = np.isin(labels, chosen)
            if gone.any():
                kept[axis] = kept.get(axis, np.ones(labels.size, np.bool_)) & ~gone
            if axis in kept and not kept[axis].any():
                message = f"nothing would be left of axis {axis[1]} of '{axis[0]}'"
                raise UsageError(message, where=group.name, hint="remove fewer units")
    return kept


@final
@dataclass(frozen=True)
class _Edit:
    """One removal: what stays of every axis, and how large axes were."""

    model: Model
    sizes: AxisSizes
    kept: Mapping[Axis, Mask]

    def mask(self, value: onnx_ir.Value | None, axis: int) -> Mask | None:
        """What stays of an axis, `None` where all of it does."""
        name = value.name or "" if value is not None else ""
        rank = len(self.sizes.first.get(name, ()))
        return self.kept.get((name, axis % rank)) if rank else None

    def size(self, name: str, axis: int) -> int | None:
        """The new size of an axis where it is fixed."""
        mask = self.kept.get((name, axis))
        if not self.sizes.fixed(name, axis):
            return None
        return self.sizes.first[name][axis] if mask is None else int(mask.sum())

    def set_input(self, node: onnx_ir.Node, index: int, array: NDArray[np.generic]) -> None:
        """Give a node a constant of its own: others may read the old one for another axis."""
        graph, at = self.model.graph, 0
        base = f"{node.outputs[0].name}_{index}_kept"
        while (name := base if not at else f"{base}_{at}") in graph.initializers:
            at += 1
        tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
        value = onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape(array.shape),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        node.replace_input_with(index, value)
        if old is not None and _unread(old):
            graph.initializers.pop(old.name or "")

    def constant(self, node: onnx_ir.Node, index: int) -> NDArray[np.generic]:
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        return value.const_value.numpy()


def _unread(value: onnx_ir.Value) -> bool:
    """Whether a constant has no reader left and no name that a caller knows."""
    known = value.is_graph_input() or value.is_graph_output()
    return value.is_initializer() and not value.uses() and not known


def _shape_input(edit: _Edit, node: onnx_ir.Node, index: int, data: onnx_ir.Value | None) -> None:
    """Make every element that no longer is the size of what the node gives a number that is."""
    output, wanted = node.outputs[0], {}
    if not edit.sizes.known(output):
        return
    name, source = output.name or "", node.inputs[index]
    have = elements(source, edit.sizes)
    offset = len(edit.sizes.shape(output)) - len(have)
    for at, element in enumerate(have):
        size = edit.size(name, at + offset)
        if size is None or element == -1:
            continue
        now = edit.size(*element) if isinstance(element, tuple) else element
        if now is None:
            now = edit.sizes.first[name][at + offset]
        if now != size and not (now in (0, 1) and _copied(edit, node, data, at + offset, size)):
            wanted[at] = size
    if wanted:
        _set_elements(edit, node, index, wanted)


def _copied(
    edit: _Edit, node: onnx_ir.Node, data: onnx_ir.Value | None, axis: int, size: int
) -> bool:
    """Whether a 0 of a Reshape or a 1 of an Expand takes the right size from what it reads."""
    zeros_are_sizes = bool(node.attributes.get_int("allowzero", 0))
    if data is None or zeros_are_sizes:
        return False
    shift = 0
    if node.op_type == "Expand":
        shift = len(edit.sizes.shape(node.outputs[0])) - len(edit.sizes.shape(data))
    return axis >= shift and edit.size(data.name or "", axis - shift) == size


def _set_elements(edit: _Edit, node: onnx_ir.Node, index: int, wanted: Mapping[int, int]) -> None:
    value = node.inputs[index]
    assert value is not None
    if value.const_value is not None:
        array = np.array(value.const_value.numpy())
        array[list(wanted)] = list(wanted.values())
        edit.set_input(node, index, array)
        return
    maker = value.producer()
    if maker is not None and maker.op_type == "Concat":
        own = _own_concat(edit, node, index, maker)
        start, left = 0, dict(wanted)
        for at, part in enumerate(own.inputs):
            assert part is not None
            count = edit.sizes.shape(part)[0]
            here = {k - start: left.pop(k) for k in range(start, start + count) if k in left}
            if here:
                _set_elements(edit, own, at, here)
            start += count
        return
    count = edit.sizes.shape(value)[0]
    chosen = np.isin(np.arange(count), list(wanted))
    numbers = np.array([wanted.get(k, 0) for k in range(count)], np.int64)
    where = onnx_ir.node("Where", [value, value, value], name=f"{node.name}_{index}_sizes")
    where.outputs[0].name = f"{node.outputs[0].name}_{index}_sizes"
    where.outputs[0].shape, where.outputs[0].type = value.shape, value.type
    edit.model.graph.insert_before(node, where)
    edit.set_input(where, 0, chosen)
    edit.set_input(where, 1, numbers)
    node.replace_input_with(index, where.outputs[0])


def _own_concat(edit: _Edit, node: onnx_ir.Node, index: int, maker: onnx_ir.Node) -> onnx_ir.Node:
    """A Concat that only this input reads, so that it can be changed."""
    value = maker.outputs[0]
    if len(value.uses()) == 1 and not value.is_graph_output():
        return maker
    own = onnx_ir.node(
        "Concat", list(maker.inputs), {"axis": 0}, name=f"{node.name}_{index}_concat"
    )
    own.metadata_props.update(maker.metadata_props)
    own.outputs[0].name = f"{node.outputs[0].name}_{index}_shape"
    own.outputs[0].shape, own.outputs[0].type = value.shape, value.type
    edit.model.graph.insert_before(node, own)
    node.replace_input_with(index, own.outputs[0])
    return own


def _reshape(edit: _Edit, node: onnx_ir.Node) -> None:
    _shape_input(edit, node, 1, node.inputs[0])


def _constant_of_shape(edit: _Edit, node: onnx_ir.Node) -> None:
    _shape_input(edit, node, 0, None)


def _conv(edit: _Edit, node: onnx_ir.Node) -> None:
    mask = edit.kept.get((f"{node.name}#group", 0))
    if mask is not None:
        name = "num_groups" if node.op_type == "GroupNormalization" else "group"
        node.attributes[name] = onnx_ir.AttrInt64(name, int(mask.sum()))


def _recurrent(edit: _Edit, node: onnx_ir.Node) -> None:
    mask = edit.mask(node.inputs[2], 2)
    if mask is not None:
        node.attributes["hidden_size"] = onnx_ir.AttrInt64("hidden_size", int(mask.sum()))


def _split(edit: _Edit, node: onnx_ir.Node) -> None:
    axis = node.attributes.get_int("axis", 0)
    if edit.mask(node.inputs[0], axis) is None:
        return
    axis %= len(edit.sizes.first[node.outputs[0].name or ""])
    parts = [edit.size(v.name or "", axis) for v in node.outputs]
    edit.set_input(node, 1, np.array(parts, np.int64))
    node.attributes.pop("num_outputs", None)


def _slice(edit: _Edit, node: onnx_ir.Node) -> None:
    value = node.inputs[0]
    assert value is not None
    rank = len(edit.sizes.shape(value))
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = range(rank) if given is None else [int(a) % rank for a in edit.constant(node, 3)]
    changed = [k for k, axis in enumerate(axes) if edit.mask(value, axis) is not None]
    if not changed:
        return
    starts, ends = (np.array(edit.constant(node, index)) for index in (1, 2))
    for at in changed:
        mask, size = edit.mask(value, axes[at]), edit.sizes.shape(value)[axes[at]]
        assert mask is not None
        first, last, _ = slice(int(starts[at]), int(ends[at])).indices(size)
        starts[at], ends[at] = mask[:first].sum(), mask[:last].sum()
    edit.set_input(node, 1, starts)
    edit.set_input(node, 2, ends)


def _pad(edit: _Edit, node: onnx_ir.Node) -> None:
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    rank = len(edit.sizes.shape(value))
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = range(rank) if given is None else [int(a) % rank for a in edit.constant(node, 3)]
    pads, changed = np.array(edit.constant(node, 1)), False
    for at, axis in enumerate(axes):
        mask = edit.mask(output, axis)
        if mask is not None:
            begin, end = int(pads[at]), int(pads[at + len(axes)])
            pads[at], pads[at + len(axes)] = mask[:begin].sum(), mask[mask.size - end :].sum()
            changed = True
    if changed:
        edit.set_input(node, 1, pads)


def _gather(edit: _Edit, node: onnx_ir.Node) -> None:
    axis, data = node.attributes.get_int("axis", 0), node.inputs[0]
    mask = edit.mask(data, axis)
    if mask is None:
        return
    index = np.array(edit.constant(node, 1))
    old = index.reshape(-1) % mask.size
    new = np.cumsum(mask) - 1
    renumbered = new[old][mask[old]].astype(index.dtype)
    edit.set_input(node, 1, renumbered.reshape(renumbered.shape if index.ndim else ()))


def _resize(edit: _Edit, node: onnx_ir.Node) -> None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        _shape_input(edit, node, 3, node.inputs[0])


def _mean(edit: _Edit, node: onnx_ir.Node) -> None:
    """Divide by the old size: what is gone was zero, and counted."""
    value = node.inputs[0]
    assert value is not None
    rank = len(edit.sizes.shape(value))
    axes = edit.constant(node, 1) if len(node.inputs) > 1 and node.inputs[1] else None
    share = 1.0
    for axis in reduced_axes(node, rank, axes) or ():
        mask = edit.mask(value, axis)
        share *= 1.0 if mask is None else mask.sum() / mask.size
    if share == 1.0:
        return
    output = node.outputs[0]
    scaled = onnx_ir.node("Mul", [output, output], name=f"{node.name}_share")
    scaled.metadata_props.update(node.metadata_props)
    scaled.outputs[0].name, output.name = output.name, f"{output.name}_mean"
    scaled.outputs[0].shape, scaled.outputs[0].type = output.shape, output.type
    edit.model.graph.insert_after(node, scaled)
    output.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
    output.shape = None
    scaled.replace_input_with(0, output)
    dtype = output.dtype.numpy() if output.dtype is not None else np.float32
    edit.set_input(scaled, 1, np.array(share, dtype))


def _shrink(value: onnx_ir.Value, axes: Mapping[int, Mask]) -> None:
    """Keep some indices of a constant, or say that a computed value has fewer."""
    if value.shape is not None:
        dims = [
            int(axes[k].sum()) if k in axes and isinstance(dim, int) else dim
            for k, dim in enumerate(value.shape)
        ]
        value.shape = onnx_ir.Shape(dims)
    if value.const_value is not None:
        array = reading(value.const_value, lambda a: _cut(a, axes))
        value.const_value = onnx_ir.tensor(array, value.const_value.dtype, name=value.name)


def _cut(array: NDArray[np.generic], axes: Mapping[int, Mask]) -> NDArray[np.generic]:
    for axis, mask in axes.items():
        array = np.compress(mask, array, axis=axis)
    return np.ascontiguousarray(array)


def _alternatives(group: AxisGroup, other: AxisGroup, axis: Axis) -> UsageError:
    return UsageError(
        f"'{group.name}' and '{other.name}' both divide axis {axis[1]} of '{axis[0]}'",
        why="removing units of one changes what the units of the other are",
        hint="remove units of one, then analyse the model again",
    )


_PATCHES: Mapping[str, Callable[[_Edit, onnx_ir.Node], None]] = {
    "Reshape": _reshape,
    "Expand": _reshape,
    "ConstantOfShape": _constant_of_shape,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Gather": _gather,
    "Resize": _resize,
    "ReduceMean": _mean,
    **dict.fromkeys(("Conv", "ConvTranspose", "GroupNormalization"), _conv),
    **dict.fromkeys(GATES, _recurrent),
}
