"""Which indices of tensor axes have to go together: what the rules of operators are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.axis_sizes import AxisSizes

    Index = NDArray[np.int64]

# Name of a tensor and its axis; a name with a # stands for sizes that only an operator knows.
Axis = tuple[str, int]


@final
@dataclass(frozen=True, eq=False)
class Link:
    """Index `left[k]` of axis `a` goes if and only if index `right[k]` of axis `b` does.

    `None` for both means that the axes agree index by index.
    """

    a: Axis
    b: Axis
    left: Index | None = None
    right: Index | None = None


@final
@dataclass(frozen=True, eq=False)
class Block:
    """The same elements, in row-major order, as axes `left` and as axes `right`."""

    node: str
    left: tuple[Axis, ...]
    right: tuple[Axis, ...]
    left_sizes: tuple[int, ...]
    right_sizes: tuple[int, ...]


@final
@dataclass(frozen=True)
class Frozen:
    """Indices of an axis (`None`: all) that have to stay, with the node and the reason."""

    axis: Axis
    node: str
    reason: str
    indices: Index | None = None


@final
@dataclass(frozen=True)
class Vanishing:
    """Removing indices of these axes is exact only where one of the tensors is zero there."""

    axes: tuple[Axis, ...]
    node: str
    reason: str


@final
@dataclass
class NodeLinks:
    """What one node says about its axes; rules fill it in."""

    node: onnx_ir.Node
    sizes: AxisSizes
    links: list[Link] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    vanishing: list[Vanishing] = field(default_factory=list)
    virtual: dict[Axis, int] = field(default_factory=dict)

    def input(self, index: int) -> onnx_ir.Value | None:
        """An input, `None` where it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    @property
    def output(self) -> onnx_ir.Value:
        return self.node.outputs[0]

    def shape(self, value: onnx_ir.Value) -> tuple[int, ...]:
        return self.sizes.shape(value)

    def constant(self, index: int) -> NDArray[np.generic] | None:
        """The array of a constant input."""
        value = self.input(index)
        known = value is not None and value.const_value is not None and not value.is_graph_input()
        return value.const_value.numpy() if known and value and value.const_value else None

    def same(
        self,
        a: tuple[onnx_ir.Value, int],
        b: tuple[onnx_ir.Value, int],
        left: Index | None = None,
        right: Index | None = None,
    ) -> None:
        """Tie two axes, negative ones counted from the end."""
        self.links.append(Link(self.axis(*a), self.axis(*b), left, right))

    def axis(self, value: onnx_ir.Value, axis: int) -> Axis:
        return value.name or "", axis % len(self.shape(value))

    def own(self, label: str, size: int) -> Axis:
        """An axis that no tensor has, for the operator's own bookkeeping."""
        axis = (f"{self.node.name}#{label}", 0)
        self.virtual[axis] = size
        return axis

    def size(self, axis: Axis) -> int:
        known = self.virtual.get(axis)
        return self.sizes.first[axis[0]][axis[1]] if known is None else known

    def block(self, left: Sequence[Axis], right: Sequence[Axis]) -> None:
        """Tie two factorisations of the same elements."""
        sizes = [tuple(map(self.size, side)) for side in (left, right)]
        self.blocks.append(Block(self.node.name or "", tuple(left), tuple(right), *sizes))

    def freeze(
        self, value: onnx_ir.Value, axis: int, reason: str, indices: Index | None = None
    ) -> None:
        """Refuse an axis, or some of its indices."""
        at = self.axis(value, axis)
        self.frozen.append(Frozen(at, self.node.name or "", reason, indices))

    def freeze_all(self, reason: str, values: Sequence[onnx_ir.Value | None] = ()) -> None:
        """Refuse every axis of what the node reads and gives, or of `values`."""
        for value in values or [*self.node.inputs, *self.node.outputs]:
            if value is not None and self.sizes.known(value):
                for axis in range(len(self.shape(value))):
                    self.freeze(value, axis, reason)

    def vanish(self, reason: str, *axes: Axis) -> None:
        """Ask for zeros along one of these axes wherever something is removed."""
        self.vanishing.append(Vanishing(axes, self.node.name or "", reason))
