"""Residual streams in the basis of their principal directions: exact, ordered, sliceable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.axis_groups import axis_groups
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.ir.remove_units import remove_units
from octavo.passes.base import PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.residual_streams import residual_streams

Context = Callable[..., PassContext]

# A decoder block without attention: embedding, two gated layers with norms, and a head that
# shares the embedding.
TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[N,5] ids) => (float[N,5,20] y)
<float[20,12] table = {0}, float two = {2}, float tiny = {1e-5}, int64[1] last = {-1},
 float[12] n1 = {0}, float[12,16] g1 = {0}, float[12,16] u1 = {0}, float[16,12] d1 = {0},
 float[12] n2 = {0}, float[12,16] g2 = {0}, float[16,12] d2 = {0}, float[12] bias = {0},
 float[12] n3 = {0}> {
    [embed] x = Gather (table, ids)
    [square1] s1 = Pow (x, two)  [mean1] m1 = ReduceMean (s1, last)  [eps1] e1 = Add (m1, tiny)
    [root1] r1 = Sqrt (e1)  [norm1] z1 = Div (x, r1)  [scale1] h1 = Mul (z1, n1)
    [gate1] a1 = MatMul (h1, g1)  [up1] b1 = MatMul (h1, u1)
    [soft1] c1 = Sigmoid (a1)  [both1] f1 = Mul (c1, b1)  [down1] o1 = MatMul (f1, d1)
    [add1] x1 = Add (x, o1)
    [square2] s2 = Mul (x1, x1)  [mean2] m2 = ReduceMean (s2, last)  [eps2] e2 = Add (m2, tiny)
    [root2] r2 = Sqrt (e2)  [norm2] z2 = Div (x1, r2)  [scale2] h2 = Mul (n2, z2)
    [gate2] a2 = MatMul (h2, g2)  [soft2] f2 = Relu (a2)  [down2] p2 = MatMul (f2, d2)
    [shift2] o2 = Add (p2, bias)
    [add2] x2 = Add (x1, o2)
    [square3] s3 = Pow (x2, two)  [mean3] m3 = ReduceMean (s3, last)  [eps3] e3 = Add (m3, tiny)
    [root3] r3 = Sqrt (e3)  [norm3] z3 = Div (x2, r3)  [scale3] h3 = Mul (z3, n3)
    [turn] head = Transpose (table)
    [out] y = MatMul (h3, head)
}
"""
# Sums in float32, in another order.
RELATIVE = 2e-5
RANK = 7


def decoder(rank: int = 12, text: str = TEXT) -> Model:
    """Random weights; whatever gives the stream lies in `rank` random directions."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    inside = np.linalg.qr(rng.standard_normal((12, 12)))[0][:, :rank]
    for tensor in proto.graph.initializer:
        if tensor.name in ("two", "tiny", "last"):
            continue
        array = rng.standard_normal(tuple(tensor.dims))
        if tensor.name in ("table", "d1", "d2", "bias"):
            array = array @ (inside * np.geomspace(1, 0.2, rank)) @ inside.T
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return read(proto)


def tokens(calibrated: Context, model: Model) -> PassContext:
    return calibrated(model, 40)


def outputs(ctx: PassContext, model: Model) -> np.ndarray:
    assert ctx.calibration is not None
    return np.concatenate([ctx.evaluator.run(model, feed)["y"] for feed in ctx.calibration])


def rotated(model: Model, ctx: PassContext) -> Model:
    return Pipeline.parse("rotate-residual{samples=512}").run(model, ctx).model


def test_the_rotated_model_computes_what_it_did(calibrated: Context) -> None:
    model = decoder()
    ctx = tokens(calibrated, model)
    turned = rotated(model, ctx)
    before = outputs(ctx, model)
    np.testing.assert_allclose(
        outputs(ctx, turned), before, rtol=0, atol=RELATIVE * np.abs(before).max()
    )
    ops = [node.op_type for node in turned.graph]
    # Two scales are in the weights behind them, that of the shared head is a MatMul.
    assert ops.count("MatMul") == [node.op_type for node in model.graph].count("MatMul") + 1
    assert not np.allclose(table(turned), table(model), atol=0.1)
    # A rotation changes no length.
    lengths = [np.linalg.norm(table(some), axis=1) for some in (turned, model)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def table(model: Model) -> np.ndarray:
    value = model.graph.initializers["table"].const_value
    assert value is not None
    return value.numpy()


def test_channels_are_uncorrelated_and_the_strongest_first(calibrated: Context) -> None:
    """Against the sum of second moments of what all norms hand on, computed by numpy."""
    model = decoder()
    ctx = tokens(calibrated, model)
    turned = rotated(model, ctx)
    norms = ("z1", "z2", "z3")
    turned.graph.outputs.extend(
        value for node in turned.graph for value in node.outputs if value.name in norms
    )
    assert ctx.calibration is not None
    made = [ctx.evaluator.run(turned, feed) for feed in ctx.calibration]
    total = np.zeros((12, 12))
    for name in norms:
        rows = np.concatenate([found[name].reshape(-1, 12) for found in made]).astype(np.float64)
        total += rows.T @ rows / np.square(rows).sum()
    power = np.diag(total)
    assert np.all(np.diff(power) <= 1e-6)
    np.testing.assert_allclose(total - np.diag(power), 0, atol=1e-4 * power.max())


def test_slicing_a_stream_of_low_rank_loses_nothing(calibrated: Context) -> None:
    model = decoder(RANK)
    ctx = tokens(calibrated, model)
    turned = rotated(model, ctx)
    before = outputs(ctx, model)
    (stream,) = residual_streams(turned)[0]
    groups = axis_groups(turned).by_name()
    gone = range(RANK, stream.group.units)
    remove_units(turned, groups, {stream.group.name: list(gone)})
    assert table(turned).shape == (20, RANK)
    np.testing.assert_allclose(
        outputs(ctx, turned), before, rtol=0, atol=RELATIVE * np.abs(before).max()
    )


@pytest.mark.parametrize(
    ("old", "new", "node"),
    [
        ("[add1] x1 = Add (x, o1)", "[act] t1 = Relu (x)  [add1] x1 = Add (t1, o1)", "act"),
        ("[norm1] z1 = Div (x, r1)", "[norm1] z1 = Softmax (x)", "norm1"),
        ("[mean1] m1 = ReduceMean", "[mean1] m1 = ReduceMax", "mean1"),
    ],
)
def test_what_mixes_no_channels_is_refused_with_its_node(
    old: str, new: str, node: str, calibrated: Context
) -> None:
    model = decoder(text=TEXT.replace(old, new))
    ctx = tokens(calibrated, model)
    run = Pipeline.parse("rotate-residual").run(model, ctx)
    missed = [remark for remark in run.records[-1].remarks if remark.kind == "missed"]
    assert run.model.fingerprint == model.fingerprint
    assert node in {remark.where for remark in missed}
