"""Plans against brute force over every choice of small programmes, and what they say of themselves.

Damages are drawn at random, so that no structure of real ones hides a mistake.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.backends.ort_lowering import lower
from octavo.ir.errors import BudgetInfeasible, UnknownName, UsageError
from octavo.ir.facts import Plan
from octavo.ir.menu import Damage, Menu, Sensitivity, Solution
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.allocate import Allocate, choice_of, names_of, plan_of
from octavo.passes.base import PassContext
from octavo.passes.groups import weight_row
from octavo.passes.latency import predicted_seconds
from octavo.passes.pipeline import Compilation, Pipeline
from octavo.passes.planning import Planning

# What `allocate` leaves to its solver.
GAP = 1e-4
# Sums of some ten numbers in another order.
SUMS = 1e-9
# Names and tables of the emitted file that the plan does not count.
FILE_BYTES_RATIO = 0.1

OFFERED = (
    "canonicalize,calibrate{method=minmax},offer-options{bits=8;4,blocks=32,weight-only=false}"
)
RESIDUAL = """residual (float[1,16,8,8] x) => (float[1,16,8,8] y) {
    [one] a = Conv <pads = [1,1,1,1]> (x, w_16x16x3x3)  [relu] r = Relu (a)
    [two] b = Conv <pads = [1,1,1,1]> (r, w_16x16x3x3_b)  [sum] s = Add (b, r)
    [three] y = Conv (s, w_16x16x1x1) }"""
# `a` is read as codes and as floats, and its kernel can write either.
FORK = """fork (float[4,32] x) => (float[4,8] y, float[4,32] z) {
    [up] a = MatMul (x, w_32x32)  [tanh] z = Tanh (a)  [down] b = MatMul (a, w_32x16)
    [relu] r = Relu (b)  [out] y = MatMul (r, w_16x8) }"""
CHAIN = """chain (float[1,16,6,6] x) => (float[1,16,6,6] y) {
    [one] a = Conv (x, w_32x16x1x1)  [relu] r = Relu (a)  [tanh] t = Tanh (r)
    [two] y = Conv (t, w_16x32x1x1) }"""
PAIR = """pair (float[4,16] x) => (float[4,16] y) {
    [query] a = MatMul (x, w_16x32)  [key] b = MatMul (x, w_16x32_b)
    [product] c = Mul (a, b)  [out] y = MatMul (c, w_32x16) }"""
MODELS = {"residual": RESIDUAL, "fork": FORK, "chain": CHAIN, "pair": PAIR}
Calibrated = Callable[..., PassContext]


def model_of(text: str) -> Model:
    """The model of a text, with seeded weights for the values that are named by their shape."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    rng = np.random.default_rng(0)
    names = (name for node in proto.graph.node for name in node.input if name[:2] == "w_")
    for name in dict.fromkeys(names):
        shape = [int(size) for size in name.split("_")[1].split("x")]
        array = rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return read(proto)


def damages_of(menu: Menu, seed: int) -> Sensitivity:
    """Damages that rise with lost bits, up to chance."""
    rng = np.random.default_rng(seed)
    by_group = {
        name: {o.name: Damage(float(k > 0) * float(rng.exponential())) for k, o in enumerate(found)}
        for name, found in menu.offers.items()
    }
    by_value = {value: Damage(float(rng.exponential() / 10)) for value in "xrst"}
    return Sensitivity(by_group, by_value, "drawn", "chance")


@dataclass(frozen=True)
class Case:
    """A model with offers and damages, and all its choices with their totals."""

    model: Model
    ctx: PassContext

    @cached_property
    def planning(self) -> Planning:
        return Planning(self.model, self.ctx)

    @cached_property
    def every(self) -> list[tuple[dict[str, int], dict[str, float]]]:
        programme = self.planning.programme
        counts = [range(len(candidates)) for candidates in programme.groups.values()]
        choices = (dict(zip(programme.groups, c, strict=True)) for c in itertools.product(*counts))
        return [(choice, programme.totals(choice)) for choice in choices]

    def kept(self, limits: Mapping[str, float]) -> list[dict[str, float]]:
        """Totals of the choices that keep to the limits."""
        return [t for _, t in self.every if all(t[n] <= v for n, v in limits.items())]

    def allocate(self, **options: Any) -> Compilation:
        return Pipeline((Allocate(**options),)).run(self.model, self.ctx)

    def solution(self, **options: Any) -> Solution:
        return self.allocate(**options).model.fact(Solution)


@pytest.fixture
def case_of(calibrated: Calibrated) -> Callable[..., Case]:
    """`case_of(name, seed)`: a small model, its offers, and drawn damages."""

    def build(name: str, seed: int = 0) -> Case:
        model = model_of(MODELS[name])
        ctx = calibrated(model)
        offered = Pipeline.parse(OFFERED).run(model, ctx).model
        return Case(offered.with_fact(damages_of(offered.fact(Menu), seed)), ctx)

    return build


def between(case: Case, resource: str, at: float) -> float:
    """A limit between the least and the largest total of a resource, in whole numbers."""
    totals = [total[resource] for _, total in case.every]
    return float(int(min(totals) + at * (max(totals) - min(totals))))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "resources", ["bytes", "seconds", "memory", "bops", "bytes seconds memory"]
)
def test_a_plan_is_as_good_as_the_best_of_all_choices(
    case_of: Callable[..., Case], name: str, seed: int, resources: str
) -> None:
    case = case_of(name, seed)
    # What some choice needs, and a little more, so that no rounding decides.
    some = case.every[int(np.random.default_rng(seed).integers(len(case.every)))][1]
    limits = {resource: 1.001 * some[resource] for resource in resources.split()}
    limits |= {"bytes": float(int(limits["bytes"]))} if "bytes" in limits else {}
    spelt = {"size": "bytes", "latency": "seconds", "memory": "memory", "bops": "bops"}
    options = {option: f"{limits[r]:.12f}" for option, r in spelt.items() if r in limits}
    options["latency"] = options["latency"] + "s" if "latency" in options else "none"
    found = case.solution(**options)
    best = min(total["damage"] for total in case.kept(limits))
    assert found.status == "optimal"
    assert best <= found.totals["damage"] <= best * (1 + GAP)
    assert found.gap <= GAP
    assert dict(found.limits) == pytest.approx(limits, rel=1e-6)
    # The named offers are what the totals are of.
    choice = choice_of(case.model.fact(Menu), found.options)
    assert dict(found.totals) == next(total for c, total in case.every if c == choice)


@pytest.mark.parametrize("objective", ["size", "latency"])
@pytest.mark.parametrize("seed", range(3))
def test_the_least_size_or_latency_under_a_bound_on_damage(
    case_of: Callable[..., Case], objective: str, seed: int
) -> None:
    case = case_of("residual", seed)
    bound = 0.3 * max(total["damage"] for _, total in case.every)
    found = case.solution(
        objective=objective, latency="none" if objective == "size" else "", max_damage=bound
    )
    resource = {"size": "bytes", "latency": "seconds"}[objective]
    best = min(total[resource] for total in case.kept({"damage": bound}))
    assert found.totals["damage"] <= bound
    assert found.totals[resource] <= best * (1 + GAP)
    assert found.objective == objective


def test_without_a_latency_budget_a_plan_is_nearly_as_fast_as_the_fastest_that_fits(
    case_of: Callable[..., Case],
) -> None:
    case = case_of("residual")
    size = float(int(between(case, "bytes", 0.4)))
    compilation = case.allocate(size=str(int(size)))
    found = compilation.model.fact(Solution)
    fastest = min(total["seconds"] for total in case.kept({"bytes": size}))
    # The fastest is itself found to a thousandth.
    assert found.limits["seconds"] == pytest.approx(1.1 * fastest, rel=1.1e-3)
    assert found.totals["seconds"] <= found.limits["seconds"]
    notes = [remark.text for remark in compilation.records[0].remarks]
    assert notes == ["no --latency: at most 1.1x the fastest plan's seconds"]
    free = case.solution(size=str(int(size)), latency="none")
    assert "seconds" not in free.limits
    assert free.totals["damage"] < found.totals["damage"]


def test_shares_are_of_the_source_file_and_of_the_float_plan(case_of: Callable[..., Case]) -> None:
    case = case_of("residual")
    whole = case.every[0][1]
    limits = case.solution(size="60%", latency="0.9x", memory="80%", bops="50%").limits
    assert limits["bytes"] == int(0.6 * case.model.source.bytes)
    assert limits["seconds"] == pytest.approx(0.9 * whole["seconds"], rel=SUMS)
    assert limits["memory"] == pytest.approx(0.8 * whole["memory"], rel=SUMS)
    assert limits["bops"] == pytest.approx(0.5 * whole["bops"], rel=SUMS)


def test_a_budget_that_no_plan_keeps_names_the_least(case_of: Callable[..., Case]) -> None:
    case = case_of("residual")
    least = min(total["bytes"] for _, total in case.every)
    with pytest.raises(BudgetInfeasible) as caught:
        case.solution(size=str(int(least) - 1), latency="none")
    assert caught.value.nearest == {"bytes": pytest.approx(least, rel=GAP)}
    assert case.solution(size=str(int(least)), latency="none").totals["bytes"] == least


def test_budgets_that_exclude_each_other_name_both(case_of: Callable[..., Case]) -> None:
    case = case_of("residual")
    size = min(total["bytes"] for _, total in case.every)
    fastest = min(total["seconds"] for _, total in case.every)
    within_size = min(total["seconds"] for total in case.kept({"bytes": size}))
    assert fastest < within_size
    seconds = (fastest + within_size) / 2
    with pytest.raises(BudgetInfeasible, match="together") as caught:
        case.solution(size=str(int(size)), latency=f"{seconds:.12f}s")
    assert caught.value.nearest == {
        "bytes": min(total["bytes"] for total in case.kept({"seconds": seconds})),
        "seconds": pytest.approx(within_size, rel=GAP),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "size", "size": "50%", "max_damage": 1.0}, "both the objective and a bud"),
        ({"objective": "latency", "latency": "1x", "max_damage": 1.0}, "both the objective and a"),
        ({"objective": "size"}, "the least size needs a bound on the damage"),
        ({"objective": "latency", "size": "50%"}, "the least latency needs a bound on the damage"),
        ({"size": "50%", "max_damage": 1.0}, "damage cannot be both the objective and a budget"),
        ({"size": "3ms"}, "wrong unit"),
        ({"latency": "3"}, "wrong unit"),
        ({"size": "-1"}, "more than zero"),
        ({"memory": "some"}, "is not a budget"),
    ],
)
def test_options_that_contradict_are_refused(
    case_of: Callable[..., Case], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        case_of("chain").solution(**options)


def test_further_plans_are_the_next_best(case_of: Callable[..., Case]) -> None:
    case = case_of("chain")
    size = float(int(between(case, "bytes", 0.6)))
    found = case.solution(size=str(int(size)), latency="none", top_k=5, gap=0.0)
    values = [found.totals["damage"], *(totals["damage"] for totals, _ in found.alternatives)]
    expected = sorted(total["damage"] for total in case.kept({"bytes": size}))[:5]
    assert values == pytest.approx(expected, rel=SUMS)
    plans = [tuple(found.options.items()), *(tuple(o.items()) for _, o in found.alternatives)]
    assert len(set(plans)) == 5


def test_the_curve_is_the_least_damage_at_every_size(case_of: Callable[..., Case]) -> None:
    case = case_of("residual")
    curve = case.solution(latency="none", pareto=6).curve
    sizes, damages = zip(*((p["bytes"], p["damage"]) for p in curve), strict=True)
    assert sizes[0] == min(total["bytes"] for _, total in case.every)
    calm = min(case.every, key=lambda item: (item[1]["damage"], item[1]["bytes"]))[1]
    for budget, damage in zip(
        np.linspace(sizes[0], calm["bytes"], 6).tolist(), damages, strict=True
    ):
        best = min(total["damage"] for total in case.kept({"bytes": budget}))
        assert damage <= best * (1 + 1e-3) + SUMS
    assert list(damages) == sorted(damages, reverse=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_covers_every_node_with_weights(case_of: Callable[..., Case], name: str) -> None:
    case = case_of(name)
    found = case.allocate(size="70%", latency="none").model
    plan, menu, solution = found.fact(Plan), found.fact(Menu), found.fact(Solution)
    weighted = {n.name for n in found.graph if weight_row(n, case.ctx.target) is not None}
    assert weighted <= set(plan.by_node)
    for group, offer in solution.options.items():
        chosen = next(o for o in menu.offers[group] if o.name == offer)
        for node in menu.groups[group].nodes:
            assert plan.by_node[node].option == chosen.options[node]
            assert f"chosen of {len(menu.offers[group])} offers" in plan.by_node[node].reason


def test_nodes_that_project_one_input_get_one_option(case_of: Callable[..., Case]) -> None:
    found = case_of("pair").allocate(size="70%", latency="none").model
    plan = found.fact(Plan)
    assert plan.by_node["query"].option == plan.by_node["key"].option
    assert plan.by_node["query"].reason.endswith("project one input")


@pytest.mark.parametrize("name", MODELS)
def test_seconds_are_those_of_the_plan(case_of: Callable[..., Case], name: str) -> None:
    """Borders counted by the programme against borders found in the graph of the plan."""
    case = case_of(name)
    menu, found = case.model.fact(Menu), case.model.fact(Sensitivity)
    rng = np.random.default_rng(0)
    for index in rng.choice(len(case.every), min(200, len(case.every)), replace=False):
        choice, totals = case.every[index]
        plan = plan_of(menu, found, choice, "")
        seconds = predicted_seconds(case.model, plan, case.ctx.cost, case.ctx.target)
        assert totals["seconds"] == pytest.approx(seconds, rel=SUMS), names_of(menu, choice)


def test_memory_is_counted_by_hand(case_of: Callable[..., Case]) -> None:
    """Elements: x and y 576, a and r and t 1152; floats have 4 bytes, codes 1."""
    programme = case_of("chain").planning.programme
    codes = {n: [c.integer for c in found].index(True) for n, found in programme.groups.items()}

    def memory(*integer: str) -> float:
        choice = {n: codes[n] if n in integer else 0 for n in programme.groups}
        return programme.totals(choice)["memory"]

    assert list(programme.groups) == ["one", "two"]
    # While relu or tanh runs.
    assert memory() == memory("two") == 4 * (1152 + 1152)
    # While two runs, from floats to floats; where it writes codes, while tanh runs from codes.
    assert memory("one") == 4 * (1152 + 576)
    assert memory("one", "two") == 1152 + 4 * 1152


def test_damage_adds_weights_and_half_of_each_quantizer_at_a_float_border(
    case_of: Callable[..., Case],
) -> None:
    case = case_of("residual")
    programme, found = case.planning.programme, case.model.fact(Sensitivity)
    menu = case.model.fact(Menu)
    static = {
        name: next((k for k, c in enumerate(cs) if c.integer), 0)
        for name, cs in programme.groups.items()
    }
    weights = sum(found.damage(n, menu.offers[n][k].name).mean for n, k in static.items())
    value = {name: damage.mean for name, damage in found.by_value.items()}
    # `r` is read by two kernels and written by one, `s` is read and written once.
    activations = value["x"] / 2 + 1.5 * value["r"] + value["s"]
    assert programme.totals(static)["damage"] == pytest.approx(weights + activations, rel=SUMS)


@pytest.mark.parametrize("size", ["35%", "60%"])
def test_bytes_are_those_of_the_file(
    case_of: Callable[..., Case], tmp_path: Path, size: str
) -> None:
    model = case_of("residual").allocate(size=size).model
    ctx = case_of("residual").ctx
    lowered = Pipeline.parse("place-quantizers,insert-fake-quant").passes
    artifact = lower(Pipeline(lowered).run(model, ctx).model, tmp_path / "model.onnx", "ort-cpu")
    predicted = model.fact(Solution).totals["bytes"]
    assert predicted == pytest.approx(artifact.bytes, rel=FILE_BYTES_RATIO)


def test_the_same_inputs_give_the_same_plan(case_of: Callable[..., Case]) -> None:
    first = case_of("residual").allocate(size="50%", top_k=3).model
    second = case_of("residual").allocate(size="50%", top_k=3).model
    assert first.fact(Plan) == second.fact(Plan)
    assert first.fact(Solution).alternatives == second.fact(Solution).alternatives


def test_an_unknown_estimate_is_an_error(case_of: Callable[..., Case]) -> None:
    case = case_of("chain")
    found = case.model.fact(Sensitivity)
    partial = {name: offers for name, offers in found.by_group.items() if name != "two"}
    without = Sensitivity(partial, {}, "drawn", "chance")
    with pytest.raises(UnknownName, match="unknown decision group 'two'"):
        Pipeline((Allocate(size="50%"),)).run(case.model.with_fact(without), case.ctx)
