"""A graph cut into blocks that can be reconstructed one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, final

from octavo.ir.extract import read_by

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx_ir

    from octavo.ir.model import Model


@final
@dataclass(frozen=True)
class Block:
    """A run of nodes with weights, by names of values.

    `entries` are what lives where it begins: at most one of them depends on anything rounded, the
    others (masks, shapes, tables) are the same however the model is rounded. `exits` are the
    floats it computes that later nodes or the caller read and that rounding touches; `following`
    is what lives where it ends. `weights` are the names of its nodes with weights.
    """

    entries: tuple[str, ...]
    exits: tuple[str, ...]
    following: tuple[str, ...]
    weights: tuple[str, ...]


def blocks(
    model: Model, weights: Collection[str], rounded: Collection[str], most: int
) -> tuple[Block, ...]:
    """Cut a model where a single value that rounding touches is alive; blocks in running order.

    `weights` are the nodes whose weights are rounded, each of which ends up in one block;
    `rounded` those that read anything rounded. Neighbours are joined while they hold at most
    `most` weights; what has no cut inside stays whole.
    """
    return tuple(_Sweep(model, frozenset(weights), frozenset(rounded)).blocks(most))


class _Sweep:
    """What lives at every place between two nodes; place k is before node k."""

    def __init__(self, model: Model, weights: frozenset[str], rounded: frozenset[str]) -> None:
        self.nodes = list(model.graph)
        self.outputs = {id(value) for value in model.graph.outputs}
        self.places = [k for k, node in enumerate(self.nodes) if node.name in weights]
        self.born: dict[int, tuple[int, onnx_ir.Value]] = {
            id(value): (-1, value)
            for value in model.graph.inputs
            if value.name not in model.graph.initializers
        }
        self.last: dict[int, int] = {}
        self.touched: set[int] = set()
        for k, node in enumerate(self.nodes):
            read = [value for value in read_by(node) if id(value) in self.born]
            self.last.update((id(value), k) for value in read)
            if read or node.name in rounded:
                self.born.update((id(value), (k, value)) for value in node.outputs)
            if node.name in rounded or any(id(value) in self.touched for value in read):
                self.touched.update(id(value) for value in node.outputs)

    def blocks(self, most: int) -> Iterator[Block]:
        """Segments between the last cuts before each weight, joined up to `most` weights."""
        cuts = self._cuts()
        segments: list[tuple[int, int, list[int]]] = []
        begin, held = 0, []
        for place, after in pairwise([*self.places, len(self.nodes)]):
            held.append(place)
            cut = next((c for c in range(after, place, -1) if c in cuts), None)
            if cut is not None:
                segments.append((begin, cut, held))
                begin, held = cut, []
        for begin, end, places in _joined(segments, most):
            yield self._block(begin, end, places)

    def _cuts(self) -> set[int]:
        """Places where at most one touched value lives; the end always."""
        change = [0] * (len(self.nodes) + 2)
        for key in self.touched & self.last.keys():
            change[self.born[key][0] + 1] += 1
            change[self.last[key] + 1] -= 1
        alive, found = 0, {len(self.nodes)}
        for place in range(len(self.nodes)):
            alive += change[place]
            if alive <= 1:
                found.add(place)
        return found

    def _alive(self, place: int) -> tuple[str, ...]:
        found = (
            value.name or ""
            for key, (born, value) in self.born.items()
            if born < place <= self.last.get(key, -1)
        )
        return tuple(found)

    def _block(self, begin: int, end: int, places: list[int]) -> Block:
        following = self._alive(end)
        made = [v for node in self.nodes[begin:end] for v in node.outputs if id(v) in self.touched]
        exits = tuple(
            value.name or ""
            for value in made
            if (value.name in following or id(value) in self.outputs)
            and (value.dtype is None or value.dtype.is_floating_point())
        )
        names = tuple(self.nodes[k].name or "" for k in places)
        return Block(self._alive(begin), exits, following, names)


def _joined(
    segments: list[tuple[int, int, list[int]]], most: int
) -> Iterator[tuple[int, int, list[int]]]:
    held: tuple[int, int, list[int]] | None = None
    for begin, end, places in segments:
        if held is not None and len(held[2]) + len(places) <= most:
            held = (held[0], end, held[2] + places)
            continue
        if held is not None:
            yield held
        held = (begin, end, places)
    if held is not None:
        yield held
