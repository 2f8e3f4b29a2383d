"""Refined plans against measurements made without the pass, and swaps against all swaps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.cache import Cache
from octavo.ir.calibration import Part
from octavo.ir.errors import NotDifferentiable, UnknownName
from octavo.ir.facts import Plan
from octavo.ir.menu import Menu, Sensitivity, Solution
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.allocate import choice_of, plan_of
from octavo.passes.base import PassContext
from octavo.passes.evolve import Space
from octavo.passes.pipeline import Compilation, Pipeline
from octavo.passes.planning import Planning
from octavo.passes.refine import Refine, Trials, hard_limits, levels_of
from octavo.passes.rounded_model import RoundedModel
from octavo.passes.starts import starts
from octavo.passes.swaps import swapped

# Float32 sums in another order, relative to the largest output; a code that tips over at a tie
# would show as a thousand times as much.
FLOAT32_RELATIVE = 1e-5
# Damage is the square of a difference, so that its error is that of the outputs over it.
DAMAGE_RELATIVE = 1e-3
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
blocks (float[2,16,6,6] x) => (float[2,16,6,6] y) {
    [one] a = Conv <pads = [1,1,1,1]> (x, w1)  [relu1] b = Relu (a)
    [two] c = Conv <pads = [1,1,1,1]> (b, w2)  [relu2] d = Relu (c)
    [three] e = Conv <pads = [1,1,1,1]> (d, w3)  [sum] f = Add (e, b)  [relu3] g = Relu (f)
    [four] h = Conv <pads = [1,1,1,1]> (g, w4)  [last] y = Tanh (h) }"""
STUDIED = (
    "canonicalize,calibrate{method=minmax},offer-options{bits=8;6;5;4;3;2},"
    'sensitivity{estimator=weight-error},allocate{size="6000"}'
)
Calibrated = Callable[..., PassContext]
Measure = Callable[[Model], float]


@pytest.fixture
def ctx(calibrated: Calibrated, feed_of: Callable[..., Any]) -> PassContext:
    """Services with 16 feeds of two samples."""
    found = calibrated(_source())
    calibration: Any = found.calibration
    feeds = tuple(feed_of(_source(), seed) for seed in range(16))
    return replace(found, calibration=replace(calibration, feeds=feeds))


def _source() -> Model:
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(3)
    for name in ("w1", "w2", "w3", "w4"):
        array = (rng.standard_t(3, (16, 16, 3, 3)) / 12).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return read(proto)


@pytest.fixture
def planned(ctx: PassContext) -> Model:
    """The model with a plan by a coarse estimate, which leaves something to find."""
    return Pipeline.parse(STUDIED).run(_source(), ctx).model


def refined(model: Model, ctx: PassContext, **options: Any) -> Compilation:
    """Refined, within so few generations that time does not end them."""
    given = {"seconds": 60.0, "generations": 6, "offspring": 8, **options}
    return Pipeline((Refine(**given),)).run(model, ctx)


def built(model: Model, ctx: PassContext) -> Model:
    """The plan as part of the graph."""
    made = Pipeline.parse("place-quantizers,insert-fake-quant").passes
    return Pipeline(made).run(model, ctx).model


def measured(model: Model, ctx: PassContext) -> float:
    """Squared error over squared output, mean over the samples of the half that decides."""
    assert ctx.calibration is not None
    quantized, rows = built(model, ctx), []
    for feed in Part(ctx.calibration, 1):
        truth = ctx.evaluator.run(_source(), feed)["y"].astype(np.float64)
        error = ctx.evaluator.run(quantized, feed)["y"].astype(np.float64) - truth
        rows += list(np.square(error).sum((1, 2, 3)) / np.square(truth).sum((1, 2, 3)))
    return float(np.mean(rows))


@pytest.mark.parametrize("method", ["evolve", "swap"])
def test_a_refined_plan_is_better_on_the_half_that_decides(
    planned: Model, ctx: PassContext, method: str
) -> None:
    compilation = refined(planned, ctx, method=method)
    before, after = measured(planned, ctx), measured(compilation.model, ctx)
    remark = compilation.records[0].remarks[-1]
    assert remark.values["before"] == pytest.approx(before, rel=DAMAGE_RELATIVE)
    assert after <= before
    if remark.kind == "applied":
        assert remark.values["after"] == pytest.approx(after, rel=DAMAGE_RELATIVE)
        assert after < before
    else:
        assert compilation.model.fact(Plan) == planned.fact(Plan)


def test_evolution_finds_a_better_plan_here(planned: Model, ctx: PassContext) -> None:
    compilation = refined(planned, ctx)
    assert compilation.records[0].remarks[-1].kind == "applied"
    assert measured(compilation.model, ctx) < 0.95 * measured(planned, ctx)
    assert compilation.records[0].counters["plans evaluated"] > 1


@pytest.mark.parametrize("method", ["evolve", "swap"])
def test_a_refined_plan_keeps_the_budgets(planned: Model, ctx: PassContext, method: str) -> None:
    model = refined(planned, ctx, method=method).model
    solution = model.fact(Solution)
    choice = choice_of(model.fact(Menu), solution.options)
    totals = Planning(planned, ctx).programme.totals(choice)
    assert dict(solution.totals) == totals
    assert set(solution.limits) == {"bytes", "seconds"}
    for name, limit in solution.limits.items():
        assert totals[name] <= limit
    expected = plan_of(model.fact(Menu), model.fact(Sensitivity), choice, ctx.cost.source)
    assert model.fact(Plan) == expected


def test_refining_twice_gives_the_same_plan(planned: Model, ctx: PassContext) -> None:
    first, second = (refined(planned, ctx).model for _ in range(2))
    assert first.fact(Plan) == second.fact(Plan)


def test_where_the_search_ended_is_remembered(
    planned: Model, ctx: PassContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = replace(ctx, cache=Cache(tmp_path / "cache"))
    first = refined(planned, cached).model
    monkeypatch.setattr(Refine, "_search", lambda *given: pytest.fail("searched again"))
    again = refined(planned, cached).model
    assert again.fact(Solution).options == first.fact(Solution).options
    assert first.fact(Solution).options != planned.fact(Solution).options
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        refined(planned, cached, generations=5)


def test_a_plan_that_is_worse_on_the_half_that_decides_is_not_taken(
    planned: Model, ctx: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is made to return the fewest bits of everything."""
    worst = {name: indices[0] for name, indices in _levels(planned).items()}

    def misled(self: Refine, space: Space, trial: object, *more: Any) -> tuple[Choice, Choice]:
        start = choice_of(planned.fact(Menu), planned.fact(Solution).options)
        return start, {**start, **worst}

    monkeypatch.setattr(Refine, "_search", misled)
    compilation = refined(planned, ctx)
    assert compilation.records[0].remarks[-1].kind == "missed"
    assert compilation.model.fact(Plan) == planned.fact(Plan)


@pytest.mark.parametrize(
    ("saved", "kind"), [([0.1, 0.1, 0.1, 0.2], "applied"), ([2.0, 0.1, -0.1, -1.5], "missed")]
)
def test_a_plan_that_saves_less_than_the_noise_is_not_taken(
    planned: Model, ctx: PassContext, monkeypatch: pytest.MonkeyPatch, saved: list[float], kind: str
) -> None:
    """Both save 0.125 of 3 in the mean; the standard errors are 0.025 and 0.72."""
    start = choice_of(planned.fact(Menu), planned.fact(Solution).options)

    def final(self: Trials, choice: Mapping[str, int]) -> Any:
        return np.full(4, 3.0) - (0.0 if choice == start else np.array(saved))

    monkeypatch.setattr(Trials, "final", final)
    monkeypatch.setattr(Refine, "_best_start", lambda *given: start)
    compilation = refined(planned, ctx)
    assert compilation.records[0].remarks[-1].kind == kind
    assert (compilation.model.fact(Plan) != planned.fact(Plan)) == (kind == "applied")


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"seconds": -1.0}])
def test_no_time_leaves_the_plan(planned: Model, ctx: PassContext, options: Any) -> None:
    compilation = refined(planned, ctx, **options)
    assert compilation.model.fact(Plan) == planned.fact(Plan)
    assert "nothing to refine" in compilation.records[0].remarks[-1].text


def _levels(model: Model) -> dict[str, list[int]]:
    menu = model.fact(Menu)
    return levels_of(menu, choice_of(menu, model.fact(Solution).options))


def test_fed_weights_compute_what_the_built_plan_computes(
    planned: Model, ctx: PassContext, feed_of: Callable[..., Any]
) -> None:
    menu, levels = planned.fact(Menu), _levels(planned)
    start = choice_of(menu, planned.fact(Solution).options)
    rounded = RoundedModel.of(planned, ctx, list(levels))
    rng = np.random.default_rng(1)
    feed = feed_of(_source(), 77)
    for _ in range(4):
        choice = {**start, **{name: int(rng.choice(found)) for name, found in levels.items()}}
        plan = plan_of(menu, planned.fact(Sensitivity), choice, "")
        expected = ctx.evaluator.run(built(planned.with_fact(plan), ctx), feed)["y"].astype(
            np.float64
        )
        actual = rounded.run({**feed, **rounded.weights(choice)})["y"].astype(np.float64)
        bound = FLOAT32_RELATIVE * float(np.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_levels_round_activations_as_the_plan_does(planned: Model) -> None:
    menu = planned.fact(Menu)
    start = choice_of(menu, planned.fact(Solution).options)
    for name, indices in _levels(planned).items():
        offers = [menu.offers[name][k] for k in indices]
        methods = {tuple(o.method for o in offer.options.values()) for offer in offers}
        assert start[name] in indices
        assert len(methods) == 1
        assert [o.bytes for o in offers] == sorted(o.bytes for o in offers)


Choice = Mapping[str, int]


def _separable(seed: int) -> tuple[Space, dict[str, list[float]], dict[str, int], Any]:
    """Five groups of four levels, a byte budget that the start just keeps, and the total damage."""
    rng = np.random.default_rng(seed)
    names = [f"g{k}" for k in range(5)]
    size = {name: np.sort(rng.integers(1, 100, 4)) for name in names}
    damages = {name: np.sort(rng.random(4))[::-1].tolist() for name in names}
    start = {name: int(rng.integers(0, 4)) for name in names}
    budget = sum(size[name][k] for name, k in start.items())

    def feasible(choice: Choice) -> bool:
        return bool(sum(size[name][k] for name, k in choice.items()) <= budget)

    def total(choices: Sequence[Choice]) -> list[float]:
        return [sum(damages[name][k] for name, k in choice.items()) for choice in choices]

    return Space({name: range(4) for name in names}, feasible), damages, start, total


def _swaps(space: Space, choice: Choice) -> list[dict[str, int]]:
    """Every feasible choice that has one group a level higher and another one lower."""
    moved = [
        {**choice, up: choice[up] + 1, down: choice[down] - 1}
        for up, down in itertools.permutations(choice, 2)
    ]
    valid = (c for c in moved if all(0 <= level < 4 for level in c.values()))
    return [c for c in valid if space.feasible(c)]


@pytest.mark.parametrize("seed", range(12))
def test_every_swap_is_the_best_of_all_swaps(seed: int) -> None:
    space, damages, start, total = _separable(seed)
    expected = start
    while swaps := _swaps(space, expected):
        best = min(swaps, key=lambda choice: total([choice])[0])
        if total([best])[0] >= total([expected])[0]:
            break
        expected = best
    found = swapped(space, damages, total, start, seconds=60.0)
    assert found == expected


def test_a_swap_that_does_not_help_is_not_made() -> None:
    """The estimates say it helps, the measured damage does not."""
    space, damages, start, total = _separable(0)
    assert swapped(space, damages, total, start, seconds=60.0) != start

    def rising(choices: Sequence[Choice]) -> list[float]:
        return [0.0 if choice == start else 1.0 for choice in choices]

    assert swapped(space, damages, rising, start, seconds=60.0) == start


def test_the_search_begins_with_the_best_of_several_plans(planned: Model, ctx: PassContext) -> None:
    menu, solution = planned.fact(Menu), planned.fact(Solution)
    given = choice_of(menu, solution.options)
    levels = levels_of(menu, given)
    options = Refine(seconds=60.0, generations=0, starts=("fisher",))
    limits = hard_limits(solution)
    assert ctx.calibration is not None
    given_all = (planned, ctx, ctx.calibration, options.starts, "auto", levels, limits, given)
    found = dict(starts(*given_all))
    assert set(found) == {"damage ** 0.75", "damage ** 0.5", "fisher"}
    programme = Planning(planned, ctx).programme
    trial = Trials.of(planned, ctx, ctx.calibration, options, list(levels))
    for choice in found.values():
        assert programme.totals(choice)["bytes"] <= solution.limits["bytes"]
        assert all(choice[name] in levels.get(name, [given[name]]) for name in choice)
    known = [given, *found.values()]
    damages = [trial.damage_of(choice) for choice in known]
    best = known[damages.index(min(damages))]
    after = Pipeline((options,)).run(planned, ctx)
    (note,) = (r for r in after.records[0].remarks if r.kind == "note")
    assert f"{min(damages):.3e}" in note.text.partition(";")[2]
    assert after.records[0].remarks[-1].values["after"] == trial.final(best).mean()


def test_a_start_that_cannot_be_estimated_is_a_remark(
    planned: Model, ctx: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Sensitivity:
        raise NotDifferentiable("Floor", "floor", "blocks")

    monkeypatch.setattr("octavo.passes.starts.estimator", lambda name: refuse)
    after = Pipeline((Refine(generations=0, starts=("fisher",)),)).run(planned, ctx)
    notes = [remark.text for remark in after.records[0].remarks if remark.kind == "note"]
    assert any("no plan by fisher" in text and "Floor" in text for text in notes)


def test_an_unknown_start_is_refused(planned: Model, ctx: PassContext) -> None:
    with pytest.raises(UnknownName, match="fischer"):
        Pipeline((Refine(starts=("fischer",)),)).run(planned, ctx)


def test_a_least_plan_stays_as_small_as_it_was(planned: Model) -> None:
    solution = replace(planned.fact(Solution), objective="size", limits={"damage": 1.0})
    assert hard_limits(solution) == {"bytes": solution.totals["bytes"]}


def test_without_torch_the_search_begins_with_other_plans(
    planned: Model, ctx: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.ir.needs_torch.importlib.util.find_spec", lambda name: None)
    after = Pipeline((Refine(generations=0),)).run(planned, ctx)
    notes = [remark.text for remark in after.records[0].remarks if remark.kind == "note"]
    assert sum("needs torch" in text for text in notes) == 2
    assert any("damage ** 0.5" in text for text in notes)
