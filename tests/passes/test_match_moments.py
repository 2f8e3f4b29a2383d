"""Moments after the repair, against numpy on what the graphs compute."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import OrtEvaluator
from octavo.ir.errors import CalibrationError
from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.fake_quant import params_of
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantSpec, quantize
from octavo.ir.read import read
from octavo.ir.reference import Reference
from octavo.passes.affine_layers import AffineLayer
from octavo.passes.channel_repair import bias_match, moment_match
from octavo.passes.joint_moments import JointMoments
from octavo.passes.layer_walk import Walk, segments
from octavo.passes.pipeline import Pipeline
from octavo.passes.read_values import value_reader
from octavo.passes.rewrite import Rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.ir.quant import Granularity
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

    Array = NDArray[np.generic]

# Three layers of float32 arithmetic, relative to the spread of a channel.
RELATIVE = 2e-4

_NET = """<ir_version: 10, opset_import: ["" : 21]>
net (float[N,3,8,8] x) => (float[N,5] y)
<float[8,3,3,3] w1, float[8,1,3,3] w2, float[8] b2, float[8,12] w3, float[12] b3, float[5,12] w4>
{
    [abs] m = Abs (x)
    [first] a = Conv <pads: ints = [1, 1, 1, 1]> (m, w1)
    [relu] r = Relu (a)
    [depth] d = Conv <group: int = 8, pads: ints = [1, 1, 1, 1]> (r, w2, b2)
    [both] s = Add (d, r)
    [pool] p = GlobalAveragePool (s)
    [row] f = Flatten (p)
    [up] u = MatMul (f, w3)
    [bias] v = Add (u, b3)
    [tanh] t = Tanh (v)
    [down] y = Gemm <transB: int = 1, alpha: float = 0.5> (t, w4)
}"""
_LAYERS = {"first": "a", "depth": "d", "bias": "v", "down": "y"}
_SHAPES = {
    "w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (8, 12), "b3": (12,), "w4": (5, 12),
}  # fmt: skip
_AXES = {"first": 0, "depth": 0, "up": 1, "down": 0}


def model_of(text: str, shapes: Mapping[str, tuple[int, ...]], seed: int = 3) -> Model:
    proto = onnx.parser.parse_model(text)
    del proto.graph.value_info[:]
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        fan_in = max(int(np.prod(shape[1:])), 1)
        array = np.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return read(proto)


def planned(model: Model, specs: Mapping[str, QuantSpec], ctx: PassContext) -> Model:
    plan = Plan({n: Choice(Option("storage", s), "") for n, s in specs.items()}, "test")
    return Pipeline.parse("insert-fake-quant").run(model.with_fact(plan), ctx).model


def per_channel(bits: int = 3) -> dict[str, QuantSpec]:
    dtype = {2: "s2", 3: "s3", 4: "s4"}[bits]
    return {
        name: QuantSpec(dtype, PerAxis(axis), symmetric=True)  # type: ignore[arg-type]
        for name, axis in _AXES.items()
    }


def repaired(
    text: str, ctx: PassContext, specs: Mapping[str, QuantSpec] | None = None
) -> tuple[Model, Compilation, PassContext]:
    """The model before and after a pass, on eight feeds of its own."""
    source = model_of(_NET, _SHAPES)
    before = planned(source, per_channel() if specs is None else specs, ctx)
    after = Pipeline.parse(text).run(before, ctx)
    return before, after, ctx


@pytest.fixture
def ctx(pass_context: PassContext, calibrated: Callable[..., PassContext]) -> PassContext:
    """Four feeds of 16 samples."""
    return calibrated(model_of(_NET, _SHAPES), 16)


def moments(
    model: Model, ctx: PassContext, name: str, axis: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance per channel over all calibration feeds, by numpy."""
    assert ctx.calibration is not None
    read_value = value_reader(model, ctx.evaluator, [name])
    arrays = [np.moveaxis(read_value(feed)[name], axis, 0) for feed in ctx.calibration]
    flat = np.concatenate([a.reshape(a.shape[0], -1) for a in arrays], axis=1).astype(np.float64)
    return flat.mean(axis=1), flat.var(axis=1)


def fakes(model: Model) -> dict[str, onnx_ir.Node]:
    return {n.name or "": n for n in model.graph if n.domain == "octavo"}


def codes(fake: onnx_ir.Node) -> Array:
    assert fake.inputs[0] is not None
    assert fake.inputs[0].const_value is not None
    return quantize(fake.inputs[0].const_value.numpy(), params_of(fake))


def test_every_channel_has_the_moments_of_the_float_model(ctx: PassContext) -> None:
    before, after, _ = repaired("match-moments", ctx)
    assert after.records[0].counters == {"layers corrected": 4}
    reference = before.fact(Reference).model
    for name in _LAYERS.values():
        axis = 1 if name in "ad" else -1
        mean, variance = moments(reference, ctx, name, axis)
        bad_mean, bad_variance = moments(before, ctx, name, axis)
        new_mean, new_variance = moments(after.model, ctx, name, axis)
        spread = float(np.sqrt(variance.max()))
        np.testing.assert_allclose(new_mean, mean, rtol=0, atol=RELATIVE * spread)
        np.testing.assert_allclose(new_variance, variance, rtol=20 * RELATIVE)
        assert np.abs(bad_mean - mean).max() > 50 * RELATIVE * spread
        assert np.abs(bad_variance / variance - 1).max() > 0.05


def test_codes_stay_and_scales_take_the_ratio(ctx: PassContext) -> None:
    before, after, _ = repaired("match-moments", ctx)
    _, variance = moments(before.fact(Reference).model, ctx, "a", 1)
    _, variance_q = moments(before, ctx, "a", 1)
    ratio = params_of(fakes(after.model)["w1_storage"]).scale
    ratio = ratio / params_of(fakes(before)["w1_storage"]).scale
    np.testing.assert_allclose(ratio, np.sqrt(variance / variance_q), rtol=RELATIVE)
    for name, fake in fakes(before).items():
        np.testing.assert_array_equal(codes(fakes(after.model)[name]), codes(fake))


def test_correct_bias_gives_back_means_and_leaves_weights(ctx: PassContext) -> None:
    before, after, _ = repaired("correct-bias", ctx)
    for name in _LAYERS.values():
        axis = 1 if name in "ad" else -1
        mean, variance = moments(before.fact(Reference).model, ctx, name, axis)
        new_mean, _ = moments(after.model, ctx, name, axis)
        spread = float(np.sqrt(variance.max()))
        np.testing.assert_allclose(new_mean, mean, rtol=0, atol=RELATIVE * spread)
    for name, fake in fakes(before).items():
        np.testing.assert_array_equal(
            params_of(fakes(after.model)[name]).scale, params_of(fake).scale
        )
        np.testing.assert_array_equal(codes(fakes(after.model)[name]), codes(fake))


def test_the_lowered_file_computes_what_the_graph_does(ctx: PassContext, tmp_path: Path) -> None:
    _, after, _ = repaired("clip-weights,round-squant,match-moments", ctx)
    artifact = lower(after.model, tmp_path / "low.onnx")
    evaluator = OrtEvaluator(threads=1)
    assert ctx.calibration is not None
    feed = next(iter(ctx.calibration))
    expected = np.asarray(ctx.evaluator.run(after.model, feed)["y"], np.float32)
    actual = np.asarray(evaluator.run(read(str(artifact.path)), feed)["y"], np.float32)
    bound = RELATIVE * float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("granularity", "scaled"),
    [(PerAxis(1), True), (PerBlock(0, 4), True), (PerTensor(), False), (PerAxis(0), False)],
    ids=str,
)
def test_only_scales_of_output_channels_change(
    granularity: Granularity, scaled: bool, ctx: PassContext
) -> None:
    specs = {"up": QuantSpec("s3", granularity, symmetric=True)}
    before, after, _ = repaired("match-moments", ctx, specs)
    assert after.records[0].counters["layers corrected"] >= 1
    old, new = (params_of(fakes(m)["w3_storage"]).scale for m in (before, after.model))
    assert (not np.array_equal(old, new)) == scaled
    mean, variance = moments(before.fact(Reference).model, ctx, "v", -1)
    new_mean, new_variance = moments(after.model, ctx, "v", -1)
    np.testing.assert_allclose(new_mean, mean, rtol=0, atol=RELATIVE * float(variance.max()))
    assert bool(np.allclose(new_variance, variance, rtol=20 * RELATIVE)) == scaled


@pytest.mark.parametrize(
    ("call", "shapes", "granularity"),
    [
        ("Conv (x, w)", {"w": (6, 4, 3, 3)}, PerAxis(0)),
        ("Conv (x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}, PerBlock(1, 2)),
        ("Conv <group: int = 2> (x, w)", {"w": (6, 2, 3, 3)}, PerAxis(0)),
        ("ConvTranspose (x, w, b)", {"w": (4, 6, 3, 3), "b": (6,)}, PerAxis(1)),
        ("Gemm (m, w, b)", {"w": (4, 6), "b": (1, 6)}, PerAxis(1)),
        ("Gemm <beta: float = 0.3, alpha: float = 2.0> (m, w, b)", {"w": (4, 6), "b": (6,)},
         PerAxis(1)),
        ("Gemm <transB: int = 1> (m, w)", {"w": (6, 4)}, PerBlock(1, 3)),
    ],
)  # fmt: skip
def test_a_layer_gives_ratio_times_y_plus_shift(
    call: str,
    shapes: Mapping[str, tuple[int, ...]],
    granularity: Granularity,
    pass_context: PassContext,
) -> None:
    declared = ", ".join(f"float[{','.join(map(str, s))}] {n}" for n, s in shapes.items())
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,4,5,5] x, float[3,4] m) => (float y) <{declared}> {{ [one] y = {call} }}"""
    model = model_of(text, shapes)
    spec = QuantSpec("s3", granularity, symmetric=True)
    before = planned(model, {"one": spec}, pass_context)
    rng = np.random.default_rng(0)
    sizes = {"x": (2, 4, 5, 5), "m": (3, 4)}
    feed = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in sizes.items()}
    given = np.asarray(pass_context.evaluator.run(before, feed)["y"], np.float32)
    ratio, shift = rng.uniform(0.5, 2, 6), rng.standard_normal(6)
    after = before.clone()
    layer = next(a for a in map(AffineLayer.of, after.graph) if a is not None)
    assert (layer.channels, layer.scalable) == (6, True)
    layer.transform(Rewrite(after, pass_context), ratio, shift)
    along = [-1 if k == layer.axis % given.ndim else 1 for k in range(given.ndim)]
    expected = given * ratio.reshape(along) + shift.reshape(along)
    actual = np.asarray(pass_context.evaluator.run(after, feed)["y"], np.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_grouped_transposed_convolution_shares_scales_between_channels(
    pass_context: PassContext,
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,4,5,5] x) => (float y) <float[4,3,3,3] w> {
        [one] y = ConvTranspose <group: int = 2> (x, w) }"""
    model = model_of(text, {"w": (4, 3, 3, 3)})
    specs = {"one": QuantSpec("s3", PerAxis(1), symmetric=True)}
    layer = next(filter(None, map(AffineLayer.of, planned(model, specs, pass_context).graph)))
    assert (layer.channels, layer.scalable) == (6, False)


def test_a_tied_weight_keeps_its_scales(
    pass_context: PassContext, calibrated: Callable[..., PassContext]
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4] b, float[4] c> {
        [one] a = MatMul (x, w) [add] p = Add (a, b) [tanh] t = Tanh (p)
        [two] d = MatMul (t, w) [end] y = Add (d, c) }"""
    model = model_of(text, {"w": (4, 4), "b": (4,), "c": (4,)})
    spec = QuantSpec("s2", PerAxis(1), symmetric=True)
    ctx = calibrated(model, 32)
    before = planned(model, {"one": spec, "two": spec}, ctx)
    after = Pipeline.parse("match-moments").run(before, ctx).model
    old, new = (params_of(fakes(m)["w_storage"]).scale for m in (before, after))
    np.testing.assert_array_equal(new, old)
    mean, variance = moments(before.fact(Reference).model, ctx, "y", -1)
    bound = RELATIVE * float(np.sqrt(variance.max()))
    np.testing.assert_allclose(moments(after, ctx, "y", -1)[0], mean, rtol=0, atol=bound)


def test_a_matmul_without_a_bias_is_left_alone(
    pass_context: PassContext, calibrated: Callable[..., PassContext]
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,4] x) => (float[N,4] y) <float[4,4] w> { [one] y = MatMul (x, w) }"""
    model = model_of(text, {"w": (4, 4)})
    ctx = calibrated(model, 32)
    before = planned(model, {"one": QuantSpec("s2", PerAxis(1), symmetric=True)}, ctx)
    after = Pipeline.parse("match-moments").run(before, ctx)
    assert after.model.fingerprint == before.fingerprint
    assert [(r.kind, r.where) for r in after.records[0].remarks] == [("missed", "one")]


def test_nothing_happens_without_data(pass_context: PassContext) -> None:
    before, after, _ = repaired("match-moments", pass_context)
    assert after.model.fingerprint == before.fingerprint
    assert [r.kind for r in after.records[0].remarks] == ["note"]


def test_worse_outputs_are_not_kept(ctx: PassContext) -> None:
    """Where nothing was rounded, the outputs cannot come closer."""
    before, after, _ = repaired("match-moments", ctx, {})
    assert after.model.fingerprint == before.fingerprint


def test_values_that_are_not_finite_name_the_layer(ctx: PassContext) -> None:
    assert ctx.calibration is not None
    feeds = [dict(feed) for feed in ctx.calibration]
    feeds[2]["x"] = np.full_like(feeds[2]["x"], np.nan)
    broken = replace(ctx, calibration=type(ctx.calibration)(tuple(feeds)))  # type: ignore[call-arg]
    with pytest.raises(CalibrationError, match="'first'") as caught:
        repaired("match-moments", broken)
    assert "feed 3" in str(caught.value)


def test_large_models_take_fewer_samples(ctx: PassContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctx.calibration is not None
    feeds = [dict(feed) for feed in ctx.calibration]
    feeds[3]["x"] = np.full_like(feeds[3]["x"], np.nan)
    seen = sum(len(feed["x"]) for feed in feeds[:3])
    broken = replace(ctx, calibration=type(ctx.calibration)(tuple(feeds)))  # type: ignore[call-arg]
    monkeypatch.setattr("octavo.passes.channel_repair._MACS", 0.0)
    monkeypatch.setattr("octavo.passes.channel_repair._LEAST_SAMPLES", seen)
    repaired("match-moments", broken)
    monkeypatch.setattr("octavo.passes.channel_repair._LEAST_SAMPLES", seen + len(feeds[3]["x"]))
    with pytest.raises(CalibrationError, match="'first'"):
        repaired("match-moments", broken)


def test_a_single_feed_is_both_halves(
    pass_context: PassContext, calibrated: Callable[..., PassContext]
) -> None:
    many = calibrated(model_of(_NET, _SHAPES), 64).calibration
    assert many is not None
    one = replace(pass_context, calibration=type(many)((next(iter(many)),)))  # type: ignore[call-arg]
    before, after, _ = repaired("match-moments", one)
    mean, variance = moments(before.fact(Reference).model, one, "y", -1)
    new_mean, new_variance = moments(after.model, one, "y", -1)
    np.testing.assert_allclose(new_variance, variance, rtol=20 * RELATIVE)
    bound = RELATIVE * float(np.sqrt(variance.max()))
    np.testing.assert_allclose(new_mean, mean, rtol=0, atol=bound)


def test_joint_moments_are_those_of_all_entries_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("octavo.passes.joint_moments._ELEMENTS", 50)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 3, 4)).astype(np.float32) + 100
    y = (0.5 * x + rng.standard_normal(x.shape)).astype(np.float32)
    found = JointMoments.of(x[:2], y[:2], 1).merged(JointMoments.of(x[2:], y[2:], 1))
    flat_x, flat_y = (np.moveaxis(a, 1, 0).reshape(3, -1).astype(np.float64) for a in (x, y))
    assert found.count == 28
    for channel in range(3):
        truth = np.cov(flat_x[channel], flat_y[channel], bias=True)
        actual = [found.variance, found.covariance, found.variance_q]
        expected = [truth[0, 0], truth[0, 1], truth[1, 1]]
        np.testing.assert_allclose([a[channel] for a in actual], expected, rtol=1e-9)
    np.testing.assert_allclose(found.mean, flat_x.mean(axis=1), rtol=1e-12)
    ratio, shift = rng.uniform(0.5, 2, 3), rng.standard_normal(3)
    error = ((flat_y * ratio[:, None] + shift[:, None] - flat_x) ** 2).mean(axis=1)
    np.testing.assert_allclose(found.error(ratio, shift), error, rtol=1e-9)


def test_a_channel_that_does_not_vary_is_shifted_only() -> None:
    real = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [5.0, 7.0, 6.0], [0.0, 0.1, 9.0]])
    rounded = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [6.0, 10.0, 8.0], [0.0, 0.01, 0.9]])
    found = JointMoments.of(real, rounded, 0)
    ratio, shift = moment_match(found)
    np.testing.assert_allclose(ratio, [1, 1, 0.5, 4], rtol=1e-12)
    np.testing.assert_allclose(ratio * rounded.mean(axis=1) + shift, real.mean(axis=1))
    np.testing.assert_array_equal(bias_match(found)[0], 1)
    np.testing.assert_allclose(bias_match(found)[1], [-1, -2, -2, 2.73], rtol=1e-12)


def test_a_walk_runs_every_node_once_and_forgets(
    ctx: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that do not fit into memory come back from their files."""
    monkeypatch.setattr("octavo.passes.layer_walk._KEPT_BYTES", 0)
    model = model_of(_NET, _SHAPES)
    stops = [n for n in model.graph if n.name in _LAYERS]
    assert ctx.calibration is not None
    feeds: list[Feed] = list(ctx.calibration)
    path = segments(model, stops)
    walk = Walk(model, ctx.evaluator, feeds, ctx.executor, ctx.workdir)
    read_values = value_reader(model, ctx.evaluator, _LAYERS.values())
    for segment in path:
        walk.step(segment)
        for index, feed in enumerate(feeds):
            np.testing.assert_array_equal(
                walk.read(index, segment.value), read_values(feed)[segment.value]
            )
        walk.leave(segment)
    assert [segment.reads for segment in path] == [("x",), ("a",), ("d", "r"), ("v",)]
    assert not walk.alive
    assert not list(ctx.workdir.iterdir())
