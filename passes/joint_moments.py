"""First and second moments, per channel, of what a layer gives before and after rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]


# The float64 copies of so many entries take 64 MB.
_ELEMENTS = 1 << 22


@final
@dataclass(frozen=True)
class JointMoments:
    """Of `count` entries per channel, arrays of shape `[C]`.

    `mean`, `variance` describe the float layer, `mean_q`, `variance_q` the rounded one;
    `covariance` is that of both.
    """

    count: int
    mean: Float64
    mean_q: Float64
    variance: Float64
    variance_q: Float64
    covariance: Float64

    @staticmethod
    def of(real: NDArray[np.generic], rounded: NDArray[np.generic], axis: int) -> JointMoments:
        """Of two arrays of one shape, whose channels lie along `axis`; large ones in parts."""
        axis %= real.ndim
        if real.size > _ELEMENTS and axis and len(real) > 1:
            half = len(real) // 2
            first = JointMoments.of(real[:half], rounded[:half], axis)
            return first.merged(JointMoments.of(real[half:], rounded[half:], axis))
        x, y = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (real, rounded))
        wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
        mean, mean_q = wide_x.mean(axis=1), wide_y.mean(axis=1)
        wide_x -= mean[:, None]
        wide_y -= mean_q[:, None]
        squares = (
            np.einsum("ck,ck->c", a, b) / x.shape[1]
            for a, b in ((wide_x, wide_x), (wide_y, wide_y), (wide_x, wide_y))
        )
        return JointMoments(x.shape[1], mean, mean_q, *squares)

    def merged(self, other: JointMoments) -> JointMoments:
        """Of the entries of both (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        share = other.count / count
        d, d_q = other.mean - self.mean, other.mean_q - self.mean_q
        between = share * (1 - share)
        return JointMoments(
            count,
            self.mean + share * d,
            self.mean_q + share * d_q,
            self.variance + share * (other.variance - self.variance) + between * d * d,
            self.variance_q + share * (other.variance_q - self.variance_q) + between * d_q * d_q,
            self.covariance + share * (other.covariance - self.covariance) + between * d * d_q,
        )

    def error(self, ratio: Float64, shift: Float64) -> Float64:
        """Mean of `(y·ratio + shift - x)²` per channel: x the float layer, y the rounded one."""
        spread = ratio * ratio * self.variance_q - 2 * ratio * self.covariance + self.variance
        return np.asarray(np.maximum(spread, 0) + (ratio * self.mean_q + shift - self.mean) ** 2)

    def mismatch(self, ratio: Float64, shift: Float64) -> Float64:
        """How far `y·ratio + shift` is from x in mean and deviation, squared, per channel.

        For normal distributions this is their squared Wasserstein distance.
        """
        means = ratio * self.mean_q + shift - self.mean
        return means**2 + (ratio * np.sqrt(self.variance_q) - np.sqrt(self.variance)) ** 2
