"""Axis groups that carry a whole residual branch: without their units it is a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir.passes.common

from octavo.passes.affine_layers import AffineLayer
from octavo.passes.drop_blocks import removable_branches
from octavo.passes.rewrite import Rewrite

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.prune_units import Pruner


@final
@dataclass(frozen=True)
class Branch:
    """The residual branch of an axis group, by node names.

    `end` is the layer that alone reads the units, `total` the sum of it and the identity, and
    `nodes` compute nothing but the branch.
    """

    end: str
    total: str
    nodes: frozenset[str]


def branch_groups(pruner: Pruner) -> dict[str, Branch]:
    """The groups all of whose units can go, by name: `x + f(x)` is then `x` and a bias."""
    nodes = {node.name or "": node for node in pruner.model.graph}
    ends: dict[str, tuple[AffineLayer, onnx_ir.Node]] = {}
    for name, index in removable_branches(pruner.model).items():
        layer = _layer_of(nodes[name].inputs[1 - index])
        if layer is not None:
            ends[layer.node.name or ""] = layer, nodes[name]
    found = {}
    for name, some in pruner.readers.items():
        end = some[0].node.name or "" if len(some) == 1 else ""
        if end not in ends or some[0].index != 1 or (some[0].units < 0).any():
            continue
        layer, total = ends[end]
        inside = _only_for(layer.last)
        if inside.issuperset(pruner.groups[name].layers):
            found[name] = Branch(end, total.name or "", inside)
    return found


def without_branch(model: Model, ctx: PassContext, branch: Branch) -> None:
    """Add the bias of the last layer of a branch to the identity, and nothing else, in place."""
    nodes = {node.name or "": node for node in model.graph}
    layer, total = AffineLayer.of(nodes[branch.end]), nodes[branch.total]
    assert layer is not None
    bias, made = layer.bias(), layer.last.outputs[0]
    constant = np.zeros(layer.channels) if bias is None else bias
    if layer.axis == 1:
        assert made.shape is not None
        constant = constant.reshape(-1, *[1] * (len(made.shape) - 2))
    index = next(k for k, value in enumerate(total.inputs) if value is made)
    assert made.dtype is not None
    Rewrite(model, ctx).set_constant(total, index, constant.astype(made.dtype.numpy()), "branch")
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model.ir)


def _layer_of(value: onnx_ir.Value | None) -> AffineLayer | None:
    """The layer that gives a value and nothing else."""
    node = value.producer() if value is not None else None
    if node is None or value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    own = [node, *(v.producer() for v in node.inputs if v is not None and node.op_type == "Add")]
    layers = (AffineLayer.of(each) for each in own if each is not None)
    return next((layer for layer in layers if layer is not None and layer.last is node), None)


def _only_for(last: onnx_ir.Node) -> frozenset[str]:
    """The nodes whose outputs nothing reads once a node is gone, itself included."""
    gone: set[onnx_ir.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in gone:
            continue
        read = node is not last and any(
            value.is_graph_output() or any(use.node not in gone for use in value.uses())
            for value in node.outputs
        )
        if not read:
            gone.add(node)
            makers = (value.producer() for value in node.inputs if value is not None)
            waiting += [maker for maker in makers if maker is not None]
    return frozenset(node.name or "" for node in gone)
