"""The minimum cut against brute force over every assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from octavo.passes.partition import Edge, Item, integer_side


def _seconds(items: list[Item], edges: list[Edge], integer: set[str]) -> float:
    """The cost of an assignment, written out from the definition."""
    total = 0.0
    for item in items:
        seconds = item.integer_seconds if item.name in integer else item.float_seconds
        if seconds is None:
            return float("inf")
        total += seconds
    for edge in edges:
        made_integer = edge.producer in integer
        sides = [reader in integer for reader in edge.readers]
        if made_integer and not all(sides):
            total += edge.dequantize_seconds
        if not made_integer and any(sides):
            total += edge.quantize_seconds
    return total


def _random_problem(seed: int) -> tuple[list[Item], list[Edge]]:
    rng = np.random.default_rng(seed)
    names = [f"n{k}" for k in range(int(rng.integers(2, 9)))]
    micro = [float(s) * 1e-6 for s in rng.integers(1, 40, 2 * len(names))]
    items = [
        Item(name, None if rng.random() < 0.15 else micro[2 * k], micro[2 * k + 1])
        for k, name in enumerate(names)
    ]
    edges = []
    for k in range(len(names) + 2):
        producer = rng.choice([*names, ""]) or None
        later = names[names.index(producer) + 1 :] if producer else names
        readers = [r or None for r in rng.choice([*later, ""], int(rng.integers(1, 4)))]
        cost = [float(c) * 1e-6 for c in rng.integers(0, 20, 2)]
        edges.append(Edge(f"v{k}", producer, tuple(readers), *cost))
    return items, edges


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_is_as_fast_as_the_best_of_all_assignments(seed: int) -> None:
    items, edges = _random_problem(seed)
    names = [item.name for item in items]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )
    best = min(_seconds(items, edges, set(subset)) for subset in subsets)
    found = _seconds(items, edges, integer_side(items, edges))
    # Costs are whole microseconds, kept to a picosecond.
    assert found == pytest.approx(best, rel=0, abs=1e-11)


def test_a_slow_kernel_between_fast_ones_stays_integer_when_the_border_costs_more() -> None:
    items = [Item("a", 1e-6, 9e-6), Item("slow", 5e-6, 3e-6), Item("b", 1e-6, 9e-6)]

    def edges(border: float) -> list[Edge]:
        return [
            Edge("v", "a", ("slow",), border, border),
            Edge("w", "slow", ("b",), border, border),
        ]

    assert integer_side(items, edges(2e-6)) == {"a", "slow", "b"}
    assert integer_side(items, edges(0.5e-6)) == {"a", "b"}
