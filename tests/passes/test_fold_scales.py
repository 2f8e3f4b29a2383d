"""Which scales fold-scales chooses, by the formulas of the papers and by brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir
import pytest

from octavo.ir.errors import CalibrationError, UsageError
from octavo.ir.facts import Range, Ranges
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantSpec, round_weight
from octavo.ir.read import read
from octavo.passes.fold_scales import FoldScales
from octavo.passes.pipeline import Pipeline
from octavo.passes.scaled_layers import Rounding

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext, Remark

    Calibrated = Callable[..., PassContext]

FLOAT32_RELATIVE = 1e-5
BITS, WIDTH, OUTPUTS = 3, 12, 10

NORMED = """
<ir_version: 10, opset_import: ["" : 21]>
normed (float[B,5,12] x) => (float[B,5,10] y, float[B,5,10] z)
<float[12] gamma = {0}, float[12] beta = {0}, float[12,10] w = {0}, float[12,10] v = {0}>
{
  [norm] h = LayerNormalization (x, gamma, beta)
  [first] y = MatMul (h, w)
  [second] z = MatMul (h, v)
}
"""
CONVOLVED = """
<ir_version: 10, opset_import: ["" : 21]>
convolved (float[B,3,6,6] x) => (float[B,5,6,6] y)
<float[8,3,1,1] w = {0}, float[8] b = {0}, float[5,8,3,3] v = {0}>
{
  [first] a = Conv (x, w, b)
  [relu] r = Relu (a)
  [second] y = Conv <pads = [1, 1, 1, 1]> (r, v)
}
"""


def seeded(text: str, spread: float = 1.5, **given: NDArray[np.float32]) -> Model:
    """The model of a text with seeded weights whose channels differ by factors of exp(spread)."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(5)
    for tensor in proto.graph.initializer:
        shape = tuple(tensor.dims)
        channels = np.exp(rng.normal(0, spread, (shape[0], *[1] * (len(shape) - 1))))
        array = given.get(tensor.name, (rng.standard_normal(shape) * channels).astype(np.float32))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


def array(model: Model, name: str) -> NDArray[np.float64]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


def remarks(ctx: PassContext, kind: str, where: str) -> list[Remark]:
    return [r for r in ctx.recorder.remarks if (r.kind, r.where) == (kind, where)]


def read_by_the_layers(model: Model, ctx: PassContext) -> NDArray[np.float64]:
    """What both linear operators of NORMED read on the calibration data, `[samples, 12]`."""
    assert ctx.calibration is not None
    found = [a["h"] for a in ctx.evaluator.stream(model, ctx.calibration, ["h"])]
    return np.concatenate(found).reshape(-1, WIDTH).astype(np.float64)


def rounded(w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearest codes with one scale per output, in float64."""
    step = np.abs(w).max(axis=0) / (2 ** (BITS - 1) - 1)
    return np.asarray(np.rint(w / step) * step)


def error(x: NDArray[np.float64], w: NDArray[np.float64], scale: NDArray[np.float64]) -> float:
    truth = x @ w
    left = (x / scale) @ rounded(w * scale[:, None]) - truth
    return float((left**2).sum() / (truth**2).sum())


@pytest.mark.parametrize("grid", [2, 5])
def test_awq_takes_the_best_exponents_of_the_grid(grid: int, calibrated: Calibrated) -> None:
    model = seeded(NORMED)
    ctx = calibrated(model)
    x, w, v = read_by_the_layers(model, ctx), array(model, "w"), array(model, "v")
    steps = [step / (grid - 1) for step in range(grid)]
    pairs = [(alpha, beta) for alpha in steps for beta in steps]
    means, largest = np.abs(x).mean(axis=0), np.abs(np.concatenate([w, v], axis=1)).max(axis=1)
    tried = [means**alpha / largest**beta for alpha, beta in pairs]
    errors = [error(x, w, scale) + error(x, v, scale) for scale in tried]
    gamma = array(model, "gamma")
    after = FoldScales(method="awq", bits=BITS, grid=grid).run(model.clone(), ctx)
    (remark,) = remarks(ctx, "applied", "norm")
    best = int(np.argmin(errors))
    assert remark.text.startswith("awq alpha={:g} beta={:g}:".format(*pairs[best]))
    ones = np.ones(WIDTH)
    assert remark.values["before"] == pytest.approx(error(x, w, ones) + error(x, v, ones), rel=1e-3)
    assert remark.values["after"] == pytest.approx(errors[best], rel=1e-3)
    scale = gamma / array(after, "gamma")
    ratio = scale / tried[best]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    np.testing.assert_allclose(np.log(scale).mean(), 0, atol=1e-5)
    np.testing.assert_allclose(array(after, "w"), w * scale[:, None], rtol=1e-5)


def test_smoothquant_scales_by_its_formula(calibrated: Calibrated) -> None:
    model = seeded(NORMED)
    ctx = calibrated(model)
    x = read_by_the_layers(model, ctx)
    largest = np.abs(np.concatenate([array(model, "w"), array(model, "v")], axis=1)).max(axis=1)
    expected = np.abs(x).max(axis=0) ** 0.7 / largest**0.3
    gamma = array(model, "gamma")
    method = FoldScales(method="smoothquant", alpha=0.7, bits=8, activation_bits=4)
    after = method.run(model.clone(), ctx)
    assert remarks(ctx, "applied", "norm")
    np.testing.assert_allclose(gamma / array(after, "gamma"), expected, rtol=1e-5)


def test_equalised_ranges_are_their_geometric_mean(pass_context: PassContext) -> None:
    model = seeded(CONVOLVED)
    first = np.abs(array(model, "w")).max(axis=(1, 2, 3))
    second = np.abs(array(model, "v")).max(axis=(0, 2, 3))
    bias = array(model, "b")
    after = FoldScales(method="cle", per_tensor=True).run(model.clone(), pass_context)
    now = np.abs(array(after, "w")).max(axis=(1, 2, 3))
    np.testing.assert_allclose(now, np.sqrt(first * second), rtol=1e-5)
    then = np.abs(array(after, "v")).max(axis=(0, 2, 3))
    np.testing.assert_allclose(then, np.sqrt(first * second), rtol=1e-5)
    np.testing.assert_allclose(array(after, "b"), bias * now / first, rtol=1e-5)


def test_equalisation_lowers_the_error_of_weights_with_one_scale(
    calibrated: Calibrated, agrees: Callable[[Feed, Feed, float], None]
) -> None:
    model = seeded(CONVOLVED)
    ctx = calibrated(model)
    after = FoldScales(method="cle", per_tensor=True, bits=4).run(model.clone(), ctx)
    assert ctx.calibration is not None
    feed = next(iter(ctx.calibration))
    truth = ctx.evaluator.run(model, feed)
    agrees(ctx.evaluator.run(after, feed), truth, FLOAT32_RELATIVE)
    errors = []
    for own in (model.clone(), after.clone()):
        for name in ("w", "v"):
            near = round_weight(array(own, name), QuantSpec("s4", symmetric=True))
            own.graph.initializers[name].const_value = onnx_ir.tensor(near, name=name)
        errors.append(float(np.square(ctx.evaluator.run(own, feed)["y"] - truth["y"]).sum()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("method", ["auto", "awq", "smoothquant", "cle"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("activation_bits", [0, 8])
@pytest.mark.parametrize("text", [NORMED, CONVOLVED])
def test_no_method_raises_the_error(
    method: str, per_tensor: bool, activation_bits: int, text: str, calibrated: Calibrated
) -> None:
    model = seeded(text)
    ctx = calibrated(model)
    options = {"method": method, "per_tensor": per_tensor, "activation_bits": activation_bits}
    FoldScales(**options, bits=4).run(model, ctx)  # type: ignore[arg-type]
    for remark in ctx.recorder.remarks:
        if remark.kind == "applied":
            before, after = remark.values["before"], remark.values["after"]
            assert isinstance(before, float)
            assert isinstance(after, float)
            assert after < before


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 7, 300), (3, 4, 9), (1, 5, 1)])
def test_rounding_is_that_of_the_grid(bits: int, shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(bits).standard_normal(shape).astype(np.float32)
    rows[0, 0] = 0
    flat, dtype = rows.reshape(-1, shape[-1]), f"s{bits}"
    for rounding, granularity in (
        (Rounding(bits), PerAxis(0)),
        (Rounding(bits, block=128), PerBlock(1, 128)),
        (Rounding(bits, per_tensor=True), PerTensor()),
    ):
        spec = QuantSpec(dtype, granularity, symmetric=True)  # type: ignore[arg-type]
        expected = round_weight(flat, spec).reshape(shape)
        np.testing.assert_array_equal(rounding.rows(rows, blocks=True), expected)
    spec = QuantSpec(dtype, PerAxis(0), symmetric=True)  # type: ignore[arg-type]
    whole = Rounding(bits, block=128).rows(rows, blocks=False)
    np.testing.assert_array_equal(whole, round_weight(flat, spec).reshape(shape))


def test_weights_on_the_grid_stay(calibrated: Calibrated) -> None:
    rng = np.random.default_rng(0)
    codes = {n: rng.integers(-7, 8, (WIDTH, OUTPUTS)).astype(np.float32) for n in "wv"}
    for name in codes:
        codes[name][0] = 7
    model = seeded(NORMED, **codes)
    ctx = calibrated(model)
    after = FoldScales(bits=4).run(model.clone(), ctx)
    assert after.fingerprint == model.fingerprint
    assert [r.text for r in remarks(ctx, "missed", "norm")] == ["no scale lowers the error"]


def test_dead_channels_keep_their_scale(calibrated: Calibrated) -> None:
    gamma = np.array([0, 50, *[1] * 10], np.float32)
    model = seeded(NORMED, gamma=gamma, beta=np.zeros(WIDTH, np.float32))
    ctx = calibrated(model)
    after = FoldScales(method="awq", bits=3).run(model.clone(), ctx)
    assert remarks(ctx, "applied", "norm")
    np.testing.assert_array_equal(array(after, "w")[0], array(model, "w")[0])
    assert array(after, "gamma")[0] == 0


def test_without_data_norms_tell_how_large_activations_are(pass_context: PassContext) -> None:
    gamma = np.array([40, 20, *[1] * 10], np.float32)
    model = seeded(NORMED, spread=0.1, gamma=gamma, beta=np.zeros(WIDTH, np.float32))
    after = FoldScales(bits=3).run(model.clone(), pass_context)
    assert remarks(pass_context, "note", "")[0].text.startswith("no calibration data")
    x = np.random.default_rng(1).standard_normal((4096, WIDTH)) * gamma
    scale = gamma / array(after, "gamma")
    w, v, ones = array(model, "w"), array(model, "v"), np.ones(WIDTH)
    assert error(x, w, scale) + error(x, v, scale) < 0.8 * (error(x, w, ones) + error(x, v, ones))


def test_only_selects_links(calibrated: Calibrated) -> None:
    model = seeded(CONVOLVED)
    kept = FoldScales(only=("relu",)).run(model.clone(), calibrated(model))
    assert kept.fingerprint == model.fingerprint
    for name in ("first", "second"):
        changed = FoldScales(only=(name,)).run(model.clone(), calibrated(model))
        assert changed.fingerprint != model.fingerprint
    with pytest.raises(UsageError, match="selects no node"):
        FoldScales(only=("nothing",)).run(model.clone(), calibrated(model))


@pytest.mark.parametrize(
    "text", ["bits=1", "bits=9", "activation-bits=9", "alpha=1.5", "grid=1", "rows=0", "block=-1"]
)
def test_options_out_of_range_are_refused(text: str, calibrated: Calibrated) -> None:
    model = seeded(NORMED)
    with pytest.raises(UsageError, match=f"{text.split('=')[0]} is "):
        Pipeline.parse(f"fold-scales{{{text}}}").run(model, calibrated(model))


def test_activations_that_are_not_numbers_are_named(calibrated: Calibrated) -> None:
    text = NORMED.replace("Normalization (x", "Normalization (r")
    model = seeded(text.replace("{\n  [norm]", "{\n  [root] r = Sqrt (x)\n  [norm]"))
    with pytest.raises(CalibrationError, match="'h' that 'first' reads is not finite"):
        FoldScales().run(model, calibrated(model))


def test_large_models_take_fewer_samples(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(NORMED)
    ctx = calibrated(model)
    assert ctx.calibration is not None
    first, *others = (dict(feed) for feed in ctx.calibration)
    feeds = (first, *({name: np.full_like(a, np.nan) for name, a in f.items()} for f in others))
    broken = replace(ctx, calibration=type(ctx.calibration)(feeds))  # type: ignore[call-arg]
    with pytest.raises(CalibrationError, match="not finite"):
        FoldScales().run(model, broken)
    monkeypatch.setattr("octavo.passes.layer_columns._MACS", 0.0)
    monkeypatch.setattr("octavo.passes.layer_columns._LEAST_SAMPLES", 1)
    FoldScales().run(seeded(NORMED), broken)


def test_stale_ranges_are_dropped(calibrated: Calibrated) -> None:
    model = seeded(NORMED).with_fact(Ranges({"h": Range(0, 1, 0, 1)}, "minmax", 1, ""))
    result = Pipeline.parse("fold-scales{bits=3}").run(model, calibrated(model)).model
    assert result.find(Ranges) is None


def test_the_source_model_keeps_its_weights(calibrated: Calibrated) -> None:
    model = seeded(NORMED)
    before = {name: array(model, name) for name in ("gamma", "w", "v")}
    result = Pipeline.parse("fold-scales{bits=3}").run(model, calibrated(model)).model
    assert result.fingerprint != model.fingerprint
    for name, expected in before.items():
        np.testing.assert_array_equal(array(model, name), expected)
