"""The model that passes see: an onnx-ir graph, the facts about it, and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, final

import numpy as np
import onnx_ir

from octavo.ir.errors import VerificationFailed
from octavo.ir.facts import Fact
from octavo.ir.mapped import reading
from octavo.ir.subgraphs import subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from onnx_ir import TensorProtocol

SomeFact = TypeVar("SomeFact", bound=Fact)

# The private digest cache lives on the tensor, which clones share.
_DIGEST = "octavo.digest"
PROVENANCE = "octavo.source"


@final
@dataclass(frozen=True)
class Source:
    """Where a model came from: its path (or a description) and the sha256 of its bytes."""

    name: str
    sha256: str
    bytes: int


@final
@dataclass(frozen=True)
class Model:
    """A graph with its facts. It never changes; a pass edits the private clone it is given.

    `ir` must not be edited by anybody but the pass that owns the clone. Every node has a unique
    name, and `metadata_props["octavo.source"]` of a node names the source node it comes from.
    """

    ir: onnx_ir.Model
    source: Source
    facts: Mapping[type[Fact], Fact] = field(default_factory=dict)

    @property
    def graph(self) -> onnx_ir.Graph:
        return self.ir.graph

    def clone(self) -> Model:
        """A private copy: nodes and values are new, tensors are shared, facts are kept."""
        return Model(self.ir.clone(), self.source, self.facts)

    def with_fact(self, fact: Fact) -> Model:
        return replace(self, facts={**self.facts, type(fact): fact})

    def keeping(self, kinds: Iterable[type[Fact]]) -> Model:
        """The same graph without the facts that are not of `kinds` or their subclasses."""
        kept = tuple(kinds)
        return replace(self, facts={k: v for k, v in self.facts.items() if issubclass(k, kept)})

    def find(self, kind: type[SomeFact]) -> SomeFact | None:
        fact = self.facts.get(kind)
        return fact if isinstance(fact, kind) else None

    def fact(self, kind: type[SomeFact]) -> SomeFact:
        """The fact of a kind; the pipeline check has made sure that it is there."""
        fact = self.find(kind)
        if fact is None:
            message = f"the model carries no {kind.__name__}"
            raise VerificationFailed(message, hint="run the pass that produces it first")
        return fact

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of graph structure, attributes and weight bytes; names included."""
        digest = hashlib.sha256()
        for line in _lines(self.ir):
            digest.update(line.encode())
            digest.update(b"\n")
        return digest.hexdigest()


def tensor_sha256(tensor: TensorProtocol) -> str:
    """sha256 of a tensor's dtype, shape and bytes, computed once per tensor object."""
    meta = getattr(tensor, "meta", None)
    if meta is not None and _DIGEST in meta:
        return str(meta[_DIGEST])
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.dtype == onnx_ir.DataType.STRING:
        digest.update(repr(tensor.numpy().tolist()).encode())
    else:
        digest.update(reading(tensor, _bytes))
    if meta is not None:
        meta[_DIGEST] = digest.hexdigest()
    return digest.hexdigest()


def _bytes(array: NDArray[np.generic]) -> bytes:
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).digest()


def weight_bytes(model: Model) -> int:
    """Bytes of all constant tensors of a model, each shared tensor counted once."""
    seen: dict[int, int] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                seen[id(value.const_value)] = value.const_value.nbytes
    return sum(seen.values())


def _lines(model: onnx_ir.Model) -> Iterator[str]:
    yield repr(sorted(model.opset_imports.items()))
    yield from _graph_lines(model.graph)
    for key, function in sorted(model.functions.items()):
        yield f"function {key}"
        yield from (_node_line(node) for node in function)


def _graph_lines(graph: onnx_ir.Graph) -> Iterator[str]:
    for role, values in (("in", graph.inputs), ("out", graph.outputs)):
        yield from (f"{role} {value.name} {value.type} {value.shape}" for value in values)
    for name, value in sorted(graph.initializers.items()):
        tensor = value.const_value
        yield f"const {name} {tensor_sha256(tensor) if tensor is not None else 'missing'}"
    for node in graph:
        yield _node_line(node)
        for attribute in node.attributes.values():
            for subgraph in subgraphs(attribute):
                yield from _graph_lines(subgraph)


def _node_line(node: onnx_ir.Node) -> str:
    inputs = [value.name if value is not None else "" for value in node.inputs]
    outputs = [value.name for value in node.outputs]
    attributes = [_attribute(a) for _, a in sorted(node.attributes.items())]
    return f"{node.domain}::{node.op_type} {node.name} {inputs} {outputs} {attributes}"


def _attribute(attribute: onnx_ir.Attr) -> str:
    if attribute.is_ref():
        return f"{attribute.name}=@{attribute.ref_attr_name}"
    if attribute.type == onnx_ir.AttributeType.TENSOR:
        return f"{attribute.name}={tensor_sha256(attribute.as_tensor())}"
    if attribute.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS):
        return f"{attribute.name}=graph"
    return f"{attribute.name}={attribute.value!r}"
