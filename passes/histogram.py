"""A streaming histogram: bounded memory, one sweep, and the same result in any order.

Bins have a width of `2**exponent` and are aligned to zero. When values outgrow them, the width
doubles and bins merge pairwise, which is exact; the final bins depend on the data alone, so
`merge` is associative and commutative. Exact zeros (the peak a Relu leaves) are counted apart:
every quantization grid holds zero, and they carry no error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALF_BINS = 4096
_HALF_BITS = HALF_BINS.bit_length() - 1
# The smallest float32, 2**-149, needs no finer bins.
_LOWEST_EXPONENT = -148 - _HALF_BITS


@final
@dataclass(frozen=True)
class Histogram:
    """Counts `[2 * HALF_BINS]` of values, zeros apart; `low` and `high` are exact extremes.

    Bin `i` holds `[(i - HALF_BINS) * width, (i - HALF_BINS + 1) * width)`. No value at all is
    `low = inf, high = -inf`.
    """

    counts: NDArray[np.int64]
    exponent: int = _LOWEST_EXPONENT
    zeros: int = 0
    low: float = math.inf
    high: float = -math.inf

    @staticmethod
    def empty() -> Histogram:
        return Histogram(np.zeros(2 * HALF_BINS, np.int64))

    @staticmethod
    def of(values: NDArray[np.floating]) -> Histogram:
        """The histogram of an array of any shape; ValueError where a value is not finite."""
        flat = np.asarray(values, np.float32).ravel()
        if flat.size == 0:
            return Histogram.empty()
        low, high = float(flat.min()), float(flat.max())
        if not math.isfinite(low) or not math.isfinite(high):
            message = "a value is not finite"
            raise ValueError(message)
        exponent = _exponent(max(-low, high))
        # In float64 no scaled float32 underflows: a tiny negative value stays below zero.
        bins = np.floor(flat * np.float64(2.0**-exponent)).astype(np.intp) + HALF_BINS
        counts = np.bincount(bins, minlength=2 * HALF_BINS)
        zeros = flat.size - int(np.count_nonzero(flat))
        counts[HALF_BINS] -= zeros
        return Histogram(counts, exponent, zeros, low, high)

    @property
    def width(self) -> float:
        return float(2.0**self.exponent)

    @property
    def total(self) -> int:
        return int(self.counts.sum()) + self.zeros

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation, as if what a bin holds were in its middle; NaN if empty."""
        if not self.total:
            return math.nan, math.nan
        middles = (np.arange(-HALF_BINS, HALF_BINS) + 0.5) * self.width
        mean = float(self.counts @ middles) / self.total
        square = float(self.counts @ np.square(middles)) / self.total
        return mean, math.sqrt(max(square - mean * mean, 0.0))

    @property
    def centers(self) -> NDArray[np.float64]:
        return (np.arange(-HALF_BINS, HALF_BINS, dtype=np.float64) + 0.5) * self.width

    def observing(self, low: float, high: float) -> Histogram:
        """The same counts with extremes that were found elsewhere, on more data."""
        return replace(self, low=min(self.low, low), high=max(self.high, high))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of the values of both; exact, associative and commutative."""
    exponent = max(a.exponent, b.exponent)
    return Histogram(
        _widened(a, exponent) + _widened(b, exponent),
        exponent,
        a.zeros + b.zeros,
        min(a.low, b.low),
        max(a.high, b.high),
    )


def _exponent(peak: float) -> int:
    """The smallest bin width, as a power of two, that keeps |x| <= peak inside the bins."""
    if peak == 0:
        return _LOWEST_EXPONENT
    return math.frexp(peak)[1] - _HALF_BITS


def _widened(histogram: Histogram, exponent: int) -> NDArray[np.int64]:
    """Counts at a wider bin width."""
    # Beyond this, each side is one bin already and stays the one next to zero.
    doublings = min(exponent - histogram.exponent, _HALF_BITS)
    if doublings == 0:
        return histogram.counts
    merged = histogram.counts.reshape(-1, 1 << doublings).sum(axis=1)
    widened = np.zeros_like(histogram.counts)
    begin = HALF_BINS - len(merged) // 2
    widened[begin : begin + len(merged)] = merged
    return widened
