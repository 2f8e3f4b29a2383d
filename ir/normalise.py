"""Bring a graph into the one form that passes see, whatever exporter wrote it."""

from __future__ import annotations

import graphlib
from collections import Counter
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir
import onnx_ir.passes.common as onnx_passes

from octavo.ir.errors import ModelError, UnsafeModel
from octavo.ir.model import PROVENANCE
from octavo.ir.safety import MAX_NODES
from octavo.ir.weightless import is_small

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx_ir import TensorProtocol

# Before it, runtimes know an initializer only by the graph input of its name.
_IR_OF_FREE_INITIALIZERS = 4
DOMAINS = ("", "ai.onnx.ml", "com.microsoft", "octavo")


def normalise(model: onnx_ir.Model, where: str) -> None:
    """Inline functions, sort, lift constants and make names unique, in place.

    Afterwards every constant is an initializer, large ones of the main graph; every node has a
    unique name and metadata that names its source node. Raises ModelError.
    """
    inline(model, where)
    check_domains(model, where)
    sort(model.graph, where)
    onnx_passes.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, _IR_OF_FREE_INITIALIZERS)
    forget_impossible_shapes(model)
    lift_constants(model)
    resolve_identities(model)
    unique_names(model)
    hoist_weights(model)


def inline(model: onnx_ir.Model, where: str) -> None:
    """Inline local functions; octavo's own stay, for they are what its passes look for."""
    kept = {f.identifier() for f in model.functions.values() if f.domain == "octavo"}
    if len(kept) == len(model.functions):
        return
    _check_inlined_size(model, where)
    for node in model.graph.all_nodes():
        if node.op_identifier() in model.functions and node.name:
            # The inliner hands a call's metadata down to the nodes of the body.
            node.metadata_props.setdefault(PROVENANCE, node.name)
    onnx_passes.InlinePass(lambda function: function.identifier() not in kept)(model)
    for key in model.functions.keys() - kept:
        del model.functions[key]


def check_domains(model: onnx_ir.Model, where: str) -> None:
    """Refuse operators that neither ONNX nor ONNX Runtime defines."""
    for node in model.graph.all_nodes():
        if node.domain not in DOMAINS or (
            node.domain == "octavo" and node.op_identifier() not in model.functions
        ):
            message = f"operator '{node.op_type}' of domain '{node.domain}' is unknown"
            hint = "octavo reads the ONNX operators and those of com.microsoft"
            raise ModelError(message, where=f"{where}, node '{node.name}'", hint=hint)


def sort(graph: onnx_ir.Graph, where: str) -> None:
    """Order nodes topologically, changing as little as possible; a cycle is a ModelError."""
    try:
        graph.sort()
    except ValueError as error:
        needs = {
            node: [v.producer() for v in node.inputs if v is not None and v.producer()]
            for node in graph.all_nodes()
        }
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as cycle:
            names = " → ".join(f"'{node.name}'" for node in cycle.args[1][:8])
            raise ModelError("the graph has a cycle", where=where, why=names) from error
        raise ModelError("the graph has a cycle", where=where) from error


def forget_impossible_shapes(model: onnx_ir.Model) -> None:
    """Make negative dims unknown, as runtimes do, and drop shapes of values without a type."""
    for graph in model.graphs():
        for value in _values(graph):
            if value.shape is None:
                continue
            if value.type is None:
                value.shape = None
            elif any(isinstance(d, int) and d < 0 for d in value.shape):
                dims = [None if isinstance(d, int) and d < 0 else d for d in value.shape]
                value.shape = onnx_ir.Shape(dims)


def lift_constants(model: onnx_ir.Model) -> None:
    """Turn Constant nodes into initializers, except strings and graph outputs."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Constant" or node.domain or node.graph is None:
            continue
        tensor, old = _constant_tensor(node), node.outputs[0]
        if tensor is None:
            continue
        if old.is_graph_output():
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.Tensor(tensor.numpy()))
            continue
        dtype = onnx_ir.TensorType(tensor.dtype)
        shape = onnx_ir.Shape(tensor.shape.numpy())
        new = onnx_ir.Value(name=old.name, shape=shape, type=dtype, const_value=tensor)
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new)
        graph = node.graph
        graph.remove(node, safe=True)
        graph.initializers.add(new)


def resolve_identities(model: onnx_ir.Model) -> None:
    """Let the readers of Identity(initializer) read the initializer itself."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Identity" or node.domain or node.graph is None:
            continue
        source, copy = node.inputs[0], node.outputs[0]
        if source is None or not source.is_initializer() or copy.is_graph_output():
            continue
        copy.replace_all_uses_with(source)
        node.graph.remove(node, safe=True)


def unique_names(model: onnx_ir.Model) -> None:
    """Name every node and value once in the whole model; the first bearer keeps its name.

    Graph inputs and outputs of the main graph always keep theirs.
    """
    nodes, values = _Names(), _Names()
    named: set[int] = set()
    for value in (*model.graph.inputs, *model.graph.outputs):
        if id(value) not in named:
            value.name = values.claim(value.name or "value")
            named.add(id(value))
    for graph in model.graphs():
        for value in _values(graph):
            if id(value) not in named and value.name != "":
                value.name = values.claim(value.name or "value")
        for node in graph:
            source = node.name
            node.name = nodes.claim(node.name or node.op_type)
            node.metadata_props.setdefault(PROVENANCE, source or node.name)


def hoist_weights(model: onnx_ir.Model) -> None:
    """Move the large initializers of subgraphs to the main graph; names are already unique."""
    for graph in model.graph.subgraphs():
        inputs = set(graph.inputs)
        for name, value in list(graph.initializers.items()):
            if value.const_value is None or is_small(value.const_value) or value.is_graph_output():
                continue
            if value not in inputs:
                del graph.initializers[name]
                model.graph.initializers.add(value)


def _check_inlined_size(model: onnx_ir.Model, where: str) -> None:
    """Functions that call functions twice grow exponentially: count before inlining."""
    calls = {
        key: [n.op_identifier() for n in function.all_nodes()]
        for key, function in model.functions.items()
    }
    graph = {key: [c for c in called if c in calls] for key, called in calls.items()}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        message = f"function '{error.args[1][0][1]}' calls itself"
        raise ModelError(message, where=where) from error
    size: dict[onnx_ir.OperatorIdentifier, int] = {}
    for key in order:
        size[key] = sum(size.get(called, 1) for called in calls[key])
    total = sum(size.get(n.op_identifier(), 1) for n in model.graph.all_nodes())
    if total > MAX_NODES:
        message = f"the functions of the model unfold to more than {MAX_NODES} nodes"
        raise UnsafeModel(message, where=where)


def _constant_tensor(node: onnx_ir.Node) -> TensorProtocol | None:
    """What a Constant node holds; `None` for strings, which no kernel wants as initializers."""
    if len(node.attributes) != 1:
        return None
    name, attribute = next(iter(node.attributes.items()))
    if attribute.is_ref() or name not in _CONSTANT_DTYPES:
        return None
    dtype = _CONSTANT_DTYPES[name]
    if dtype is None:
        return attribute.as_tensor()
    return onnx_ir.Tensor(np.array(attribute.value, dtype))


_CONSTANT_DTYPES = {
    "value": None,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph:
        yield from node.outputs


@final
class _Names:
    """Names in use; `claim` gives a name itself, or the first free `name_1`, `name_2`, …"""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: Counter[str] = Counter()

    def claim(self, name: str) -> str:
        candidate = name
        while candidate in self._taken:
            self._last[name] += 1
            candidate = f"{name}_{self._last[name]}"
        self._taken.add(candidate)
        return candidate
