"""Ranges without data, against sampled values that follow the same laws."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest

from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.facts import Range, Ranges
from octavo.ir.read import read
from octavo.passes.base import Statistic
from octavo.passes.bound_ranges import BoundRanges
from octavo.passes.input_laws import InputLaw, standard
from octavo.passes.law_rules import ELEMENTWISE, Propagation
from octavo.passes.pipeline import Pipeline
from octavo.passes.value_laws import Law, added, multiplied

if TYPE_CHECKING:
    from octavo.passes.base import PassContext

# A mean or deviation of 200,000 samples, and a sum over 201 points, are this close together.
MOMENT_TOLERANCE = 0.02
SAMPLES = 200_000

NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N, 3, 12, 12] image, float[N, 8] other) => (float[N, 8] out, float[N, 8] far)
<float[8, 3, 3, 3] w = {0}, float[8] gamma = {0}, float[8] beta = {0}, float[8] mean = {0},
 float[8] var = {0}, float[8, 8] dense = {0}, int64[1] one = {1}> {
    conv = Conv <pads = [1, 1, 1, 1]> (image, w)
    norm = BatchNormalization (conv, gamma, beta, mean, var)
    relu = Relu (norm)
    pool = GlobalAveragePool (relu)
    flat = Flatten (pool)
    out = MatMul (flat, dense)
    far = CumSum (other, one)
}
"""


def _network() -> Any:
    proto = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name != "one":
            drawn = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
            drawn = np.abs(drawn) + 0.5 if tensor.name == "var" else drawn
            tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return proto


def _sampled(law: Law, rng: np.random.Generator) -> Any:
    drawn = rng.standard_normal((SAMPLES, len(law.mean))) * law.deviation + law.mean
    return np.clip(drawn, law.low, law.high)


def _assert_moments(law: Law, values: Any) -> None:
    scale = max(float(np.abs(values).max()), 1.0)
    np.testing.assert_allclose(law.mean, values.mean(0), atol=MOMENT_TOLERANCE * scale, rtol=0)
    np.testing.assert_allclose(law.deviation, values.std(0), atol=MOMENT_TOLERANCE * scale, rtol=0)
    slack = 1e-9 * scale
    assert np.all(values >= law.low - slack) and np.all(values <= law.high + slack)  # noqa: PT018


def _law() -> Law:
    return Law.normal(1, np.array([0.5, -1.0, 0.0]), np.array([1.0, 0.3, 0.0]), 4.0)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_an_activation_moves_moments_and_ends_as_it_moves_samples(name: str) -> None:
    values = ELEMENTWISE[name](_sampled(_law(), np.random.default_rng(1)))
    law = _law().through(ELEMENTWISE[name])
    # A grid of 65 points finds the least value of a curve, not of every sample.
    widened = replace(law, low=law.low - 0.01, high=law.high + 0.01)
    _assert_moments(widened, values)


def test_sums_products_and_matrices_move_moments_as_they_move_samples() -> None:
    rng = np.random.default_rng(2)
    first, second = _law(), Law.normal(1, np.array([2.0, 0, -1]), np.array([0.5, 1, 2]), 4.0)
    a, b = _sampled(first, rng), _sampled(second, rng)
    product, total = multiplied(first, second), added(first, second, 4.0)
    _assert_moments(product, a * b)
    _assert_moments(replace(total, low=total.low - 9, high=total.high + 9), a + b)
    w = rng.standard_normal((4, 3, 1))
    law = first.linear(w, np.ones(4), 1, 4.0)
    values = a @ w[:, :, 0].T + 1
    np.testing.assert_allclose(law.mean, values.mean(0), atol=MOMENT_TOLERANCE, rtol=0)
    np.testing.assert_allclose(law.deviation, values.std(0), atol=MOMENT_TOLERANCE, rtol=0)


def test_a_matrix_is_never_wider_than_its_extremes() -> None:
    law = Law(None, np.zeros(1), np.ones(1), np.array([-1.0]), np.array([1.0]))
    found = law.linear(np.full((1, 2, 1), 0.5), None, 1, 100.0)
    assert (found.low[0], found.high[0]) == (-1.0, 1.0)


def test_every_range_holds_what_inputs_of_that_law_give(pass_context: PassContext) -> None:
    """The norm's own statistics are those of the convolution, as training leaves them."""
    proto = _network()
    by_name = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    power = np.square(by_name["w"]).sum((1, 2, 3))
    for name, array in (("mean", np.zeros(8)), ("var", power)):
        (tensor,) = (t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    model = Pipeline.parse("canonicalize").run(read(proto), pass_context).model
    names = ["norm", "relu", "flat", "out"]
    wanted = tuple(Statistic("range", name) for name in (*names, "far"))
    found = BoundRanges().run(model, replace(pass_context, statistics=wanted)).fact(Ranges)
    assert (found.method, found.samples) == ("analytic", 0)
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names[:3])
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {
        "image": np.random.default_rng(3).standard_normal((64, 3, 12, 12)).astype(np.float32),
        "other": np.zeros((64, 8), np.float32),
    }
    for name, array in zip(names, session.run(names, feed), strict=True):
        inside = (array >= found.by_value[name].low) & (array <= found.by_value[name].high)
        assert inside.mean() > 0.999, name
    # Twice the width of what comes out would waste a bit.
    relu = session.run(["relu"], feed)[0]
    assert found.by_value["relu"].high < 2 * relu.max()
    assert "far" not in found.by_value
    assert any(r.where == "far" and "CumSum" in r.text for r in pass_context.recorder.remarks)


def test_measured_ranges_are_cut_and_never_widened(pass_context: PassContext) -> None:
    model = Pipeline.parse("canonicalize").run(read(_network()), pass_context).model
    wanted = replace(pass_context, statistics=(Statistic("range", "relu"),))
    bound = BoundRanges().run(model, wanted).fact(Ranges).by_value["relu"]
    for high in (bound.high / 2, bound.high * 2):
        known = Ranges({"relu": Range(0.0, high, 0.0, high)}, "percentile", 4, "data")
        cut = BoundRanges().run(model.with_fact(known), wanted).fact(Ranges)
        assert cut.by_value["relu"].high == min(high, bound.high)
        assert cut.calibration_sha256 == "data"


def test_an_input_s_law_is_that_before_the_graph_s_own_scaling() -> None:
    model = read(
        onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        scaled (float[N, 4] x) => (float[N, 4] y) <float m = {100}, float d = {50}> {
            a = Sub (x, m)
            b = Div (a, d)
            y = Exp (b)
        }
        """)
    )
    assert standard(model.graph.inputs[0]) == InputLaw("normal", 100.0, 50.0)
    laws = Propagation(model, 4.0)
    laws.run({"x": InputLaw.parse("uniform(0,100)")})
    assert (laws.laws["b"].low[0], laws.laws["b"].high[0]) == (-2.0, 0.0)
    with pytest.raises(UnknownName, match="unknown input 'z'"):
        laws.run({"z": InputLaw.parse("normal(0,1)")})


@pytest.mark.parametrize(
    "text", ["normal(0,0)", "uniform(2,1)", "ids(0,1.5)", "normal(0,inf)", "normal", "gauss(0,1)"]
)
def test_a_law_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="distribution"):
        InputLaw.parse(text)
