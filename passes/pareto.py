"""Several answers of one programme: the curve of damage against a resource, and the k best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from octavo.ir.errors import UsageError
from octavo.passes.programme import Programme
from octavo.passes.solve import Answer, OutOfTime, Search, solve


def pareto(
    programme: Programme,
    resource: str,
    points: int,
    limits: Mapping[str, float] | None = None,
    *,
    gap: float = 1e-4,
    time_limit_seconds: float = math.inf,
) -> tuple[Answer, ...]:
    """The least damage at `points` budgets of a resource, evenly spaced, smallest first.

    They span from the least total that is feasible under the other limits to the total of the
    choice with the least damage; damage never rises along them. The time limit is one answer's.
    """
    if points < 2:
        raise UsageError(f"a curve needs at least 2 points, not {points}")
    others = {name: limit for name, limit in (limits or {}).items() if name != resource}

    def answer(objective: str, budgets: Mapping[str, float]) -> Answer:
        return solve(programme, objective, budgets, gap=gap, time_limit_seconds=time_limit_seconds)

    least = answer(resource, others).value
    most = max(answer("damage", others).totals[resource], least)
    curve: list[Answer] = []
    for budget in np.linspace(least, most, points).tolist():
        found = answer("damage", {**others, resource: budget})
        if curve and curve[-1].value < found.value:
            # Both are within the gap; what keeps a smaller budget keeps this one.
            found = replace(curve[-1], bound=found.bound, seconds=found.seconds)
        curve.append(found)
    return tuple(curve)


def top_k(
    programme: Programme,
    k: int,
    objective: str = "damage",
    limits: Mapping[str, float] | None = None,
    *,
    gap: float = 1e-4,
    time_limit_seconds: float = math.inf,
) -> tuple[Answer, ...]:
    """The k best distinct choices, best first; fewer if there are no more or time ends.

    Each is within `gap` of the best that differs from those before it. BudgetInfeasible where no
    choice keeps the limits.
    """
    if k < 1:
        raise UsageError(f"at least one choice is asked for, not {k}")
    end = time.perf_counter() + time_limit_seconds
    first = solve(programme, objective, limits, gap=gap, time_limit_seconds=time_limit_seconds)
    answers = [first]
    while len(answers) < k and (left := end - time.perf_counter()) > 0:
        choices = [answer.choice for answer in answers]
        try:
            found = Search(programme, objective, limits or {}, gap, choices).answer(left)
        except OutOfTime:
            break
        if found is None:
            break
        answers.append(found)
    return tuple(sorted(answers, key=lambda answer: answer.value))
