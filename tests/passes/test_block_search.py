"""The search for blocks against every set there is."""

from __future__ import annotations

from itertools import chain, combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.passes.block_search import BlockSearch

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = tuple("abcdef")
ALL = len(NAMES)
WIDE = 2**ALL


def drawn(seed: int) -> tuple[dict[str, float], Callable[[tuple[str, ...]], float]]:
    """What blocks save, and damage that only grows: of each, and of every pair."""
    rng = np.random.default_rng(seed)
    saves = dict(zip(NAMES, rng.uniform(0.02, 0.3, ALL).tolist(), strict=True))
    pairs = np.triu(rng.exponential(0.1, (ALL, ALL)))

    def damage(path: tuple[str, ...]) -> float:
        gone = [NAMES.index(name) for name in path]
        return float(pairs[np.ix_(sorted(gone), sorted(gone))].sum())

    return saves, damage


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_best_of_all_sets(seed: int) -> None:
    saves, damage = drawn(seed)
    goal = 0.5 * sum(saves.values())
    found = BlockSearch(saves, damage, tries=ALL, beam=WIDE).least(goal)
    sets = chain.from_iterable(combinations(NAMES, k) for k in range(1, ALL + 1))
    enough = [path for path in sets if sum(saves[n] for n in path) >= goal]
    assert set(found) == set(min(enough, key=damage))


@pytest.mark.parametrize("seed", range(4))
def test_narrow_beams_measure_fewer_sets_and_save_enough(seed: int) -> None:
    saves, damage = drawn(seed)
    goal = 0.5 * sum(saves.values())
    narrow = BlockSearch(saves, damage, tries=2, beam=1)
    wide = BlockSearch(saves, damage, tries=ALL, beam=WIDE)
    found, best = narrow.least(goal), wide.least(goal)
    assert sum(saves[name] for name in found) >= goal
    assert len(narrow.known) < len(wide.known)
    assert narrow.total(found) >= wide.total(best)


def test_every_set_is_measured_once_and_what_is_known_stays() -> None:
    saves, damage = drawn(0)
    seen: list[frozenset[str]] = []
    steps: list[tuple[int, int]] = []

    def counted(path: tuple[str, ...]) -> float:
        seen.append(frozenset(path))
        return damage(path)

    search = BlockSearch(saves, counted, ALL, 3, lambda done, total: steps.append((done, total)))
    path = search.least(sum(saves.values()))
    assert set(path) == set(NAMES)
    assert len(seen) == len(set(seen))
    assert all(search.total(path[: k + 1]) == damage(path[: k + 1]) for k in range(ALL))
    assert [done for done, _ in steps] == list(range(1, len(seen) + 1))
    assert all(done <= total for done, total in steps)
