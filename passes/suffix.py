"""Run only what lies behind a few nodes: their inputs are computed once, changed, and fed again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

from octavo.ir.extract import extract, read_by, variable_values

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model


@final
@dataclass(frozen=True)
class Flow:
    """What depends on what in the top-level graph, found once for many suffixes."""

    model: Model

    @cached_property
    def nodes(self) -> Mapping[str, onnx_ir.Node]:
        return {node.name or "": node for node in self.model.graph}

    @cached_property
    def variable(self) -> frozenset[int]:
        """Ids of the values that depend on a graph input; all others are constants."""
        return variable_values(self.model.graph)

    def suffix(self, starts: Iterable[onnx_ir.Node]) -> Suffix:
        """The starts with everything that depends on them."""
        inside = {id(node) for node in starts}
        made: set[int] = set()
        members = []
        for node in self.model.graph:
            if id(node) in inside or any(id(value) in made for value in read_by(node)):
                members.append(node)
                made.update(id(value) for value in node.outputs)
        read = {id(v): v for node in members for v in read_by(node) if id(v) not in made}
        boundary = [v.name or "" for k, v in read.items() if k in self.variable]
        outputs = [v.name or "" for v in self.model.graph.outputs if id(v) in made]
        return Suffix(self.model, frozenset(n.name or "" for n in members), boundary, outputs)


@final
@dataclass(frozen=True)
class Suffix:
    """A part of a model up to its outputs: the values it reads, and the outputs it computes."""

    model: Model
    nodes: frozenset[str]
    boundary: Sequence[str]
    outputs: Sequence[str]

    def holds_readers(self, value: onnx_ir.Value) -> bool:
        """Whether nobody outside reads a value."""
        return all(node.name in self.nodes for node in value.consumers())

    def runnable(self, constants: Iterable[str]) -> Model:
        """The part as a model that is fed the boundary and the named constants."""
        return extract(self.model, (*self.boundary, *constants), self.outputs)

    def before(self, inputs: Iterable[str]) -> Model | None:
        """The model that computes the boundary, `None` where graph inputs are all there is."""
        given = set(inputs)
        wanted = [name for name in self.boundary if name not in given]
        return extract(self.model, (), wanted) if wanted else None
