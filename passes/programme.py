"""A choice of one candidate per group, what it costs, and the limits it must keep: as data.

Each group takes exactly one candidate. The total of a resource is a fixed part plus the costs of
the chosen candidates; two totals depend on pairs of groups as well. A value that crosses between
integer and float groups costs "seconds", once per direction, however many readers it has (the cut
of `octavo.passes.partition`). A candidate may need that other groups take certain candidates, as
layers that share channels do. "memory" is the largest of several points in time, each smaller by
what integer groups save there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

from octavo.ir.errors import UnknownName, UsageError

# Adding seconds rounds; whole numbers (bytes) below 1e12 are compared exactly with this.
ROUNDING = 1e-12


@final
@dataclass(frozen=True)
class Candidate:
    """One way to treat a group: its damage, its costs by resource, both >= 0.

    `integer`: it computes on integer codes, so that its values need no conversion among its like.
    `needs`: the index of the candidate that other groups have to take with it.
    """

    damage: float
    costs: Mapping[str, float] = field(default_factory=dict)
    integer: bool = False
    needs: Mapping[str, int] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Border:
    """A value: the group that makes it, those that read it, and the seconds to cross either way.

    `None` stands for what is always float: a graph input or output, a node without a choice.
    """

    producer: str | None
    readers: tuple[str | None, ...]
    quantize_seconds: float
    dequantize_seconds: float


@final
@dataclass(frozen=True)
class MemoryRow:
    """Bytes that live at one point in time: `constant`, less what each integer group saves."""

    constant: float
    saved: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Programme:
    """Groups with their candidates, and what couples them. UsageError where a number is no cost."""

    groups: Mapping[str, tuple[Candidate, ...]]
    fixed: Mapping[str, float] = field(default_factory=dict)
    borders: tuple[Border, ...] = ()
    memory_rows: tuple[MemoryRow, ...] = ()

    def __post_init__(self) -> None:
        for name, candidates in self.groups.items():
            if not candidates:
                raise UsageError("a group has no candidate", where=name)
            for candidate in candidates:
                _check_costs((candidate.damage, *candidate.costs.values()), name)
                self._check_groups(candidate.needs, name)
                if self.memory_rows and "memory" in candidate.costs:
                    raise UsageError("memory is counted by rows, not by candidates", where=name)
        _check_costs(self.fixed.values(), "fixed costs")
        if self.memory_rows and "memory" in self.fixed:
            raise UsageError("memory is counted by rows, not by fixed costs")
        for border in self.borders:
            _check_costs((border.quantize_seconds, border.dequantize_seconds), "borders")
            self._check_groups((border.producer, *border.readers), "borders")
        for row in self.memory_rows:
            _check_costs((row.constant, *row.saved.values()), "memory rows")
            self._check_groups(row.saved, "memory rows")

    @property
    def needed(self) -> frozenset[str]:
        """Groups of which others need a certain candidate."""
        candidates = (c for of in self.groups.values() for c in of)
        return frozenset(name for candidate in candidates for name in candidate.needs)

    def agrees(self, choice: Mapping[str, int]) -> bool:
        """Whether every group takes what the candidates of others need it to take."""
        chosen = (self.groups[name][choice[name]] for name in self.groups)
        return all(
            choice[n] == index for candidate in chosen for n, index in candidate.needs.items()
        )

    def _check_groups(self, names: Iterable[str | None], where: str) -> None:
        for name in names:
            if name is not None and name not in self.groups:
                raise UnknownName("group", name, self.groups, where=where)

    @property
    def resources(self) -> tuple[str, ...]:
        """What a choice has totals of: "damage", then the resources in alphabetical order."""
        costs = (c.costs for candidates in self.groups.values() for c in candidates)
        names = {name for each in (*costs, self.fixed) for name in each} - {"damage"}
        names |= {"seconds"} if self.borders else set()
        names |= {"memory"} if self.memory_rows else set()
        return ("damage", *sorted(names))

    def totals(self, choice: Mapping[str, int]) -> dict[str, float]:
        """Exact totals, by resource, of a choice: the index of a candidate for every group."""
        chosen = {name: self.groups[name][choice[name]] for name in self.groups}
        terms = {name: [self.fixed.get(name, 0.0)] for name in self.resources}
        for candidate in chosen.values():
            terms["damage"].append(candidate.damage)
            for name, cost in candidate.costs.items():
                terms[name].append(cost)
        integer = {name for name, candidate in chosen.items() if candidate.integer}
        if self.borders:
            terms["seconds"] += (_border_seconds(border, integer) for border in self.borders)
        totals = {name: math.fsum(values) for name, values in terms.items()}
        if self.memory_rows:
            rows = (_live_bytes(row, integer) for row in self.memory_rows)
            totals["memory"] = max(0.0, *rows)
        return totals


def keeps(totals: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether no total exceeds its limit: whole numbers exactly, others to 1e-12 of the limit."""
    return all(totals[name] <= limit * (1 + ROUNDING) for name, limit in limits.items())


def _border_seconds(border: Border, integer: set[str]) -> float:
    reads_codes = any(reader in integer for reader in border.readers)
    reads_floats = any(reader not in integer for reader in border.readers)
    if border.producer in integer:
        return border.dequantize_seconds if reads_floats else 0.0
    return border.quantize_seconds if reads_codes else 0.0


def _live_bytes(row: MemoryRow, integer: set[str]) -> float:
    return math.fsum(
        (row.constant, *(-saved for name, saved in row.saved.items() if name in integer))
    )


def _check_costs(values: Iterable[float], where: str) -> None:
    wrong = [value for value in values if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise UsageError(f"a cost must be finite and not negative, not {wrong[0]}", where=where)
