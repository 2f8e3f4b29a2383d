"""Decision groups: which nodes of a graph must get one decision, and the role each plays."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING

import networkx as nx

from octavo.ir.menu import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import onnx_ir

    from octavo.ir.model import Model
    from octavo.ir.target import KernelRow, Target, Tie

Nodes = list["onnx_ir.Node"]
_LINEAR = ("Conv", "MatMul", "Gemm")
_PROJECTIONS = ("MatMul", "Gemm")
# Nodes that hand on what a linear node computed: a sum of their outputs is a sum of its outputs.
_CARRIERS = ("Relu", "Clip", "BatchNormalization", "Add", "Identity", "Dropout")
_NEIGHBOURHOOD = 2
_REASONS: Mapping[Tie, str] = {
    "weight": "read one weight",
    "input": "project one input",
    "sum": "are added to each other",
    "concat": "are concatenated",
}


def find_groups(model: Model, target: Target, ties: Sequence[Tie] = ()) -> dict[str, Group]:
    """Groups of nodes with weights, by the name of their first node, in topological order.

    Nodes that a tie connects, directly or through others, form one group. `ties` (none: those of
    the target) names the rules.
    """
    weighted = {n.name or "": n for n in model.graph if weight_row(n, target) is not None}
    order = {name: index for index, name in enumerate(weighted)}
    graph = nx.Graph()
    graph.add_nodes_from(weighted)
    reasons: dict[str, str] = {}
    for tie in ties or target.ties:
        for nodes in _RULES[tie](model, list(weighted.values()), target):
            names = [node.name or "" for node in nodes]
            nx.add_path(graph, names)
            reasons |= dict.fromkeys(names, _REASONS[tie])
    roles = _roles(model, weighted)
    groups = {}
    for component in nx.connected_components(graph):
        names = sorted(component, key=order.__getitem__)
        reason = reasons.get(names[0], "") if len(names) > 1 else ""
        role = "+".join(dict.fromkeys(roles[name] for name in names))
        groups[names[0]] = Group(names[0], tuple(names), reason, role)
    return dict(sorted(groups.items(), key=lambda item: order[item[0]]))


def weight_row(node: onnx_ir.Node, target: Target) -> KernelRow | None:
    """A row of the target that reads constant weights of the node, if there is one."""
    for method in ("storage", "static", "dynamic", "float8", "float4", "weight-only"):
        row = target.support(node, method).row
        if row is not None and row.weights:
            return row
    return None


def weight_source(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The initializer a weight comes from, also through a Transpose."""
    made = value.producer() if value is not None else None
    return made.inputs[0] if made is not None and made.op_type == "Transpose" else value


def _by_weight(model: Model, nodes: Nodes, target: Target) -> Iterator[Nodes]:
    readers: dict[str, Nodes] = defaultdict(list)
    for node in nodes:
        row = weight_row(node, target)
        for index in row.weights if row is not None else ():
            source = weight_source(node.inputs[index])
            readers[(source.name or "") if source is not None else ""].append(node)
    yield from (group for group in readers.values() if len(group) > 1)


def _by_input(model: Model, nodes: Nodes, target: Target) -> Iterator[Nodes]:
    readers: dict[tuple[str, str], Nodes] = defaultdict(list)
    for node in nodes:
        if node.op_type in _PROJECTIONS and node.inputs[0] is not None:
            readers[node.op_type, node.inputs[0].name or ""].append(node)
    yield from (group for group in readers.values() if len(group) > 1)


def _meeting(op_type: str) -> Callable[[Model, Nodes, Target], Iterator[Nodes]]:
    """Linear nodes whose outputs meet in an operator of this type."""

    def rule(model: Model, nodes: Nodes, target: Target) -> Iterator[Nodes]:
        linear = {id(node) for node in nodes if node.op_type in _LINEAR}
        for node in model.graph:
            if node.op_type != op_type or node.domain:
                continue
            found = [_linear_behind(value, linear) for value in node.inputs]
            met = [made for made in found if made is not None]
            if len(met) > 1:
                yield met

    return rule


def _linear_behind(value: onnx_ir.Value | None, linear: set[int]) -> onnx_ir.Node | None:
    """The linear node that computes a value, behind what carries it (a sum: the first found)."""
    pending, seen = [value], set[int]()
    while pending:
        front = pending.pop()
        node = front.producer() if front is not None else None
        if node is None or id(node) in seen:
            continue
        if id(node) in linear:
            return node
        seen.add(id(node))
        if node.op_type in _CARRIERS and not node.domain:
            pending.extend(v for v in reversed(node.inputs) if v is not None)
    return None


_RULES: Mapping[Tie, Callable[[Model, Nodes, Target], Iterator[Nodes]]] = {
    "weight": _by_weight,
    "input": _by_input,
    "sum": _meeting("Add"),
    "concat": _meeting("Concat"),
}


def _roles(model: Model, weighted: Mapping[str, onnx_ir.Node]) -> dict[str, str]:
    """A digest of operator, weight shapes and neighbourhood of every weighted node.

    Weisfeiler and Lehman's refinement (1968) of operator types, so that layers at the same
    place of repeated blocks get the same role whatever they are called.
    """
    labels = {id(node): node.op_type for node in model.graph}
    for _ in range(_NEIGHBOURHOOD):
        labels = {id(node): _refined(node, labels) for node in model.graph}
    return {name: _digest((labels[id(n)], *_shapes(n))) for name, n in weighted.items()}


def _refined(node: onnx_ir.Node, labels: Mapping[int, str]) -> str:
    makers = [v.producer() if v is not None else None for v in node.inputs]
    before = [labels.get(id(maker), "") for maker in makers]
    readers = (reader for value in node.outputs for reader in value.consumers())
    after = sorted(labels.get(id(reader), "") for reader in readers)
    return _digest((labels[id(node)], "<", *before, ">", *after))


def _shapes(node: onnx_ir.Node) -> Iterator[str]:
    for value in node.inputs:
        if value is not None and value.const_value is not None:
            yield str(tuple(value.const_value.shape))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
