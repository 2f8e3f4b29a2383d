"""Layer errors by moments against products of numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.quant import PerAxis, QuantSpec, round_weight
from octavo.ir.read import read
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.moment_error import moment_errors
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.passes.base import PassContext

# `turned` is read through a Transpose, as tied weights are.
_NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
two (float[N,6] x) => (float[N,5] y, float[N,7] z)
<float[6,5] plain = {0}, float[7,6] turned = {0}> {
    [first] y = MatMul (x, plain)
    [turn] t = Transpose <perm: ints = [1, 0]> (turned)
    [second] z = MatMul (x, t)
}
"""
# float32 sums of a few dozen terms, in other orders.
CLOSE = 1e-4


@pytest.mark.parametrize("rows", [2, 512])
def test_moments_tell_the_layer_error_and_nothing_runs(
    rows: int, calibrated: Callable[..., PassContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto, rng = onnx.parser.parse_model(_NETWORK), np.random.default_rng(3)
    weights = {}
    for tensor in proto.graph.initializer:
        array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        weights[tensor.name] = array
    source = read(proto)
    ctx = calibrated(source, 8)
    offered = "collect-moments,offer-options{static=false,bits=4}"
    model = Pipeline.parse(offered).run(source, ctx).model
    roundings = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    # Evenly spread rows of a weight stand for all of them.
    monkeypatch.setattr("octavo.passes.moment_error._ROWS", rows)
    found = moment_errors(model, ctx, roundings)
    assert ctx.calibration is not None
    x = np.concatenate([feed["x"] for feed in ctx.calibration]).astype(np.float64)
    spec = QuantSpec("s4", PerAxis(1), symmetric=True)
    expected = 0.0
    # Both read one value, and are one decision.
    for weight in (weights["plain"], weights["turned"].T):
        every = max(1, weight.shape[1] // rows)
        some, rounded = (a[:, ::every] for a in (weight, round_weight(weight, spec)))
        expected += np.square(x @ (some - rounded)).sum() / np.square(x @ some).sum()
    (rounding,) = roundings.values()
    damage = rounding.damages(found)["storage:s4/axis1"]
    assert damage.mean == pytest.approx(expected, rel=CLOSE)
