"""What a model looks like with fewer units: touched nodes, shapes of constants, small copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.extract import values_by_name
from octavo.ir.remove_units import remove_units

if TYPE_CHECKING:
    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.model import Model

    Shape = tuple[int, ...]

# Units that stay, by axis group; a group that is not named keeps all.
Kept = Mapping[str, int]


@final
@dataclass(frozen=True)
class WidthShapes:
    """A model and axis groups of it that can shrink together; no two divide the same indices."""

    model: Model
    groups: Mapping[str, AxisGroup]

    @staticmethod
    def of(model: Model, groups: Sequence[AxisGroup]) -> WidthShapes:
        """Of groups that are alternatives for an axis, the first stays."""
        taken: dict[tuple[str, int], np.ndarray[tuple[int], np.dtype[np.bool_]]] = {}
        found: dict[str, AxisGroup] = {}
        for group in groups:
            own = {axis: labels >= 0 for axis, labels in group.labels.items()}
            if any(np.any(taken[axis] & mask) for axis, mask in own.items() if axis in taken):
                continue
            for axis, mask in own.items():
                taken[axis] = taken[axis] | mask if axis in taken else mask
            found[group.name] = group
        return WidthShapes(model, found)

    @cached_property
    def touching(self) -> Mapping[str, tuple[str, ...]]:
        """The groups whose units a node reads or gives, by node name, those of weights first."""
        found: dict[str, dict[str, bool]] = {}
        constants = {n for n, v in values_by_name(self.model).items() if v.const_value is not None}
        for name, group in self.groups.items():
            named = {tensor for tensor, _ in group.labels} & constants
            nodes = set(group.nodes)
            for node in self.model.graph:
                if node.name in nodes:
                    weighs = any(v is not None and v.name in named for v in node.inputs)
                    found.setdefault(node.name or "", {})[name] = weighs
        return {
            node: tuple(sorted(some, key=lambda name: not some[name]))
            for node, some in found.items()
        }

    def shape(self, tensor: str, shape: Shape, kept: Kept) -> Shape:
        """The shape of a value when some groups keep fewer units."""
        dims = list(shape)
        for (axis, _), (group, per_unit) in self._axes.get(tensor, {}).items():
            gone = self.groups[group].units - kept.get(group, self.groups[group].units)
            dims[axis] -= round(per_unit * gone)
        return tuple(dims)

    def shapes(self, kept: Kept) -> dict[str, Shape]:
        """The shapes of all constants that get smaller."""
        touched = {
            tensor
            for tensor, axes in self._axes.items()
            if any(group in kept for group, _ in axes.values())
        }
        return {n: self.shape(n, s, kept) for n, s in self.constants.items() if n in touched}

    @cached_property
    def constants(self) -> Mapping[str, Shape]:
        """The shapes of all constants that some group divides."""
        values = values_by_name(self.model)
        return {
            name: tuple(value.const_value.shape.numpy())
            for name in self._axes
            if (value := values.get(name)) is not None and value.const_value is not None
        }

    def dividing(self, tensor: str) -> tuple[str, ...]:
        """The groups that divide some axis of a value."""
        return tuple(dict.fromkeys(group for group, _ in self._axes.get(tensor, {}).values()))

    def smaller(self, kept: Kept) -> Model:
        """A copy that keeps so many units, whichever: for its shapes, not for its numbers."""
        own = self.model.clone()
        gone = {name: range(self.groups[name].units - count) for name, count in kept.items()}
        remove_units(own, self.groups, {name: units for name, units in gone.items() if units})
        return own

    @cached_property
    def _axes(self) -> Mapping[str, Mapping[tuple[int, str], tuple[str, float]]]:
        """By tensor, per axis and group: the group, and the indices that one unit has."""
        found: dict[str, dict[tuple[int, str], tuple[str, float]]] = {}
        for name, group in self.groups.items():
            for (tensor, axis), labels in group.labels.items():
                per_unit = np.count_nonzero(labels >= 0) / group.units
                found.setdefault(tensor, {})[axis, name] = name, per_unit
        return found
