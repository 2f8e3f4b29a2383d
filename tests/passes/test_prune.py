"""Pruning: the order of units, the repair behind them, the allocation, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.errors import GoalNotMet, OctavoError, UsageError
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.pipeline import Pipeline
from octavo.passes.prune_allocation import Width, Work, allocate, offers
from octavo.passes.prune_moments import centred
from octavo.passes.prune_ranking import surgeon
from octavo.passes.prune_readers import readers
from octavo.passes.prune_repair import Normal
from octavo.passes.prune_units import Pruner

Context = Callable[..., PassContext]

MLP = """
<ir_version: 10, opset_import: ["" : 21]>
mlp (float[N,6] x) => (float[N,4] y)
<float[6,12] w1 = {0}, float[12] b1 = {0}, float[12,4] w2 = {0}, float[4] b2 = {0}> {
    [one] h = MatMul (x, w1)
    [bias] z = Add (h, b1)
    [act] a = Relu (z)
    [two] o = MatMul (a, w2)
    [out] y = Add (o, b2)
}
"""
# Four query heads of three dimensions; two of them share a key and a value.
GROUPED = Path(__file__).with_name("grouped_attention.txt").read_text(encoding="utf-8")
WIDE = 1e-5


def with_weights(text: str) -> Model:
    """A model whose float constants are normal numbers."""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


@pytest.fixture
def mlp() -> Model:
    """Twelve hidden units of rank six, each pair with the same filter up to a factor."""
    proto = onnx.parser.parse_model(MLP)
    rng = np.random.default_rng(0)
    first = rng.standard_normal((6, 6))
    arrays = {
        "w1": np.concatenate([first, first * 2], axis=1),
        "b1": np.zeros(12),
        "w2": rng.standard_normal((12, 4)),
        "b2": rng.standard_normal(4),
    }
    for tensor in proto.graph.initializer:
        array = arrays[tensor.name].astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


def shipped(name: str) -> Model:
    return read(Path(str(files("octavo.models"))) / f"{name}.onnx")


def errors(ctx: PassContext, model: Model, smaller: Model) -> float:
    assert ctx.calibration is not None
    pairs = [(ctx.evaluator.run(model, f), ctx.evaluator.run(smaller, f)) for f in ctx.calibration]
    lost = sum(float(np.square(a[k] - b[k]).sum()) for a, b in pairs for k in a)
    return lost / sum(float(np.square(a[k]).sum()) for a, _ in pairs for k in a)


def test_repair_is_the_least_squares_solution() -> None:
    """Against numpy's, with a column of ones for the shift, on noise that is not centred."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + 1
    target = x @ rng.standard_normal((5, 3))
    wide = np.concatenate([x, np.ones((400, 1))], axis=1)
    normal = Normal(
        (wide.T @ wide / 400)[None],
        (target.T @ wide / 400)[None],
        float(np.square(target).sum() / 400),
    )
    kept = np.array([True, True, False, True, False])
    found = normal.solve(np.zeros((1, 3, 6)), kept, shifted=True)[0]
    truth, *_ = np.linalg.lstsq(wide[:, [0, 1, 3, 5]], target, rcond=None)
    best = float(np.square(wide[:, [0, 1, 3, 5]] @ truth - target).sum() / 400) / normal.power
    assert not found[:, [2, 4]].any()
    # The damping towards zero costs less than a thousandth of the error.
    assert best <= normal.error(found[None]) <= best * 1.001


def test_surgeon_takes_the_unit_that_costs_least(mlp: Model, calibrated: Context) -> None:
    """Against every unit's damped least-squares problem, solved one by one."""
    ctx = calibrated(mlp, 64)
    pruner = Pruner.of(mlp, ctx, "surgeon", "least-squares", 512)
    (name,) = pruner.groups
    (reader,) = readers(mlp, pruner.groups[name])
    second = centred(pruner.moments[reader.key])[0]
    weight = reader.rows()[0].astype(np.float64)
    hessian = second + 0.01 * np.trace(second) / 12 * np.eye(12)
    costs = []
    for unit in range(12):
        rest = [k for k in range(12) if k != unit]
        change = np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[rest, unit])
        gone = np.zeros((4, 12))
        gone[:, unit] = -weight[:, unit]
        gone[:, rest] = np.outer(weight[:, unit], change)
        costs.append(np.einsum("nk,kl,nl->", gone, hessian, gone))
    ranking = surgeon([reader], {reader.key: second[None]}, 12)
    power = np.einsum("nk,kl,nl->", weight, second, weight)
    assert ranking.order[0] == np.argmin(costs)
    assert ranking.costs[0] == pytest.approx(min(costs) / power, rel=1e-6)
    assert sorted(ranking.order) == list(range(12))


def test_removing_redundant_units_loses_nothing(mlp: Model, calibrated: Context) -> None:
    """Half of the units are multiples of the others: repair finds them, plain removal does not."""
    ctx = calibrated(mlp, 64)
    run = {
        repair: Pipeline.parse(f"prune-channels{{ratio=0.5,round-to=1,offers=12,repair={repair}}}")
        for repair in ("least-squares", "none")
    }
    lost = {repair: errors(ctx, mlp, text.run(mlp, ctx).model) for repair, text in run.items()}
    assert lost["least-squares"] < 1e-3 < 0.05 < lost["none"]


def test_closed_form_repair_without_data(
    mlp: Model, pass_context: PassContext, calibrated: Context
) -> None:
    text = "prune-channels{ratio=0.5,round-to=1,repair=%s,score=surgeon}"
    some = [
        Pipeline.parse(text % how).run(mlp, pass_context).model for how in ("closed-form", "none")
    ]
    repaired, plain = (errors(calibrated(mlp, 64), mlp, model) for model in some)
    assert repaired < 0.01 < plain


@pytest.mark.parametrize("score", ["surgeon", "magnitude", "activation", "taylor", "kprune"])
def test_every_score_removes_a_dead_unit_first(score: str, mlp: Model, calibrated: Context) -> None:
    model = mlp.clone()
    for name in ("w1", "w2"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        if name == "w1":
            array[:, 5] *= 1e-3
        else:
            array[5] = 0
        value.const_value = onnx_tensor(array, name)
    pruner = Pruner.of(model, calibrated(model, 64), score, "none", 512)  # type: ignore[arg-type]
    (group,) = pruner.groups
    assert pruner.ranking(group).order[0] == 5


def onnx_tensor(array: np.ndarray, name: str):  # type: ignore[no-untyped-def]
    import onnx_ir

    return onnx_ir.tensor(array, name=name)


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_mobile"])
def test_predicted_work_is_that_of_the_smaller_model(name: str, pass_context: PassContext) -> None:
    model = Canonicalize().run(shipped(name).clone(), pass_context)
    pruner = Pruner.of(model, pass_context, "magnitude", "none", 1)
    kept = {name: group.units // 2 for name, group in pruner.groups.items()}
    removed = {name: pruner.removed(name, count) for name, count in kept.items()}
    smaller = pruner.pruned(removed)
    pruner.cut(smaller, removed)
    work = Work.of(model, pass_context, pruner.groups)
    assert work.left(kept) == pytest.approx(Work.of(smaller, pass_context, {}).total, rel=1e-9)
    assert work.total == sum(pass_context.cost.macs(node) for node in model.graph)
    numbers = Work.parameters(model, pruner.groups)
    stored = [v.const_value for v in smaller.graph.initializers.values() if v.const_value]
    left = sum(t.size for t in stored if t.dtype.is_floating_point())
    assert numbers.left(kept) == pytest.approx(left, rel=1e-9)


def test_pruned_model_computes_what_the_smaller_one_does(
    calibrated: Context, agrees: Callable[..., None]
) -> None:
    source = shipped("fashion_resnet")
    ctx = calibrated(source)
    model = Canonicalize().run(source.clone(), ctx)
    pruner = Pruner.of(model, ctx, "surgeon", "least-squares", 512)
    removed = {name: pruner.removed(name, 16) for name in pruner.groups}
    masked = pruner.pruned(removed)
    smaller = masked.clone()
    pruner.cut(smaller, removed)
    feed = next(iter(ctx.calibration or ()))
    agrees(ctx.evaluator.run(smaller, feed), ctx.evaluator.run(masked, feed), WIDE)


def test_every_layer_is_closer_after_repair(calibrated: Context) -> None:
    source = shipped("fashion_vit")
    ctx = calibrated(source, 8)
    compiled = Pipeline.parse("canonicalize,prune-heads{ratio=0.5,offers=2}").run(source, ctx)
    repaired = [
        remark.values
        for remark in compiled.records[-1].remarks
        if remark.kind == "applied" and "before" in remark.values
    ]
    assert len(repaired) >= 4
    for values in repaired:
        assert float(values["after"] or 0) < float(values["before"] or 0)


def test_allocation_is_near_the_best_of_all() -> None:
    """Damages that grow faster than what is saved: a Lagrangian can lose one step at most."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        full = dict.fromkeys("abc", 8)
        scale = dict(zip("abc", rng.uniform(0.1, 10, 3), strict=True))
        found = {n: [Width(k, scale[n] * (8 - k) ** 2) for k in range(7, 0, -1)] for n in "abc"}

        def saved(kept: dict[str, int]) -> float:
            return sum(8 - count for count in kept.values()) / 24

        goal = float(rng.uniform(0.1, 0.8))
        kept = allocate(found, full, saved, goal)  # type: ignore[arg-type]
        assert kept is not None
        assert saved(kept) >= goal
        damage = sum(scale[n] * (8 - count) ** 2 for n, count in kept.items())
        choices = itertools.product(range(1, 9), repeat=3)
        best = min(
            sum(scale[n] * (8 - k) ** 2 for n, k in zip("abc", some, strict=True))
            for some in choices
            if saved(dict(zip("abc", some, strict=True))) >= goal
        )
        assert damage == pytest.approx(best, rel=1e-9)
    assert allocate(found, full, saved, 0.95) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.2"])
def test_ratios_outside_of_0_and_1(ratio: str, mlp: Model, pass_context: PassContext) -> None:
    for name in ("prune-channels", "prune-heads"):
        with pytest.raises(UsageError, match="does not lie between 0 and 1"):
            Pipeline.parse(f"{name}{{ratio={ratio}}}").run(mlp, pass_context)


def test_nothing_to_prune_says_why(mlp: Model, pass_context: PassContext) -> None:
    def failure(text: str) -> OctavoError:
        with pytest.raises(OctavoError) as raised:
            Pipeline.parse(text).run(mlp, pass_context)
        return raised.value

    heads = failure("prune-heads")
    assert isinstance(heads, GoalNotMet)
    assert heads.exit_code == 3
    assert heads.why == "no layer has heads of its own"
    kept = failure("prune-channels{keep=*}")
    assert kept.why == "keep names a layer of everything that could go"
    output = failure("prune-channels{only=two}")
    assert isinstance(output, GoalNotMet)
    assert "it is an axis of the graph output 'y'" in output.why
    narrow = failure("prune-channels{round-to=16}")
    assert "no layer wider than 16" in str(narrow)
    much = failure("prune-channels{ratio=0.9,of=macs}")
    assert "cannot remove 90% of the macs" in str(much)


def test_contradictory_patterns(calibrated: Context) -> None:
    source = shipped("fashion_resnet")
    text = "canonicalize,prune-channels{only=/2/b/b.0/Conv,keep=/2/d/d.0/Conv}"
    with pytest.raises(UsageError, match=r"is to be pruned and .* to be kept"):
        Pipeline.parse(text).run(source, calibrated(source))


def test_kept_layers_keep_their_channels(calibrated: Context) -> None:
    source = shipped("fashion_resnet")
    ctx = calibrated(source)
    text = "canonicalize,prune-channels{ratio=0.5,keep=/3/a/a.0/Conv,repair=none,offers=2}"
    model = Pipeline.parse(text).run(source, ctx).model
    sizes = {n.name: n.inputs[1].shape[0] for n in model.graph if n.op_type == "Conv"}  # type: ignore[index,union-attr]
    assert sizes["/3/a/a.0/Conv"] == 96
    assert sizes["/2/a/a.0/Conv"] < 48


def test_heads_that_share_keys_go_one_way_only(calibrated: Context) -> None:
    """Keys with their queries, and queries of every key alike, are two ways to divide the heads."""
    model = with_weights(GROUPED)
    ctx = calibrated(model, 16)
    found = Pipeline.parse("prune-heads{ratio=0.5,repair=none}").run(model, ctx)
    remarks = found.records[-1].remarks
    assert [r.text for r in remarks if r.kind == "applied"] == ["1 of 2 heads stay"]
    assert any("are an alternative to 'query#heads'" in r.text for r in remarks)
    left = {n: v.const_value for n, v in found.model.graph.initializers.items() if v.const_value}
    assert [tuple(left[n].shape) for n in ("wq", "wk", "wv", "wo")] == [
        (6, 6), (6, 3), (6, 3), (6, 5),
    ]  # fmt: skip


def test_one_measured_width_scales_the_costs_of_the_ranking(
    mlp: Model, calibrated: Context
) -> None:
    ctx = calibrated(mlp, 64)
    pruner = Pruner.of(mlp, ctx, "surgeon", "least-squares", 512)
    (name,) = pruner.groups
    (offered,) = offers(pruner, [name], 1, 1, 128, 0.25).values()
    (measured,) = offers(pruner, [name], 1, 11, 128, 0.25).values()
    assert [w.kept for w in offered] == [w.kept for w in measured] == list(range(11, 0, -1))
    three = {w.kept: w.damage for w in offered}, {w.kept: w.damage for w in measured}
    assert three[0][3] == pytest.approx(three[1][3], rel=1e-6)
    costs = np.cumsum(pruner.ranking(name).costs)[:11]
    np.testing.assert_allclose(
        [w.damage for w in offered], costs * three[1][3] / costs[8], rtol=1e-9
    )


def test_extreme_samples_do_not_decide_the_repair(mlp: Model, calibrated: Context) -> None:
    """One sample in 64 is thirty times as long; without a bound the error is 4.7 times as large."""
    ctx, rng = calibrated(mlp, 64), np.random.default_rng(3)
    assert ctx.calibration is not None
    feeds = tuple({"x": feed["x"].copy()} for feed in ctx.calibration)
    for feed in feeds:
        feed["x"][0] = 30 * rng.standard_normal(6)
    spiked = replace(ctx, calibration=replace(ctx.calibration, feeds=feeds))  # type: ignore[type-var]
    prune = Pipeline.parse("prune-channels{ratio=0.7,round-to=1}")
    lost = [errors(ctx, mlp, prune.run(mlp, some).model) for some in (ctx, spiked)]
    assert lost[1] < 1.1 * lost[0]


def test_dimensions_of_queries_and_keys_go_by_what_they_give(calibrated: Context) -> None:
    """Against ‖X·Wq_u‖·‖X·Wk_u‖ by numpy, with two query heads per key."""
    model = with_weights(GROUPED)
    ctx = calibrated(model, 16)
    pruner = Pruner.of(model, ctx, "surgeon", "none", 512)
    x = np.concatenate([feed["x"].reshape(-1, 6) for feed in pruner.feeds]).astype(np.float64)
    wq, wk = (
        model.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        for name in ("wq", "wk")
    )
    queries = np.square(x @ wq).sum(axis=0).reshape(4, 3).sum(axis=0)
    keys = np.square(x @ wk).sum(axis=0).reshape(2, 3).sum(axis=0) * 2
    truth = np.sqrt(queries * keys)
    ranking = pruner.ranking("query#dimensions")
    np.testing.assert_allclose(ranking.costs, np.sort(truth), rtol=1e-5)
    assert list(ranking.order) == list(np.argsort(truth))
