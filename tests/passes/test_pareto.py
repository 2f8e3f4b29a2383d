"""Curves and the k best choices against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from octavo.ir.errors import BudgetInfeasible, UnknownName, UsageError
from octavo.passes.pareto import pareto, top_k
from octavo.passes.programme import Border, Candidate, Programme

REL = 1e-8


def random_programme(seed: int) -> Programme:
    """Five groups of three candidates with a border between neighbours."""
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(5)]

    def candidate(index: int) -> Candidate:
        costs = {"bytes": float(rng.integers(1, 100)), "seconds": rng.uniform(0, 1e-3)}
        return Candidate(rng.lognormal(0, 1), costs, index == 2)

    borders = tuple(Border(a, (b,), 2e-4, 1e-4) for a, b in itertools.pairwise(names))
    groups = {name: tuple(candidate(j) for j in range(3)) for name in names}
    return Programme(groups, {"bytes": 50.0}, borders)


def every_total(programme: Programme) -> list[dict[str, float]]:
    """Totals of all 243 choices."""
    choices = itertools.product(range(3), repeat=5)
    return [programme.totals(dict(zip(programme.groups, c, strict=True))) for c in choices]


@pytest.mark.parametrize("resource", ["bytes", "seconds"])
@pytest.mark.parametrize("seed", range(4))
def test_every_point_of_the_curve_is_the_optimum_of_its_budget(resource: str, seed: int) -> None:
    programme = random_programme(seed)
    other = "seconds" if resource == "bytes" else "bytes"
    totals = every_total(programme)
    limit = float(np.median([t[other] for t in totals]))
    kept = [t for t in totals if t[other] <= limit]
    least = min(t[resource] for t in kept)
    best = min(t["damage"] for t in kept)
    most = min(t[resource] for t in kept if t["damage"] == best)
    curve = pareto(programme, resource, 6, {other: limit}, gap=0)
    budgets = [least + (most - least) * i / 5 for i in range(6)]
    truths = [min(t["damage"] for t in kept if t[resource] <= b * (1 + 1e-12)) for b in budgets]
    assert [a.value for a in curve] == pytest.approx(truths, rel=REL, abs=0)
    assert all(a.totals[resource] <= b * (1 + 1e-12) for a, b in zip(curve, budgets, strict=True))
    assert all(a.totals[other] <= limit for a in curve)


def test_damage_never_rises_along_a_curve() -> None:
    curve = pareto(random_programme(9), "bytes", 12, gap=0.2)
    damages = [answer.value for answer in curve]
    assert damages == sorted(damages, reverse=True)


@pytest.mark.parametrize("objective", ["damage", "bytes", "seconds"])
@pytest.mark.parametrize("seed", range(4))
def test_the_k_best_are_distinct_and_the_best_ones(objective: str, seed: int) -> None:
    programme = random_programme(seed)
    totals = every_total(programme)
    limit = float(np.median([t["seconds"] for t in totals]))
    limits = {} if objective == "seconds" else {"seconds": limit}
    kept = [t for t in totals if objective == "seconds" or t["seconds"] <= limit]
    truth = sorted(t[objective] for t in kept)[:8]
    answers = top_k(programme, 8, objective, limits, gap=0)
    assert [a.value for a in answers] == pytest.approx(truth, rel=REL, abs=0)
    assert len({tuple(a.choice.items()) for a in answers}) == 8
    assert all(programme.totals(a.choice) == a.totals for a in answers)


def test_all_choices_are_found_then_no_more() -> None:
    same = Candidate(1.0, {"bytes": 1.0})
    answers = top_k(Programme({"a": (same, same), "b": (same, same)}), 9)
    assert sorted(tuple(a.choice.values()) for a in answers) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_what_cannot_be_answered_is_refused() -> None:
    programme = random_programme(0)
    with pytest.raises(BudgetInfeasible, match="no plan keeps --size 1B"):
        top_k(programme, 2, limits={"bytes": 1.0})
    with pytest.raises(BudgetInfeasible, match="no plan keeps --size 1B"):
        pareto(programme, "seconds", 3, {"bytes": 1.0})
    with pytest.raises(UnknownName, match="unknown resource 'watts'"):
        pareto(programme, "watts", 3)
    with pytest.raises(UsageError, match="at least 2 points"):
        pareto(programme, "bytes", 1)
    with pytest.raises(UsageError, match="at least one choice"):
        top_k(programme, 0)
