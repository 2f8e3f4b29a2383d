"""Tables of codes: powers against their formula, centres and scales against brute force."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.passes.power_codes import (
    best_centres,
    best_power,
    fitted_rows,
    nearest_entries,
    power_table,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

WIDTHS = (2, 3, 4, 5, 6, 7)
# Rounding errors of float32 sums, relative.
SUMMED = 1e-5


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nearest(rows: Float32, scale: Float32, table: Float32) -> Float32:
    """Over all entries, not by their bounds."""
    distance = np.abs(rows[..., None] - scale[:, None, None] * table)
    found: Float32 = scale[:, None] * table[distance.argmin(axis=-1)]
    return found


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("largest", [127, 63])
def test_exponent_one_is_the_even_grid(bits: int, largest: int) -> None:
    table = power_table(bits, 1.0, largest)
    m = 2 ** (bits - 1) - 1
    step = largest // m
    np.testing.assert_array_equal(table, step * np.arange(-m, m + 1))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("exponent", [0.4, 0.5, 0.8])
def test_entries_are_where_rounding_powers_leads(bits: int, exponent: float) -> None:
    """sign(w)·|w|^a rounded to steps of 1/m, and undone, is the entry within half a code."""
    table = power_table(bits, exponent, 127)
    m = 2 ** (bits - 1) - 1
    j = np.rint(np.linspace(-1, 1, 2 * m + 1) * m)
    undone = np.sign(j) * (np.abs(j) / m) ** (1 / exponent)
    assert np.abs(table - undone * (127 // m * m)).max() <= 0.5
    np.testing.assert_array_equal(table, -table[::-1])


def test_nearest_entries_are_nearest() -> None:
    table = np.array([-100, -7, 0, 3, 90], np.float32)
    real = np.linspace(-130, 130, 521, dtype=np.float32)
    found = nearest_entries(real, table)
    least = np.abs(real[:, None] - table).min(axis=1)
    np.testing.assert_array_equal(np.abs(real - found), least)


@pytest.mark.parametrize("weighed", [False, True])
def test_scales_leave_the_error_they_report(weighed: bool) -> None:
    rows, table = normal(5, 60), power_table(3, 0.6)
    importance = normal(5, 60, seed=1) ** 2 if weighed else None
    found = fitted_rows(rows, table, importance)
    error = (rows - nearest(rows, found.scale, table)) ** 2
    error = error if importance is None else error * importance
    np.testing.assert_allclose(found.error, error.sum(axis=1), rtol=1e-4)
    # Within 1 % of the best of many scales.
    whole = np.abs(rows).max(axis=1) / 127
    for row in range(5):
        tried = []
        for ratio in np.linspace(0.2, 1.6, 400, dtype=np.float32):
            one = (rows[row] - nearest(rows[row : row + 1], whole[row, None] * ratio, table)) ** 2
            tried.append(float((one if importance is None else one * importance[row]).sum()))
        assert found.error[row] <= 1.03 * min(tried)


@pytest.mark.parametrize("exponent", [0.45, 0.7])
def test_the_exponent_of_the_weights_is_found(exponent: float) -> None:
    """Weights that are entries of a power table: no error is left."""
    table = power_table(4, exponent)
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.5, 2, 40).astype(np.float32)
    rows = scale[:, None] * rng.choice(table, (40, 64))
    rows[:, 0] = scale * table[-1]
    found, fitted = best_power(rows, 4, 127)
    assert found == pytest.approx(exponent, abs=0.02)
    # Half a code, squared, of entries of up to 126.
    assert fitted.error.sum() <= 1e-4 * np.square(rows).sum()


def test_even_weights_have_exponent_one() -> None:
    rng = np.random.default_rng(4)
    rows = rng.integers(-7, 8, (30, 50)).astype(np.float32) * np.float32(0.25)
    rows[:, 0] = 7 * 0.25
    found, fitted = best_power(rows, 4, 127)
    assert found == 1.0
    np.testing.assert_allclose(fitted.scale, 0.25 / 18, rtol=SUMMED)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_freedom_loses_less(bits: int) -> None:
    """Normal weights: even codes, then powers of them, then free entries."""
    rows = normal(64, 200)
    even = fitted_rows(rows, power_table(bits, 1.0)).error.sum()
    _, powers = best_power(rows, bits, 127)
    centres = best_centres(rows, bits, 127)
    assert powers.error.sum() <= even * (1 + SUMMED)
    assert centres.error.sum() < powers.error.sum()
    assert centres.table.size <= 2**bits
    assert np.abs(centres.table).max() <= 127


def test_centres_of_one_row_are_the_best_ones() -> None:
    """Against every cut of a few sorted weights into four runs, each with its mean."""
    rows = np.sort(normal(1, 12, seed=6), axis=1)
    whole = []
    for cuts in itertools.combinations(range(1, 12), 3):
        runs = np.split(rows[0], cuts)
        whole.append(sum(float(np.square(run - run.mean()).sum()) for run in runs))
    found = best_centres(rows, 2, 127)
    # Entries are whole numbers up to 127; Lloyd's rounds may end beside the best cut.
    assert min(whole) * (1 - SUMMED) - 1e-6 <= found.error[0] <= 1.5 * min(whole) + 1e-3


@pytest.mark.parametrize("rows", [np.zeros((2, 5)), np.full((2, 5), -3.0), np.ones((1, 1))])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_constant_rows_are_kept(rows: NDArray[np.float64], bits: int) -> None:
    weight = rows.astype(np.float32)
    for fitted in (best_power(weight, bits, 127)[1], best_centres(weight, bits, 127)):
        assert np.all(np.isfinite(fitted.scale) & (fitted.scale > 0))
        np.testing.assert_allclose(
            nearest(weight, fitted.scale, fitted.table), weight, rtol=SUMMED, atol=0
        )
