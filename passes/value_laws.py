"""What can be said of a value without data: mean, deviation and interval of each channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.facts import Norm

Array = np.ndarray[Any, Any]
# A fine even grid: activations have kinks, which Gauss's points step over.
_POINTS = np.linspace(-5, 5, 201)
_WEIGHTS = np.exp(-np.square(_POINTS) / 2) / np.exp(-np.square(_POINTS) / 2).sum()
_GRID = 65


@final
@dataclass(frozen=True)
class Law:
    """Mean, deviation and interval `[low, high]` of every channel, float64 `[C]`.

    `axis` counts the channels; None: one law for all elements, `[1]`.
    """

    axis: int | None
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @staticmethod
    def normal(axis: int | None, mean: Array, deviation: Array, reach: float) -> Law:
        """A normal law that ends `reach` deviations from its mean."""
        mean, spread = mean.astype(np.float64), np.abs(deviation).astype(np.float64)
        return Law(axis, mean, spread, mean - reach * spread, mean + reach * spread)

    @staticmethod
    def of_norm(norm: Norm, rank: int, reach: float) -> Law:
        """What a normalization gives: β ± reach·|γ| per channel (DFQ, ICCV 2019, section 4.2)."""
        axis = 1 if norm.kind == "batch" else rank - 1
        return Law.normal(axis, norm.beta, norm.gamma, reach)

    @staticmethod
    def of_constant(array: Array, rank: int) -> Law:
        """The numbers of a constant that is broadcast to `rank` axes."""
        wide = [k for k, size in enumerate(array.shape) if size > 1]
        if len(wide) == 1 and array.ndim <= rank:
            flat = array.reshape(-1).astype(np.float64)
            return Law(rank - array.ndim + wide[0], flat, np.zeros_like(flat), flat, flat)
        return Law.among(array)

    @staticmethod
    def among(array: Array, axis: int | None = None) -> Law:
        """Any of the numbers of an array, by position along `axis`."""
        rows = np.moveaxis(array, axis, 0) if axis is not None else array[None]
        rows = rows.reshape(len(rows), -1).astype(np.float64)
        return Law(axis, rows.mean(1), rows.std(1), rows.min(1), rows.max(1))

    @property
    def finite(self) -> bool:
        """Whether all its numbers are."""
        parts = (self.mean, self.deviation, self.low, self.high)
        return all(bool(np.isfinite(part).all()) for part in parts)

    def on(self, axis: int) -> Law:
        """The same channels, counted by another axis."""
        return replace(self, axis=axis)

    def merged(self) -> Law:
        """One law for all channels."""
        mean = self.mean.mean()
        power = (np.square(self.deviation) + np.square(self.mean)).mean() - mean * mean
        found = (mean, math.sqrt(max(power, 0.0)), self.low.min(), self.high.max())
        return Law(None, *(np.array([number]) for number in found))

    def through(self, function: Callable[[Array], Array]) -> Law:
        """After a function of each element, by a sum over the normal law cut to the interval.

        The interval is that of the function on a grid which holds both ends and zero.
        """
        drawn = self.mean[:, None] + self.deviation[:, None] * _POINTS
        drawn = np.clip(drawn, self.low[:, None], self.high[:, None])
        values = function(drawn)
        mean = values @ _WEIGHTS
        deviation = np.sqrt(np.maximum(np.square(values) @ _WEIGHTS - mean * mean, 0.0))
        share = np.linspace(0, 1, _GRID)
        along = self.low[:, None] + (self.high - self.low)[:, None] * share
        # Where activations bend.
        bend = np.clip(0.0, self.low, self.high)[:, None]
        along = function(np.concatenate([along, bend], axis=1))
        return Law(self.axis, mean, deviation, along.min(1), along.max(1))

    def within(self, low: Array, high: Array) -> Law:
        """The law with an interval that is known otherwise cut out of its own."""
        return replace(self, low=np.maximum(self.low, low), high=np.minimum(self.high, high))

    def times(self, number: float) -> Law:
        """The law of the value times a number."""
        ends = np.sort(np.stack([self.low * number, self.high * number]), axis=0)
        return Law(self.axis, self.mean * number, self.deviation * abs(number), ends[0], ends[1])

    def linear(
        self, weight: Array, bias: Array | None, axis: int, reach: float, groups: int = 1
    ) -> Law:
        """After `weight` `[M, K / groups, taps]` over K channels: moments of independent terms.

        Never wider than the sum of the extremes of all terms.
        """
        w = weight.astype(np.float64)
        rows, channels = w.shape[:2]

        def over(of_weight: Array, of_channel: Array) -> Array:
            """Σ over the channels of each row's own group, `[M]`."""
            by_group = np.broadcast_to(of_channel, groups * channels).reshape(groups, channels, 1)
            found = of_weight.sum(2).reshape(groups, rows // groups, channels) @ by_group
            return np.asarray(found.reshape(rows))

        shift = 0.0 if bias is None else bias.astype(np.float64)
        deviation = np.sqrt(over(np.square(w), np.square(self.deviation)))
        found = Law.normal(axis, over(w, self.mean) + shift, deviation, reach)
        up, down = np.maximum(w, 0), np.minimum(w, 0)
        low = over(up, self.low) + over(down, self.high) + shift
        return found.within(low, over(up, self.high) + over(down, self.low) + shift)


def together(laws: Sequence[Law]) -> tuple[Law, ...]:
    """The laws with the same channels: merged where they count different ones."""
    counted = {law.axis for law in laws if law.axis is not None}
    sizes = {len(law.mean) for law in laws if law.axis is not None}
    if len(counted) <= 1 and len(sizes) <= 1:
        return tuple(laws)
    return tuple(law.merged() for law in laws)


def added(first: Law, second: Law, reach: float) -> Law:
    """The sum of independent values; no wider than the sum of both intervals."""
    a, b = together((first, second))
    axis = a.axis if a.axis is not None else b.axis
    spread = np.sqrt(np.square(a.deviation) + np.square(b.deviation))
    return Law.normal(axis, a.mean + b.mean, spread, reach).within(a.low + b.low, a.high + b.high)


def multiplied(first: Law, second: Law) -> Law:
    """The product of independent values."""
    a, b = together((first, second))
    axis = a.axis if a.axis is not None else b.axis
    mean = a.mean * b.mean
    power = (np.square(a.deviation) + np.square(a.mean)) * (
        np.square(b.deviation) + np.square(b.mean)
    )
    ends = np.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
    spread = np.sqrt(np.maximum(power - mean * mean, 0.0))
    return Law(axis, mean, spread, ends.min(0), ends.max(0))


def either(laws: Sequence[Law]) -> Law:
    """A value that follows one of several laws, each with equal chance."""
    merged = [law.merged() for law in laws]
    stacked = Law(
        None, *(np.concatenate(parts) for parts in zip(*map(_parts, merged), strict=True))
    )
    return stacked.merged()


def _parts(law: Law) -> tuple[Array, Array, Array, Array]:
    return law.mean, law.deviation, law.low, law.high
