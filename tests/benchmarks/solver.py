"""Seconds to a proven gap, of octavo's solver and of the plain model through PuLP and HiGHS.

    python tests/benchmarks/solver.py [--seeds 5] [--plain]

Groups have log-normal sizes and damages; a candidate has 1 to 16 bits, damage falls by 3.5 per
bit, with noise. Limits of bytes, seconds and bops lie halfway between the least and the mean.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import pulp

from octavo.passes.programme import Border, Candidate, MemoryRow, Programme
from octavo.passes.solve import solve

RESOURCES = ("bytes", "seconds", "bops")
GAP = 1e-4


def instance(groups: int, candidates: int, seed: int) -> tuple[Programme, dict[str, float]]:
    """A programme without borders, and three limits that bind."""
    rng = np.random.default_rng(seed)
    shape = (groups, candidates)
    bits = np.sort(rng.uniform(1, 16, shape), axis=1)
    size = rng.lognormal(10, 1.5, (groups, 1))
    damage = rng.lognormal(0, 1, (groups, 1)) * 3.5**-bits * rng.lognormal(0, 0.3, shape)
    costs = {
        "bytes": np.round(size * bits / 8),
        "seconds": rng.lognormal(-7, 1, (groups, 1)) * rng.uniform(0.3, 1, shape),
        "bops": size * bits * rng.uniform(2, 8, shape) * 100,
    }
    limits = {n: float(c.min(1).sum() + c.mean(1).sum()) / 2 for n, c in costs.items()}
    return _programme(damage, costs), limits


def bordered(
    groups: int, candidates: int, borders: int, seed: int
) -> tuple[Programme, dict[str, float]]:
    """A chain with skips: integer candidates take half the time, crossings 2 to 10 % of it."""
    rng = np.random.default_rng(seed)
    programme, limits = instance(groups, candidates, seed)
    names, chain = list(programme.groups), {}
    for name, offers in programme.groups.items():
        factors = [0.5 if offer.integer else 1.0 for offer in offers]
        chain[name] = tuple(
            replace(o, costs={**o.costs, "seconds": o.costs["seconds"] * f})
            for o, f in zip(offers, factors, strict=True)
        )
    crossed = tuple(
        Border(
            names[i % groups],
            (names[(i + 1) % groups], names[min(int(i + rng.integers(1, 9)), groups - 1)]),
            *(rng.uniform(0.02, 0.1, 2) * chain[names[i % groups]][0].costs["seconds"]),
        )
        for i in rng.permutation(borders).tolist()
    )
    saved = {n: float(rng.integers(40, 100)) * 1e3 for n in names}
    live = tuple(
        MemoryRow(rng.uniform(3e5, 1e6), {n: saved[n] for n in names[i : i + 4]})
        for i in range(groups - 3)
    )
    limits = {"bytes": limits["bytes"], "seconds": limits["seconds"] * 0.8, "memory": 9e5}
    return Programme(chain, {}, crossed, live), limits


def plain_seconds(programme: Programme, limits: dict[str, float]) -> float:
    """What PuLP and HiGHS take for the model as it is written down."""
    start = time.perf_counter()
    problem = pulp.LpProblem("plain", pulp.LpMinimize)
    every = {
        (i, j): problem.add_variable(f"x{i}_{j}", 0, 1, pulp.LpInteger)
        for i, candidates in enumerate(programme.groups.values())
        for j in range(len(candidates))
    }
    chosen = [(x, list(programme.groups.values())[i][j]) for (i, j), x in every.items()]
    problem += pulp.LpAffineExpression((x, c.damage) for x, c in chosen)
    for i, candidates in enumerate(programme.groups.values()):
        problem += pulp.lpSum(every[i, j] for j in range(len(candidates))) == 1
    for name, limit in limits.items():
        problem += pulp.LpAffineExpression((x, c.costs[name] / limit) for x, c in chosen) <= 1
    problem.solve(pulp.HiGHS(msg=False, gapRel=GAP, gapAbs=0.0, timeLimit=60, parallel="off"))
    return time.perf_counter() - start


def _programme(damage: np.ndarray, costs: dict[str, np.ndarray]) -> Programme:
    groups = {
        f"g{i}": tuple(
            Candidate(float(row[j]), {n: float(c[i, j]) for n, c in costs.items()}, j % 3 == 1)
            for j in range(len(row))
        )
        for i, row in enumerate(damage)
    }
    return Programme(groups)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="time plain HiGHS as well")
    arguments = parser.parse_args()
    sys.stdout.write(
        "groups candidates limits               seed  seconds      gap dominated plain HiGHS\n"
    )
    for groups, candidates, borders in (
        (500, 12, 0),
        (1000, 20, 0),
        (100, 12, 300),
        (400, 12, 300),
    ):
        for seed in range(arguments.seeds):
            if borders:
                programme, limits = bordered(groups, candidates, borders, seed)
            else:
                programme, limits = instance(groups, candidates, seed)
            answer = solve(programme, limits=limits, gap=GAP, time_limit_seconds=60)
            plain = ""
            if arguments.plain and not borders:
                plain = f"{plain_seconds(programme, limits):.2f}"
            kind = "+".join(limits)
            sys.stdout.write(
                f"{groups:6} {candidates:10} {kind:20} {seed:4} {answer.seconds:8.2f} "
                f"{answer.gap:8.1e} {answer.dominated:9} {plain:>11} {answer.status}\n"
            )


if __name__ == "__main__":
    main()
