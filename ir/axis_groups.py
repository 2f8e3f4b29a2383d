"""Axis groups: which channels, heads and neurons of an exported graph can go, and with what.

Every node ties indices of the axes of what it reads and gives (`axis_rules_*`). A graph of axes
(networkx) holds the ties; labels that start from one axis spread along them, merge where they
meet, and give the units that can only be removed together (the dependency graph of Fang et al.
2023, arXiv 2301.12900, at the level of single indices). What has no rule is frozen, so that
nothing is removed that was not proven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir import axis_rules_elementwise, axis_rules_layout, axis_rules_matrix
from octavo.ir.axis_links import Axis, NodeLinks
from octavo.ir.axis_sizes import AxisSizes
from octavo.ir.axis_spread import Spread
from octavo.ir.axis_zeros import vanishes
from octavo.ir.extract import read_by, values_by_name
from octavo.ir.subgraphs import subgraphs

if TYPE_CHECKING:
    import networkx
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.axis_links import Block
    from octavo.ir.model import Model

    Index = NDArray[np.int64]

Kind = Literal["channels", "heads", "dimensions"]
_RULES = {**axis_rules_elementwise.RULES, **axis_rules_matrix.RULES, **axis_rules_layout.RULES}
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Gather", "Einsum")


@final
@dataclass(frozen=True)
class Member:
    """Indices of one axis of a tensor."""

    tensor: str
    axis: int
    indices: Index


@final
@dataclass(frozen=True, eq=False)
class AxisGroup:
    """Alternatives of the same structure: any unit can go, with everything that belongs to it.

    `labels` say for every axis which unit each index belongs to, -1 for those of no unit. `kind`
    is "heads" where the axis counts matrices of a product of two activations, "dimensions" where
    it lies inside of such matrices. `nodes` touch a labelled axis, `layers` are those with weights
    that give one. Groups of one `signature` have the same structure.
    """

    name: str
    kind: Kind
    units: int
    labels: Mapping[Axis, Index]
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    signature: tuple[object, ...]

    def unit(self, index: int) -> tuple[Member, ...]:
        """All that has to be removed together with a unit."""
        found = ((axis, np.flatnonzero(label == index)) for axis, label in self.labels.items())
        return tuple(Member(*axis, indices) for axis, indices in found if indices.size)


def alternatives(group: AxisGroup, other: AxisGroup) -> bool:
    """Whether two groups divide the same indices of an axis, so that only one can shrink."""
    shared = group.labels.keys() & other.labels.keys()
    return any(np.any((group.labels[k] >= 0) & (other.labels[k] >= 0)) for k in shared)


@final
@dataclass(frozen=True)
class Refusal:
    """An output axis of a layer that cannot shrink: the layer, and the node that says why."""

    layer: str
    node: str
    reason: str


@final
@dataclass(frozen=True)
class AxisGroups:
    """What can be removed from a model, and what cannot."""

    groups: tuple[AxisGroup, ...]
    refused: tuple[Refusal, ...]

    def by_name(self) -> dict[str, AxisGroup]:
        return {group.name: group for group in self.groups}


def axis_groups(model: Model) -> AxisGroups:
    """The groups of the top-level graph; two that share a layer's axis are alternatives."""
    ties = AxisTies.of(model)
    found: list[AxisGroup] = []
    covered: dict[Axis, list[bool]] = {}
    why: dict[Axis, tuple[str, str]] = {}
    refused = []
    for axis, layer in ties.seeds():
        if axis in covered and (layer or any(covered[axis])):
            continue
        spread = Spread.run(ties.graph, axis, ties.needs)
        group = ties.group(spread)
        if group is not None:
            found.append(group)
            start = group.labels.get(axis, np.zeros(0))
            for at, labels in group.labels.items():
                # A spread from an axis with the same units along it would find the same group.
                alike = np.unique(labels).size == labels.size and labels.min() >= 0
                covered.setdefault(at, []).append(alike or np.array_equal(labels, start))
            continue
        node, reason = spread.why or (layer, "it has a single unit")
        if layer:
            refused.append(Refusal(layer, *why.get(axis, (node, reason))))
        else:
            why.update(dict.fromkeys(spread.labels, (node, reason)))
    return AxisGroups(_named(found), tuple(refused))


@final
@dataclass(frozen=True)
class AxisTies:
    """The graph of axes: edges hold links, nodes hold blocks, frozen indices and needs of zeros."""

    model: Model
    sizes: AxisSizes
    graph: networkx.MultiGraph[Axis]
    blocks: list[Block] = field(default_factory=list)

    @staticmethod
    def of(model: Model) -> AxisTies:
        import networkx

        ties = AxisTies(model, AxisSizes.of(model), networkx.MultiGraph())
        for node in model.graph:
            ties._add(_links(node, ties.sizes))
        for values, what in (
            (model.graph.inputs, "graph input"),
            (model.graph.outputs, "graph output"),
        ):
            for value in values:
                for axis in range(len(ties.sizes.first.get(value.name or "", ()))):
                    reason = f"it is an axis of the {what} '{value.name}'"
                    ties._freeze((value.name or "", axis), "", reason, None)
        return ties

    def _add(self, links: NodeLinks) -> None:
        for link in links.links:
            for axis in (link.a, link.b):
                self._node(axis, links.size(axis))
            self.graph.add_edge(link.a, link.b, link=link)
        for block in links.blocks:
            self.blocks.append(block)
            for axis in (*block.left, *block.right):
                self._node(axis, links.size(axis))
                self.graph.nodes[axis]["blocks"].append(block)
        for frozen in links.frozen:
            self._freeze(frozen.axis, frozen.node, frozen.reason, frozen.indices)
        for need in links.vanishing:
            for axis in need.axes:
                self._node(axis, links.size(axis))
                self.graph.nodes[axis]["needs"].append(need)

    def _node(self, axis: Axis, size: int) -> None:
        if axis not in self.graph:
            self.graph.add_node(axis, size=size, blocks=[], frozen=[], needs=[])

    def _freeze(self, axis: Axis, node: str, reason: str, indices: Index | None) -> None:
        self._node(axis, self.sizes.first[axis[0]][axis[1]])
        self.graph.nodes[axis]["frozen"].append((indices, node, reason))

    @cached_property
    def values(self) -> Mapping[str, onnx_ir.Value]:
        return values_by_name(self.model)

    def needs(self, labelled: Mapping[Axis, Index]) -> Iterator[tuple[Axis, str, str]]:
        """Axes whose removal would be exact only with zeros that nothing guarantees."""
        for axis in labelled:
            for need in self.graph.nodes[axis]["needs"]:
                axes = [a for a in need.axes if a in labelled]
                if not any(vanishes(self.values[name], labelled) for name, _ in axes):
                    yield axis, need.node, need.reason

    def seeds(self) -> Iterator[tuple[Axis, str]]:
        """Axes to start from: parts of divided axes first, then the outputs of layers by name."""
        for block in self.blocks:
            for side, sizes in ((block.left, block.left_sizes), (block.right, block.right_sizes)):
                wide = [a for a, size in zip(side, sizes, strict=True) if size > 1]
                for axis in wide if len(wide) > 1 or "#" in side[0][0] else ():
                    if "#" in axis[0] or self.sizes.fixed(*axis):
                        yield axis, ""
        for node in self.model.graph:
            if node.op_type in _WEIGHTED and not node.domain and self._has_weights(node):
                for value in node.outputs[:1]:
                    rank = len(self.sizes.first.get(value.name or "", ()))
                    last = 1 if node.op_type.startswith("Conv") else rank - 1
                    if rank and self.sizes.fixed(value.name or "", last):
                        yield (value.name or "", last), node.name or ""

    def _has_weights(self, node: onnx_ir.Node) -> bool:
        floats = (v for v in node.inputs if v is not None and v.const_value is not None)
        return any(v.const_value.dtype.is_floating_point() for v in floats if v.const_value)

    def group(self, spread: Spread) -> AxisGroup | None:
        """What the labels of a spread give, `None` where fewer than two units are left."""
        labels, units = spread.units()
        if units < 2 or not any(self._constant(axis) for axis in labels):
            return None
        touched = [n for n in self.model.graph if any((v.name, a) in labels for v, a in _axes(n))]
        kind: Kind = max((_kind(node, labels) for node in touched), key=_RANK.index)
        names = tuple(node.name or "" for node in touched)
        signature = tuple(sorted(_signature(touched, labels, units)))
        weighted = [n for n in touched if n.op_type in _WEIGHTED and self._has_weights(n)]
        layers = tuple(node.name or "" for node in weighted if _gives(node, labels))
        name = (layers or names)[0]
        return AxisGroup(name, kind, units, labels, names, layers, (kind, *signature))

    def _constant(self, axis: Axis) -> bool:
        value = self.values.get(axis[0])
        return value is not None and value.const_value is not None


_RANK: Sequence[Kind] = ("channels", "dimensions", "heads")


def _kind(node: onnx_ir.Node, labels: Mapping[Axis, Index]) -> Kind:
    """What the units are for a product of two activations that touches them."""
    if node.op_type != "MatMul" or any(v is None or _is_constant(v) for v in node.inputs):
        return "channels"
    axes = [(value, axis) for value, axis in _axes(node) if (value.name or "", axis) in labels]
    if not axes:
        return "channels"
    within = all(axis >= len(value.shape or ()) - 2 for value, axis in axes)
    return "dimensions" if within else "heads"


def _is_constant(value: onnx_ir.Value) -> bool:
    """Whether a value is a constant, or one turned as a head that shares the embedding's is."""
    if value.const_value is not None:
        return True
    node = value.producer()
    read = node.inputs[0] if node is not None and node.op_type == "Transpose" else None
    return read is not None and _is_constant(read)


def _gives(node: onnx_ir.Node, labels: Mapping[Axis, Index]) -> bool:
    given = node.outputs[0]
    return any((given.name or "", axis) in labels for axis in range(len(given.shape or ())))


def _axes(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, int]]:
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.shape is not None:
            yield from ((value, axis) for axis in range(len(value.shape)))


def _signature(
    nodes: Sequence[onnx_ir.Node], labels: Mapping[Axis, Index], units: int
) -> Iterator[tuple[str, int, int, float]]:
    """How the constants of a group are read: operator, input, axis and indices per unit."""
    for node in nodes:
        for at, value in enumerate(node.inputs):
            if value is None or value.const_value is None:
                continue
            for (name, axis), label in labels.items():
                if name == value.name:
                    yield node.op_type, at, axis, np.count_nonzero(label >= 0) / units


def _named(groups: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
    """Groups under unique names: the layer, and what is removed of it where it is no channel."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    found = []
    for group in groups:
        base = group.name if group.kind == "channels" else f"{group.name}#{group.kind}"
        seen[base] = seen.get(base, 0) + 1
        name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        found.append(replace(group, name=name))
    return tuple(found)


def _links(node: onnx_ir.Node, sizes: AxisSizes) -> NodeLinks:
    """What a node ties, everything frozen where it has no rule."""
    links = NodeLinks(node, sizes)
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    bodies = [g for attribute in node.attributes.values() for g in subgraphs(attribute)]
    if bodies:
        links.freeze_all(
            f"the body of a {node.op_type} reads or gives it", [*read_by(node), *node.outputs]
        )
    elif rule is None:
        links.freeze_all(f"there is no rule for {node.domain or 'operator'} {node.op_type}")
    elif not all(sizes.known(value) for value in values):
        links.freeze_all("the shape of what it reads or gives is unknown")
    else:
        rule(links)
    return links
