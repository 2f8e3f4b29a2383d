"""Cut a model into consecutive parts of few constants, to run it without all of them in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.extract import extract, read_by, variable_values

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model


@final
@dataclass(frozen=True)
class Part:
    """Some of a model's nodes, by names of values.

    `reads` were given or computed by parts before, `gives` are outputs or read by parts behind,
    and nobody reads `drops` afterwards.
    """

    model: Model
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]


def parts(model: Model, limit_bytes: int) -> Iterator[Part]:
    """The parts in the order they run, each cut out when it is asked for.

    The constants of a part, and those they are computed from, take at most `limit_bytes`, or
    belong to one node. Together the parts give every graph output that is not an input.
    """
    variable = variable_values(model.graph)
    groups = list(_groups(model.graph, variable, limit_bytes))
    place = {id(v): k for k, nodes in enumerate(groups) for n in nodes for v in n.outputs}
    last = {id(value): len(groups) for value in model.graph.outputs}
    for k in reversed(range(len(groups))):
        for value in (v for node in groups[k] for v in read_by(node)):
            last.setdefault(id(value), k)
    for k, nodes in enumerate(groups):
        read = {id(v): v for node in nodes for v in read_by(node) if id(v) in variable}
        reads = [v for key, v in read.items() if place.get(key, -1) < k]
        gives = [v for node in nodes for v in node.outputs if last.get(id(v), k) > k]
        drops = [v for v in reads if last[id(v)] == k]
        names = [tuple(dict.fromkeys(v.name or "" for v in some)) for some in (reads, gives, drops)]
        if gives:
            yield Part(extract(model, names[0], names[1]), *names)
    known = {*place, *map(id, model.graph.inputs)}
    constants = tuple(v.name or "" for v in model.graph.outputs if id(v) not in known)
    if constants:
        yield Part(extract(model, (), constants), (), constants, ())


def _groups(
    graph: onnx_ir.Graph, variable: frozenset[int], limit_bytes: int
) -> Iterator[Sequence[onnx_ir.Node]]:
    """Consecutive nodes that depend on an input."""
    group: list[onnx_ir.Node] = []
    sizes: dict[int, int] = {}
    for node in graph:
        if not any(id(value) in variable for value in node.outputs):
            continue
        own = _constants(node, variable)
        if group and sum({**sizes, **own}.values()) > limit_bytes:
            yield group
            group, sizes = [], {}
        group.append(node)
        sizes |= own
    if group:
        yield group


def _constants(node: onnx_ir.Node, variable: frozenset[int]) -> dict[int, int]:
    """Bytes of the constants that a node depends on without an input between, by tensor."""
    found: dict[int, int] = {}
    waiting = read_by(node)
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in variable or id(value) in seen:
            continue
        seen.add(id(value))
        if value.const_value is not None:
            found[id(value.const_value)] = value.const_value.nbytes
        elif (maker := value.producer()) is not None:
            waiting += read_by(maker)
    return found
