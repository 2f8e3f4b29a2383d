"""Range search: against exhaustive search, and on weights that lie on a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.errors import UsageError
from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.fake_quant import params_of
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    dequantize,
    params_for_weight,
    quantize,
)
from octavo.ir.read import read
from octavo.passes.clip_search import clipped_params
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantType
    from octavo.passes.base import PassContext

    Float32 = NDArray[np.float32]

_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[3,6] x) => (float[3,4] y) <float[6,4] w> { [one] y = MatMul (x, w) }"""
BITS: tuple[QuantType, ...] = ("s2", "s3", "s4", "s5", "s6", "s7", "s8")
# The search sums float32 powers; numpy's truth here does so in float64.
RELATIVE = 1e-4


def drawn(shape: tuple[int, ...], seed: int = 0) -> Float32:
    """Heavy tails, so that the whole range is far from the best."""
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def loss(weight: Float32, params: QuantParams, p: float = 2.4) -> float:
    error = weight.astype(np.float64) - dequantize(quantize(weight, params), params)
    return float((np.abs(error) ** p).sum())


def exhaustive(row: Float32, qmax: int, p: float, steps: int) -> float:
    """Least loss of one row over the same 80 scales, in plain Python."""
    losses = []
    for step in range(steps):
        scale = np.float32(np.abs(row).max() / qmax * (1 - 0.8 * step / steps))
        codes = np.clip(np.rint(row / scale), -qmax, qmax)
        losses.append(float((np.abs(row - codes.astype(np.float64) * scale) ** p).sum()))
    return min(losses)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_the_loss_is_that_of_an_exhaustive_search(dtype: QuantType, p: float) -> None:
    weight, spec = drawn((5, 40)), QuantSpec(dtype, PerAxis(0), symmetric=True)
    found = clipped_params(weight, spec, p)
    for channel, row in enumerate(weight):
        truth = exhaustive(row, spec.qmax, p, 80)
        own = QuantParams(
            QuantSpec(dtype, symmetric=True), found.scale[channel], found.zero_point[channel]
        )
        assert loss(row, own, p) == pytest.approx(truth, rel=RELATIVE)


def test_scales_of_float4_blocks_are_searched_among_those_that_are_stored() -> None:
    """Four significant bits; blocks of zeros do not change what others get."""
    weight = drawn((32, 6)) * np.float32(1e-3)
    weight[16:, 3] = 0
    spec = QuantSpec("f4", PerBlock(0, 16), symmetric=True)
    found = clipped_params(weight, spec)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert np.all(np.isfinite(found.scale))
    for block, column in np.ndindex(2, 6):
        row = weight[16 * block : 16 * (block + 1), column].astype(np.float64)
        losses = []
        for step in range(80):
            mantissa, exponent = np.frexp(np.abs(row).max() / 6 * (1 - 0.8 * step / 80))
            scale = np.ldexp(np.rint(mantissa * 16) / 16, exponent) or 1.0
            nearest = np.abs(np.abs(row)[:, None] / scale - values).min(axis=1) * scale
            losses.append(float((nearest**2.4).sum()))
        own = QuantParams(QuantSpec("f4"), found.scale[block, column], np.array(0, np.int32))
        assert loss(row.astype(np.float32), own) <= min(losses) * (1 + RELATIVE) + 1e-30


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((6, 4), PerAxis(1)),
        ((6, 4), PerBlock(0, 3)),
        ((7, 4), PerBlock(0, 3)),
        ((4, 6), PerBlock(1, 2)),
        ((4, 6, 3, 3), PerBlock(1, 4)),
        ((4, 6, 3, 3), PerAxis(0)),
        ((2, 8, 5), PerBlock(2, 0)),
        ((6, 4), PerTensor()),
    ],
    ids=str,
)
def test_every_scale_is_searched_for_its_own_entries(
    shape: tuple[int, ...], granularity: PerTensor | PerAxis | PerBlock
) -> None:
    weight, spec = drawn(shape), QuantSpec("s3", granularity, symmetric=True)
    found = clipped_params(weight, spec)
    plain = params_for_weight(weight, found.spec)
    assert found.scale.shape == plain.scale.shape
    least = np.full(found.scale.shape, np.inf)
    numbered = QuantParams(
        found.spec,
        np.arange(1, found.scale.size + 1, dtype=np.float32).reshape(found.scale.shape),
        np.zeros(found.scale.shape, np.int32),
    )
    spread = dequantize(np.ones(weight.shape, np.int8), numbered).astype(np.int64) - 1
    for index in range(found.scale.size):
        row = weight[spread == index]
        least.reshape(-1)[index] = exhaustive(row, spec.qmax, 2.4, 80)
    assert loss(weight, found) == pytest.approx(float(least.sum()), rel=RELATIVE)


@pytest.mark.parametrize("dtype", ["s2", "s3", "s4", "s8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_on_a_grid_is_kept_exactly(dtype: QuantType, symmetric: bool) -> None:
    """Also where the grid's outer codes are not used, so that its range misleads."""
    rng = np.random.default_rng(1)
    spec = QuantSpec(dtype, PerBlock(1, 32), symmetric)
    high = max(spec.qmax - 2, 1)
    codes = rng.integers(max(spec.qmin, -high), high + 1, (16, 64))
    scale = rng.uniform(1e-3, 1, (16, 2)).astype(np.float32)
    zero = np.zeros((16, 2), np.int32)
    if not symmetric:
        zero = rng.integers(spec.qmin, spec.qmax + 1, (16, 2)).astype(np.int32)
    weight = dequantize(codes, QuantParams(spec, scale, zero))
    found = clipped_params(weight, spec)
    np.testing.assert_array_equal(dequantize(quantize(weight, found), found), weight)


def test_an_affine_block_of_sixteen_levels_is_kept_exactly() -> None:
    """Blocks `d·q + m` with 4-bit q and m a multiple of d, as GGUF's Q4_1 stores them."""
    rng = np.random.default_rng(2)
    step = rng.uniform(0.01, 0.1, (8, 2, 1)).astype(np.float32)
    first = rng.integers(-15, 1, (8, 2, 1))
    levels = (rng.integers(0, 16, (8, 2, 32)) + first).astype(np.float32)
    weight = (levels * step).reshape(8, 64)
    spec = QuantSpec("u4", PerBlock(1, 32))
    found = clipped_params(weight, spec)
    np.testing.assert_array_equal(dequantize(quantize(weight, found), found), weight)


def test_an_asymmetric_grid_suits_one_sided_weights_better() -> None:
    weight = np.abs(drawn((4, 64)))
    symmetric = clipped_params(weight, QuantSpec("s4", PerAxis(0), symmetric=True))
    asymmetric = clipped_params(weight, QuantSpec("s4", PerAxis(0)))
    assert loss(weight, asymmetric) < 0.5 * loss(weight, symmetric)
    codes = quantize(np.zeros_like(weight), asymmetric)
    np.testing.assert_array_equal(
        codes.astype(np.int32), asymmetric.zero_point[:, None] + 0 * codes
    )


def test_the_best_magnitude_of_two_values() -> None:
    """Binary, p = 2: the mean magnitude is optimal (XNOR-Net, equation 6)."""
    weight = drawn((6, 50))
    spec = QuantSpec("s1", PerAxis(0), symmetric=True)
    squares = clipped_params(weight, spec, p=2.0)
    np.testing.assert_allclose(squares.scale, np.abs(weight).mean(axis=1), rtol=RELATIVE)
    assert loss(weight, clipped_params(weight, spec)) < loss(weight, squares)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e38])
def test_no_magnitude_overflows(scale: float) -> None:
    weight = (drawn((3, 20)).clip(-3, 3) * np.float32(scale / 3)).astype(np.float32)
    found = clipped_params(weight, QuantSpec("s4", PerAxis(0), symmetric=True))
    relative = np.abs(weight - dequantize(quantize(weight, found), found)).max() / scale
    assert relative < 0.6


def test_dead_channels_single_entries_and_nothing() -> None:
    spec = QuantSpec("s4", PerAxis(0), symmetric=True)
    dead = np.zeros((2, 5), np.float32)
    dead[1] = 3
    found = clipped_params(dead, spec)
    np.testing.assert_array_equal(dequantize(quantize(dead, found), found), dead)
    assert clipped_params(np.zeros((0, 5), np.float32), spec).scale.shape == (0,)
    assert clipped_params(np.zeros((5, 0), np.float32), spec).scale.shape == (5,)


def planned(weight: Float32, spec: QuantSpec, ctx: PassContext) -> Model:
    proto = onnx.parser.parse_model(_TEXT)
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    plan = Plan({"one": Choice(Option("storage", spec), "")}, "test")
    return Pipeline.parse("insert-fake-quant").run(read(proto).with_fact(plan), ctx).model


@pytest.mark.parametrize("granularity", [PerAxis(1), PerBlock(0, 3), PerBlock(0, 4)], ids=str)
def test_the_graph_computes_with_the_chosen_range(
    granularity: PerAxis | PerBlock, pass_context: PassContext
) -> None:
    weight, spec = drawn((6, 4)), QuantSpec("s3", granularity, symmetric=True)
    before = planned(weight, spec, pass_context)
    after = Pipeline.parse("clip-weights").run(before, pass_context)
    truth = clipped_params(weight, spec)
    (fake,) = (node for node in after.model.graph if node.domain == "octavo")
    np.testing.assert_array_equal(params_of(fake).scale, truth.scale)
    x = np.eye(6, dtype=np.float32)[:3]
    actual = np.asarray(pass_context.evaluator.run(after.model, {"x": x})["y"], np.float32)
    expected = dequantize(quantize(weight, truth), truth)[:3]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)
    (remark,) = after.records[0].remarks
    assert remark.kind == "applied"
    power = float((np.abs(weight.astype(np.float64)) ** 2.4).sum())
    assert remark.values["after"] == pytest.approx(loss(weight, truth) / power, rel=RELATIVE)
    plain = params_for_weight(weight, spec)
    assert remark.values["before"] == pytest.approx(loss(weight, plain) / power, rel=RELATIVE)


def test_what_lies_on_its_grid_is_left_alone(pass_context: PassContext) -> None:
    spec = QuantSpec("s3", PerAxis(1), symmetric=True)
    params = params_for_weight(drawn((6, 4)), spec)
    weight = dequantize(quantize(drawn((6, 4)), params), params)
    before = planned(weight, spec, pass_context)
    after = Pipeline.parse("clip-weights").run(before, pass_context)
    assert after.model.fingerprint == before.fingerprint
    assert [r.kind for r in after.records[0].remarks] == ["missed"]


@pytest.mark.parametrize("options", ["p=0", "p=-1.0", "steps=0"])
def test_a_norm_without_a_least_value_is_refused(options: str, pass_context: PassContext) -> None:
    before = planned(drawn((6, 4)), QuantSpec("s3", PerAxis(1), symmetric=True), pass_context)
    with pytest.raises(UsageError, match="no least value"):
        Pipeline.parse(f"clip-weights{{{options}}}").run(before, pass_context)
