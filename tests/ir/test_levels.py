"""Per-channel levels: binary coding, nearest levels, and what is stored of them."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.ir.errors import UsageError
from octavo.ir.levels import (
    binary_levels,
    binary_parts,
    level_weight,
    nearest_levels,
    sign_table,
    stored_levels,
)
from octavo.ir.quant import PerAxis, QuantParams, QuantSpec, QuantType

WIDTHS = (1, 2, 3, 4, 5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_powers_of_two_are_the_codes_of_a_width(bits: int) -> None:
    """α = 2^(k-2-i) with offset -1/2: the 2^k codes of k bits, in their order."""
    alpha = np.array([[2.0 ** (bits - 2 - i) for i in range(bits)]], np.float32)
    levels = binary_levels(alpha, np.array([-0.5], np.float32))
    np.testing.assert_array_equal(levels[0], np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize("dtype", ["s2", "s3", "s4"])
def test_rounding_to_them_is_rounding_to_codes(dtype: QuantType) -> None:
    spec = QuantSpec(dtype, PerAxis(0))
    weight = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    scale = np.abs(weight).max(axis=1) / -spec.qmin
    params = QuantParams(spec, scale, np.zeros(5, np.int32))
    powers = 2.0 ** (spec.bits - 2 - np.arange(spec.bits))
    levels = binary_levels((scale[:, None] * powers).astype(np.float32), -scale / 2)
    found = level_weight(nearest_levels(weight, levels, 0), levels, 0)
    codes = np.clip(np.rint(weight / scale[:, None]), spec.qmin, spec.qmax)
    np.testing.assert_allclose(found, codes * params.scale[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nearest_is_nearest(axis: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((3, 4, 5)).astype(np.float32)
    levels = rng.standard_normal((weight.shape[axis], 6)).astype(np.float32)
    found = level_weight(nearest_levels(weight, levels, axis), levels, axis)
    own = np.expand_dims(levels, [k for k in range(3) if k != axis])
    spread = np.moveaxis(
        np.moveaxis(weight, axis, -1)[..., None] - own.reshape(levels.shape), -2, axis
    )
    least = np.abs(spread).min(axis=-1)
    np.testing.assert_allclose(np.abs(weight - found), least, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 7), 0), ((7, 6), 1), ((6, 2, 3), 0), ((1, 6, 7), 1)]
)
def test_stored_indices_give_the_weight(bits: int, shape: tuple[int, ...], axis: int) -> None:
    """As GatherElements reads them, which counts negative indices from the end."""
    rng = np.random.default_rng(bits)
    levels = rng.standard_normal((6, 2**bits)).astype(np.float32)
    indices = rng.integers(0, 2**bits, shape)
    weight = level_weight(indices, levels, axis)
    codes, table, along = stored_levels(weight, levels, axis, bits)
    assert codes.min() >= -max(1, 2 ** (bits - 1))
    assert codes.max() <= max(1, 2 ** (bits - 1) - 1)
    whole = np.where(codes < 0, codes + table.shape[along], codes)
    found = np.take_along_axis(table, whole.astype(np.int64), axis=along)
    np.testing.assert_array_equal(found.reshape(shape), weight)


def test_channels_in_the_middle_are_refused() -> None:
    weight = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(UsageError, match="first or the last axis"):
        stored_levels(weight, np.zeros((3, 2), np.float32), 1, 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_binary_levels_come_apart_again(bits: int) -> None:
    rng = np.random.default_rng(bits)
    alpha = rng.standard_normal((5, bits)).astype(np.float16)
    offset = rng.standard_normal(5).astype(np.float16)
    levels = binary_levels(alpha.astype(np.float32), offset.astype(np.float32))
    found = binary_parts(levels)
    assert found is not None
    np.testing.assert_array_equal(found[0], alpha)
    np.testing.assert_array_equal(found[1], offset)


@pytest.mark.parametrize("bits", WIDTHS)
def test_signs_make_the_stored_table(bits: int) -> None:
    """α and z times signs: the table of `stored_levels`, to the last bit."""
    rng = np.random.default_rng(bits)
    both = rng.standard_normal((6, bits + 1)).astype(np.float16).astype(np.float32)
    levels = binary_levels(both[:, :bits], both[:, bits])
    weight = level_weight(rng.integers(0, 2**bits, (6, 9)), levels, 0)
    _, table, _ = stored_levels(weight, levels, 0, bits)
    np.testing.assert_array_equal(both @ sign_table(bits), table)


@pytest.mark.parametrize("kind", ["four numbers", "float32", "too wide", "beyond float16"])
def test_other_levels_have_no_parts(kind: str) -> None:
    alpha = {
        "four numbers": [[1, 0.5]],
        "float32": [[1 / 3, 0.1]],
        "too wide": [[1024, 2.0**-13]],
        "beyond float16": [[1e6, 1]],
    }[kind]
    levels = binary_levels(np.array(alpha, np.float32), np.zeros(1, np.float32))
    levels = levels + np.array([[0, 1, 0, 0]], np.float32) * (kind == "four numbers")
    assert binary_parts(levels.astype(np.float32)) is None
