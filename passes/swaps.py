"""LampQ's refinement: one group a level up, another a level down, by their estimated damages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from octavo.passes.evolve import Choice, Space


def swapped(
    space: Space,
    damages: Mapping[str, Sequence[float]],
    fitness: Callable[[Sequence[Choice]], Sequence[float]],
    start: Choice,
    seconds: float,
) -> Choice:
    """The best choice when no further swap helps (LampQ, arXiv 2511.10004, section 4.3).

    A swap takes the pair with the largest gain of the damage saved above the damage added whose
    result is feasible. `damages` are by group and offer index.
    """
    begin = time.perf_counter()
    best, value = start, fitness([start])[0]
    while time.perf_counter() - begin < seconds:
        child = _best_swap(space, damages, best)
        if child is None:
            return best
        found = fitness([child])[0]
        if found >= value:
            return best
        best, value = child, found
    return best


def _best_swap(
    space: Space, damages: Mapping[str, Sequence[float]], choice: Choice
) -> Choice | None:
    up = [(g, k, damages[g][choice[g]] - damages[g][k]) for g, k in space.neighbours(choice, +1)]
    down = [(g, k, damages[g][k] - damages[g][choice[g]]) for g, k in space.neighbours(choice, -1)]
    pairs = sorted(
        ((saved - added, a, i, b, j) for a, i, saved in up for b, j, added in down if a != b),
        key=lambda pair: (-pair[0], pair[1:]),
    )
    for gain, a, i, b, j in pairs:
        child = space.moved(choice, a, i)
        child = space.moved(child, b, j) if j in space.rungs(child, b) else {}
        if gain > 0 and child and space.feasible(child):
            return child
    return None
