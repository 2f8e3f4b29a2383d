"""Repair with data made to have stored moments, against repair with data that have them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.quant import PerAxis, QuantSpec
from octavo.ir.read import read
from octavo.ir.synthetic import Synthetic
from octavo.passes.affine_layers import affine_layers
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.synthetic import Origin
    from octavo.passes.base import PassContext

    Array = NDArray[np.generic]

# Two layers of float32 arithmetic, relative to the largest bias.
RELATIVE = 2e-4

_NORMED = """<ir_version: 10, opset_import: ["" : 21]>
net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float[3,1,1,1] w1, float[3] gamma, float[3] beta, float[3] mean, float[3] var, float[4,3,3,3] w2>
{
    [first] a = Conv <group: int = 3> (x, w1)
    [norm] n = BatchNormalization <epsilon: float = 0.0> (a, gamma, beta, mean, var)
    [relu] r = Relu (n)
    [second] y = Conv (r, w2)
}"""


def normed(real: Array) -> Model:
    """Two layers, of which the first ends in a BatchNormalization that has seen `real`."""
    proto = onnx.parser.parse_model(_NORMED)
    rng = np.random.default_rng(5)
    w1 = np.array([0.5, -2, 1], np.float32)
    seen = real * w1[:, None, None]
    arrays = {
        "w1": w1.reshape(3, 1, 1, 1),
        "gamma": np.array([1, -0.5, 2]),
        "beta": np.array([0.3, 0, -1]),
        "mean": seen.mean((0, 2, 3)),
        "var": seen.var((0, 2, 3)),
        "w2": rng.normal(size=(4, 3, 3, 3)),
    }
    for name, array in arrays.items():
        made = numpy_helper.from_array(np.asarray(array, np.float32), name)
        proto.graph.initializer.append(made)
    return read(proto)


@pytest.mark.parametrize("text", ["match-moments", "correct-bias"])
def test_made_data_counts_as_if_it_had_the_stored_moments(
    text: str, pass_context: PassContext
) -> None:
    rng = np.random.default_rng(2)
    real = (rng.standard_normal((4, 16, 3, 8, 8)) * 0.7 + 0.2).astype(np.float32)
    source = normed(real.reshape(-1, 3, 8, 8))
    wrong = np.array([0.6, 1.5, 0.9], np.float32)[:, None, None], np.float32(0.4)
    made = real * wrong[0] + wrong[1]
    spec = QuantSpec("s3", PerAxis(0), symmetric=True)
    base = Pipeline.parse("canonicalize").run(source, pass_context).model
    plan = Plan({"second": Choice(Option("storage", spec), "")}, "test")
    before = Pipeline.parse("insert-fake-quant").run(base.with_fact(plan), pass_context).model

    def bias(arrays: Array, origin: Origin) -> Array:
        feeds = Synthetic(tuple({"x": each} for each in arrays), origin)
        own = replace(pass_context, calibration=feeds)
        after = Pipeline.parse(text).run(before.clone(), own).model
        (layer,) = [a for a in affine_layers(after) if a.fake is not None]
        assert layer.bias() is not None
        return np.asarray(layer.bias())

    expected = bias(real, "real")
    spread = float(np.abs(expected).max())
    restored, plain = bias(made, "synthetic-bn"), bias(made, "real")
    np.testing.assert_allclose(restored, expected, rtol=0, atol=RELATIVE * spread)
    assert np.abs(plain - expected).max() > 50 * RELATIVE * spread
