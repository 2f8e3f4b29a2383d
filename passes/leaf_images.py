"""Images to begin with: leaves that fall over each other, which have what photographs have.

Flat regions of all sizes, sharp edges and a spectrum that falls with the frequency (Lee, Mumford
and Huang 2001, "Occlusion models for natural images"); networks that were trained on nothing else
see much of the world (Baradad et al. 2021, arXiv 2106.05963). Noise has none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

# Radii from a pixel or a share of the side up to half of it; so many leaves, from bare to covered.
_SMALLEST, _LARGEST = 1 / 32, 1 / 2
_FEWEST, _MOST = 20, 300
# How much an ellipse is drawn out, and the share of a colour that is not its brightness.
_STRETCH = 0.3
_CHROMA = 0.5
# Sensors and textures: deviation of what is added to every pixel.
_GRAIN = 0.05


def leaf_images(shape: Sequence[int], rng: np.random.Generator) -> Float32:
    """Images `[N, C, H, W]` whose colours have mean 0 and deviation 1."""
    count, *size = shape
    return np.stack([_image(size, rng) for _ in range(count)])


def _image(size: Sequence[int], rng: np.random.Generator) -> Float32:
    channels, height, width = size
    image = np.broadcast_to(_colour(channels, rng)[:, None, None], size).copy()
    for radius in _radii(max(height, width), rng):
        leaf = _Leaf.drawn(radius, height, width, rng)
        rows, columns = leaf.window(height, width)
        covered = leaf.covers(rows, columns)
        image[:, rows, columns][:, covered] = _colour(channels, rng)[:, None]
    grain = _GRAIN * rng.standard_normal(size)
    return (image + grain).astype(np.float32)


def _radii(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """With a density of r⁻³, by which leaves of every size cover as much: nothing has a scale."""
    least, most = max(1.0, side * _SMALLEST), max(1.5, side * _LARGEST)
    share = rng.random(rng.integers(_FEWEST, _MOST))
    found: NDArray[np.float64] = 1 / np.sqrt(least**-2 + share * (most**-2 - least**-2))
    return found


def _colour(channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    bright = rng.standard_normal() * np.sqrt(1 - _CHROMA**2)
    found: NDArray[np.float64] = bright + _CHROMA * rng.standard_normal(channels)
    return found


@final
@dataclass(frozen=True)
class _Leaf:
    """An ellipse or a rectangle: its middle, half axes and turn."""

    y: float
    x: float
    long: float
    wide: float
    turn: float
    round: bool

    @staticmethod
    def drawn(radius: float, height: int, width: int, rng: np.random.Generator) -> _Leaf:
        """Anywhere in the image, turned by any angle."""
        y, x, turn = rng.random(3) * (height, width, np.pi)
        long, wide = radius * np.exp(_STRETCH * rng.standard_normal(2))
        return _Leaf(y, x, long, wide, turn, bool(rng.random() < 0.5))

    def window(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns outside of which the leaf covers nothing."""
        reach = float(np.hypot(self.long, self.wide))
        spans = (
            slice(max(0, int(at - reach)), min(size, int(at + reach) + 1))
            for at, size in ((self.y, height), (self.x, width))
        )
        rows, columns = spans
        return rows, columns

    def covers(self, rows: slice, columns: slice) -> NDArray[np.bool_]:
        """Which pixels of a window it covers."""
        down, right = np.mgrid[rows, columns]
        down, right = down - self.y, right - self.x
        along = np.abs(down * np.cos(self.turn) + right * np.sin(self.turn)) / self.long
        across = np.abs(right * np.cos(self.turn) - down * np.sin(self.turn)) / self.wide
        found = along**2 + across**2 < 1 if self.round else np.maximum(along, across) < 1
        return np.asarray(found)
