"""A part of a model as a model of its own: from some values to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir

from octavo.ir.errors import UnknownName
from octavo.ir.fake_quant import declare_functions
from octavo.ir.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def extract(model: Model, inputs: Iterable[str], outputs: Sequence[str]) -> Model:
    """The nodes that compute `outputs` from `inputs`, values of the top-level graph.

    An input may be a constant, which the caller then feeds; graph inputs that are still needed
    stay inputs. Facts do not carry over. Raises UnknownName for a value the model lacks.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

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
    RemoveUnusedNodesPass()(own.ir)
    used = [v for v in graph.inputs if v.uses() or v.is_graph_output()]
    graph.inputs.clear()
    graph.inputs.extend([*used, *(v for v in fed if v not in used)])
    declare_functions(own.ir)
    return Model(own.ir, model.source)


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
