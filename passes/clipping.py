"""From a histogram to the interval that an 8-bit grid shall cover."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from octavo.ir.quant import QuantSpec
from octavo.passes.histogram import HALF_BINS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.passes.histogram import Histogram

ClipMethod = Literal["mse", "minmax", "percentile", "entropy"]

_U8 = QuantSpec("u8")
# Clip ratios in steps of 4 %; the error is flat around its minimum.
_RATIOS = np.geomspace(1, 1 / 256, 129)
# The divergence needs bins that hold many values: noise in sparse ones looks like divergence.
_MERGED = 4


def choose_interval(
    histogram: Histogram, method: ClipMethod, percentile: float, grid: QuantSpec = _U8
) -> tuple[float, float]:
    """The interval `[low, high]` of real values the grid covers; it always contains zero.

    A symmetric grid reaches the larger magnitude of both ends on either side of zero.

    - `minmax`: everything observed.
    - `percentile`: this share of the values, the rest cut evenly on the sides that have any.
    - `mse`: least expected squared error of rounding and clipping (Banner et al. 2019,
      "Post training 4-bit quantization", eq. 2-6, on the histogram instead of a fitted law).
    - `entropy`: least Kullback-Leibler divergence (Migacz 2017, "8-bit inference with
      TensorRT"), with the levels of the grid over what it reaches.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high or method == "minmax":
        return low, high
    if method == "percentile":
        chosen = _percentile(histogram, percentile)
    elif method == "entropy":
        chosen = _least_divergence(histogram, low, high, grid)
    else:
        chosen = _least_squares(histogram, low, high, grid)
    return max(chosen[0], low), min(chosen[1], high)


def depends_on_grid(method: ClipMethod) -> bool:
    """Whether another grid may get another interval."""
    return method in ("mse", "entropy")


def step_of(grid: QuantSpec, low: float, high: float) -> float:
    """The distance of neighbouring levels where a grid covers `[low, high]`."""
    width = 2 * max(-low, high) if grid.symmetric else high - low
    return width / (_levels(grid) - 1)


def _levels(grid: QuantSpec) -> int:
    return grid.qmax - grid.qmin + 1


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    sides = int(histogram.low < 0) + int(histogram.high > 0)
    tail = histogram.total * (1 - percentile / 100) / sides
    below = np.cumsum(histogram.counts[:HALF_BINS])
    above = below[-1] + histogram.zeros + np.cumsum(histogram.counts[HALF_BINS:])
    # Zero appears twice: the step between both is the count of exact zeros.
    ranks = np.concatenate(([0], below, [below[-1] + histogram.zeros], above))
    edges = np.arange(-HALF_BINS, HALF_BINS + 1) * histogram.width
    values = np.insert(edges, HALF_BINS, 0.0)
    low, high = np.interp((tail, histogram.total - tail), ranks, values)
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_squares(
    histogram: Histogram, low: float, high: float, grid: QuantSpec
) -> tuple[float, float]:
    """Search all pairs of clip ratios at once, or all magnitudes where both sides have one."""
    if grid.symmetric:
        highs = _candidates(max(-low, high))
        lows = -highs
    else:
        lows, highs = _candidates(low)[:, None], _candidates(high)
    cut_below, lost_below = _clipped(histogram.counts[::-1], -histogram.centers[::-1], -lows)
    cut_above, lost_above = _clipped(histogram.counts, histogram.centers, highs)
    inside = histogram.counts.sum() - cut_below - cut_above
    step = (highs - lows) / (_levels(grid) - 1)
    best = np.argmin(inside * step**2 / 12 + lost_below + lost_above)
    chosen_low, chosen_high = np.broadcast_arrays(lows, highs)
    return float(chosen_low.flat[best]), float(chosen_high.flat[best])


def _candidates(bound: float) -> NDArray[np.float64]:
    """Clip positions between a bound and zero, widest first, so that ties keep the range."""
    return bound * _RATIOS if bound else np.zeros(1)


def _clipped(
    counts: NDArray[np.int64], centers: NDArray[np.float64], highs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many values lie above each clip position, and the squared error of clipping them."""
    positive = np.where(centers > 0, counts, 0)
    moments = [_above(positive * centers**power, centers, highs) for power in (0, 1, 2)]
    return moments[0], moments[2] - 2 * highs * moments[1] + highs**2 * moments[0]


def _above(
    weights: NDArray[np.float64], centers: NDArray[np.float64], highs: NDArray[np.float64]
) -> NDArray[np.float64]:
    tails = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
    chosen: NDArray[np.float64] = tails[np.searchsorted(centers, highs)]
    return chosen


def _least_divergence(
    histogram: Histogram, low: float, high: float, grid: QuantSpec
) -> tuple[float, float]:
    """Narrow both sides together, as the literature does, and keep the closest distribution."""
    best, chosen = np.inf, (low, high)
    reach = max(-low, high)
    for clip in reach * _RATIOS[:65:2]:
        interval = max(low, -clip), min(high, clip)
        reached = (-clip, clip) if grid.symmetric else interval
        divergence = _divergence(histogram, *reached, _levels(grid))
        if divergence < best:
            best, chosen = divergence, (float(interval[0]), float(interval[1]))
    return chosen


def _divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    """KL divergence of the clipped distribution from itself at so many levels, without zeros."""
    counts = histogram.counts.reshape(-1, _MERGED).sum(axis=1)
    half, width = HALF_BINS // _MERGED, histogram.width * _MERGED
    begin = half + int(np.floor(low / width))
    end = half + int(np.floor(high / width)) + 1
    inside = counts[begin:end].astype(np.float64)
    size = len(inside)
    if size < levels or not inside.any():
        return float(np.inf)
    clipped = inside.copy()
    clipped[0] += counts[:begin].sum()
    clipped[-1] += counts[end:].sum()
    level = np.arange(size) * levels // size
    filled = np.bincount(level, clipped > 0, levels)[level]
    merged = np.bincount(level, inside, levels)[level]
    present = clipped > 0
    p = clipped[present] / clipped.sum()
    q = np.maximum(merged[present] / filled[present] / inside.sum(), np.finfo(np.float64).tiny)
    return float(np.sum(p * np.log(p / q)))
