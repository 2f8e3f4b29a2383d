"""Chosen intervals against exhaustive or literal computation on the full data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo.ir.quant import PerTensor, QuantSpec, dequantize, params_for_range, quantize
from octavo.passes.clipping import _divergence, choose_interval, depends_on_grid
from octavo.passes.histogram import HALF_BINS, Histogram

U8 = QuantSpec("u8", PerTensor())
S8 = QuantSpec("s8", PerTensor(), symmetric=True)
RNG = np.random.default_rng(3)
DATA = {
    "normal": RNG.standard_normal(40_000),
    "heavy tails": RNG.standard_t(2.5, 40_000),
    "after relu": np.maximum(RNG.standard_normal(40_000) * 3 - 2, 0),
    "after relu6": np.clip(RNG.standard_normal(40_000) * 4, 0, 6),
    "one outlier": np.append(RNG.standard_normal(40_000), 300.0),
    "shifted": RNG.standard_normal(40_000) + 4,
    "negative": -np.abs(RNG.standard_normal(40_000)),
}
METHODS = ["minmax", "percentile", "entropy", "mse"]


def sample(name: str) -> np.ndarray:
    return DATA[name].astype(np.float32)


def squared_error(values: np.ndarray, low: float, high: float, grid: QuantSpec = U8) -> float:
    params = params_for_range(grid, low, high)
    return float(np.square(dequantize(quantize(values, params), params) - values).mean())


@pytest.mark.parametrize("name", DATA)
def test_mse_is_near_the_best_of_an_exhaustive_search(name: str) -> None:
    values = sample(name)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    ratios = np.geomspace(1, 1 / 300, 40)
    lows, highs = (ratios * bound if bound else [0.0] for bound in (low, high))
    best = min(squared_error(values, a, b) for a in lows for b in highs)
    chosen = squared_error(values, *choose_interval(Histogram.of(values), "mse", 0))
    assert chosen <= 1.05 * best


@pytest.mark.parametrize("name", DATA)
def test_mse_on_a_symmetric_grid_is_near_the_best_of_an_exhaustive_search(name: str) -> None:
    values = sample(name)
    reach = float(np.abs(values).max())
    best = min(squared_error(values, -m, m, S8) for m in reach * np.geomspace(1, 1 / 300, 200))
    interval = choose_interval(Histogram.of(values), "mse", 0, S8)
    assert squared_error(values, *interval, S8) <= 1.05 * best


def test_one_sided_values_are_clipped_more_where_half_of_the_codes_are_idle() -> None:
    histogram = Histogram.of(sample("after relu"))
    (_, even), (low, high) = (choose_interval(histogram, "mse", 0, grid) for grid in (U8, S8))
    assert low == 0
    assert high < even


def test_extremes_and_percentiles_know_no_grid() -> None:
    histogram = Histogram.of(sample("shifted"))
    for method in ("minmax", "percentile"):
        assert not depends_on_grid(method)
        on_both = [choose_interval(histogram, method, 99.9, grid) for grid in (U8, S8)]
        assert on_both[0] == on_both[1]
    assert depends_on_grid("mse")
    assert depends_on_grid("entropy")


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_intervals_hold_zero_and_stay_inside_what_was_observed(name: str, method: Any) -> None:
    values = sample(name)
    low, high = choose_interval(Histogram.of(values), method, 99.9)
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)
    assert high > low
    if values.min() >= 0:
        assert low == 0


def test_minmax_is_exact() -> None:
    values = sample("heavy tails")
    assert choose_interval(Histogram.of(values), "minmax", 0) == (values.min(), values.max())


@pytest.mark.parametrize("name", ["normal", "heavy tails", "one outlier", "after relu", "negative"])
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentiles_equal_numpy_within_one_bin(name: str, percentile: float) -> None:
    values = sample(name)
    histogram = Histogram.of(values)
    low, high = choose_interval(histogram, "percentile", percentile)
    cut = 100 - percentile
    sides = int(values.min() < 0) + int(values.max() > 0)
    ranks = [cut / sides, 100 - cut / sides]
    # Between two order statistics, every value is this percentile.
    least, most = (np.percentile(values, ranks, method=m) for m in ("lower", "higher"))
    assert min(least[0], 0) - histogram.width <= low <= min(most[0], 0) + histogram.width
    assert max(least[1], 0) - histogram.width <= high <= max(most[1], 0) + histogram.width


def literal_divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    """Migacz 2017, slide 38, bin by bin, over 4 merged bins at a time as `_divergence` does."""
    counts = histogram.counts.reshape(-1, 4).sum(axis=1).tolist()
    left = [i * 4 * histogram.width for i in range(-HALF_BINS // 4, HALF_BINS // 4)]
    inside = [i for i, edge in enumerate(left) if edge <= high and edge + 4 * histogram.width > low]
    p = [counts[i] for i in inside]
    groups: dict[int, list[int]] = {}
    for position in range(len(p)):
        groups.setdefault(position * levels // len(p), []).append(position)
    kept = sum(p)
    raw = list(p)
    p[0] += sum(counts[: inside[0]])
    p[-1] += sum(counts[inside[-1] + 1 :])
    total = 0.0
    for group in groups.values():
        filled = [k for k in group if p[k] > 0]
        for k in filled:
            q = sum(raw[g] for g in group) / len(filled) / kept
            total += p[k] / sum(p) * np.log(p[k] / sum(p) / max(q, np.finfo(float).tiny))
    return total


@pytest.mark.parametrize("levels", [255, 256])
@pytest.mark.parametrize("clip", [1.0, 0.6, 0.3])
def test_divergence_equals_the_literal_computation(clip: float, levels: int) -> None:
    histogram = Histogram.of(sample("heavy tails"))
    interval = histogram.low * clip, histogram.high * clip
    expected = literal_divergence(histogram, *interval, levels)
    assert _divergence(histogram, *interval, levels) == pytest.approx(expected, rel=1e-9)


def test_entropy_on_a_symmetric_grid_counts_the_codes_that_are_idle() -> None:
    histogram = Histogram.of(sample("negative"))
    even, chosen = (-choose_interval(histogram, "entropy", 0, grid)[0] for grid in (U8, S8))
    lost, *others = (
        literal_divergence(histogram, -clip, clip, 255)
        for clip in (chosen, even, chosen * 1.1, chosen / 1.1)
    )
    assert lost < min(others)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_lone_outlier_is_cut(method: Any) -> None:
    _, high = choose_interval(Histogram.of(sample("one outlier")), method, 99.9)
    assert 2.5 < high < 150


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_a_constant_keeps_its_value(method: Any, value: float) -> None:
    histogram = Histogram.of(np.full(100, value, np.float32))
    interval = choose_interval(histogram, method, 99.99)
    assert interval == pytest.approx((min(value, 0), max(value, 0)), abs=histogram.width)


def test_the_peak_of_a_clip_is_kept() -> None:
    for method in ("mse", "entropy", "percentile"):
        histogram = Histogram.of(sample("after relu6"))
        assert choose_interval(histogram, method, 99.99) == (0, 6)
