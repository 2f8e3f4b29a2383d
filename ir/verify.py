"""What must hold of every model between two passes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from octavo.ir.errors import VerificationFailed
from octavo.ir.subgraphs import subgraphs

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model


def verify(model: Model, *, after_pass: str) -> None:
    """Check names, single assignment, topological order and known domains.

    Raises VerificationFailed that names the pass and the node.
    """
    problem = _names(model.graph) or _order(model.graph, set()) or _domains(model)
    if problem:
        message = f"the graph is broken after {after_pass}: {problem}"
        raise VerificationFailed(message, where=model.source.name)


def _names(graph: onnx_ir.Graph) -> str:
    names = Counter(node.name for node in graph)
    for name, times in names.items():
        if not name:
            return "a node has no name"
        if times > 1:
            return f"{times} nodes are called '{name}'"
    return ""


def _order(graph: onnx_ir.Graph, outer: set[int]) -> str:
    """Every value read must be an outer value, an input, a constant or an earlier output."""
    seen = outer | {id(v) for v in graph.inputs} | {id(v) for v in graph.initializers.values()}
    produced: set[str | None] = {v.name for v in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.inputs:
            if value is not None and id(value) not in seen:
                return f"node '{node.name}' reads '{value.name}' before it is computed"
        for attribute in node.attributes.values():
            for subgraph in subgraphs(attribute):
                if problem := _order(subgraph, seen):
                    return problem
        for value in node.outputs:
            if value.name and value.name in produced:
                return f"value '{value.name}' is assigned twice, by node '{node.name}' again"
            produced.add(value.name)
            seen.add(id(value))
    missing = next((v for v in graph.outputs if id(v) not in seen), None)
    return f"graph output '{missing.name}' is not computed" if missing is not None else ""


def _domains(model: Model) -> str:
    known = {*model.ir.opset_imports, *(key[0] for key in model.ir.functions)}
    known |= {"", "ai.onnx"}
    for node in model.graph.all_nodes():
        if node.domain not in known:
            return f"node '{node.name}' uses domain '{node.domain}' that no opset import names"
    return ""
