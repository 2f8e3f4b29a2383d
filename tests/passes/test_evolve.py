"""Search around a plan: small problems whose optimum is known, and what always holds."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.passes.evolve import Search, Space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.passes.evolve import Choice


@dataclass(frozen=True)
class Problem:
    """Groups with a size and a damage per level; damages add; sizes must keep to a budget."""

    sizes: np.ndarray
    damages: np.ndarray
    budget: float

    @staticmethod
    def drawn(seed: int, groups: int = 5, levels: int = 4) -> Problem:
        rng = np.random.default_rng(seed)
        sizes = np.sort(rng.uniform(1, 9, (groups, levels)), axis=1)
        damages = -np.sort(-rng.uniform(0, 5, (groups, levels)), axis=1)
        return Problem(sizes, damages, float(sizes.mean(axis=1).sum()))

    def total(self, table: np.ndarray, choice: Choice) -> float:
        return float(sum(table[int(name[1:]), level] for name, level in choice.items()))

    def feasible(self, choice: Choice) -> bool:
        return self.total(self.sizes, choice) <= self.budget

    def choices(self) -> list[Choice]:
        groups, levels = self.sizes.shape
        every = itertools.product(range(levels), repeat=groups)
        return [{f"g{k}": level for k, level in enumerate(found)} for found in every]

    def optimum(self) -> float:
        return min(self.total(self.damages, c) for c in self.choices() if self.feasible(c))

    def start(self) -> Choice:
        """The worst of the choices with half of all levels: there is room to move."""
        half = sum(divmod(self.sizes.size - len(self.sizes), 2))
        fits = [c for c in self.choices() if self.feasible(c) and sum(c.values()) <= half]
        most = max(sum(c.values()) for c in fits)
        return max(
            (c for c in fits if sum(c.values()) == most),
            key=lambda c: self.total(self.damages, c),
        )

    def search(self, seed: int, **settings: float) -> tuple[Search, list[Choice]]:
        asked: list[Choice] = []

        def fitness(choices: Sequence[Choice], stage: int) -> list[float]:
            asked.extend(choices)
            return [self.total(self.damages, choice) for choice in choices]

        groups, levels = self.sizes.shape
        space = Space({f"g{k}": range(levels) for k in range(groups)}, self.feasible)
        rng = np.random.default_rng(seed)
        return Search(space, fitness, rng, **settings), asked  # type: ignore[arg-type]


def run(search: Search, start: Choice) -> Choice:
    return search.run(start, lambda done, total: None)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_of_small_problems(seed: int) -> None:
    """A switch keeps the sum of all levels, so levels are of one size for all groups here."""
    damages = Problem.drawn(seed, groups=4, levels=3).damages
    problem = Problem(np.tile([1.0, 2.0, 3.0], (4, 1)), damages, 8.0)
    found = min(
        problem.total(problem.damages, run(problem.search(own)[0], problem.start()))
        for own in range(5)
    )
    assert found == pytest.approx(problem.optimum(), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_never_over_budget_never_backwards(seed: int) -> None:
    problem = Problem.drawn(seed)
    search, asked = problem.search(seed, generations=15)
    start = problem.start()
    best = run(search, start)
    value = problem.total(problem.damages, best)
    assert problem.feasible(best)
    assert all(problem.feasible(choice) for choice in asked)
    assert value <= problem.total(problem.damages, start)
    assert search.history == sorted(search.history, reverse=True)
    assert search.history[-1] == pytest.approx(value, rel=1e-12)
    assert search.evaluated == len(asked)


def test_a_seed_fixes_everything() -> None:
    problem = Problem.drawn(1)
    (one, asked), (two, again) = problem.search(3), problem.search(3)
    assert run(one, problem.start()) == run(two, problem.start())
    assert asked == again
    other, differently = problem.search(4)
    run(other, problem.start())
    assert differently != asked


def test_an_optimum_is_kept() -> None:
    problem = Problem.drawn(2)
    fits = [c for c in problem.choices() if problem.feasible(c)]
    start = min(fits, key=lambda c: problem.total(problem.damages, c))
    search, _ = problem.search(0)
    assert run(search, start) == start
    # The start and the eight generations without a find after which it gives up.
    assert len(search.history) == 9


def test_it_stops_when_the_time_is_over() -> None:
    problem = Problem.drawn(0)
    search, asked = problem.search(0, seconds=0.0)
    assert run(search, problem.start()) == problem.start()
    assert len(asked) == 1

    def slow(choices: Sequence[Choice], stage: int) -> list[float]:
        time.sleep(0.02)
        # Always better than before, so that only the clock ends it.
        return [-time.perf_counter() for _ in choices]

    space = Space(search.space.levels, search.space.feasible)
    endless = Search(space, slow, np.random.default_rng(0), generations=10_000, seconds=0.2)
    begin = time.perf_counter()
    run(endless, problem.start())
    assert len(endless.history) > 1
    # One generation may be under way: three evaluations of 20 ms; the rest is a busy machine.
    assert time.perf_counter() - begin < 2.0


def test_nothing_to_change() -> None:
    space = Space({"g0": (0,), "g1": (2,)}, lambda choice: True)
    search = Search(space, lambda choices, stage: [1.0] * len(choices), np.random.default_rng(0))
    assert run(search, {"g0": 0, "g1": 2}) == {"g0": 0, "g1": 2}
    assert search.evaluated == 1


def test_a_level_that_is_not_listed_stays() -> None:
    space = Space({"g0": (0, 1, 2), "g1": (3, 5)}, lambda choice: True)
    rng = np.random.default_rng(0)
    for _ in range(50):
        child = space.mutated({"g0": 1, "g1": 4}, rng)
        assert child is None or child["g1"] == 4
    assert space.neighbours({"g0": 1, "g1": 5}, -1) == [("g0", 0), ("g1", 3)]
    assert space.neighbours({"g0": 1, "g1": 5}, +1) == [("g0", 2)]


def test_later_stages_see_fewer_children() -> None:
    problem = Problem.drawn(0)
    seen: list[tuple[int, int]] = []

    def fitness(choices: Sequence[Choice], stage: int) -> list[float]:
        seen.append((stage, len(choices)))
        return [problem.total(problem.damages, choice) for choice in choices]

    search = Search(problem.search(0)[0].space, fitness, np.random.default_rng(0), generations=1)
    run(search, problem.start())
    assert [stage for stage, _ in seen] == [2, 0, 1, 2]
    assert seen[0][1] == seen[3][1] == 1
    assert 4 < seen[1][1] <= 16
    assert seen[2][1] == 4
