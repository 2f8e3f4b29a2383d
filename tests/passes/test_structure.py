"""Widths and ranks in the programme: their costs, the joint optimum, and what executes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx.reference
import onnx_ir
import pytest

from octavo.backends.ort_lowering import lower
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import BudgetInfeasible
from octavo.ir.facts import FLOAT, Option
from octavo.ir.menu import Menu, Sensitivity, Solution, Units
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.ir.reference import Original
from octavo.passes.allocate import choice_of, plan_of
from octavo.passes.base import PassContext
from octavo.passes.evolve import Space
from octavo.passes.joint_moves import JointMoves
from octavo.passes.narrow_models import NarrowModels
from octavo.passes.pipeline import Pipeline
from octavo.passes.planning import Planning
from octavo.passes.programme import Programme
from octavo.passes.rounded_model import RoundedModel
from octavo.passes.solve import solve
from octavo.passes.width_seconds import WidthSeconds, designs, nonnegative
from octavo.passes.width_shapes import WidthShapes

Context = Callable[..., PassContext]

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,3,8,8] x) => (float[N,10] y)
<float[16,3,3,3] w1 = {0}, float[16] b1 = {0}, float[24,16,3,3] w2 = {0}, float[24] b2 = {0},
 float[24,16,1,1] w3 = {0}, float[24] b3 = {0}, float[24,10] w4 = {0}> {
    [first] a = Conv <pads: ints = [1, 1, 1, 1]> (x, w1, b1)
    [act] b = Relu (a)
    [deep] c = Conv <pads: ints = [1, 1, 1, 1]> (b, w2, b2)
    [side] d = Conv (b, w3, b3)
    [sum] e = Add (c, d)
    [act2] f = Relu (e)
    [pool] g = GlobalAveragePool (f)
    [flat] h = Flatten (g)
    [last] y = MatMul (h, w4)
}
"""
OFFERED = (
    "canonicalize,calibrate{method=minmax},"
    "offer-options{bits=8,dynamic=false,weight-only=false,float16=false,storage=false},"
    "sensitivity{samples=4},offer-structure{widths=3,samples=4,copies=2,ranks=0.5}"
)
EXACT = 1e-12
FLOAT32 = 1e-5
# Lengths of tensors are counted as those of whole ones.
NAMES = 16


@pytest.fixture
def network() -> Model:
    """Two widths: 16 channels that two layers read, and 24 that two layers add up to."""
    proto = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        shape = tuple(tensor.dims)
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return read(proto)


@pytest.fixture
def offered(network: Model, calibrated: Context) -> tuple[Model, PassContext]:
    """The network with its joint menu."""
    ctx = calibrated(network, 8)
    return Pipeline.parse(OFFERED).run(network, ctx).model, ctx


def test_the_joint_optimum_equals_enumeration(offered: tuple[Model, PassContext]) -> None:
    programme = replace(Planning(*offered).programme, memory_rows=())
    menu = offered[0].fact(Menu)
    assert [len(menu.offers[name]) for name in menu.widths] == [2, 3]
    totals = [programme.totals(choice) for choice in agreeing(programme)]
    for resource in ("bytes", "seconds"):
        ordered = sorted(total[resource] for total in totals)
        for limit in ordered[:: len(ordered) // 5]:
            answer = solve(programme, "damage", {resource: limit}, gap=0)
            least = min(total["damage"] for total in totals if total[resource] <= limit)
            assert answer.value == pytest.approx(least, rel=1e-8, abs=1e-15)
            assert programme.agrees(answer.choice)
        with pytest.raises(BudgetInfeasible):
            solve(programme, "damage", {resource: ordered[0] * (1 - 1e-6)})


def agreeing(programme: Programme) -> Iterator[dict[str, int]]:
    """All choices in which every candidate gets the widths it needs, width by width."""
    widths = sorted(programme.needed)
    for levels in itertools.product(*(range(len(programme.groups[name])) for name in widths)):
        taken = dict(zip(widths, levels, strict=True))
        rest = {
            name: [k for k, c in enumerate(of) if c.needs.items() <= taken.items()]
            for name, of in programme.groups.items()
            if name not in taken
        }
        for js in itertools.product(*rest.values()):
            yield {**taken, **dict(zip(rest, js, strict=True))}


def test_every_offer_is_at_the_widths_it_touches(offered: tuple[Model, PassContext]) -> None:
    menu = offered[0].fact(Menu)
    touched = {name: {n for o in of for n in o.needs} for name, of in menu.offers.items()}
    inner, outer = "first#width", "deep#width"
    assert touched["first"] == {inner}
    assert touched["deep"] == touched["side"] == {inner, outer}
    assert touched["last"] == touched["sum"] == {outer}
    for name, offers in menu.offers.items():
        whole = {n: menu.offers[n][0].name for n in touched[name]}
        assert offers[0].needs == whole
        assert len({offer.name for offer in offers}) == len(offers)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_are_those_of_the_file(
    offered: tuple[Model, PassContext], tmp_path: Path, seed: int
) -> None:
    model, ctx = offered
    menu, programme = model.fact(Menu), Planning(model, ctx).programme
    choices = [c for c in agreeing(programme) if any(c[name] for name in menu.widths)]
    choice = choices[int(np.random.default_rng(seed).integers(len(choices)))]
    built = built_with(model, ctx, choice)
    whole = built_with(model, ctx, dict(widened(menu, choice)))
    files = [
        lower(m, tmp_path / f"{k}.onnx", ctx.target.name) for k, m in enumerate((built, whole))
    ]
    totals = [programme.totals(c)["bytes"] for c in (choice, dict(widened(menu, choice)))]
    assert files[1].bytes - files[0].bytes == pytest.approx(totals[1] - totals[0], abs=NAMES)
    for name in menu.widths:
        kept = int(menu.offers[name][choice[name]].name.split()[0])
        node = next(node for node in built.graph if node.name == name.partition("#")[0])
        assert node.outputs[0].shape is not None
        assert node.outputs[0].shape[1] == kept


def test_a_rank_is_two_layers_of_the_bytes_it_was_offered_with(
    offered: tuple[Model, PassContext], tmp_path: Path
) -> None:
    model, ctx = offered
    menu, programme = model.fact(Menu), Planning(model, ctx).programme
    float_choice = dict.fromkeys(menu.groups, 0)
    names = [offer.name for offer in menu.offers["deep"]]
    at = next(k for k, offer in enumerate(menu.offers["deep"]) if offer.ranks)
    assert names[at].startswith("float rank ")
    choice = {**float_choice, "deep": at}
    assert programme.agrees(choice)
    thin, whole = (built_with(model, ctx, some) for some in (choice, float_choice))
    files = [lower(m, tmp_path / f"{k}.onnx", ctx.target.name) for k, m in enumerate((thin, whole))]
    totals = [programme.totals(some)["bytes"] for some in (choice, float_choice)]
    assert files[1].bytes - files[0].bytes == pytest.approx(totals[1] - totals[0], abs=4 * NAMES)
    rank = menu.offers["deep"][at].ranks["deep"].rank
    shapes = [
        tuple(n.inputs[1].const_value.shape.numpy())  # type: ignore[union-attr]
        for n in thin.graph
        if (n.name or "").startswith("deep")
    ]
    assert [shape[0] for shape in shapes] == [rank, 24]


def widened(menu: Menu, choice: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The same options with all units."""
    for name, index in choice.items():
        option = menu.offers[name][index].name.partition(" @")[0]
        names = [offer.name for offer in menu.offers[name]]
        yield name, 0 if name in menu.widths else names.index(option)


def built_with(model: Model, ctx: PassContext, choice: dict[str, int]) -> Model:
    """The model with a choice executed, up to its FakeQuants."""
    menu = model.fact(Menu)
    names = {name: menu.offers[name][index].name for name, index in choice.items()}
    solution = Solution("", "damage", 0, 0, "", {}, {}, names)
    plan = plan_of(menu, model.fact(Sensitivity), choice, "")
    text = "apply-structure{samples=8},calibrate{method=minmax},place-quantizers,insert-fake-quant"
    return Pipeline.parse(text).run(model.with_fact(solution).with_fact(plan), ctx).model


def test_a_narrow_model_computes_what_the_reference_says(
    offered: tuple[Model, PassContext], feed_of: Callable[..., dict[str, np.ndarray]]
) -> None:
    model, ctx = offered
    text = "allocate{objective=size,max-damage=0.5},apply-structure{samples=8}"
    found = Pipeline.parse(text).run(model, ctx).model
    original = found.fact(Original).model
    assert original.fingerprint == model.fingerprint
    assert sum(v.const_value.size for v in found.graph.initializers.values() if v.const_value) < (
        sum(v.const_value.size for v in original.graph.initializers.values() if v.const_value)
    )
    feed = feed_of(model, 7, 8)
    truth = onnx.reference.ReferenceEvaluator(onnx_ir.to_proto(found.ir)).run(None, feed)[0]
    actual = ctx.evaluator.run(found, feed)["y"]
    np.testing.assert_allclose(actual, truth, rtol=0, atol=FLOAT32 * np.abs(truth).max())


@dataclass(frozen=True)
class Product:
    """Seconds of 2 + 3·inputs·outputs of a convolution, whatever the option."""

    analytic: AnalyticCost
    source: str = "made up"

    def option_seconds(self, node: onnx_ir.Node, option: Option) -> float | None:
        if node.op_type != "Conv":
            return 1.0
        assert node.inputs[1] is not None
        assert node.inputs[1].const_value is not None
        outputs, inputs = node.inputs[1].const_value.shape.numpy()[:2]
        return 2.0 + 3.0 * inputs * outputs


def test_seconds_of_widths_that_were_not_measured(
    network: Model, pass_context: PassContext
) -> None:
    from octavo.ir.axis_groups import axis_groups

    cost = Product(pass_context.cost)  # type: ignore[arg-type]
    ctx = replace(pass_context, cost=cost, cost_of=lambda model: cost)  # type: ignore[arg-type]
    shapes = WidthShapes.of(network, axis_groups(network).groups)
    levels = {"first": (16, 8), "deep": (24, 8)}
    rng = np.random.default_rng(0)
    seconds = WidthSeconds.of(shapes, ctx, designs(levels, 4, rng))
    for inputs, outputs in itertools.product((16, 12, 4), (24, 20, 8)):
        found = seconds.seconds("deep", FLOAT, {"first": inputs, "deep": outputs})
        assert found == pytest.approx(2 + 3 * inputs * outputs, rel=1e-6)
        narrow = seconds.seconds("first", FLOAT, {"first": inputs, "deep": outputs})
        assert narrow == pytest.approx(2 + 3 * 3 * inputs, rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_no_coefficient_is_negative_and_none_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, wanted = rng.standard_normal((9, 4)), rng.standard_normal(9)
    found = nonnegative(rows, wanted)
    gradient = rows.T @ (rows @ found - wanted)
    # Karush, Kuhn and Tucker: no unknown that is above zero has a slope, no other a falling one.
    assert (found >= 0).all()
    assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-9
    assert gradient[found == 0].min(initial=0.0) > -1e-9


def test_where_nothing_can_go_bits_alone_are_offered(
    calibrated: Context, pass_context: PassContext
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    plain (float[N,2] x) => (float[N,2] y)
    <float[2,2] w = {1, 2, 3, 4}> { [only] y = MatMul (x, w) }
    """
    model = read(onnx.parser.parse_model(text))
    compiled = Pipeline.parse(OFFERED).run(model, calibrated(model, 8))
    assert not compiled.model.fact(Menu).widths
    assert compiled.records[-1].remarks[-1].text.startswith("nothing could go: it is an axis of")


def test_fed_widths_compute_what_the_cut_model_computes(
    offered: tuple[Model, PassContext], feed_of: Callable[..., dict[str, np.ndarray]]
) -> None:
    model, ctx = offered
    menu = model.fact(Menu)
    narrow, whole = NarrowModels.of(model, ctx), dict.fromkeys(menu.groups, 0)
    plan = plan_of(menu, model.fact(Sensitivity), whole, "")
    rounded = RoundedModel.of(model.with_fact(plan), ctx, list(plan.by_node))
    for name in menu.widths:
        for index, offer in enumerate(menu.offers[name]):
            choice = JointMoves(menu).moved(whole, name, index)
            assert Planning(model, ctx).programme.agrees(choice)
            made = narrow.at(choice)
            smaller = made.clone()
            group = model.fact(Units).axis_group[name]
            narrow.pruner.cut(smaller, {group: model.fact(Units).removed[name][offer.name]})
            feed = feed_of(model, 5, 8)
            truth = ctx.evaluator.run(smaller, feed)["y"]
            fed = rounded.run({**feed, **rounded.weights(choice)})["y"]
            np.testing.assert_allclose(fed, truth, rtol=0, atol=FLOAT32 * np.abs(truth).max())


def test_refinement_with_widths_keeps_the_budget(
    offered: tuple[Model, PassContext],
) -> None:
    model, ctx = offered
    whole = dict.fromkeys(model.fact(Menu).groups, 0)
    limit = 0.8 * Planning(model, ctx).programme.totals(whole)["bytes"]
    text = f"allocate{{size={limit:.0f},latency=none}},refine{{generations=4,seconds=60,starts=}}"
    found = Pipeline.parse(text).run(model, ctx)
    solution, menu = found.model.fact(Solution), found.model.fact(Menu)
    choice = choice_of(menu, solution.options)
    programme = Planning(found.model, ctx).programme
    assert programme.agrees(choice)
    assert programme.totals(choice)["bytes"] <= limit


@pytest.mark.parametrize("seed", range(5))
def test_moves_keep_what_offers_need(offered: tuple[Model, PassContext], seed: int) -> None:
    model, ctx = offered
    menu, programme = model.fact(Menu), Planning(model, ctx).programme
    space = Space(dict.fromkeys(menu.groups, ()), lambda _: True, JointMoves(menu))
    choice: dict[str, int] = dict.fromkeys(menu.groups, 0)
    rng, seen = np.random.default_rng(seed), set()
    for _ in range(40):
        by = int(rng.choice([-1, 1]))
        if not (some := space.neighbours(choice, by)):
            continue
        group, level = some[int(rng.integers(len(some)))]
        choice = space.moved(choice, group, level)
        assert programme.agrees(choice)
        seen.add(tuple(choice[name] for name in menu.widths))
    assert len(seen) > 2
