"""A part of a model as a model of its own: from some values to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir

from octavo.ir.errors import UnknownName
from octavo.ir.fake_quant import declare_functions
from octavo.ir.model import Model
from octavo.ir.subgraphs import subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def extract(model: Model, inputs: Iterable[str], outputs: Sequence[str]) -> Model:
    """The nodes that compute `outputs` from `inputs`, values of the top-level graph.

    An input may be a constant, which the caller then feeds; graph inputs that are still needed
    stay inputs. Facts do not carry over. Raises UnknownName for a value the model lacks.
    """
    values = values_by_name(model)
    inputs = tuple(dict.fromkeys(inputs))
    for name in (*inputs, *outputs):
        if name not in values:
            raise UnknownName("value", name, values)
    graph, fed = model.graph, [values[name] for name in inputs]
    nodes, read = _needed(graph, [values[name] for name in outputs], set(map(id, fed)))
    used = [value for value in graph.inputs if id(value) in read]
    view = onnx_ir.GraphView(
        [*used, *(value for value in fed if value not in used)],
        [values[name] for name in outputs],
        nodes=nodes,
        initializers=[
            v for v in graph.initializers.values() if id(v) in read and v.name not in inputs
        ],
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    functions = list(model.ir.functions.values())
    # Only what is needed is copied: a large model is extracted from once per layer.
    own = onnx_ir.Model(
        view.clone(),
        ir_version=model.ir.ir_version,
        functions=[function.clone() for function in functions],
    )
    _feed(own.graph, inputs)
    declare_functions(own)
    return Model(own, model.source)


def read_by(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """What a node reads, in the bodies of If, Loop and Scan too."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        for graph in subgraphs(attribute):
            values += [v for inner in graph.all_nodes() for v in inner.inputs if v is not None]
            values.extend(list(graph.outputs))
    return values


def _needed(
    graph: onnx_ir.Graph, outputs: Iterable[onnx_ir.Value], fed: set[int]
) -> tuple[list[onnx_ir.Node], set[int]]:
    """The nodes that outputs depend on beyond what is fed; the ids of all values that are read."""
    read = set(map(id, outputs))
    nodes = []
    for node in reversed(graph):
        if any(id(value) in read and id(value) not in fed for value in node.outputs):
            read.update(map(id, read_by(node)))
            nodes.append(node)
    return nodes[::-1], read


def variable_values(graph: onnx_ir.Graph) -> frozenset[int]:
    """Ids of the values of a graph that depend on one of its inputs; all others are constants."""
    known = {id(value) for value in graph.inputs}
    for node in graph:
        if any(id(value) in known for value in read_by(node)):
            known.update(id(value) for value in node.outputs)
    return frozenset(known)


def values_by_name(model: Model) -> dict[str, onnx_ir.Value]:
    """Every value of the top-level graph: inputs, constants, and what nodes compute."""
    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    named = (*graph.inputs, *graph.initializers.values(), *made)
    return {value.name: value for value in named if value.name}


def _feed(graph: onnx_ir.Graph, names: Iterable[str]) -> None:
    """Let inputs of these names be fed, and read by all who read what they stand for."""
    inputs = {value.name: value for value in graph.inputs}
    for name in names:
        inputs[name].const_value = None
    for node in graph:
        for value in node.outputs:
            if value.name in inputs:
                fed = inputs[value.name]
                value.replace_all_uses_with(fed, replace_graph_outputs=True)
                value.name = f"{fed.name}#computed"
