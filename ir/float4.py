"""Weights of four bits as NVFP4 has them: float4 codes in blocks, whose scales are float8 numbers.

The scales of a tensor (E4M3) are multiplied by one float32 number besides. It is a power of two
here, so that a scale loses what four significant bits lose, whatever the scales around it are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What NVFP4 gives one scale.
BLOCK = 16
LARGEST = 6
_SIGNIFICANT_BITS = 4
# The largest scale of a tensor is stored between 2^7 and 2^8, where float8 has all four bits.
_TOP = 8
_LEAST_EXPONENT = -126
# The smallest float8 number that is not 0.
_LEAST_SCALE = np.float32(2**-9)


def stored_parts(
    scale: NDArray[np.float32],
) -> tuple[NDArray[ml_dtypes.float8_e4m3fn], NDArray[np.float32]]:
    """The float8 numbers of positive scales, and the float32 number that all are multiplied by."""
    mantissa, exponent = np.frexp(scale.max(initial=np.float32(0)))
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, _SIGNIFICANT_BITS)), exponent - _SIGNIFICANT_BITS)
    power = max(int(np.frexp(rounded)[1]) - _TOP, _LEAST_EXPONENT)
    unit = np.ldexp(np.float32(1), power)
    codes = np.maximum(scale / unit, _LEAST_SCALE).astype(ml_dtypes.float8_e4m3fn)
    return codes, np.asarray(unit, np.float32)


def stored_scales(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Positive scales as they are stored; those that are stay as they are."""
    codes, unit = stored_parts(scale)
    return np.asarray(codes.astype(np.float32) * unit, np.float32)
