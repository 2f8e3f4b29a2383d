"""Scales of blocks that are whole multiples of their channel's scale.

A weight `(q - z) · m · s` has the int8 codes `(q - z) · m` on the scale s of its channel, so that
kernels which take one scale per channel multiply weights of few bits in blocks (the two levels of
scales of VS-Quant, arXiv 2102.04503, section 4, with the lower one multiplied out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST_CODE = 127
_MULTIPLE_BITS = 4
_HALF = np.finfo(np.float16)


def most_multiple(bits: int, symmetric: bool) -> int:
    """The largest m for which m times any code is an int8 code, with a zero point or without."""
    largest = (1 << (bits - 1) if symmetric else 1 << bits) - 1
    return min((1 << _MULTIPLE_BITS) - 1, _LARGEST_CODE // largest)


def channel_axis(block_axis: int) -> int:
    """The axis of the output channels of a weight with blocks along the other of its first two."""
    return 0 if block_axis else 1


def block_axes(block_axis: int, rank: int) -> tuple[int, ...]:
    """The axes of the scales of blocks along which they are those of one channel."""
    return tuple(k for k in range(rank) if k != channel_axis(block_axis))


def whole_multiples(
    scale: NDArray[np.float32], axes: tuple[int, ...], most: int
) -> NDArray[np.float32]:
    """The scales nearest to `scale` that are `m · s`, with one float16 s over `axes`.

    The largest m is `most`. Products are exact; whole multiples stay as they are.
    """
    largest = scale.max(axis=axes, keepdims=True, initial=0.0) / np.float32(most)
    bounded = np.clip(largest, _HALF.smallest_subnormal, _HALF.max)
    unit = bounded.astype(np.float16).astype(np.float32)
    found: NDArray[np.float32] = unit * np.clip(np.rint(scale / unit), 1, most)
    return found
