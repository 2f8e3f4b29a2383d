"""Tables of int8 codes that are no even grid: powers (NUPES), and centres of what occurs.

Codes of few bits are indices into a table that a whole tensor shares; a scale per channel or
block multiplies them. All entries are whole numbers of at most `largest` in magnitude, so that
integer kernels multiply them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

# NUPES seeks exponents up to 1; below a third, half of the codes are next to zero.
_EXPONENTS = (0.35, 1.0)
_COARSE = 14
_GOLDEN = (5**0.5 - 1) / 2
_GOLDEN_STEPS = 8
_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_SAMPLE = 1 << 15
_ROUNDS = 20
_TINY = float(np.finfo(np.float32).tiny)


def power_table(bits: int, exponent: float, largest: int = 127) -> Float32:
    """The codes `c·sign(j)·(|j| / m)^(1/a)` of all |j| ≤ m = 2^(bits-1) - 1, rounded, rising.

    NUPES (arXiv 2308.05600) rounds `sign(w)·|w|^a` to j; these are the weights that j stands for.
    c is the multiple of m closest below `largest`: exponent 1 gives the even grid exactly.
    """
    m = max(1, (1 << (bits - 1)) - 1)
    j = np.arange(-m, m + 1)
    wide = np.sign(j) * (np.abs(j) / m) ** (1 / exponent) * (largest // m * m)
    return np.rint(wide).astype(np.float32)


@final
@dataclass(frozen=True)
class Fitted:
    """A rising table, and the scale `[n]` of every row with its squared error."""

    table: Float32
    scale: Float32
    error: Float64


def fitted_rows(rows: Float32, table: Float32, importance: Float32 | None = None) -> Fitted:
    """The scales with which `rows` `[n, K]`, rounded to a table, lose least.

    Several shares of the range of a row are tried; least squares then suits the scale to the
    codes. `importance` `[n, K]` weighs squared errors. A row of zeros has scale 1.
    """
    whole = np.asarray(np.abs(rows).max(axis=1, initial=0.0) / np.abs(table).max(), np.float32)
    whole = np.where(whole > _TINY, whole, np.float32(1))
    best = Fitted(table, whole, np.full(len(rows), np.inf))
    for ratio in _RATIOS:
        scale: Float32 = np.maximum(whole * np.float32(ratio), np.float32(_TINY))
        codes = nearest_entries(rows / scale[:, None], table)
        scale = _refitted(rows, codes, importance, scale)
        codes = nearest_entries(rows / scale[:, None], table)
        error = np.square(rows - codes * scale[:, None])
        if importance is not None:
            error = error * importance
        found = Fitted(table, scale, error.sum(axis=1, dtype=np.float64))
        wins = found.error < best.error
        best = Fitted(
            table, np.where(wins, scale, best.scale), np.where(wins, found.error, best.error)
        )
    return best


def best_power(
    rows: Float32, bits: int, largest: int, importance: Float32 | None = None
) -> tuple[float, Fitted]:
    """The exponent of least squared error over all rows, from a grid and a golden section.

    A tie keeps the larger exponent, so that a weight on an even grid has one.
    """
    some, weighed = _sampled(rows, importance)
    known: dict[float, float] = {}

    def error(exponent: float) -> float:
        if exponent not in known:
            table = power_table(bits, exponent, largest)
            known[exponent] = float(fitted_rows(some, table, weighed).error.sum())
        return known[exponent]

    grid = [float(x) for x in np.linspace(*_EXPONENTS, _COARSE)]
    if bits > 2:
        at = min(range(len(grid)), key=lambda k: error(grid[k]))
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        for _ in range(_GOLDEN_STEPS):
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            low, high = (low, right) if error(left) < error(right) else (left, high)
    # Two bits have the entries -1, 0 and 1, which no power changes.
    error(1.0)
    chosen = min(known, key=lambda exponent: (known[exponent], -exponent))
    return chosen, fitted_rows(rows, power_table(bits, chosen, largest), importance)


def best_centres(
    rows: Float32, bits: int, largest: int, importance: Float32 | None = None
) -> Fitted:
    """All `2^bits` entries free: weighted k-means of the weights divided by their scales.

    Lloyd's rounds alternate between codes, entries and scales, from several starts (powers, and
    even entries without zero); the entries are rounded last.
    """
    some, weighed = _sampled(rows, importance)
    starts = [
        _filled(power_table(bits, 1.0, largest), bits),
        _filled(power_table(bits, 0.6, largest), bits),
        _half_steps(bits, largest),
    ]
    found = [_lloyd(some, start, largest, weighed) for start in starts]
    best = min(found, key=lambda fitted: float(fitted.error.sum()))
    return fitted_rows(rows, best.table, importance)


def nearest_entries(real: Float32, table: Float32) -> Float32:
    """The nearest entries of a rising table `[entries]`, the lower one in a tie."""
    return table[_nearest(real, table)]


def _nearest(real: Float32, table: Float32) -> NDArray[np.intp]:
    bounds = (table[1:] + table[:-1]) / 2
    return np.asarray(np.searchsorted(bounds, real))


def _lloyd(rows: Float32, table: Float32, largest: int, importance: Float32 | None) -> Fitted:
    fitted = fitted_rows(rows, table, importance)
    scale = fitted.scale
    for _ in range(_ROUNDS):
        index = _nearest(rows / scale[:, None], table)
        spread = np.broadcast_to(scale[:, None], rows.shape)
        weighed = spread if importance is None else spread * importance
        pulled = np.bincount(index.ravel(), (weighed * rows).ravel(), table.size)
        mass = np.bincount(index.ravel(), (weighed * spread).ravel(), table.size)
        table = np.where(mass > 0, pulled / np.maximum(mass, _TINY), table).astype(np.float32)
        table = np.sort(table)
        codes = nearest_entries(rows / scale[:, None], table)
        scale = _refitted(rows, codes, importance, scale)
    size = float(np.abs(table).max(initial=0.0))
    whole = np.unique(np.rint(table * (largest / size if size > _TINY else 1.0)))
    return fitted_rows(rows, whole.astype(np.float32), importance)


def _refitted(rows: Float32, codes: Float32, importance: Float32 | None, scale: Float32) -> Float32:
    """Least squares per row for codes that stay; the old scale where it is not positive."""
    weighed = codes if importance is None else codes * importance
    pulled = (weighed * rows).sum(axis=1, dtype=np.float64)
    mass = (weighed * codes).sum(axis=1, dtype=np.float64)
    found = (pulled / np.maximum(mass, _TINY)).astype(np.float32)
    return np.where(np.isfinite(found) & (found > _TINY), found, scale)


def _filled(table: Float32, bits: int) -> Float32:
    """The table with entries in the middle of the widest gaps until it has `2^bits`."""
    values = [float(value) for value in table]
    while len(values) < 1 << bits:
        at = max(range(len(values) - 1), key=lambda k: values[k + 1] - values[k])
        values.insert(at + 1, (values[at] + values[at + 1]) / 2)
    return np.array(values, np.float32)


def _half_steps(bits: int, largest: int) -> Float32:
    """`2^bits` even entries without zero."""
    count = 1 << bits
    return np.linspace(-largest, largest, count).astype(np.float32)


def _sampled(rows: Float32, importance: Float32 | None) -> tuple[Float32, Float32 | None]:
    """Every k-th row, so that about as many weights remain as tell a distribution."""
    every = max(1, rows.size // _SAMPLE)
    some = rows[:: min(every, max(1, len(rows)))]
    return some, None if importance is None else importance[:: min(every, max(1, len(rows)))]
