"""A programme as linear rows over 0/1 columns, and the bounds that multipliers give.

Column j of the first `candidates` is 1 where its candidate is chosen; further columns are
continuous in [0, upper]: the crossings of borders, and the memory where it is minimised. Rows are
`coefficients · columns <= limit`; that every group takes exactly one candidate is implied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from octavo.passes.programme import Candidate, MemoryRow, Programme

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@final
@dataclass(frozen=True)
class Row:
    """sum(coefficients * x[columns]) <= limit; no column occurs twice."""

    columns: Integers
    coefficients: Floats
    limit: float


@final
@dataclass(frozen=True)
class LinearModel:
    """Minimise `constant + cost · columns` subject to rows.

    `group` (sorted) and `candidate` say what the first columns stand for, `integer` which of them
    are integer in a group whose borders or memory count; `upper` bounds the continuous columns.
    """

    names: tuple[str, ...]
    group: Integers
    candidate: Integers
    integer: Mask
    cost: Floats
    upper: Floats
    constant: float
    rows: tuple[Row, ...]

    @property
    def starts(self) -> Integers:
        """The first column of every group."""
        return np.searchsorted(self.group, np.arange(len(self.names)))

    def with_row(self, row: Row) -> LinearModel:
        """The model with one row more."""
        return replace(self, rows=(*self.rows, row))

    def choice(self, columns: Integers) -> dict[str, int]:
        """The choice that a column per group stands for."""
        return dict(zip(self.names, self.candidate[columns].tolist(), strict=True))

    def without(self, choice: Mapping[str, int]) -> LinearModel:
        """The model with a choice excluded: not all of its columns may be 1."""
        index = np.array([choice[name] for name in self.names], dtype=np.int64)
        columns = np.flatnonzero(self.candidate == index[self.group])
        if len(columns) < len(self.names):
            return self
        return self.with_row(Row(columns, np.ones(len(columns)), len(columns) - 1.0))

    def lagrangian(self, multipliers: Floats) -> tuple[float, Floats]:
        """A lower bound for multipliers >= 0 of the rows, and what each column adds to it.

        A choice that takes a column costs at least the bound plus the column's reduced cost
        (variable fixing: Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
        1995, section 4). This holds for any multipliers; the dual's optimum gives the best bound.
        """
        priced = self.cost.copy()
        bound = self.constant
        for row, multiplier in zip(self.rows, multipliers.tolist(), strict=True):
            priced[row.columns] += multiplier * row.coefficients
            bound -= multiplier * row.limit
        count = len(self.group)
        least = np.minimum.reduceat(priced[:count], self.starts)
        bound += float(least.sum() + np.minimum(priced[count:] * self.upper, 0.0).sum())
        return bound, priced[:count] - least[self.group]


def undominated(
    programme: Programme, used: Sequence[str], coupled: set[str], copies: int = 1
) -> dict[str, list[int]]:
    """Per group, the candidates that fewer than `copies` others make superfluous.

    One makes another superfluous if it is no worse in every used resource, equally integer where
    the group is coupled, and needs the same of others; of equals, the one better in the unused
    resources, then the first. Where others need a certain candidate, none is superfluous.
    """
    needed = programme.needed
    unused = [name for name in programme.resources if name not in used]
    kept = {}
    for name, candidates in programme.groups.items():
        table = np.array([[_cost(c, r) for r in used] for c in candidates]).T
        rest = np.array([[_cost(c, r) for r in unused] for c in candidates]).T
        order = np.lexsort((*rest[::-1],)) if unused else np.arange(len(candidates))
        rank = np.argsort(order, kind="stable")
        no_worse = (table[:, :, None] <= table[:, None, :]).all(axis=0)
        better = no_worse & (~no_worse.T | (rank[:, None] < rank))
        if name in coupled:
            flags = np.array([c.integer for c in candidates])
            better &= flags[:, None] == flags
        kinds = {tuple(sorted(c.needs.items())): None for c in candidates}
        if name in needed:
            better[:] = False
        elif len(kinds) > 1:
            index = {key: at for at, key in enumerate(kinds)}
            own = np.array([index[tuple(sorted(c.needs.items()))] for c in candidates])
            better &= own[:, None] == own
        kept[name] = np.flatnonzero(better.sum(axis=0) < copies).tolist()
    return kept


def coupled_groups(programme: Programme, used: Sequence[str]) -> set[str]:
    """Groups for which it matters whether they are integer."""
    names: set[str | None] = set()
    if "seconds" in used:
        names |= {n for border in programme.borders for n in (border.producer, *border.readers)}
    if "memory" in used:
        names |= {name for row in programme.memory_rows for name in row.saved}
    return {name for name in names if name is not None}


def linear_model(
    programme: Programme, objective: str, limits: Mapping[str, float], kept: Mapping[str, list[int]]
) -> LinearModel:
    """The programme's kept candidates as columns, its limits and borders as rows."""
    used = (objective, *limits)
    names = tuple(kept)
    candidates = [programme.groups[name][j] for name in names for j in kept[name]]
    group = np.repeat(np.arange(len(names)), [len(kept[name]) for name in names])
    coupled = coupled_groups(programme, used)
    flags = np.array([c.integer for c in candidates]) & np.isin(
        group, [i for i, name in enumerate(names) if name in coupled]
    )
    sides = {
        name: np.flatnonzero(flags & (group == i))
        for i, name in enumerate(names)
        if name in coupled
    }
    builder = _Builder(len(candidates), sides)
    crossings = builder.borders(programme) if "seconds" in used else np.zeros(0)
    fixed = {name: programme.fixed.get(name, 0.0) for name in used}
    for name, limit in limits.items():
        if name == "memory" and programme.memory_rows:
            builder.memory(programme.memory_rows, limit, None)
        else:
            costs = _costs(candidates, name, crossings)
            builder.add(np.flatnonzero(costs), costs[costs != 0], limit - fixed[name])
    builder.needs(candidates, group, names, [j for name in names for j in kept[name]])
    upper = np.ones(len(crossings))
    cost = _costs(candidates, objective, crossings)
    cost = np.concatenate([cost, np.zeros(len(candidates) + len(upper) - len(cost))])
    if objective == "memory" and programme.memory_rows:
        builder.memory(programme.memory_rows, 0.0, len(cost))
        cost = np.append(cost, 1.0)
        upper = np.append(upper, max(row.constant for row in programme.memory_rows))
    index = np.array([j for name in names for j in kept[name]], dtype=np.int64)
    rows = tuple(builder.rows)
    return LinearModel(names, group, index, flags, cost, upper, fixed[objective], rows)


@final
class _Builder:
    """Collects rows over `count` candidate columns, then continuous ones."""

    def __init__(self, count: int, sides: Mapping[str, Integers]) -> None:
        self.count, self.sides = count, sides
        self.rows: list[Row] = []

    def add(self, columns: Integers, coefficients: Floats, limit: float) -> None:
        self.rows.append(Row(columns, coefficients, limit))

    def borders(self, programme: Programme) -> Floats:
        """Rows of every crossing: int(one side) - int(other side) <= crossing; their seconds."""
        seconds: list[float] = []
        for border in programme.borders:
            producer = border.producer
            readers = list(dict.fromkeys(r for r in border.readers if r != producer))
            if border.quantize_seconds and any(r is not None for r in readers):
                self._crossing(((r, producer) for r in readers if r is not None), len(seconds))
                seconds.append(border.quantize_seconds)
            if border.dequantize_seconds and producer is not None and readers:
                self._crossing(((producer, r) for r in readers), len(seconds))
                seconds.append(border.dequantize_seconds)
        return np.array(seconds)

    def _crossing(self, pairs: Iterable[tuple[str, str | None]], index: int) -> None:
        crossing = np.array([self.count + index])
        for more, less in pairs:
            plus = self.sides[more]
            minus = self.sides[less] if less is not None else plus[:0]
            signs = np.concatenate([np.ones(len(plus)), -np.ones(len(minus)), [-1.0]])
            self.add(np.concatenate([plus, minus, crossing]), signs, 0.0)

    def needs(
        self,
        candidates: Sequence[Candidate],
        group: Integers,
        names: Sequence[str],
        index: Sequence[int],
    ) -> None:
        """Of the candidates of one group that need the same of another, one at most with it.

        As every group takes one, this is as tight as an equality.
        """
        column = {(names[g], j): at for at, (g, j) in enumerate(zip(group, index, strict=True))}
        asking: dict[tuple[int, str, int], list[int]] = {}
        for at, candidate in enumerate(candidates):
            for name, j in candidate.needs.items():
                asking.setdefault((int(group[at]), name, j), []).append(at)
        for (_, name, j), columns in asking.items():
            signs = np.append(np.ones(len(columns)), -1.0)
            self.add(np.array([*columns, column[name, j]]), signs, 0.0)

    def memory(self, rows: Iterable[MemoryRow], limit: float, peak: int | None) -> None:
        """Live bytes <= limit at every point in time, or <= the column `peak`."""
        for row in rows:
            saving = {name: bytes_ for name, bytes_ in row.saved.items() if bytes_}
            columns = [self.sides[name] for name in saving]
            saved = [-np.full(len(self.sides[name]), b) for name, b in saving.items()]
            if peak is not None:
                columns, saved = [*columns, np.array([peak])], [*saved, np.array([-1.0])]
            empty = np.zeros(0)
            self.add(
                np.concatenate([empty.astype(np.int64), *columns]),
                np.concatenate([empty, *saved]),
                limit - row.constant,
            )


def _costs(candidates: Sequence[Candidate], resource: str, crossings: Floats) -> Floats:
    costs = np.array([_cost(candidate, resource) for candidate in candidates])
    return np.concatenate([costs, crossings]) if resource == "seconds" else costs


def _cost(candidate: Candidate, resource: str) -> float:
    return candidate.damage if resource == "damage" else candidate.costs.get(resource, 0.0)
