"""Low-rank factors against numpy's SVD, normal equations and onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest

from octavo.cli.calibration_data import load_calibration
from octavo.ir.errors import UsageError
from octavo.ir.moments import Moment, Moments
from octavo.ir.read import read
from octavo.passes.factor_low_rank import low_rank_layer
from octavo.passes.low_rank import Spectrum, factored, relative_error
from octavo.passes.low_rank_graph import split_layer
from octavo.passes.low_rank_layer import Form, LowRankLayer
from octavo.passes.pipeline import Pipeline
from octavo.passes.rewrite import Rewrite
from octavo.passes.weight_matrix import WeightMatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Float64 = NDArray[np.float64]

FLOAT64_RELATIVE = 1e-8
FLOAT32_RELATIVE = 2e-5
SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)]


def columns_of(width: int, seed: int, rank: int | None = None) -> Float64:
    """Correlated columns `[width, 200]` with a mean, of a rank if given."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((width, rank or width)) @ rng.standard_normal((rank or width, 200))
    return mixed + rng.standard_normal((width, 1)) if rank is None else mixed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [False, True])
def test_whitened_factors_are_the_best_there_are(shape: tuple[int, int], dead: bool) -> None:
    rows, width = shape
    weight = np.random.default_rng(1).standard_normal(shape)
    x = columns_of(width, 2, max(1, width // 2) if dead else None)
    second = x @ x.T / x.shape[1]
    for rank in range(1, min(shape) + 1):
        made = factored(weight, second, rank)
        assert made.left.shape == (rows, rank)
        assert made.right.shape == (rank, width)
        # Eckart and Young: no matrix of this rank is closer to W·X.
        best = float(np.square(np.linalg.svd(weight @ x, compute_uv=False)[rank:]).sum())
        lost = float(np.square((weight - made.left @ made.right) @ x).sum())
        whole = float(np.square(weight @ x).sum())
        assert abs(lost - best) <= FLOAT64_RELATIVE * whole
        assert abs(made.error - best / whole) <= FLOAT64_RELATIVE


def test_without_data_the_weight_itself_is_approximated() -> None:
    weight = np.random.default_rng(3).standard_normal((12, 8))
    left, singular, right = np.linalg.svd(weight)
    best = left[:, :3] * singular[:3] @ right[:3]
    np.testing.assert_allclose(factored(weight, None, 3).product, best, rtol=0, atol=1e-10)


def test_mean_that_a_bias_takes_up_costs_nothing() -> None:
    weight, x = np.random.default_rng(4).standard_normal((6, 9)), columns_of(9, 5)
    mean, second = x.mean(axis=1), x @ x.T / x.shape[1]
    covariance = second - np.outer(mean, mean)
    made = Spectrum.of(weight, covariance, mean).factors(2)
    # The best affine layer of this rank is that of the centred outputs.
    centred = weight @ (x - mean[:, None])
    best = float(np.square(np.linalg.svd(centred, compute_uv=False)[2:]).sum())
    assert abs(made.error - best / float(np.square(weight @ x).sum())) <= FLOAT64_RELATIVE
    assert made.error < Spectrum.of(weight, second).error(2)
    again = relative_error(weight, made.product, covariance, mean)
    assert abs(again - made.error) <= FLOAT64_RELATIVE


def test_rank_for_an_energy_is_the_least_that_keeps_it() -> None:
    spectrum = Spectrum.of(np.diag([4.0, 2.0, 1.0, 0.5]))
    whole = 16 + 4 + 1 + 0.25
    for energy, rank in [(0.1, 1), (16 / whole, 1), (0.8, 2), (20 / whole, 2), (0.999, 4)]:
        assert spectrum.rank_for(energy) == rank


def test_sides_are_balanced() -> None:
    made = factored(np.diag([9.0, 4.0, 1.0]), None, 3)
    np.testing.assert_allclose(
        np.linalg.norm(made.left, axis=0), np.linalg.norm(made.right, axis=1), rtol=1e-12
    )


def test_zero_weight_has_no_error() -> None:
    made = factored(np.zeros((4, 6)), None, 2)
    assert made.error == 0
    assert np.all(made.product == 0)


CONV = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[4,5,9,8] x) => (float[4,7,h,w] y) <float[7,5,3,3] weight = {0}, float[7] bias = {0}> {
    [layer] y = Conv <ATTRIBUTES> (x, weight, bias)
}
"""
GEMM = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[SHAPE] x) => (float[N,7] y) <float[WEIGHT] weight = {0}, float[7] bias = {0}> {
    [layer] y = Gemm <alpha: float = 0.5, beta: float = 2.0, ATTRIBUTES> (x, weight, bias)
}
"""
MATMUL = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N,3,9] x) => (float[N,3,7] y) <float[9,7] weight = {0}, float[7] bias = {0}> {
    [layer] product = MatMul (x, weight)
    [add] y = Add (bias, product)
}
"""


def gemm(shape: str, weight: str, attributes: str) -> str:
    """A Gemm that reads `x` of a shape."""
    text = GEMM.replace("SHAPE", shape).replace("WEIGHT", weight)
    return text.replace("ATTRIBUTES", attributes)


MODELS = {
    "plain": CONV.replace("ATTRIBUTES", "strides: ints = [1, 1]"),
    "strided": CONV.replace("ATTRIBUTES", "strides: ints = [2, 3], pads: ints = [1, 0, 2, 1]"),
    "dilated": CONV.replace("ATTRIBUTES", "dilations: ints = [2, 1], pads: ints = [2, 1, 2, 1]"),
    "same": CONV.replace("ATTRIBUTES", 'auto_pad: string = "SAME_UPPER", strides: ints = [2, 2]'),
    "lower": CONV.replace("ATTRIBUTES", 'auto_pad: string = "SAME_LOWER"'),
    "valid": CONV.replace("ATTRIBUTES", 'auto_pad: string = "VALID"'),
    "gemm": gemm("N,9", "9,7", "transA: int = 0"),
    "gemm-b": gemm("N,9", "7,9", "transB: int = 1"),
    "gemm-a": gemm("9,N", "9,7", "transA: int = 1"),
    "matmul": MATMUL,
}


def model_of(name: str, spatial: bool = False, rank: int = 2, noise: float = 0.0) -> Model:
    """A model, by name or text, whose weight has a rank, as a matrix or as a spatial kernel."""
    proto = onnx.parser.parse_model(MODELS.get(name, name))
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        shape = tuple(tensor.dims)
        array = rng.standard_normal(shape)
        if tensor.name == "weight":
            rows = [rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, *shape[1:]))]
            if spatial:
                rows = [rng.standard_normal(rows) for rows in ((7, rank, 3), (rank, 5, 3))]
            product = "nrj,rci->ncij" if spatial else "nr,r...->n..."
            array = np.einsum(product, *rows) + noise * array
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return read(proto)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in MODELS for form in ("channel", "spatial")
     if form == "channel" or "Conv" in MODELS[name]],
)  # fmt: skip
@pytest.mark.parametrize("method", ["whitened", "svd"])
def test_weight_of_low_rank_computes_the_same_as_two_layers(
    name: str,
    form: str,
    method: str,
    calibrated: Callable[..., PassContext],
    feed_of: Callable[..., Feed],
    agrees: Callable[[Feed, Feed, float], None],
) -> None:
    model = model_of(name, form == "spatial")
    ctx, text = calibrated(model), f"factor-low-rank{{rank=2,conv={form},method={method}}}"
    compiled = Pipeline.parse(text).run(model, ctx)
    assert compiled.records[-1].counters == {"layers factored": 1}
    assert [n.name for n in compiled.model.graph][:2] == ["layer_low_rank", "layer"]
    assert set(compiled.model.graph.initializers) >= {"weight_first", "weight_second", "bias"}
    assert "weight" not in compiled.model.graph.initializers
    feed = feed_of(model, 9)
    agrees(*(ctx.evaluator.run(m, feed) for m in (compiled.model, model)), FLOAT32_RELATIVE)


def exact_moment(node: onnx_ir.Node, inputs: Sequence[NDArray[np.generic]]) -> Moment:
    """The moment of all columns of some inputs, as of so many that nothing is shrunk."""
    matrix = WeightMatrix.of(node, 1)
    columns = np.concatenate([matrix.columns(x) for x in inputs], axis=1)
    second = np.einsum("gsi,gsj->gij", columns, columns) / columns.shape[1]
    return Moment(second, columns.mean(axis=1), 1 << 40)


@pytest.mark.parametrize("name", ["plain", "strided", "gemm", "gemm-a", "matmul"])
@pytest.mark.parametrize("form", [0, -1])
def test_reported_error_is_that_of_the_outputs(
    name: str, form: int, pass_context: PassContext, feed_of: Callable[..., Feed]
) -> None:
    model = model_of(name, noise=0.5)
    node, feeds = next(iter(model.graph)), [feed_of(model, seed, 40) for seed in range(4)]
    moment = exact_moment(node, [feed["x"] for feed in feeds])
    layer = low_rank_layer(node, Moments({"layer:1": moment}))
    made = layer.factors(layer.forms[form], 3)
    changed = model.clone()
    split_layer(Rewrite(changed, pass_context), next(iter(changed.graph)), made)
    lost, whole = 0.0, 0.0
    bias = np.asarray(model.graph.initializers["bias"].const_value)
    bias = bias.reshape(-1, 1, 1) if "Conv" in MODELS[name] else bias
    for feed in feeds:
        before, after = (pass_context.evaluator.run(m, feed)["y"] for m in (model, changed))
        lost += float(np.square(after - before).sum())
        whole += float(np.square(before - bias * (2 if "Gemm" in MODELS[name] else 1)).sum())
    assert lost / whole == pytest.approx(made.error, rel=1e-3)


def test_fitted_spatial_kernel_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(0)
    model, x = model_of("plain", noise=0.5), columns_of(45, 6)
    second, mean = (x @ x.T / 200).astype(np.float32), np.zeros((1, 45), np.float32)
    node = next(iter(model.graph))
    weight = np.asarray(model.graph.initializers["weight"].const_value)
    layer = LowRankLayer.of(node, weight, Moment(second[None], mean, 1 << 40), biased=False)
    made = layer.factors(layer.forms[1], 3)
    lost = float(np.square(layer.rows @ x - made.product.reshape(7, 45) @ x).sum())
    assert made.error == pytest.approx(lost / np.square(layer.rows @ x).sum(), rel=1e-4)
    for _ in range(20):
        nudged = made.second + 1e-2 * rng.standard_normal(made.second.shape)
        product = np.einsum("nrj,rci->ncij", nudged[:, :, 0], made.first[..., 0])
        assert np.square((layer.rows - product.reshape(7, 45)) @ x).sum() > lost


def test_whitening_beats_the_plain_decomposition_on_a_trained_network(
    pass_context: PassContext,
) -> None:
    folder = Path(str(files("octavo.models")))
    model = read(folder / "fashion_resnet.onnx")
    ctx = replace(pass_context, calibration=load_calibration(str(folder / "fashion.npz"), model))
    prepared = Pipeline.parse("canonicalize,collect-moments").run(model, ctx).model
    moments, compared = prepared.fact(Moments), 0
    for node in prepared.graph:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weight = low_rank_layer(node, moments).weight
        layer = LowRankLayer.of(node, weight, moments.of(node.name or "", 1), biased=False)
        for form in layer.forms:
            rank = max(1, form.full // 4)
            plain = LowRankLayer(node, weight).factors(form, rank).product
            lost = relative_error(layer.rows, layer.matrix.rows(plain)[0], layer.second)
            assert layer.factors(form, rank).error <= lost + 1e-6
            compared += 1
    assert compared >= 12


def test_layer_that_would_not_get_cheaper_stays(pass_context: PassContext) -> None:
    model = model_of("matmul")
    compiled = Pipeline.parse("factor-low-rank{rank=4}").run(model, pass_context)
    assert compiled.model.fingerprint == model.fingerprint
    assert "below 3.938" in compiled.records[0].remarks[1].text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=8", "above the full rank of 'layer'"),
        ("rank=0", "neither a share"),
        ("rank=1.5", "neither a share"),
        ("rank=-1", "neither a share"),
        ("rank=inf", "neither a share"),
        ("rank=nan", "neither a share"),
        ("samples=0", "samples be at least 1"),
        ("energy=1", "energy must lie"),
        ("multiple=0", "energy must lie"),
        ("only=layer,keep=type:MatMul", "is to be kept"),
        ("only=nothing", "selects no node"),
    ],
)
def test_bad_option_is_refused(text: str, message: str, pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(f"factor-low-rank{{{text}}}").run(model_of("matmul"), pass_context)


def test_shared_weight_stays(pass_context: PassContext) -> None:
    text = MATMUL.replace(
        "[layer] product", "[other] second = MatMul (x, weight)\n [layer] product"
    )
    text = text.replace("y)", "y, float[N,3,7] second)")
    compiled = Pipeline.parse("factor-low-rank").run(model_of(text), pass_context)
    reasons = {r.where: r.text for r in compiled.records[0].remarks}
    assert reasons["layer"] == reasons["other"] == "its weight is not a constant of its own"


def test_ranks_are_multiples_below_the_break_even_rank() -> None:
    form = Form("matrix", 96, 96 + 384, 96 * 384)
    assert [form.rank(share, 8) for share in (0.01, 0.5, 0.7, 0.99)] == [8, 40, 56, 72]
    assert Form("matrix", 10, 106, 960).rank(0.5, 16) == 0
