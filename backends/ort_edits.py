"""Edits of a graph that lowering makes: nodes with fresh names, nodes in the place of others."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


def insert(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    name: str,
    attributes: dict[str, int] | None = None,
    domain: str = "",
) -> onnx_ir.Node:
    """A new node in front of another; it and its value are called `name`, or like it."""
    name = unique(graph, name)
    node = onnx_ir.node(op_type, inputs, attributes=attributes or {}, domain=domain, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node


def unique(graph: onnx_ir.Graph, name: str) -> str:
    """A name that no node or value has; a model lowered before uses the same ones."""
    taken: set[str] = graph.meta.setdefault("octavo.names", _names(graph))
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    free = name if name not in taken else next(n for n in numbered if n not in taken)
    taken.add(free)
    return free


def _names(graph: onnx_ir.Graph) -> set[str]:
    names = {node.name or "" for node in graph} | set(graph.initializers)
    return names | {v.name or "" for node in graph for v in node.outputs}


def replace(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: dict[str, int] | None = None,
    domain: str = "",
    name: str | None = None,
) -> None:
    """Another operator computes the node's outputs, with its metadata and (unless given) name."""
    outputs = [onnx_ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
    made = onnx_ir.node(
        op_type,
        inputs,
        attributes=attributes or {},
        domain=domain,
        outputs=outputs,
        name=name or node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    onnx_ir.convenience.replace_nodes_and_values(
        graph, node, [node], [made], node.outputs, made.outputs
    )


def input_of(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """An input that the node must have."""
    value = node.inputs[index]
    assert value is not None
    return value


def input_array(node: onnx_ir.Node, index: int) -> NDArray[np.float32]:
    """The array of a constant float input."""
    tensor = input_of(node, index).const_value
    assert tensor is not None
    array: NDArray[np.float32] = tensor.numpy()
    return array


def producer_of(node: onnx_ir.Node, index: int) -> onnx_ir.Node:
    """The node that makes an input."""
    producer = input_of(node, index).producer()
    assert producer is not None
    return producer
