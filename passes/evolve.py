"""Search around a plan with its true fitness: switch levels of a few groups, keep the better."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import numpy as np

    from octavo.passes.joint_moves import JointMoves

Choice = Mapping[str, int]
# (choices, stage) → fitness of each, lower is better; a later stage looks at more data.
Fitness = Callable[[Sequence[Choice], int], Sequence[float]]

_MOST_FLIPS = 3
_MOST_LOWERED = 10
_TRIES = 20
_PATIENCE = 8


@final
@dataclass(frozen=True)
class Space:
    """What may be chosen: the levels of each group from small to large, and what fits.

    `levels` are indices of offers in rising order of bytes; `feasible` says whether the totals
    of a choice keep to the budgets. With `moves`, what a group may become depends on the others.
    """

    levels: Mapping[str, Sequence[int]]
    feasible: Callable[[Choice], bool]
    moves: JointMoves | None = None

    def mutated(self, parent: Choice, rng: np.random.Generator) -> Choice | None:
        """A feasible neighbour: some groups one level higher, then others lower until it fits.

        Groups differ in size, so that one step up may take several down (EvoPress without size
        groups).
        """
        for _ in range(_TRIES):
            child = dict(parent)
            for _ in range(int(min(rng.integers(1, _MOST_FLIPS + 1, 2)))):
                self._step(child, rng, +1)
            for _ in range(_MOST_LOWERED):
                if self.feasible(child):
                    break
                self._step(child, rng, -1)
            if child != parent and self.feasible(child):
                return child
        return None

    def neighbours(self, choice: Choice, by: int) -> list[tuple[str, int]]:
        """Groups that can move by that many levels, with the level they would get."""
        found = ((group, self._next(choice, group, by)) for group in self.levels)
        return [(group, level) for group, level in found if level is not None]

    def _step(self, child: dict[str, int], rng: np.random.Generator, by: int) -> None:
        movable = self.neighbours(child, by)
        if movable:
            group, level = movable[int(rng.integers(len(movable)))]
            child.update(self.moved(child, group, level))

    def moved(self, choice: Choice, group: str, level: int) -> dict[str, int]:
        """The choice with a group at another level."""
        made = {**choice, group: level}
        return made if self.moves is None else self.moves.moved(choice, group, level)

    def rungs(self, choice: Choice, group: str) -> Sequence[int]:
        """The levels that a group has, given what the others are."""
        return self.levels[group] if self.moves is None else self.moves.rungs(choice, group)

    def _next(self, choice: Choice, group: str, by: int) -> int | None:
        known = list(self.rungs(choice, group))
        if choice[group] not in known:
            return None
        at = known.index(choice[group]) + by
        return known[at] if 0 <= at < len(known) else None


@final
@dataclass
class Search:
    """An elitist (1+λ) evolution in stages (EvoPress, arXiv 2410.14649, algorithm 1).

    Every generation draws `offspring` children of the best choice so far. Each stage evaluates
    the survivors of the one before, and the parent joins the last, on more data. Stops at the
    deadline, after `generations`, or when nothing was found for several generations.
    """

    space: Space
    fitness: Fitness
    rng: np.random.Generator
    offspring: int = 16
    survivors: Sequence[int] = (4, 1)
    generations: int = 60
    seconds: float = 30.0
    history: list[float] = field(default_factory=list)
    evaluated: int = 0

    def run(self, start: Choice, progress: Callable[[int, int], None]) -> Choice:
        """The best choice found; `history` holds its fitness after every generation."""
        begin = time.perf_counter()
        last = len(self.survivors)
        best, value = start, self._evaluate([start], last)[0]
        self.history.append(value)
        idle = 0
        for generation in range(self.generations):
            if time.perf_counter() - begin > self.seconds or idle >= _PATIENCE:
                break
            child = self._generation(best)
            found = self._evaluate([child], last)[0] if child is not None else value
            idle = 0 if found < value else idle + 1
            if child is not None and found < value:
                best, value = child, found
            self.history.append(value)
            progress(generation + 1, self.generations)
        return best

    def _generation(self, parent: Choice) -> Choice | None:
        """The child that survives all stages but the last."""
        drawn = (self.space.mutated(parent, self.rng) for _ in range(self.offspring))
        unique = {tuple(sorted(c.items())): c for c in drawn if c is not None}
        children = list(unique.values())
        for stage, keep in enumerate(self.survivors):
            if len(children) > keep:
                values = self._evaluate(children, stage)
                order = sorted(range(len(children)), key=lambda k: (values[k], k))
                children = [children[k] for k in order[:keep]]
        return children[0] if children else None

    def _evaluate(self, choices: Sequence[Choice], stage: int) -> Sequence[float]:
        self.evaluated += len(choices)
        return self.fitness(choices, stage)
