"""GPTQ against brute force, against its textbook form, and on degenerate moments."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

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
from octavo.passes.gptq import Factor, RowGrid, gptq, row_errors
from octavo.passes.gptq_weight import GptqOptions, gptq_weight
from octavo.passes.scale_refit import refitted
from octavo.passes.weight_matrix import WeightMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import Granularity, QuantType

    Float32 = NDArray[np.float32]

# Float32 sums of a few hundred products.
RELATIVE = 1e-4
PLAIN = GptqOptions(damping=1e-7, act_order=False, refit=False, ranges=1)


def moments(rng: np.random.Generator, groups: int, width: int, samples: int = 0) -> Float32:
    """C of correlated columns with a few large inputs."""
    mix = rng.standard_normal((groups, width, width)) * rng.uniform(0.2, 2, (groups, 1, width))
    x = np.matmul(rng.standard_normal((groups, samples or 4 * width, width)), mix)
    return (np.matmul(x.transpose(0, 2, 1), x) / x.shape[1]).astype(np.float32)


def matrix_of(weight: Float32) -> WeightMatrix:
    """The geometry of a Gemm weight `[N, K]`, or of a depthwise Conv `[G, 1, k, k]`."""
    if weight.ndim == 2:
        return WeightMatrix("Gemm", weight.shape, 1, (0,), (1,))
    return WeightMatrix("Conv", weight.shape, len(weight), (0,), (1, 2, 3))


def grid_of(weight: Float32, params: QuantParams) -> RowGrid:
    scale, zero, cells = matrix_of(weight).scales(params)
    return RowGrid(params.spec, scale, zero.astype(np.float32), cells)


def spec(bits: int, granularity: Granularity | None = None, *, symmetric: bool = True) -> QuantSpec:
    dtype: QuantType = f"s{bits}"  # type: ignore[assignment]
    return QuantSpec(dtype, granularity or PerAxis(0), symmetric)


def normal(seed: int, *shape: int) -> Float32:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def nearest_error(weight: Float32, params: QuantParams, second: Float32) -> NDArray[np.float64]:
    rows = matrix_of(weight).rows
    rounded = dequantize(quantize(weight, params), params)
    return row_errors(rows(weight) - rows(rounded), second)


@pytest.mark.parametrize(("bits", "width"), [(2, 6), (3, 4)])
def test_between_the_optimum_and_nearest(bits: int, width: int) -> None:
    """Every code of tiny rows is tried; GPTQ closes most of the gap that rounding leaves."""
    ratios = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        second, weight = moments(rng, 1, width), normal(seed, 1, width)
        params = params_for_weight(weight, spec(bits))
        every = np.array(
            list(itertools.product(range(params.spec.qmin, params.spec.qmax + 1), repeat=width))
        )
        values = every.astype(np.float32) * params.scale
        best = row_errors((weight - values)[None], second).min()
        made = gptq_weight(weight, params, matrix_of(weight), second, PLAIN)
        assert best * (1 - RELATIVE) <= made.after <= made.before
        nearest = float(nearest_error(weight, params, second).sum())
        assert made.before == pytest.approx(nearest, rel=RELATIVE)
        ratios.append((made.after - best) / max(nearest - best, 1e-9))
    assert np.mean(ratios) < 0.35


FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def textbook(
    weight: Float32, second: Float32, scale: NDArray[np.float32], values: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Algorithm 1 of the paper for one row, with the inverse and its Cholesky factor.

    Every weight has a scale of its own, and becomes the nearest of `values` times it.
    """
    inverse = np.linalg.inv(second.astype(np.float64))
    upper = np.linalg.cholesky(inverse).T
    left, codes = weight.astype(np.float64).copy(), np.empty(len(weight))
    for c in range(len(weight)):
        codes[c] = values[np.abs(left[c] / scale[c] - values).argmin()]
        left[c:] -= (left[c] - codes[c] * scale[c]) / upper[c, c] * upper[c, c:]
    return codes


@pytest.mark.parametrize("width", [5, 300])
def test_equals_the_textbook_algorithm(width: int) -> None:
    weight, second = normal(3, 4, width), moments(np.random.default_rng(width), 1, width)
    second += np.eye(width, dtype=np.float32) * np.float32(0.05 * np.trace(second[0]) / width)
    params = params_for_weight(weight, spec(4))
    factor = Factor.of(second, 0.0, act_order=False)
    codes = gptq(matrix_of(weight).rows(weight), factor, grid_of(weight, params))[0]
    scales = np.broadcast_to(params.scale[:, None], weight.shape)
    truth = [
        textbook(row, second[0], scale, np.arange(-7, 8))
        for row, scale in zip(weight, scales, strict=True)
    ]
    # A tie that float32 breaks the other way changes all later codes of a row.
    assert np.mean(codes == np.array(truth)) > 0.98


def test_float4_codes_equal_the_textbook_algorithm() -> None:
    width = 96
    weight, second = normal(4, 6, width), moments(np.random.default_rng(width), 1, width)
    second += np.eye(width, dtype=np.float32) * np.float32(0.05 * np.trace(second[0]) / width)
    params = params_for_weight(weight, QuantSpec("f4", PerBlock(1, 16), symmetric=True))
    factor = Factor.of(second, 0.0, act_order=False)
    codes = gptq(matrix_of(weight).rows(weight), factor, grid_of(weight, params))[0]
    scales = np.repeat(params.scale, 16, axis=1)
    values = np.concatenate((-FLOAT4[:0:-1], FLOAT4))
    pairs = zip(weight, scales, strict=True)
    truth = [textbook(row, second[0], scale, values) for row, scale in pairs]
    assert np.mean(codes == np.array(truth)) > 0.98
    assert set(np.abs(codes).reshape(-1).tolist()) == set(FLOAT4.tolist())


@pytest.mark.parametrize(
    "given",
    [
        QuantSpec("f4", PerBlock(1, 16), symmetric=True),
        QuantSpec("f8", PerAxis(0), symmetric=True, half_scales=True),
    ],
    ids=str,
)
def test_floating_codes_are_never_worse_than_nearest(given: QuantSpec) -> None:
    weight, second = normal(7, 9, 48), moments(np.random.default_rng(7), 1, 48, samples=12)
    params = params_for_weight(weight, given)
    made = gptq_weight(weight, params, matrix_of(weight), second)
    nearest = nearest_error(weight, params, second)
    errors = row_errors((weight - made.rounded)[None], second)
    assert np.all(errors <= nearest * (1 + RELATIVE) + 1e-6)
    assert errors.sum() < 0.8 * nearest.sum()
    # The scales that it finds are those that a file can hold.
    on_grid = dequantize(quantize(made.rounded, made.params), made.params)
    np.testing.assert_array_equal(on_grid, made.rounded)


@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_leave_nearest_rounding(act_order: bool) -> None:
    weight = normal(1, 8, 20)
    second = np.diag(np.random.default_rng(0).uniform(0.1, 9, 20)).astype(np.float32)[None]
    params = params_for_weight(weight, spec(3))
    made = gptq_weight(
        weight,
        params,
        matrix_of(weight),
        second,
        GptqOptions(0.01, act_order, refit=False, ranges=1),
    )
    np.testing.assert_array_equal(made.rounded, dequantize(quantize(weight, params), params))


def test_act_order_gives_large_inputs_less_error() -> None:
    weight, rng = normal(2, 64, 48), np.random.default_rng(5)
    second = moments(rng, 1, 48)
    params = params_for_weight(weight, spec(3))
    plain, ordered = (
        gptq_weight(weight, params, matrix_of(weight), second, GptqOptions(0.01, order, False, 1))
        for order in (False, True)
    )
    assert ordered.after < plain.after < plain.before


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerBlock(1, 16), PerBlock(1, 7)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_never_worse_than_nearest(
    granularity: Granularity, bits: int, symmetric: bool
) -> None:
    weight, second = normal(bits, 9, 40), moments(np.random.default_rng(bits), 1, 40, samples=12)
    params = params_for_weight(weight, spec(bits, granularity, symmetric=symmetric))
    matrix = matrix_of(weight)
    made = gptq_weight(weight, params, matrix, second)
    errors = row_errors(matrix.rows(weight) - matrix.rows(made.rounded), second)
    nearest = nearest_error(weight, params, second)
    assert made.after == pytest.approx(float(errors.sum()), rel=RELATIVE, abs=1e-6)
    if granularity == PerTensor():
        assert errors.sum() <= nearest.sum() * (1 + RELATIVE)
    else:
        assert np.all(errors <= nearest * (1 + RELATIVE) + 1e-6)
    # The rounded weight is on the grid of its parameters.
    again = dequantize(quantize(made.rounded, made.params), made.params)
    np.testing.assert_allclose(again, made.rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 8), PerTensor()])
def test_ranges_are_tried_together_as_they_are_alone(
    granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many ranges fit in memory together decides nothing."""
    second, weight = moments(np.random.default_rng(4), 1, 32), normal(9, 12, 32)
    params = params_for_weight(weight, spec(3, granularity, symmetric=False))
    found = []
    for elements in (1, 2 * weight.size, 1 << 21):
        monkeypatch.setattr("octavo.passes.gptq_weight._STACKED_ELEMENTS", elements)
        found.append(gptq_weight(weight, params, matrix_of(weight), second, GptqOptions()))
    for one in found[1:]:
        np.testing.assert_allclose(one.rounded, found[0].rounded, rtol=RELATIVE, atol=1e-6)
        assert one.after == pytest.approx(found[0].after, rel=RELATIVE)


def test_zero_points_are_found_for_given_codes() -> None:
    weight = normal(0, 6, 32)
    grid = grid_of(weight, params_for_weight(weight, spec(3, symmetric=False)))
    codes = np.random.default_rng(0).integers(-4, 4, (1, 6, 32)).astype(np.float32)
    scale = np.linspace(0.3, 2, 6, dtype=np.float32).reshape(1, 6, 1)
    found = refitted((codes + 2) * scale, codes, moments(np.random.default_rng(1), 1, 32), grid)
    np.testing.assert_array_equal(found.zero, np.full_like(scale, -2))
    np.testing.assert_allclose(found.scale, scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 8), PerTensor()])
def test_refitted_scales_leave_no_gradient(granularity: Granularity) -> None:
    """The derivative of the error by every scale is zero: (w - ŵ) C qᵀ = 0 over its entries."""
    weight, second = normal(4, 5, 24), moments(np.random.default_rng(2), 1, 24)
    params = params_for_weight(weight, spec(4, granularity))
    grid, rows = grid_of(weight, params), matrix_of(weight).rows(weight)
    codes = grid.nearest(rows)
    new = refitted(rows, codes, second, grid)
    pulled = np.matmul((rows - new.values(codes)).astype(np.float64), second) * codes
    blocks = np.array(
        [pulled[..., new.cells.block == b].sum(-1) for b in range(new.scale.shape[2])]
    )
    if granularity == PerTensor():
        blocks = blocks.sum(keepdims=True)
    before = np.matmul((rows - grid.values(codes)).astype(np.float64), second) * codes
    assert np.abs(blocks).max() < 1e-3 * np.abs(before).sum(-1).max()
    assert (
        row_errors(rows - new.values(codes), second).sum()
        < nearest_error(weight, params, second).sum()
    )


def test_a_depthwise_weight_is_its_groups() -> None:
    weight, second = normal(5, 7, 1, 3, 3), moments(np.random.default_rng(3), 7, 9)
    params = params_for_weight(weight, spec(3))
    made = gptq_weight(weight, params, matrix_of(weight), second)
    for g in range(7):
        own = weight[g].reshape(1, 9)
        alone = gptq_weight(own, params_for_weight(own, spec(3)), matrix_of(own), second[g : g + 1])
        np.testing.assert_allclose(made.rounded[g].reshape(1, 9), alone.rounded, rtol=1e-6, atol=0)


def test_columns_that_are_never_used_are_rounded_to_nearest() -> None:
    weight, second = normal(6, 4, 12), moments(np.random.default_rng(4), 1, 12)
    second[:, 3], second[:, :, 3] = 0, 0
    params = params_for_weight(weight, spec(3))
    made = gptq_weight(
        weight, params, matrix_of(weight), second, GptqOptions(refit=False, ranges=1)
    )
    nearest = dequantize(quantize(weight, params), params)
    np.testing.assert_array_equal(made.rounded[:, 3], nearest[:, 3])
    assert made.after < made.before


@pytest.mark.parametrize("samples", [1, 3])
def test_singular_moments(samples: int) -> None:
    weight, second = normal(7, 4, 30), moments(np.random.default_rng(5), 1, 30, samples)
    params = params_for_weight(weight, spec(4))
    made = gptq_weight(weight, params, matrix_of(weight), second, GptqOptions(damping=0.0))
    assert np.all(np.isfinite(made.rounded))
    assert made.after < made.before


def test_moments_of_nothing_leave_nearest_rounding() -> None:
    weight, second = normal(8, 4, 6), np.zeros((1, 6, 6), np.float32)
    params = params_for_weight(weight, spec(4))
    made = gptq_weight(weight, params, matrix_of(weight), second)
    np.testing.assert_array_equal(made.rounded, dequantize(quantize(weight, params), params))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_weights_of_hardly_any_size(shape: tuple[int, int]) -> None:
    weight, width = normal(9, *shape), shape[1]
    params = params_for_weight(weight, spec(4))
    second = np.ones((1, width, width), np.float32)
    made = gptq_weight(weight, params, matrix_of(weight), second)
    assert made.rounded.shape == shape
    np.testing.assert_allclose(made.rounded, weight, rtol=1e-6, atol=0)


def test_binary_codes_have_their_sign_chosen() -> None:
    weight, second = normal(10, 16, 24), moments(np.random.default_rng(6), 1, 24)
    params = params_for_weight(weight, QuantSpec("s1", PerAxis(0), symmetric=True))
    made = gptq_weight(weight, params, matrix_of(weight), second)
    assert made.after < 0.8 * made.before
    again = dequantize(quantize(made.rounded, made.params), made.params)
    np.testing.assert_array_equal(again, made.rounded)


def test_half_scales_stay_float16_numbers() -> None:
    weight, second = normal(11, 8, 24), moments(np.random.default_rng(7), 1, 24)
    half = QuantSpec("s4", PerBlock(1, 8), symmetric=True, half_scales=True)
    made = gptq_weight(weight, params_for_weight(weight, half), matrix_of(weight), second)
    scale = made.params.scale
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    again = dequantize(quantize(made.rounded, made.params), made.params)
    np.testing.assert_allclose(again, made.rounded, rtol=1e-6, atol=0)
