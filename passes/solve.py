"""The best choice of a programme under limits, with the proof of how good it is.

A programme of a thousand groups is nearly decided by its linear relaxation. Its multipliers bound
from below what any choice costs that takes a given candidate. Candidates that add little to the
bound form a core, small enough for PuLP and HiGHS; a choice with a candidate outside costs at
least the bound plus the core's width. A first core finds how much that must be, a second one
proves it (fixing and the expanding core of Pisinger, "A minimal algorithm for the multiple-choice
knapsack problem", 1995).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from octavo.ir.errors import BudgetInfeasible, UnknownName, UsageError
from octavo.passes.highs import SOLVER, core_optimum, multipliers
from octavo.passes.linear_model import (
    Floats,
    LinearModel,
    Mask,
    coupled_groups,
    linear_model,
    undominated,
)
from octavo.passes.pair_swaps import exchange
from octavo.passes.programme import Programme, keeps

# The first core holds candidates within the gap, but no narrower one than this.
_SMALLEST_GAP = 1e-4
# A core without a choice grows by this factor; the first one, from a candidate per group.
_GROWTH = 1.3
# A choice far above the bound asks for a wide core; one this much wider may find a better one.
_STRIDE = 8.0
# Of the gap, so much is left to HiGHS; it proves no more than the second number.
_SHARE, _EXACT = 0.9, 1e-9


@final
class OutOfTime(UsageError):
    """The time limit ended before any choice was found."""


@final
@dataclass(frozen=True)
class Answer:
    """A choice with its exact totals, and what is known about the best one.

    `value` is its total of the objective, `bound` a proven lower bound of every choice's, `gap`
    their relative distance; `status` says whether the gap asked for was reached in time;
    `dominated` counts the candidates that were dropped; `seconds` is what finding it took.
    """

    choice: Mapping[str, int]
    totals: Mapping[str, float]
    objective: str
    value: float
    bound: float
    status: Literal["optimal", "time limit"]
    seconds: float
    dominated: int
    solver: str = SOLVER

    @property
    def gap(self) -> float:
        """(value - bound) / value; 0 where both are 0."""
        return max(self.value - self.bound, 0.0) / self.value if self.value else 0.0


def solve(
    programme: Programme,
    objective: str = "damage",
    limits: Mapping[str, float] | None = None,
    *,
    gap: float = 1e-4,
    time_limit_seconds: float = math.inf,
) -> Answer:
    """The choice with the least total of `objective` ("damage" or a resource) under upper limits.

    It is proven to be within `gap` (relative; 0 stands for 1e-9) of the best. BudgetInfeasible
    where no choice keeps the limits; OutOfTime where none is found; UsageError for a limit that is
    no number; UnknownName for what is no resource.
    """
    limits = limits or {}
    answer = Search(programme, objective, limits, gap).answer(time_limit_seconds)
    if answer is None:
        raise _infeasible(programme, limits, time_limit_seconds)
    return answer


@final
@dataclass(frozen=True)
class Search:
    """What is minimised under which limits, to which relative gap, without which choices."""

    programme: Programme
    objective: str
    limits: Mapping[str, float]
    gap: float = 1e-4
    excluded: Sequence[Mapping[str, int]] = ()

    def __post_init__(self) -> None:
        for name in (self.objective, *self.limits):
            if name not in self.programme.resources:
                raise UnknownName("resource", name, self.programme.resources)
        for name, limit in self.limits.items():
            if not limit >= 0:
                raise UsageError(f"a limit must be a number >= 0, not {limit}", where=name)

    def answer(self, seconds: float) -> Answer | None:
        """The best choice; None if there is none. OutOfTime where neither is known in time."""
        start = time.perf_counter()
        limits = {name: limit for name, limit in self.limits.items() if math.isfinite(limit)}
        used = (self.objective, *limits)
        coupled = coupled_groups(self.programme, used)
        # Each candidate in place of a superfluous one gives a choice; not all are excluded.
        kept = undominated(self.programme, used, coupled, copies=1 + len(self.excluded))
        model = linear_model(self.programme, self.objective, limits, kept)
        for choice in self.excluded:
            model = model.without(choice)
        best, bound = self._widen(model, start + seconds)
        if best is None and bound < math.inf:
            raise OutOfTime(f"no choice was found in {seconds:g} s", hint="allow more time")
        if best is None:
            return None
        totals = self.programme.totals(best)
        value = totals[self.objective]
        return Answer(
            choice=best,
            totals=totals,
            objective=self.objective,
            value=value,
            bound=min(bound, value),
            status="optimal" if self._proves(value, bound) else "time limit",
            seconds=time.perf_counter() - start,
            dominated=sum(map(len, self.programme.groups.values())) - len(model.group),
        )

    def _widen(self, model: LinearModel, end: float) -> tuple[dict[str, int] | None, float]:
        """The best choice, and a lower bound of all; infinite if there is none."""
        weights = multipliers(model, end - time.perf_counter())
        floor, reduced = model.lagrangian(np.zeros(len(model.rows)) if weights is None else weights)
        best, value = self._nearest_bound(model, reduced)
        # No total is negative, but for the rounding of multipliers.
        floor = max(floor, 0.0)
        width, bound = 0.0, floor
        while not self._proves(value, bound) and bound < math.inf:
            if time.perf_counter() > end:
                break
            known = weights is not None
            width = self._width(reduced, width, value, floor) if known else math.inf
            # Nothing that is not better by more than the gap needs to be found.
            cutoff = value * (1 - self.gap * _SHARE)
            core = reduced <= width
            choice, inside = self._best_in(model, core, reduced, floor, cutoff, end)
            bound = max(floor, min(inside, math.inf if core.all() else floor + width))
            if choice is not None:
                total = self.programme.totals(choice)[self.objective]
                best, value = (choice, total) if total < value else (best, value)
        return best, bound

    def _width(self, reduced: Floats, width: float, value: float, floor: float) -> float:
        """What a candidate may add to the bound in the next core."""
        if width and math.isfinite(value):
            needed = value * (1 - _SHARE * self.gap) - floor
            return max(min(needed, _STRIDE * width), width)
        held = max(np.count_nonzero(reduced <= width), np.count_nonzero(reduced == 0))
        last = min(int(held * _GROWTH), reduced.size - 1)
        least = float(np.partition(reduced, last)[last])
        return max(max(self.gap, _SMALLEST_GAP) * floor, least)

    def _best_in(
        self,
        shell: LinearModel,
        core: Mask,
        reduced: Floats,
        floor: float,
        cutoff: float,
        end: float,
    ) -> tuple[dict[str, int] | None, float]:
        """The best choice of a shell that keeps the limits exactly, and the shell's bound."""
        order = reduced - shell.cost[: len(reduced)]
        while True:
            found = core_optimum(
                shell,
                core,
                order,
                size=floor,
                gap=_SHARE * self.gap * floor,
                cutoff=cutoff,
                seconds=end - time.perf_counter(),
            )
            if found.columns is None:
                return None, found.bound
            choice = shell.choice(found.columns)
            if keeps(self.programme.totals(choice), self.limits):
                return choice, found.bound
            shell = shell.without(choice)

    def _nearest_bound(
        self, model: LinearModel, reduced: Floats
    ) -> tuple[dict[str, int] | None, float]:
        """The choice that adds nothing to the bound and its value, if it keeps the limits."""
        starts = [*model.starts.tolist(), len(reduced)]
        columns = [a + int(reduced[a:b].argmin()) for a, b in itertools.pairwise(starts)]
        choice = model.choice(exchange(model, reduced, np.array(columns, dtype=np.int64)))
        totals = self.programme.totals(choice)
        if choice in self.excluded or not keeps(totals, self.limits):
            return None, math.inf
        if not self.programme.agrees(choice):
            return None, math.inf
        return choice, totals[self.objective]

    def _proves(self, value: float, bound: float) -> bool:
        return math.isfinite(value) and value - bound <= max(self.gap, _EXACT) * value


def _infeasible(
    programme: Programme, limits: Mapping[str, float], seconds: float
) -> BudgetInfeasible:
    """The error that names a smallest set of limits no choice keeps together."""
    conflict = dict(limits)
    for name in limits:
        rest = {other: limit for other, limit in conflict.items() if other != name}
        if Search(programme, "damage", rest, gap=1.0).answer(seconds) is None:
            conflict = rest

    def least(name: str, kept: Mapping[str, float]) -> float | None:
        answer = Search(programme, name, kept).answer(seconds)
        return answer.value if answer else None

    others = {n: {o: v for o, v in limits.items() if o != n} for n in conflict}
    return BudgetInfeasible(
        conflict,
        nearest={name: least(name, others[name]) for name in conflict},
        alone={name: least(name, {}) for name in conflict},
    )
