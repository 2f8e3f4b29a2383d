"""SQuant (Guo et al., ICLR 2022): flip roundings so that their errors cancel where they add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

_CHUNK_ELEMENTS = 1 << 18
# Up to so many are found one by one, which beats sorting short rows.
_FEW = 8


def balanced_codes(scaled: Float32, low: float, high: float) -> Float32:
    """Codes of weights `[channels, kernels, entries]` in units of their scale, zero at code 0.

    Starting from the nearest code in `[low, high]` of every entry, as few codes as possible are
    moved to the other neighbour, those first whose rounding was closest to a tie: first until
    the errors of a kernel add up to at most half a step, then, one per kernel, until those of a
    channel do (algorithms 1 and 2 of the paper). A kernel that the second part changed is off by
    less than a step. A code at an end of the grid moves inwards only, and may leave a sum larger.
    """
    codes = np.empty_like(scaled)
    count = max(_CHUNK_ELEMENTS * len(scaled) // max(scaled.size, 1), 1)
    for start in range(0, len(scaled), count):
        part = slice(start, start + count)
        codes[part] = _balanced(scaled[part], low, high)
    return codes


def _balanced(scaled: Float32, low: float, high: float) -> Float32:
    codes = np.clip(np.rint(scaled), low, high)
    if not codes.size:
        return codes
    error = codes - scaled
    direction = np.sign(error.sum(axis=2, dtype=np.float64, keepdims=True)).astype(np.float32)
    gain = _gain(codes, error, direction, low, high)
    codes -= direction * _most(gain, _steps(error.sum(axis=2, dtype=np.float64)))
    error = codes - scaled
    sums = error.sum(axis=2, dtype=np.float64)
    totals = sums.sum(axis=1)
    towards = np.sign(totals).astype(np.float32)[:, None, None]
    gain = _gain(codes, error, towards, low, high)
    entry = gain.argmax(axis=2)[..., None]
    movable = np.take_along_axis(gain, entry, axis=2)[..., 0] > 0
    by_kernel = np.where(movable, (sums * towards[..., 0]).astype(np.float32), 0)
    moved = _most(by_kernel, _steps(totals))
    old = np.take_along_axis(codes, entry, axis=2)
    np.put_along_axis(codes, entry, old - towards * moved[..., None], axis=2)
    return codes


def _steps(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many codes have to move by one for a sum of at most half a step."""
    return np.rint(np.abs(sums))


def _gain(codes: Float32, error: Float32, direction: Float32, low: float, high: float) -> Float32:
    """The error of every entry that can move against `direction`, 0 for all others."""
    moved = codes - direction
    allowed = (error * direction > 0) & (moved >= low) & (moved <= high)
    return np.where(allowed, np.abs(error), 0)


def _most(gain: Float32, count: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The `count` entries of greatest positive gain along the last axis; of equal ones the first.

    `count` has the shape of `gain` without that axis.
    """
    most = int(count.max(initial=0))
    if most > _FEW:
        order = np.argsort(-gain, axis=-1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(gain.shape[-1]), order.shape), -1)
        return (rank < count[..., None]) & (gain > 0)
    left = gain.copy()
    for taken in range(most):
        best = left.argmax(axis=-1)[..., None]
        used = np.where(count[..., None] > taken, 0, np.take_along_axis(left, best, -1))
        np.put_along_axis(left, best, used, -1)
    return np.not_equal(left, gain)
