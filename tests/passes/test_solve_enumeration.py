"""The solver against all choices of small random programmes, with widths and without."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from octavo.ir.errors import BudgetInfeasible
from octavo.passes.programme import Border, Candidate, MemoryRow, Programme
from octavo.passes.solve import solve

REL = 1e-8


def random_programme(rng: np.random.Generator) -> Programme:
    """Up to 8 groups of up to 4 candidates; about half have borders, half memory rows."""
    names = [f"g{i}" for i in range(rng.integers(1, 9))]
    whole = rng.random() < 0.5

    def candidate() -> Candidate:
        costs = {
            "bytes": float(rng.integers(0, 12 if whole else 5000)),
            "seconds": float(rng.integers(0, 8)) if whole else rng.uniform(0, 1e-3),
        }
        if rng.random() < 0.7:
            costs["bops"] = rng.lognormal(10, 2)
        damage = float(rng.integers(0, 6)) if whole else rng.lognormal(0, 2)
        return Candidate(damage, costs, bool(rng.random() < 0.5))

    def some() -> str | None:
        return None if rng.random() < 0.2 else names[rng.integers(len(names))]

    def border() -> Border:
        readers = tuple(some() for _ in range(rng.integers(1, 4)))
        return Border(some(), readers, *rng.uniform(0, 3.0 if whole else 4e-4, 2))

    borders = tuple(border() for _ in range(rng.integers(0, 6) * rng.integers(0, 2)))
    rows = tuple(
        MemoryRow(
            float(rng.integers(500, 1000)),
            {n: float(rng.integers(0, 100)) for n in names if rng.random() < 0.6},
        )
        for _ in range(rng.integers(0, 4) * rng.integers(0, 2))
    )
    groups = {n: tuple(candidate() for _ in range(rng.integers(1, 5))) for n in names}
    return Programme(groups, {"bytes": 100.0, "seconds": 1e-4}, borders, rows)


def every_choice(programme: Programme) -> list[tuple[dict[str, int], dict[str, float]]]:
    """All choices with their totals."""
    sizes = [range(len(candidates)) for candidates in programme.groups.values()]
    choices = [dict(zip(programme.groups, js, strict=True)) for js in itertools.product(*sizes)]
    return [(choice, programme.totals(choice)) for choice in choices if agree(programme, choice)]


def agree(programme: Programme, choice: Mapping[str, int]) -> bool:
    """Whether no chosen candidate needs what was not chosen."""
    return all(
        choice[other] == wanted
        for name, index in choice.items()
        for other, wanted in programme.groups[name][index].needs.items()
    )


def with_needs(programme: Programme, rng: np.random.Generator) -> Programme:
    """The programme with one or two width groups, and every other candidate once per width."""
    widths = {
        f"w{i}": tuple(
            Candidate(rng.lognormal(0, 1), {"bytes": float(rng.integers(0, 50))})
            for _ in range(rng.integers(2, 4))
        )
        for i in range(rng.integers(1, 3))
    }
    groups: dict[str, tuple[Candidate, ...]] = dict(widths)
    for name, candidates in programme.groups.items():
        touched = [w for w in widths if rng.random() < 0.6]
        groups[name] = tuple(
            replace(c, costs=scaled(c.costs, rng), needs=dict(zip(touched, levels, strict=True)))
            for c in candidates[:3]
            for levels in itertools.product(*(range(len(widths[w])) for w in touched))
            if rng.random() < 0.9 or not any(levels)
        )
    return replace(programme, groups=dict(list(groups.items())[:7]))


def scaled(costs: Mapping[str, float], rng: np.random.Generator) -> dict[str, float]:
    """Other costs of the same size."""
    return {name: cost * rng.uniform(0.2, 1.0) for name, cost in costs.items()}


def least(
    everything: list[tuple[dict[str, int], dict[str, float]]],
    objective: str,
    limits: Mapping[str, float],
) -> float:
    """The least total under limits; infinite if there is none."""
    kept = (t for _, t in everything if all(t[n] <= x for n, x in limits.items()))
    return min((t[objective] for t in kept), default=math.inf)


@pytest.mark.parametrize("seed", range(40))
def test_optimum_equals_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        equals_enumeration(random_programme(rng), rng)


@pytest.mark.parametrize("seed", range(15))
def test_shared_widths_equal_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(2):
        programme = random_programme(rng)
        small = dict(list(programme.groups.items())[:3])
        equals_enumeration(with_needs(Programme(small, programme.fixed), rng), rng)


def equals_enumeration(programme: Programme, rng: np.random.Generator) -> None:
    """Solve for a random objective and limits, and compare with all choices."""
    everything = every_choice(programme)
    objective = str(rng.choice(programme.resources))
    limits = {}
    for name in programme.resources:
        if name != objective and rng.random() < 0.6:
            totals = sorted(t[name] for _, t in everything)
            limits[name] = totals[int(rng.random() ** 2 * len(totals))]
    truth = least(everything, objective, limits)
    if truth == math.inf:
        with pytest.raises(BudgetInfeasible) as error:
            solve(programme, objective, limits, gap=0)
        for name in error.value.limits:
            rest = {n: x for n, x in limits.items() if n != name}
            nearest = least(everything, name, rest)
            got = error.value.nearest[name]
            assert got == (None if nearest == math.inf else pytest.approx(nearest, rel=1e-4))
    else:
        answer = solve(programme, objective, limits, gap=0)
        assert answer.status == "optimal"
        assert answer.totals == programme.totals(answer.choice)
        assert answer.value == pytest.approx(truth, rel=REL, abs=0)
        assert answer.bound <= truth * (1 + REL)
        assert all(answer.totals[n] <= x for n, x in limits.items())
