"""The solver against the minimum cut, published numbers and a greedy bound."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pulp
import pytest
from numpy.typing import NDArray

from octavo.ir.errors import BudgetInfeasible, UnknownName, UsageError
from octavo.passes.highs import multipliers
from octavo.passes.linear_model import linear_model
from octavo.passes.partition import Edge, Item, integer_side
from octavo.passes.programme import Border, Candidate, Programme
from octavo.passes.solve import OutOfTime, solve

REL = 1e-8


def layered(groups: int, candidates: int, seed: int) -> tuple[Programme, dict[str, float]]:
    """A programme like a network's: damage falls and costs rise with bits; limits that bind."""
    rng = np.random.default_rng(seed)
    shape = (groups, candidates)
    bits = rng.uniform(1, 16, shape)
    size = rng.lognormal(10, 1.5, (groups, 1))
    damage = rng.lognormal(0, 1, (groups, 1)) * 3.5**-bits * rng.lognormal(0, 0.3, shape)
    costs = {
        "bytes": np.round(size * bits / 8),
        "seconds": rng.lognormal(-7, 1, (groups, 1)) * rng.uniform(0.3, 1, shape),
        "bops": size * bits * rng.uniform(2, 8, shape),
    }
    options = {
        f"g{i}": tuple(
            Candidate(float(damage[i, j]), {n: float(c[i, j]) for n, c in costs.items()})
            for j in range(candidates)
        )
        for i in range(groups)
    }
    limits = {n: float(c.min(1).sum() + c.mean(1).sum()) / 2 for n, c in costs.items()}
    return Programme(options), limits


def plain_optimum(programme: Programme, limits: Mapping[str, float], gap: float) -> float:
    """The least damage by the model as it is written down, a column per candidate."""
    problem = pulp.LpProblem("plain", pulp.LpMinimize)
    chosen = []
    for i, candidates in enumerate(programme.groups.values()):
        columns = [
            problem.add_variable(f"x{i}_{j}", 0, 1, pulp.LpInteger) for j in range(len(candidates))
        ]
        problem += pulp.lpSum(columns) == 1
        chosen += list(zip(columns, candidates, strict=True))
    problem += pulp.LpAffineExpression((x, c.damage) for x, c in chosen)
    for name, limit in limits.items():
        problem += pulp.LpAffineExpression((x, c.costs[name] / limit) for x, c in chosen) <= 1
    problem.solve(pulp.HiGHS(msg=False, gapRel=gap, gapAbs=0.0, parallel="off"))
    return float(pulp.value(problem.objective))


@pytest.mark.parametrize("seed", range(4))
def test_cores_find_what_the_plain_model_finds(seed: int) -> None:
    programme, limits = layered(60, 8, seed)
    answer = solve(programme, limits=limits, gap=0)
    # HiGHS keeps limits to 1e-6 of their size only, so that its optimum may be a little lower.
    assert answer.value == pytest.approx(plain_optimum(programme, limits, 0.0), rel=1e-5, abs=0)
    assert all(answer.totals[name] <= limit for name, limit in limits.items())
    rough = solve(programme, limits=limits, gap=0.01)
    assert rough.gap <= 0.01
    assert rough.bound <= answer.value * (1 + REL)
    assert answer.value <= rough.value * (1 + REL)


def test_a_hundred_groups_are_proven_and_repeat() -> None:
    programme, limits = layered(100, 12, 0)
    answer = solve(programme, limits=limits)
    assert answer.status == "optimal"
    assert answer.gap <= 1e-4
    assert answer.bound <= answer.value == programme.totals(answer.choice)["damage"]
    assert answer.bound <= plain_optimum(programme, limits, 1e-4) * (1 + 1e-5)
    assert answer.choice == solve(programme, limits=limits).choice


@pytest.mark.parametrize("seed", range(30))
def test_the_fastest_mixture_is_the_minimum_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"n{i}" for i in range(rng.integers(2, 25))]
    items = [
        Item(n, None if rng.random() < 0.2 else rng.uniform(0, 1e-3), rng.uniform(0, 1e-3))
        for n in names
    ]
    edges = []
    for index, name in enumerate([None, None, *names]):
        readers = [None if rng.random() < 0.2 else str(rng.choice(names)) for _ in range(3)]
        edges.append(Edge(str(index), name, tuple(readers), *rng.uniform(0, 5e-4, 2)))
    groups = {}
    for item in items:
        groups[item.name] = (Candidate(0.0, {"seconds": item.float_seconds}),)
        if item.integer_seconds is not None:
            groups[item.name] += (Candidate(0.0, {"seconds": item.integer_seconds}, True),)
    borders = tuple(
        Border(e.producer, e.readers, e.quantize_seconds, e.dequantize_seconds) for e in edges
    )
    programme = Programme(groups, borders=borders)
    side = integer_side(items, edges)
    fastest = programme.totals({name: int(name in side) for name in names})["seconds"]
    # The cut counts whole picoseconds.
    assert solve(programme, "seconds", gap=0).value == pytest.approx(fastest, rel=1e-7, abs=0)


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Any]:
    """Published traces, weight errors, sizes and latencies of ResNet18 (HAWQ-V3)."""
    text = (Path(__file__).parent / "hawq_resnet18.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def hawq(data: dict[str, Any]) -> tuple[Programme, float]:
    """Layers at 4 and 8 bits, tied ones as one group, and the damage of 8 bits everywhere."""
    layers = range(len(data["parameters"]))
    tied = {layer: tuple(group) for group in data["tied"] for layer in group}
    groups = list(dict.fromkeys(tied.get(layer, (layer,)) for layer in layers))

    def candidate(group: tuple[int, ...], bits: int) -> Candidate:
        traces, errors = data["hessian_trace_mean"], data["delta_weight_squared"][str(bits)]
        costs = {
            "bits": sum(data["parameters"][i] * bits for i in group),
            "bops": sum(data["macs"][i] * bits * bits for i in group),
            "seconds": sum(data["latency_ms_t4"][str(bits)][i] for i in group) / 1e3,
        }
        return Candidate(sum(traces[i] * errors[i] for i in group), costs)

    programme = Programme({str(g): (candidate(g, 4), candidate(g, 8)) for g in groups})
    return programme, programme.totals(dict.fromkeys(programme.groups, 1))["damage"]


def between(programme: Programme, resource: str, ratio: float) -> float:
    """The budget at a ratio between all 4 bits and all 8 bits."""
    low, high = (programme.totals(dict.fromkeys(programme.groups, j))[resource] for j in (0, 1))
    return low + ratio * (high - low)


@pytest.mark.parametrize(
    ("ratio", "published"), [(0.25, 0.114042), (0.5, 0.070248), (0.75, 0.029183)]
)
def test_resnet18_under_a_size_budget(
    resnet18: dict[str, Any], ratio: float, published: float
) -> None:
    programme, floor = hawq(resnet18)
    assert len(programme.groups) == 16
    answer = solve(programme, limits={"bits": between(programme, "bits", ratio)}, gap=0)
    assert answer.value - floor == pytest.approx(published, abs=5e-7, rel=0)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("resources", [("bops",), ("seconds",), ("bits", "bops", "seconds")])
def test_resnet18_under_other_budgets_equals_enumeration(
    resnet18: dict[str, Any], resources: tuple[str, ...], ratio: float
) -> None:
    programme, _ = hawq(resnet18)
    eight = (np.arange(2**16)[:, None] >> np.arange(16) & 1).astype(bool)
    damage = _enumerated(programme, eight, lambda c: c.damage)
    kept = np.ones(2**16, dtype=bool)
    limits = {name: between(programme, name, ratio) for name in resources}
    for name, limit in limits.items():
        kept &= _enumerated(programme, eight, lambda c, n=name: c.costs[n]) <= limit
    answer = solve(programme, limits=limits, gap=0)
    assert answer.value == pytest.approx(damage[kept].min(), rel=REL, abs=0)


def _enumerated(
    programme: Programme, second: NDArray[np.bool_], read: Callable[[Candidate], float]
) -> NDArray[np.float64]:
    """A total of every choice between two candidates per group, given where it is the second."""
    pairs = np.array([[read(c) for c in candidates] for candidates in programme.groups.values()])
    return np.where(second, pairs[:, 1], pairs[:, 0]).sum(axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_convex_groups_agree_with_greedy_by_marginal_damage(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = np.cumsum(rng.integers(1, 100, (40, 6)), axis=1).astype(float)
    gains = -np.sort(-rng.lognormal(0, 2, (40, 5)), axis=1) * np.diff(size).min()
    # Damage per byte falls: the curve is convex.
    rates = -np.sort(-gains / np.diff(size), axis=1)
    saved = rates * np.diff(size)
    damage = np.cumsum(saved[:, ::-1], axis=1)[:, ::-1]
    damage = np.concatenate([damage, np.zeros((40, 1))], axis=1)
    programme = Programme(
        {
            f"g{i}": tuple(Candidate(damage[i, j], {"bytes": size[i, j]}) for j in range(6))
            for i in range(40)
        }
    )
    budget = float(size[:, 0].sum() + 0.4 * (size[:, -1] - size[:, 0]).sum())
    steps = sorted(zip(-rates.ravel(), np.diff(size).ravel(), saved.ravel(), strict=True))
    left, bound = budget - size[:, 0].sum(), damage[:, 0].sum()
    for _, more, less in steps:
        if more > left:
            bound, last = bound - less * left / more, less
            break
        left, bound = left - more, bound - less
    value = solve(programme, limits={"bytes": budget}, gap=0).value
    assert bound * (1 - REL) <= value <= bound + last
    kept = {name: list(range(6)) for name in programme.groups}
    model = linear_model(programme, "damage", {"bytes": budget}, kept)
    weights = multipliers(model, math.inf)
    assert weights is not None
    assert model.lagrangian(weights)[0] == pytest.approx(bound, rel=REL, abs=0)


def test_dominated_candidates_are_dropped_unless_they_differ_in_kind() -> None:
    worse = Candidate(2.0, {"seconds": 2.0})
    candidates = (worse, Candidate(1.0, {"seconds": 1.0}, True), Candidate(1.0, {"seconds": 2.0}))
    alone = Programme({"a": candidates})
    assert solve(alone, limits={"seconds": 5.0}).dominated == 2
    bordered = Programme({"a": candidates}, borders=(Border("a", (None,), 0.0, 9.0),))
    answer = solve(bordered, limits={"seconds": 5.0})
    assert (answer.dominated, answer.choice) == (1, {"a": 2})


def test_of_equals_the_one_better_elsewhere_then_the_first_is_taken() -> None:
    candidates = tuple(Candidate(damage, {"bytes": 4.0}) for damage in (3.0, 1.0, 1.0))
    assert solve(Programme({"a": candidates}), "bytes").choice == {"a": 1}


def test_limits_are_kept_exactly_and_reached_exactly() -> None:
    cheap, good = Candidate(1.0, {"bytes": 0.0}), Candidate(0.0, {"bytes": 1e9 + 1})
    programme = Programme({f"g{i}": (cheap, good) for i in range(3)})
    assert solve(programme, limits={"bytes": 3e9 + 3}).value == 0.0
    assert solve(programme, limits={"bytes": 3e9 + 2}).value == 1.0
    tenths = Programme({f"g{i}": (Candidate(0.0, {"seconds": 0.1}),) for i in range(3)})
    assert solve(tenths, limits={"seconds": 0.3}).totals["seconds"] == pytest.approx(0.3, rel=1e-15)


def test_infeasible_budgets_are_named_with_the_nearest() -> None:
    slow, fast = (
        Candidate(0.0, {"bytes": 1.0, "seconds": 9.0}),
        Candidate(0.5, {"bytes": 8.0, "seconds": 2.0}),
    )
    programme = Programme({"a": (slow, fast), "b": (slow, fast)}, {"bops": 3.0})
    with pytest.raises(BudgetInfeasible) as error:
        solve(programme, limits={"bops": 5.0, "bytes": 8.5, "seconds": 12.5})
    assert error.value.limits == {"bytes": 8.5, "seconds": 12.5}
    assert error.value.nearest == {"bytes": 9.0, "seconds": 18.0}
    assert error.value.alone == {"bytes": 2.0, "seconds": 4.0}
    assert str(error.value) == (
        "no plan keeps --size 8.5B and --latency 12.5s together\n"
        "  why:   the least alone: --size 2B, --latency 4s\n"
        "  hint:  give --size 9B, or --latency 18s"
    )
    with pytest.raises(BudgetInfeasible, match=r"no plan keeps --size 1B\n"):
        solve(programme, limits={"bytes": 1.0, "seconds": 100.0})


def test_what_is_no_resource_or_limit_is_refused() -> None:
    programme = Programme({"a": (Candidate(0.0, {"bytes": 1.0}),)})
    with pytest.raises(UnknownName, match="unknown resource 'byte'"):
        solve(programme, limits={"byte": 1.0})
    with pytest.raises(UnknownName, match="unknown resource 'seconds'"):
        solve(programme, "seconds")
    for wrong in (-1.0, math.nan):
        with pytest.raises(UsageError, match="a limit must be a number >= 0"):
            solve(programme, limits={"bytes": wrong})


def test_when_time_ends_the_bound_still_holds() -> None:
    programme, limits = layered(60, 8, 1)
    answer = solve(programme, limits=limits, gap=0, time_limit_seconds=0.05)
    best = solve(programme, limits=limits, gap=0)
    assert answer.status in ("time limit", "optimal")
    assert answer.bound <= best.value * (1 + REL)
    assert answer.value >= best.value * (1 - REL)
    borders = tuple(Border(name, (None,), 0.0, 1e-3) for name in programme.groups)
    bordered = Programme(programme.groups, borders=borders)
    with pytest.raises(OutOfTime, match="no choice was found in 0 s"):
        solve(bordered, limits=limits, time_limit_seconds=0.0)


def test_the_solver_prints_nothing() -> None:
    code = (
        "from octavo.passes.programme import Candidate, Programme\n"
        "from octavo.passes.solve import solve\n"
        "c = (Candidate(1.0, {'bytes': 1.0}), Candidate(0.0, {'bytes': 3.0}))\n"
        "solve(Programme({'a': c, 'b': c}), limits={'bytes': 5.0})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("", "")
