"""Spreading labels over tied axes until nothing changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    import networkx
    from numpy.typing import NDArray

    from octavo.ir.axis_links import Axis, Block, Link

    Index = NDArray[np.int64]
    Needs = Callable[[Mapping[Axis, Index]], Iterable[tuple[Axis, str, str]]]

_NONE = -1
_STAYS = 0


@final
@dataclass
class Spread:
    """Labels by axis, -1 where an index has none; label 0 belongs to what has to stay.

    Two labels that meet at one index become one: `root` holds the smallest of each. `why` is the
    node and reason of the first refusal.
    """

    graph: networkx.MultiGraph[Axis]
    labels: dict[Axis, Index] = field(default_factory=dict)
    root: Index = field(default_factory=lambda: np.zeros(1, np.int64))
    why: tuple[str, str] | None = None
    queue: deque[Axis] = field(default_factory=deque)
    pending: dict[int, Block] = field(default_factory=dict)

    @staticmethod
    def run(graph: networkx.MultiGraph[Axis], seed: Axis, needs: Needs) -> Spread:
        """Every index of `seed` as a unit of its own, and what follows from that."""
        if seed not in graph:
            return Spread(graph)
        size = graph.nodes[seed]["size"]
        spread = Spread(graph, root=np.arange(size + 1))
        spread._put(seed, np.arange(size), np.arange(1, size + 1))
        spread._drain()
        if not spread.nothing:
            for axis, node, reason in list(needs(spread.labels)):
                spread._stay(axis, None, node, reason)
            spread._drain()
            spread._keep_one()
        return spread

    @property
    def nothing(self) -> bool:
        """Whether every unit has to stay."""
        return not np.any(self.root)

    def units(self) -> tuple[dict[Axis, Index], int]:
        """Labels from 0 on by axis, and how many there are."""
        if self.nothing:
            return {}, 0
        kept = np.unique(self.root)
        number = np.full(self.root.size + 1, _NONE, np.int64)
        number[kept[kept != _STAYS]] = np.arange(np.count_nonzero(kept != _STAYS))
        found = {}
        for axis, label in self.labels.items():
            roots = np.where(label >= 0, self.root[label], self.root.size)
            if np.any(number[roots] >= 0):
                found[axis] = number[roots]
        return found, int(np.count_nonzero(kept != _STAYS))

    def _drain(self) -> None:
        while not self.nothing:
            while self.queue and not self.nothing:
                self._visit(self.queue.popleft())
            waiting, before = list(self.pending.values()), self.root.copy()
            for block in waiting:
                self._divide(block)
            if self.queue or not waiting or self.nothing:
                if not self.queue:
                    return
                continue
            if np.array_equal(before, self.root):
                self._give_up(next(iter(self.pending.values())))

    def _visit(self, axis: Axis) -> None:
        for indices, node, reason in self.graph.nodes[axis]["frozen"]:
            self._stay(axis, indices, node, reason)
        for _, _, link in self.graph.edges(axis, data="link"):
            self._follow(link)
        for block in self.graph.nodes[axis]["blocks"]:
            self._divide(block)

    def _stay(self, axis: Axis, indices: Index | None, node: str, reason: str) -> None:
        label = self.labels[axis] if indices is None else self.labels[axis][indices]
        roots = np.unique(self.root[label[label >= 0]])
        if np.any(roots):
            self.why = self.why or (node, reason)
            self.root[np.isin(self.root, roots)] = _STAYS

    def _keep_one(self) -> None:
        """A unit that is all of an axis stays: no tensor may become empty."""
        for (name, _), label in self.labels.items():
            roots = np.unique(np.where(label >= 0, self.root[label], _NONE))
            if roots.size == 1 and roots[0] > _STAYS:
                self.why = self.why or ("", f"nothing would be left of '{name}'")
                self.root[self.root == roots[0]] = _STAYS

    def _follow(self, link: Link) -> None:
        every = np.arange(self.graph.nodes[link.a]["size"])
        left = every if link.left is None else link.left
        right = every if link.right is None else link.right
        for here, there, mine, other in (
            (link.a, link.b, left, right),
            (link.b, link.a, right, left),
        ):
            if here in self.labels:
                self._put(there, other, self.labels[here][mine])

    def _put(self, axis: Axis, indices: Index, label: Index) -> None:
        """Label indices of an axis; those that have a label already merge with it."""
        labelled = label >= 0
        if not labelled.any():
            return
        indices, label = indices[labelled], label[labelled]
        size = self.graph.nodes[axis]["size"]
        own = self.labels.setdefault(axis, np.full(size, _NONE, np.int64))
        fresh = own[indices] < 0
        changed = bool(fresh.any())
        own[indices[fresh]] = label[fresh]
        changed |= self._merge(own[indices], label)
        if changed and axis not in self.queue:
            self.queue.append(axis)

    def _merge(self, some: Index, others: Index) -> bool:
        a, b = self.root[some], self.root[others]
        pairs = np.unique(np.stack([a, b])[:, a != b], axis=1).T
        for first, second in pairs:
            low, high = sorted((int(self.root[first]), int(self.root[second])))
            self.root[self.root == high] = low
        return len(pairs) > 0

    def _divide(self, block: Block) -> None:
        """Carry labels through a change of factorisation; one that fits no axis waits."""
        sides = (block.left, block.left_sizes), (block.right, block.right_sizes)
        of_side = [self._elements(*side) for side in sides]
        both = (of_side[0] >= 0) & (of_side[1] >= 0)
        self._merge(of_side[0][both], of_side[1][both])
        wanted = np.where(of_side[0] >= 0, of_side[0], of_side[1])
        fits = [
            np.array_equal(wanted >= 0, have >= 0) or self._express(wanted, *side)
            for have, side in zip(of_side, sides, strict=True)
        ]
        if all(fits):
            self.pending.pop(id(block), None)
        else:
            self.pending[id(block)] = block

    def _elements(self, axes: tuple[Axis, ...], sizes: tuple[int, ...]) -> Index:
        """The label of every element of a side."""
        found = np.full(sizes, _NONE, np.int64)
        for at, axis in enumerate(axes):
            if axis not in self.labels:
                continue
            along = self.labels[axis].reshape([-1 if k == at else 1 for k in range(len(axes))])
            wide = np.broadcast_to(along, sizes)
            both = (found >= 0) & (wide >= 0)
            self._merge(found[both], wide[both])
            found = np.where(found >= 0, found, wide)
        return found.reshape(-1)

    def _express(self, wanted: Index, axes: tuple[Axis, ...], sizes: tuple[int, ...]) -> bool:
        """Label one axis of a side so that its elements are labelled as wanted, if one can."""
        roots = np.where(wanted >= 0, self.root[wanted], _NONE).reshape(sizes)
        raw = wanted.reshape(sizes)
        for at, axis in sorted(enumerate(axes), key=lambda pair: pair[1] not in self.labels):
            if sizes[at] == 1 and max(sizes) > 1:
                continue
            rows = np.moveaxis(roots, at, 0).reshape(sizes[at], -1)
            even = (rows == rows[:, :1]).all(axis=1)
            if (rows[~even] < 0).all():
                first = np.moveaxis(raw, at, 0).reshape(sizes[at], -1)[:, 0]
                self._put(axis, np.flatnonzero(even), first[even])
                return True
        return False

    def _give_up(self, block: Block) -> None:
        """What no axis of a side expresses has to stay."""
        del self.pending[id(block)]
        for axis in (*block.left, *block.right):
            if axis in self.labels:
                self._stay(axis, None, block.node, "its parts do not divide along one axis")
