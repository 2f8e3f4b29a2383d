"""Leaves have what is known of photographs, by its definition."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.passes.leaf_images import leaf_images


def _slope(images: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """Exponent of the mean power by radial frequency, away from the lowest and the grain."""
    side = images.shape[-1]
    power = np.square(np.abs(np.fft.fft2(images - images.mean((2, 3), keepdims=True)))).mean((0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) * side
    bands = np.arange(3, side // 5)
    means = [power[(frequency >= k) & (frequency < k + 1)].mean() for k in bands]
    return float(np.polyfit(np.log(bands + 0.5), np.log(means), 1)[0])


def test_power_falls_with_the_frequency_as_in_photographs() -> None:
    """By an exponent of -2 (Field 1987) to -3, that of edges alone; noise is flat."""
    rng = np.random.default_rng(0)
    assert -3 < _slope(leaf_images((24, 1, 96, 96), rng)) < -2
    noise = rng.standard_normal((24, 1, 96, 96)).astype(np.float32)
    assert _slope(noise) == pytest.approx(0, abs=0.1)


def test_colours_have_mean_zero_and_deviation_one() -> None:
    images = leaf_images((200, 3, 16, 16), np.random.default_rng(0))
    assert images.dtype == np.float32
    assert images.mean() == pytest.approx(0, abs=0.1)
    assert images.std() == pytest.approx(1, abs=0.05)


def test_neighbours_are_alike_and_edges_are_sharp() -> None:
    images = leaf_images((32, 3, 48, 48), np.random.default_rng(1))
    steps = np.abs(np.diff(images, axis=3)).max(1).ravel()
    assert np.median(steps) < 0.25
    assert np.quantile(steps, 0.99) > 1.0


def test_the_same_generator_gives_the_same_images() -> None:
    first, second, other = (leaf_images((2, 3, 8, 12), np.random.default_rng(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
