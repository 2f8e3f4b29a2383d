"""Recognise the decomposed Gelu, so that no quantizer is placed inside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_GELU_OPSET = 20


def fuse_gelu(model: Model, ctx: PassContext) -> None:
    """`0.5·x·(1 + erf(x/√2))` in any order of its products becomes one Gelu (Hendrycks 2016).

    Edits the graph; exact but for the rounding of the product.
    """
    if model.ir.opset_imports.get("", 0) < _GELU_OPSET:
        return
    for node in list(model.graph):
        if node.op_type == "Erf" and (found := _match(node)) is not None:
            _replace(model.graph, *found)
            ctx.count("gelu fused")


def _match(erf: onnx_ir.Node) -> tuple[onnx_ir.Value, list[onnx_ir.Node]] | None:
    """The Gelu's input and its nodes, last one last, or `None`."""
    scaled = _producer(erf.inputs[0], "Div", "Mul")
    x = _scaled_input(scaled) if scaled is not None else None
    plus = _reader(erf, "Add")
    product = _reader(plus, "Mul") if plus is not None else None
    if scaled is None or x is None or plus is None or product is None:
        return None
    if not _is(_other(plus, erf.outputs[0]), 1.0):
        return None
    nodes = [scaled, erf, plus, product]
    other = _other(product, plus.outputs[0])
    halved = _producer(other, "Mul", "Div")
    if halved is not None and _halves(halved, x) and len(halved.outputs[0].uses()) == 1:
        return x, [halved, *nodes]
    last = _reader(product, "Mul", "Div")
    if other is x and last is not None and _halves(last, product.outputs[0]):
        return x, [*nodes, last]
    return None


def _scaled_input(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """`x` of `x / √2` or `x · √½`."""
    a, b = node.inputs
    if node.op_type == "Div":
        return a if _is(b, math.sqrt(2)) else None
    return a if _is(b, math.sqrt(0.5)) else b if _is(a, math.sqrt(0.5)) else None


def _halves(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    a, b = node.inputs
    if node.op_type == "Div":
        return a is value and _is(b, 2.0)
    return (a is value and _is(b, 0.5)) or (b is value and _is(a, 0.5))


def _is(value: onnx_ir.Value | None, number: float) -> bool:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    return math.isclose(float(np.asarray(tensor.numpy()).reshape(())), number, rel_tol=1e-4)


def _producer(value: onnx_ir.Value | None, *op_types: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types and not node.domain else None


def _reader(node: onnx_ir.Node, *op_types: str) -> onnx_ir.Node | None:
    """The only reader of a node, when it is of one of the types and sees no graph output."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    return uses[0].node if uses[0].node.op_type in op_types and not uses[0].node.domain else None


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    return next((v for v in node.inputs if v is not value), None)


def _replace(graph: onnx_ir.Graph, x: onnx_ir.Value, nodes: list[onnx_ir.Node]) -> None:
    last = nodes[-1]
    old = last.outputs[0]
    new = onnx_ir.Value(name=old.name, shape=old.shape, type=old.type)
    gelu = onnx_ir.node(
        "Gelu",
        [x],
        outputs=[new],
        name=last.name,
        doc_string=last.doc_string,
        metadata_props=dict(last.metadata_props),
    )
    onnx_ir.convenience.replace_nodes_and_values(graph, last, [last], [gelu], [old], [new])
    for node in reversed(nodes[:-1]):
        if not any(v.uses() for v in node.outputs):
            graph.remove(node, safe=True)
