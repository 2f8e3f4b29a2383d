"""Binary coding against codes of k bits, brute force on tiny rows, and least squares."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.ir.quant import PerAxis, QuantSpec
from octavo.passes.uniquanf import (
    Coding,
    alternated,
    coded_rows,
    greedy_coding,
    initial_coding,
    uniform_coding,
)
from octavo.passes.weight_matrix import Cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

SPEC = QuantSpec("s3", PerAxis(0), symmetric=True)
SUMMED = 1e-5


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared(rows: Float32, coding: Coding) -> NDArray[np.float64]:
    distance = np.abs(rows[..., None].astype(np.float64) - coding.levels[:, None, :])
    return np.asarray(np.square(distance.min(axis=-1)).sum(axis=1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("zero", [0.0, 2.0])
def test_powers_of_two_are_codes(bits: int, zero: float) -> None:
    """α = 2^(k-2-i)·Δ: rounding to levels is clip(rint(w / Δ) + z) for steps that are exact."""
    rows, scale = 3 * normal(6, 50), np.array([0.25, 0.5, 1, 0.125, 2, 1], np.float32)
    coding = uniform_coding(scale, np.full(6, zero, np.float32), bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(rows / scale[:, None]) + zero, low, high)
    np.testing.assert_array_equal(coding.nearest(rows), (codes - zero) * scale[:, None])


def test_signs_make_the_nearest_levels() -> None:
    rows = normal(5, 40)
    coding = Coding(np.abs(normal(5, 3, seed=1)), normal(5, seed=2))
    signs = coding.signs(rows)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    values = (signs * coding.alpha[:, None]).sum(axis=2) + coding.offset[:, None]
    np.testing.assert_allclose(values, coding.nearest(rows), rtol=SUMMED, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighed", [False, True])
def test_no_alternation_raises_the_error(bits: int, weighed: bool) -> None:
    rows = normal(20, 70)
    importance = normal(20, 70, seed=5) ** 2 if weighed else None
    unit = np.ones_like(rows) if importance is None else importance
    coding = greedy_coding(rows, bits)
    known = [np.square(rows - coding.nearest(rows)) * unit]
    for _ in range(8):
        coding = alternated(rows, coding, importance, rounds=1)
        known.append(np.square(rows - coding.nearest(rows)) * unit)
    errors = np.stack([each.sum(axis=1) for each in known])
    assert np.all(errors[1:] <= errors[:-1] * (1 + SUMMED))
    assert errors[-1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("seed", range(8))
def test_six_weights_in_two_bits(seed: int) -> None:
    """The best of all choices of signs, each with its least-squares α and z."""
    row = normal(1, 6, seed=seed)
    best = np.inf
    for signs in itertools.product((-1, 1), repeat=12):
        features = np.column_stack([np.array(signs).reshape(6, 2), np.ones(6)])
        solution = np.linalg.lstsq(features, row[0], rcond=None)[0]
        best = min(best, float(np.square(row[0] - features @ solution).sum()))
    start = initial_coding(row, 2)
    found = float(squared(row, alternated(row, start, rounds=30))[0])
    assert best * (1 - SUMMED) - 1e-9 <= found
    # Alternation is a descent: it ends in the best choice or near to it.
    assert found <= 2.5 * best + 0.02 * float(np.square(row).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_initialisation_beats_every_even_grid(bits: int) -> None:
    """In the norm that it minimises, over the grids that it starts from, row by row."""
    rows = normal(30, 100)
    coding = initial_coding(rows, bits)
    ours = (np.abs(rows - coding.nearest(rows)) ** 2.4).sum(axis=1)
    low, high = rows.min(axis=1), rows.max(axis=1)
    for ratio in (1.0, 0.8, 0.6):
        step = ratio * (high - low) / (2**bits - 1)
        codes = np.rint((rows - (low + high)[:, None] / 2) / step[:, None] + (2**bits - 1) / 2)
        values = np.clip(codes, 0, 2**bits - 1) - (2**bits - 1) / 2
        even = values * step[:, None] + (low + high)[:, None] / 2
        theirs = (np.abs(rows - even) ** 2.4).sum(axis=1)
        assert np.all(ours <= theirs * (1 + 1e-4))


@pytest.mark.parametrize("bits", [2, 3])
def test_moments_lower_the_error_of_the_output(bits: int) -> None:
    rows, mixed = normal(12, 30), normal(200, 8, seed=3) @ normal(8, 30, seed=4)
    x = mixed + np.float32(0.3) * normal(200, 30, seed=5)
    second = (x.T @ x / len(x)).astype(np.float32)
    start = initial_coding(rows, bits)
    cells = Cells(np.arange(12).reshape(1, 12, 1), np.zeros(30, np.int64))
    found = coded_rows(rows, start, second, cells, SPEC)
    # What it reports is what it gives, and all numbers are levels of float16 numbers.
    error = np.square(x.astype(np.float64) @ (rows - found.rows).T).mean(axis=0)
    np.testing.assert_allclose(found.errors, error, rtol=1e-3)
    levels = found.coding.levels
    assert all(np.isin(row, own).all() for row, own in zip(found.rows, levels, strict=True))
    np.testing.assert_array_equal(found.coding.stored.alpha, found.coding.alpha)
    plain = np.square(x.astype(np.float64) @ (rows - start.nearest(rows)).T).mean(axis=0)
    assert np.all(found.errors <= plain * (1 + 1e-2))
    assert found.errors.sum() < 0.5 * plain.sum()


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 5)), np.full((3, 4), 2.0), np.array([[1.5]]), np.array([[1, -1, 1.0]])]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_of_few_numbers_are_kept(rows: NDArray[np.float64], bits: int) -> None:
    weight = rows.astype(np.float32)
    coding = initial_coding(weight, bits)
    assert np.all(np.isfinite(coding.levels))
    np.testing.assert_allclose(coding.nearest(weight), weight, rtol=0, atol=1e-5)
