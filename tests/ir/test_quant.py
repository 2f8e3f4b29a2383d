"""The numpy reference of quantization against onnx.reference, which is written independently."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx.reference import ReferenceEvaluator

from octavo.ir.errors import UsageError
from octavo.ir.quant import (
    Granularity,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    QuantType,
    dequantize,
    fitted,
    params_for_range,
    params_for_weight,
    quantize,
    round_weight,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = tuple(d for d in get_args(QuantType) if d != "f16")
# Types that ONNX has, and types with a grid around zero.
NATIVE = [dtype for dtype in DTYPES if dtype[1:] in ("2", "4", "8")]
GRIDS = [dtype for dtype in DTYPES if dtype not in ("s1", "f8", "f4")]
SIGNED = [dtype for dtype in DTYPES if dtype[0] == "s"]
SHAPE = (4, 6, 2)
GRANULARITIES: tuple[tuple[Granularity, tuple[int, ...]], ...] = (
    (PerTensor(), ()),
    (PerAxis(0), (4,)),
    (PerAxis(1), (6,)),
    (PerAxis(-1), (2,)),
    (PerBlock(0, 2), (2, 6, 2)),
    (PerBlock(1, 3), (4, 2, 2)),
    # The last block is shorter.
    (PerBlock(1, 4), (4, 2, 2)),
)


def _params(dtype: QuantType, granularity: Granularity, shape: tuple[int, ...]) -> QuantParams:
    """Scales that are no power of two, and zero points all over the grid."""
    spec, rng = QuantSpec(dtype, granularity), np.random.default_rng(5)
    scale = rng.uniform(0.01, 0.3, shape).astype(np.float32)
    zero = np.array(rng.integers(spec.qmin, spec.qmax + 1, shape))
    return QuantParams(spec, scale, zero * (not spec.floating))


def _onnx(op_type: str, params: QuantParams, x: NDArray[np.generic]) -> NDArray[np.generic]:
    """What QuantizeLinear or DequantizeLinear makes of `x`, of opset 23 that knows float4."""
    spec = params.spec
    codes = onnx.TensorProto.DataType.Name(spec.onnx_type.value).lower()
    given = "float" if op_type == "QuantizeLinear" else codes
    made = codes if op_type == "QuantizeLinear" else "float"
    match spec.granularity:
        case PerTensor():
            attributes = ""
        case PerAxis(axis):
            attributes = f"<axis: int = {axis}>"
        case PerBlock(axis, size):
            attributes = f"<axis: int = {axis}, block_size: int = {size}>"
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
        g ({given} x, float scale, {codes} zero) => ({made} y)
        {{ y = {op_type} {attributes} (x, scale, zero) }}"""
    zero = params.zero_point.astype(spec.onnx_type.numpy())
    feed = {"x": x, "scale": params.scale, "zero": zero}
    (found,) = ReferenceEvaluator(onnx.parser.parse_model(text)).run(None, feed)
    return np.asarray(found)


def _with_ties(params: QuantParams) -> NDArray[np.float32]:
    """Ordinary values, values beyond the grid, and values half way between two codes."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal(SHAPE) * 3
    x[0] = rng.integers(-20, 20, SHAPE[1:]) + 0.5
    if isinstance(params.spec.granularity, PerTensor):
        x[0] *= float(params.scale)
    x[1, 0] = (1e6, -1e6)
    return x.astype(np.float32)


@pytest.mark.parametrize(("granularity", "shape"), GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", NATIVE)
def test_quantize_is_onnx_quantize_linear(
    dtype: QuantType, granularity: Granularity, shape: tuple[int, ...]
) -> None:
    params = _params(dtype, granularity, shape)
    x = _with_ties(params)
    expected = _onnx("QuantizeLinear", params, x).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, params).astype(np.float32), expected)
    assert {expected.min(), expected.max()} == {params.spec.qmin, params.spec.qmax}


@pytest.mark.parametrize(("granularity", "shape"), GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_onnx_dequantize_linear(
    dtype: QuantType, granularity: Granularity, shape: tuple[int, ...]
) -> None:
    params = _params(dtype, granularity, shape)
    spec = params.spec
    codes = np.random.default_rng(7).integers(spec.qmin, spec.qmax + 1, SHAPE)
    codes = codes.astype(spec.onnx_type.numpy())
    expected = _onnx("DequantizeLinear", params, codes)
    np.testing.assert_array_equal(dequantize(codes, params), expected)


@pytest.mark.parametrize("dtype", GRIDS)
def test_ties_go_to_the_even_code(dtype: QuantType) -> None:
    spec = QuantSpec(dtype)
    params = QuantParams(spec, np.array(0.5, np.float32), np.array(spec.qmin + 1, np.int32))
    x = np.array([-0.25, 0.25, 0.75], np.float32)
    # -0.5, 0.5 and 1.5 steps: to 0, 0 and 2 steps, within the grid.
    assert (quantize(x, params) - spec.qmin - 1).tolist() == [0, 0, 2]


@given(
    arrays.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([dtype for dtype in SIGNED if dtype != "s1"]),
    st.sampled_from([PerTensor(), PerAxis(0), PerAxis(1), PerBlock(1, 2)]),
)
def test_a_weight_keeps_within_half_a_step(
    weight: NDArray[np.float32], dtype: QuantType, granularity: Granularity
) -> None:
    spec = QuantSpec(dtype, granularity, symmetric=True)
    params = params_for_weight(weight, spec)
    codes = quantize(weight, params)
    assert codes.min() >= -spec.qmax
    assert codes.max() <= spec.qmax
    step = quantize_step(params, weight.shape)
    error = np.abs(dequantize(codes, params).astype(np.float64) - weight)
    # Half a step, and the float32 rounding of the product.
    assert (error <= step * 0.5 * (1 + 1e-5) + np.abs(weight) * 1e-6).all()


def quantize_step(params: QuantParams, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The scale of every entry, from what one step above zero dequantizes to."""
    one = np.broadcast_to(np.int32(1), shape)
    return dequantize(one, params).astype(np.float64)


@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from(GRIDS),
    st.booleans(),
)
def test_a_range_is_covered_and_holds_zero(
    one: float, other: float, dtype: QuantType, symmetric: bool
) -> None:
    low, high = min(one, other), max(one, other)
    spec = QuantSpec(dtype, symmetric=symmetric)
    params = params_for_range(spec, low, high)
    zero = np.zeros(1, np.float32)
    assert dequantize(quantize(zero, params), params)[0] == 0
    ends = np.array([low, high], np.float32)
    error = np.abs(dequantize(quantize(ends, params), params) - ends)
    # Moving zero onto the grid may cut off half a step, rounding another half.
    assert (error <= float(params.scale) * (1 + 1e-4)).all()


def test_constant_and_empty_weights_have_usable_scales() -> None:
    spec = QuantSpec("s8", PerAxis(0), symmetric=True)
    assert params_for_weight(np.zeros((2, 3), np.float32), spec).scale.tolist() == [1, 1]
    assert params_for_weight(np.zeros((2, 0), np.float32), spec).scale.tolist() == [1, 1]
    assert params_for_weight(np.zeros((0, 3), np.float32), spec).scale.shape == (0,)
    assert float(params_for_range(QuantSpec("u8"), 0.0, 0.0).scale) == 1


def test_used_bits_narrow_the_grid() -> None:
    spec = QuantSpec("s8", symmetric=True, used_bits=7)
    params = params_for_weight(np.array([-2.0, 1.5], np.float32), spec)
    assert (spec.qmin, spec.qmax) == (-63, 63)
    assert quantize(np.array([-2.0, 1.5], np.float32), params).tolist() == [-63, 47]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_must_be_finite_and_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="finite and positive"):
        QuantParams(QuantSpec("u8"), np.array(scale, np.float32), np.array(0, np.int32))


def test_scale_and_zero_point_have_one_shape() -> None:
    with pytest.raises(ValueError, match="differ"):
        QuantParams(QuantSpec("u8"), np.ones(2, np.float32), np.zeros(3, np.int32))


@pytest.mark.parametrize("dtype", SIGNED)
def test_every_width_has_its_codes(dtype: QuantType) -> None:
    bits = int(dtype[1:])
    spec = QuantSpec(dtype, symmetric=True)
    codes = quantize(np.linspace(-1, 1, 999, dtype=np.float32), _unit(spec))
    most = max(2 ** (bits - 1) - 1, 1)
    expected = {-1, 1} if bits == 1 else set(range(-most, most + 1))
    assert set(codes.tolist()) == expected


def _unit(spec: QuantSpec) -> QuantParams:
    return params_for_weight(np.array([-1.0, 1.0], np.float32), spec)


@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-1e3, 1e3, width=32)))
def test_a_binary_weight_is_the_nearest_one(weight: NDArray[np.float32]) -> None:
    spec = QuantSpec("s1", PerAxis(0), symmetric=True)
    rounded = round_weight(weight, spec).astype(np.float64)
    assert ((rounded < 0) == (weight < 0)).all()
    # The least square over all alpha of |w - alpha * sign(w)|, found by another formula.
    signs = np.where(weight < 0, -1.0, 1.0)
    wide = weight.astype(np.float64)
    best = (wide * signs).sum(axis=1) / (signs * signs).sum(axis=1)
    np.testing.assert_allclose(abs(rounded), np.repeat(best[:, None], 7, 1), rtol=1e-6, atol=1e-37)


def test_a_binary_block_that_is_short_has_its_own_mean() -> None:
    spec = QuantSpec("s1", PerBlock(0, 3), symmetric=True)
    params = params_for_weight(np.array([1, -2, 3, 8, -4], np.float32), spec)
    assert params.scale.tolist() == [2, 6]


@pytest.mark.parametrize("dtype", [dtype for dtype in SIGNED if dtype != "s1"])
@pytest.mark.parametrize("size", [0, 3, 4, 16])
def test_a_weight_is_rounded_block_by_block(dtype: QuantType, size: int) -> None:
    weight = np.random.default_rng(3).standard_normal((2, 5, 10)).astype(np.float32)
    spec = QuantSpec(dtype, PerBlock(2, size), symmetric=True)
    rounded, most = round_weight(weight, spec), spec.qmax
    step = size or 10
    for begin in range(0, 10, step):
        block = weight[..., begin : begin + step].astype(np.float64)
        scale = (abs(block).max(axis=-1, keepdims=True) / most).astype(np.float32)
        expected = np.rint((block / scale).astype(np.float32)).clip(-most, most) * scale
        found = rounded[..., begin : begin + step]
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)


def test_a_whole_axis_is_known_from_the_shape() -> None:
    spec = QuantSpec("s3", PerBlock(1, 0), symmetric=True)
    assert fitted(spec, (4, 9)).granularity == PerBlock(1, 9)
    assert fitted(QuantSpec("s3"), (4, 9)) == QuantSpec("s3")


def test_half_precision_keeps_what_float16_holds() -> None:
    weight = np.array([[1.0, 1 / 3], [-65504.0, 1e-9]], np.float32)
    kept = round_weight(weight, QuantSpec("f16"))
    np.testing.assert_array_equal(kept, weight.astype(np.float16).astype(np.float32))
    with pytest.raises(UsageError, match="no float16 number"):
        round_weight(np.array([65505.0, 1.0], np.float32), QuantSpec("f16"))


@pytest.mark.parametrize("dtype", ["u8", "u4", "u2"])
@pytest.mark.parametrize("offset", [-5.0, -0.7, 0.0, 0.4, 5.0])
def test_unsigned_codes_of_a_weight_cover_its_range_and_zero(
    dtype: QuantType, offset: float
) -> None:
    """Against the extremes of every block; a rounded zero point moves them by half a step."""
    weight = np.random.default_rng(0).uniform(-1, 1, (3, 32)).astype(np.float32) + np.float32(
        offset
    )
    params = params_for_weight(weight, QuantSpec(dtype, PerBlock(1, 16)))
    blocks = weight.reshape(3, 2, 16)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    levels = 2**params.spec.bits - 1
    np.testing.assert_allclose(params.scale, (high - low) / levels, rtol=1e-6)
    np.testing.assert_array_equal(
        params.zero_point, np.clip(np.rint(-low / params.scale), 0, levels)
    )
    error = np.abs(dequantize(quantize(weight, params), params) - weight).reshape(blocks.shape)
    assert np.all(error.max(axis=2) <= params.scale * (1 + 1e-5))
    none = dequantize(quantize(np.zeros_like(weight), params), params)
    assert not none.any()
