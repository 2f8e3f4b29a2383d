"""Histograms against numpy on the full data."""

from __future__ import annotations

from functools import reduce
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.passes.histogram import HALF_BINS, Histogram, merge

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def edges(histogram: Histogram) -> np.ndarray:
    return np.arange(-HALF_BINS, HALF_BINS + 1) * histogram.width


def same(a: Histogram, b: Histogram) -> bool:
    scalars = [(h.exponent, h.zeros, h.low, h.high) for h in (a, b)]
    return scalars[0] == scalars[1] and np.array_equal(a.counts, b.counts)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 777.0, 1e30])
def test_counts_equal_numpy(scale: float) -> None:
    values = (np.random.default_rng(0).standard_normal(10_000) * scale).astype(np.float32)
    histogram = Histogram.of(values)
    expected, _ = np.histogram(values.astype(np.float64), edges(histogram))
    assert np.array_equal(histogram.counts, expected)
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert np.abs(values).max() >= histogram.width * HALF_BINS / 2


def test_zeros_are_counted_apart() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal(1000), 0)
    histogram = Histogram.of(values.astype(np.float32))
    assert histogram.zeros == np.count_nonzero(values == 0)
    assert histogram.total == 1000
    assert histogram.counts[:HALF_BINS].sum() == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(FLOATS, max_size=8), min_size=1, max_size=5), st.randoms())
def test_any_split_and_order_gives_the_same_histogram(
    parts: list[list[float]], rng: Random
) -> None:
    arrays = [np.array(part, np.float32) for part in parts]
    whole = Histogram.of(np.concatenate(arrays))
    shuffled = list(arrays)
    rng.shuffle(shuffled)
    assert same(reduce(merge, map(Histogram.of, shuffled)), whole)
    assert same(reduce(lambda a, b: merge(b, a), map(Histogram.of, arrays)), whole)


def test_merging_is_associative_over_far_scales() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (
        Histogram.of((rng.standard_normal(500) * s).astype(np.float32)) for s in (1e-20, 1.0, 3e9)
    )
    assert same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert merge(merge(a, b), c).total == 1500


def test_nothing_is_neutral() -> None:
    some = Histogram.of(np.array([-3.0, 0.0, 5.0], np.float32))
    assert same(merge(Histogram.empty(), some), some)
    assert same(merge(some, Histogram.of(np.zeros((0, 4), np.float32))), some)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Histogram.of(np.array([0.0, bad], np.float32))
