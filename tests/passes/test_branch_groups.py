"""Residual branches that go as a width of nothing: which they are, what is left, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx.reference
import onnx_ir
import pytest

from octavo.backends.ort_lowering import lower
from octavo.ir.facts import FLOAT, Plan
from octavo.ir.menu import Menu, Sensitivity, Solution, Units
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.allocate import plan_of
from octavo.passes.base import PassContext
from octavo.passes.branch_groups import branch_groups
from octavo.passes.joint_moves import JointMoves
from octavo.passes.narrow_models import NarrowModels
from octavo.passes.pipeline import Pipeline
from octavo.passes.planning import Planning
from octavo.passes.prune_units import Pruner
from octavo.passes.rounded_model import RoundedModel

Context = Callable[..., PassContext]

# Two blocks of convolutions, one of matrices whose first layer reads a norm.
NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N,3,6,6] x) => (float[N,10] y)
<float[8,3,3,3] w1 = {0}, float[8] b1 = {0}, float[16,8,3,3] w2 = {0}, float[16] b2 = {0},
 float[8,16,1,1] w3 = {0}, float[8] b3 = {0}, float[8] g = {0}, float[8] h = {0},
 float[8,32] w4 = {0}, float[32] b4 = {0}, float[32,8] w5 = {0}, float[8] b5 = {0},
 float[8,10] w6 = {0}, float[10] b6 = {0}> {
    [stem] s = Conv (x, w1, b1)
    [act] t = Relu (s)
    [wide] u = Conv <pads: ints = [1, 1, 1, 1]> (t, w2, b2)
    [inner] v = Relu (u)
    [narrow] w = Conv (v, w3, b3)
    [sum] a = Add (w, t)
    [pool] b = GlobalAveragePool (a)
    [flat] c = Flatten (b)
    [norm] d = LayerNormalization (c, g, h)
    [up] e0 = MatMul (d, w4)
    [up_bias] e = Add (e0, b4)
    [gelu] f = Gelu (e)
    [down] k0 = MatMul (f, w5)
    [down_bias] k = Add (k0, b5)
    [total] m = Add (c, k)
    [last] y0 = MatMul (m, w6)
    [last_bias] y = Add (y0, b6)
}
"""
OFFERED = (
    "canonicalize,calibrate{method=minmax},"
    "offer-options{bits=8,weight-only=false,float16=false,storage=false},"
    "sensitivity{samples=4},offer-structure{widths=2,samples=4,copies=2}"
)
EXECUTED = "apply-structure{samples=8},calibrate{method=minmax},place-quantizers,insert-fake-quant"
CONV, MATRIX = "wide#width", "up#width"
FLOAT32 = 1e-5
NODES, NODE_BYTES = 9, 48


def filled(text: str) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        array = rng.standard_normal(tuple(tensor.dims)) / np.sqrt(np.prod(tensor.dims[1:]))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return read(proto)


@pytest.fixture
def offered(calibrated: Context) -> tuple[Model, PassContext]:
    model = filled(NETWORK)
    ctx = calibrated(model, 8)
    return Pipeline.parse(OFFERED).run(model, ctx).model, ctx


def test_branches_have_one_reader_and_nothing_looks_inside(pass_context: PassContext) -> None:
    def found(text: str) -> dict[str, set[str]]:
        pruner = Pruner.of(filled(text), pass_context, "magnitude", "none", 1)
        return {name: set(branch.nodes) for name, branch in branch_groups(pruner).items()}

    conv = {"wide", "inner", "narrow"}
    matrix = {"norm", "up", "up_bias", "gelu", "down", "down_bias"}
    assert found(NETWORK) == {"wide": conv, "up": matrix}
    # The caller reads the last sum of a branch, or a layer of one has another reader.
    assert found(NETWORK.replace("[N,10] y)", "[N,10] y, float[N,8] k)")) == {"wide": conv}
    twice = NETWORK.replace("(float[N,10] y)", "(float[N,10] y, float[N,8,6,6] z)").replace(
        "    [sum]", "    [other] z = Conv (v, w3, b3)\n    [sum]"
    )
    assert "wide" not in found(twice)
    # A projection instead of the identity.
    projected = NETWORK.replace("[total] m = Add (c, k)", "[total] m = Add (d, k)")
    assert set(found(projected)) == {"wide", "up"}


def without(offered: tuple[Model, PassContext], *widths: str) -> dict[str, int]:
    """The choice of float everywhere, with some widths of nothing."""
    menu = offered[0].fact(Menu)
    choice = dict.fromkeys(menu.groups, 0)
    for name in widths:
        choice = JointMoves(menu).moved(choice, name, len(menu.offers[name]) - 1)
    return choice


def executed(offered: tuple[Model, PassContext], choice: dict[str, int]) -> Model:
    model, ctx = offered
    menu = model.fact(Menu)
    names = {name: menu.offers[name][index].name for name, index in choice.items()}
    solution = Solution("", "damage", 0, 0, "", {}, {}, names)
    planned = model.with_fact(solution).with_fact(
        plan_of(menu, model.fact(Sensitivity), choice, "")
    )
    return Pipeline.parse(EXECUTED).run(planned, ctx).model


@pytest.mark.parametrize("gone", [(CONV,), (MATRIX,), (CONV, MATRIX)])
def test_a_branch_without_units_is_the_mean_of_what_it_was(
    offered: tuple[Model, PassContext], feed_of: Callable[..., dict[str, np.ndarray]],
    gone: tuple[str, ...],
) -> None:  # fmt: skip
    model, ctx = offered
    choice = without(offered, *gone)
    assert [model.fact(Menu).offers[name][choice[name]].name[:5] for name in gone] == [
        "0 of "
    ] * len(gone)
    found = executed(offered, choice)
    names = {node.name for node in found.graph}
    inside = {CONV: {"wide", "narrow"}, MATRIX: {"norm", "up", "down"}}
    assert not names & set().union(*(inside[name] for name in gone))
    assert set(found.fact(Plan).by_node) <= names
    feed = feed_of(model, 7, 8)
    truth = onnx.reference.ReferenceEvaluator(onnx_ir.to_proto(found.ir)).run(None, feed)[0]
    actual = ctx.evaluator.run(found, feed)["y"]
    np.testing.assert_allclose(actual, truth, rtol=0, atol=FLOAT32 * np.abs(truth).max())
    # A constant in place of the branch is better than nothing in its place.
    before = ctx.evaluator.run(model, feed)["y"]
    assert 0 < np.abs(actual - before).max() < np.abs(before).max()


def test_fed_branches_compute_what_the_cut_model_computes(
    offered: tuple[Model, PassContext], feed_of: Callable[..., dict[str, np.ndarray]]
) -> None:
    model, ctx = offered
    menu = model.fact(Menu)
    narrow, whole = NarrowModels.of(model, ctx), without(offered)
    plan = plan_of(menu, model.fact(Sensitivity), whole, "")
    rounded = RoundedModel.of(model.with_fact(plan), ctx, list(plan.by_node))
    for name in menu.widths:
        for index, offer in enumerate(menu.offers[name]):
            choice = JointMoves(menu).moved(whole, name, index)
            smaller = narrow.at(choice).clone()
            group = model.fact(Units).axis_group[name]
            narrow.pruner.cut(smaller, {group: model.fact(Units).removed[name][offer.name]})
            feed = feed_of(model, 5, 8)
            truth = ctx.evaluator.run(smaller, feed)["y"]
            fed = rounded.run({**feed, **rounded.weights(choice)})["y"]
            np.testing.assert_allclose(fed, truth, rtol=0, atol=FLOAT32 * np.abs(truth).max())


def test_what_a_branch_saves_is_what_the_file_and_its_nodes_lose(
    offered: tuple[Model, PassContext], tmp_path: Path
) -> None:
    model, ctx = offered
    programme = Planning(model, ctx).programme
    files, totals, seconds = [], [], []
    for choice in (without(offered), without(offered, CONV, MATRIX)):
        made = executed(offered, choice)
        files.append(lower(made, tmp_path / f"{len(files)}.onnx", ctx.target.name).bytes)
        totals.append(programme.totals(choice))
        seconds.append(sum(ctx.cost.option_seconds(n, FLOAT) or 0.0 for n in made.graph))
    # Nodes themselves, and what a norm holds, are not counted.
    more = files[0] - files[1] - (totals[0]["bytes"] - totals[1]["bytes"])
    assert 0 <= more <= NODES * NODE_BYTES + 2 * 8 * 4
    # Sums read a constant now, which takes less time.
    saved = totals[0]["seconds"] - totals[1]["seconds"]
    assert saved == pytest.approx(seconds[0] - seconds[1], rel=0.01)
