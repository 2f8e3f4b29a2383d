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
    own = model.clone()
    graph = own.graph
    values = values_by_name(own)
    inputs = tuple(inputs)
    for name in (*inputs, *outputs):
        if name not in values:
            raise UnknownName("value", name, values)
    fed = [_fed(graph, values[name]) for name in dict.fromkeys(inputs)]
    values |= {value.name or "": value for value in fed}
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in outputs)
    read = _needed(graph)
    used = [value for value in graph.inputs if id(value) in read]
    for name in [n for n, value in graph.initializers.items() if id(value) not in read]:
        graph.initializers.pop(name)
    graph.inputs.clear()
    graph.inputs.extend([*used, *(v for v in fed if v not in used)])
    declare_functions(own.ir)
    return Model(own.ir, model.source)


def read_by(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """What a node reads, in the bodies of If, Loop and Scan too."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        for graph in subgraphs(attribute):
            values += [v for inner in graph.all_nodes() for v in inner.inputs if v is not None]
            values.extend(list(graph.outputs))
    return values


def _needed(graph: onnx_ir.Graph) -> set[int]:
    """Remove the nodes no output depends on; the ids of all values that are still read.

    The body of a removed node would count among the uses of what it captured.
    """
    read = set(map(id, graph.outputs))
    unused = []
    for node in reversed(list(graph)):
        if any(id(value) in read for value in node.outputs):
            read.update(map(id, read_by(node)))
        else:
            unused.append(node)
    graph.remove(unused)
    return read


def values_by_name(model: Model) -> dict[str, onnx_ir.Value]:
    """Every value of the top-level graph: inputs, constants, and what nodes compute."""
    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    named = (*graph.inputs, *graph.initializers.values(), *made)
    return {value.name: value for value in named if value.name}


def _fed(graph: onnx_ir.Graph, value: onnx_ir.Value) -> onnx_ir.Value:
    """A graph input that stands for a value; whoever read the value reads the input."""
    if value.is_graph_input():
        return value
    name = value.name or ""
    fed = onnx_ir.Value(name=name, shape=value.shape, type=value.type)
    value.replace_all_uses_with(fed, replace_graph_outputs=True)
    if name in graph.initializers:
        graph.initializers.pop(name)
    else:
        value.name = f"{name}#computed"
    graph.inputs.append(fed)
    return fed
