"""How a tensor is quantized, with which numbers, and the numpy truth of doing it.

real = (q - zero_point) * scale, and q = clip(round_half_even(real / scale) + zero_point).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar, final

import ml_dtypes
import numpy as np
import onnx_ir
from numpy.typing import NDArray

from octavo.ir import float4
from octavo.ir.errors import UsageError
from octavo.ir.multiples import block_axes, most_multiple, whole_multiples

Entry = TypeVar("Entry", bound=np.generic)
Codes = NDArray[np.int8 | np.uint8 | np.float16 | ml_dtypes.float8_e4m3fn | ml_dtypes.float4_e2m1fn]
QuantType = Literal[
    "u8", "s8", "u4", "s4", "u2", "s2", "s7", "s6", "s5", "s3", "s1", "f16", "f8", "f4"
]  # fmt: skip
_NATIVE_BITS = (2, 4, 8)
_LARGEST_HALF = float(np.finfo(np.float16).max)
_LEAST_HALF = np.float32(np.finfo(np.float16).smallest_subnormal)
_LARGEST_FLOAT8 = 448


@final
@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: shape `[3, 4]` has a scale of shape `[]`."""

    def __str__(self) -> str:
        return "tensor"


@final
@dataclass(frozen=True)
class PerAxis:
    """One scale per index of `axis`: shape `[3, 4]`, axis 0, has a scale of shape `[3]`."""

    axis: int

    def __str__(self) -> str:
        return f"axis{self.axis}"


@final
@dataclass(frozen=True)
class PerBlock:
    """One scale per `size` entries along `axis`: `[64, 4]`, axis 0, size 32: scale `[2, 4]`.

    Size 0 stands for the whole axis, whose length a plan need not know: see `fitted`.
    """

    axis: int
    size: int

    def __str__(self) -> str:
        return f"block{self.size}@{self.axis}"


Granularity = PerTensor | PerAxis | PerBlock


@final
@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized; prints as `s8/axis0`.

    A symmetric signed grid leaves its lowest code unused. `used_bits` restricts the codes to
    fewer bits than the type has (7-bit weights where the kernel would saturate). `s1` is binary:
    the codes are -1 and 1, and there is no zero. `f16` keeps numbers, rounded to float16. The codes
    of `f8` are float8 numbers (E4M3FN, up to 448), whose steps grow with their size, those of `f4`
    float4 numbers (E2M1, up to 6), whose scales are stored as float8 (`ir/float4.py`).

    `half_scales` says that every scale is a float16 number, and stored as one. `index_bits` says
    that a tensor has at most `2**index_bits` different codes, and is stored as indices into a
    table of them: a non-uniform grid that integer kernels multiply. `multiples` says that every
    scale of a block is a whole multiple of its channel's (`ir/multiples.py`).
    """

    dtype: QuantType
    granularity: Granularity = PerTensor()
    symmetric: bool = False
    used_bits: int | None = None
    half_scales: bool = False
    index_bits: int | None = None
    multiples: bool = False

    @property
    def signed(self) -> bool:
        return self.dtype[0] != "u"

    @property
    def bits(self) -> int:
        return int(self.dtype[1:])

    @property
    def binary(self) -> bool:
        return self.dtype == "s1"

    @property
    def half(self) -> bool:
        return self.dtype == "f16"

    @property
    def float8(self) -> bool:
        return self.dtype == "f8"

    @property
    def float4(self) -> bool:
        return self.dtype == "f4"

    @property
    def floating(self) -> bool:
        """Whether the codes are floating-point numbers: no even grid."""
        return self.dtype[0] == "f"

    @property
    def qmin(self) -> int:
        if self.floating:
            return -self.qmax
        if self.binary:
            return -1
        return -(1 << ((self.used_bits or self.bits) - 1)) + self.symmetric if self.signed else 0

    @property
    def qmax(self) -> int:
        if self.half:
            return int(_LARGEST_HALF)
        if self.floating:
            return float4.LARGEST if self.float4 else _LARGEST_FLOAT8
        if self.binary:
            return 1
        bits = self.used_bits or self.bits
        return (1 << (bits - 1)) - 1 if self.signed else (1 << bits) - 1

    @property
    def onnx_type(self) -> onnx_ir.DataType:
        """The type of that many bits, or of 8 where ONNX has none: kernels multiply bytes."""
        if self.half:
            return onnx_ir.DataType.FLOAT16
        if self.floating:
            return onnx_ir.DataType.FLOAT4E2M1 if self.float4 else onnx_ir.DataType.FLOAT8E4M3FN
        bits = self.bits if self.bits in _NATIVE_BITS else 8
        return onnx_ir.DataType[("INT" if self.signed else "UINT") + str(bits)]

    def __str__(self) -> str:
        index = f"#{self.index_bits}" if self.index_bits else ""
        return f"{self.dtype}/{self.granularity}{'x' if self.multiples else ''}{index}"


def unsigned_type(bits: int) -> QuantType:
    """The type of unsigned codes of 2, 4 or 8 bits."""
    found: QuantType = f"u{bits}"  # type: ignore[assignment]
    return found


def signed_type(bits: int) -> QuantType:
    """The type of signed codes of 1 to 8 bits."""
    found: QuantType = f"s{bits}"  # type: ignore[assignment]
    return found


def kernel_blocks(bits: int, blocks: PerBlock, *, zero_points: bool) -> QuantSpec:
    """The spec of a weight that a kernel reads in blocks.

    With a zero point per block where it takes one beside few bits: all codes serve a range that
    is not even about zero. Wider codes gain less than a byte per block costs.
    """
    if zero_points and bits in _NATIVE_BITS and bits < _NATIVE_BITS[-1]:
        return QuantSpec(unsigned_type(bits), blocks)
    return QuantSpec(signed_type(bits), blocks, symmetric=True)


@final
@dataclass(frozen=True)
class QuantParams:
    """A spec with its numbers; `scale` and `zero_point` have the shape the granularity gives.

    Scales of a spec with `half_scales` are rounded to the nearest positive float16, those of one
    with `multiples` to the nearest multiples of a channel's scale, those of float4 codes to float8.
    """

    spec: QuantSpec
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape:
            message = f"scale {self.scale.shape} and zero point {self.zero_point.shape} differ"
            raise ValueError(message)
        if not (np.all(np.isfinite(self.scale)) and np.all(self.scale > 0)):
            message = "every scale must be finite and positive"
            raise ValueError(message)
        if self.spec.multiples:
            assert isinstance(self.spec.granularity, PerBlock)
            axes = block_axes(self.spec.granularity.axis, self.scale.ndim)
            most = most_multiple(self.spec.bits, self.spec.symmetric)
            scale = whole_multiples(self.scale, axes, most)
            object.__setattr__(self, "scale", scale)
        elif self.spec.float4:
            object.__setattr__(self, "scale", float4.stored_scales(self.scale))
        elif self.spec.half_scales:
            bounded = np.clip(self.scale, _LEAST_HALF, np.float32(_LARGEST_HALF))
            object.__setattr__(self, "scale", bounded.astype(np.float16).astype(np.float32))


def params_for_range(spec: QuantSpec, low: float, high: float) -> QuantParams:
    """Per-tensor parameters whose grid covers `[low, high]` and holds zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    tiny = float(np.finfo(np.float32).tiny)
    if spec.symmetric:
        scale = max(abs(low), abs(high)) / spec.qmax if spec.signed else 0.0
        if not spec.signed:
            scale = max(abs(low), abs(high)) / (2 ** (spec.bits - 1) - 1)
        zero = 0 if spec.signed else 2 ** (spec.bits - 1)
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
        zero = round(spec.qmin - low / scale) if scale > tiny else spec.qmin
    scale = scale if scale > tiny else 1.0
    zero = min(max(zero, spec.qmin), spec.qmax)
    return QuantParams(spec, np.array(scale, np.float32), np.array(zero, np.int32))


def params_for_weight(weight: NDArray[np.floating], spec: QuantSpec) -> QuantParams:
    """Parameters whose grid covers every channel or block.

    Signed codes reach its largest magnitude on both sides of zero, unsigned ones its range, and so
    do signed ones whose blocks have zero points.
    The scale of a binary weight is its mean magnitude, which is nearest in the square
    (Rastegari et al., XNOR-Net, equation 6).
    """
    if spec.half:
        return _half_params(weight, spec)
    if spec.binary:
        return _binary_params(weight, spec)
    grouped = _grouped(weight, spec.granularity)
    high = grouped.array.max(axis=grouped.reduced, initial=0.0)
    low = grouped.array.min(axis=grouped.reduced, initial=0.0)
    even = spec.signed and (spec.symmetric or not spec.multiples)
    reach = np.maximum(high, -low) if even else high - low
    scale = np.asarray(reach / (spec.qmax - (0 if even else spec.qmin)), np.float32)
    tiny = np.finfo(np.float32).tiny
    # What the largest scale of float4 codes is decides how the others are stored.
    scale = np.where(scale <= tiny, tiny if spec.float4 else np.float32(1), scale)
    found = QuantParams(spec, scale, np.zeros(scale.shape, np.int32))
    if even:
        return found
    # Float16 scales may be smaller: every zero point is that of the scale as it is stored.
    zero = np.clip(spec.qmin + np.rint(-low / found.scale), spec.qmin, spec.qmax)
    return replace(found, zero_point=zero.astype(np.int32))


def _half_params(weight: NDArray[np.floating], spec: QuantSpec) -> QuantParams:
    """Scale 1; UsageError for a weight that float16 does not reach."""
    if not fits_half(weight):
        message = f"a weight beyond {_LARGEST_HALF:.0f} is no float16 number"
        raise UsageError(message, hint="keep the node float, or store it as codes")
    return QuantParams(spec, np.ones((), np.float32), np.zeros((), np.int32))


def fits_half(array: NDArray[np.floating]) -> bool:
    """Whether every number of an array is in the range of float16."""
    return bool(np.abs(array).max(initial=0.0) <= _LARGEST_HALF)


def _binary_params(weight: NDArray[np.floating], spec: QuantSpec) -> QuantParams:
    grouped = _grouped(np.abs(weight), spec.granularity)
    counted = _grouped(np.ones(weight.shape, np.bool_), spec.granularity)
    total = grouped.array.sum(axis=grouped.reduced, dtype=np.float64)
    entries = counted.array.sum(axis=counted.reduced)
    scale = np.asarray(total / np.maximum(entries, 1), np.float32)
    return QuantParams(
        spec, np.maximum(scale, np.finfo(np.float32).tiny), np.zeros(scale.shape, np.int32)
    )


def fitted(spec: QuantSpec, shape: tuple[int, ...]) -> QuantSpec:
    """The spec with the block size 0 replaced by the length of its axis in `shape`."""
    match spec.granularity:
        case PerBlock(axis, 0):
            return replace(spec, granularity=PerBlock(axis, shape[axis]))
    return spec


def turned(spec: QuantSpec) -> QuantSpec:
    """The spec of a matrix for its transpose."""
    match spec.granularity:
        case PerAxis(axis):
            return replace(spec, granularity=PerAxis(1 - axis))
        case PerBlock(axis, size):
            return replace(spec, granularity=PerBlock(1 - axis, size))
    return spec


def turned_params(params: QuantParams) -> QuantParams:
    """The parameters of a matrix for its transpose."""
    spec = turned(params.spec)
    if not isinstance(spec.granularity, PerBlock):
        return replace(params, spec=spec)
    return QuantParams(spec, params.scale.T, params.zero_point.T)


def round_weight(weight: NDArray[np.floating], spec: QuantSpec) -> NDArray[np.float32]:
    """The weight that is left of `weight` when it is rounded to the nearest codes of `spec`."""
    params = params_for_weight(weight, fitted(spec, weight.shape))
    return dequantize(quantize(weight, params), params)


def quantize(real: NDArray[np.floating], params: QuantParams) -> Codes:
    """The integer codes of `real`, as ONNX QuantizeLinear computes them (float32 division).

    Codes of fewer than 8 bits take a byte each. One float32 copy of `real` is the only temporary.
    The code of a binary spec is the sign of `real`, which QuantizeLinear does not know; that of a
    float16 spec is the float16 number nearest to it. A tie goes to the even code in all of them.
    """
    if params.spec.half:
        bounded: NDArray[np.float32] = np.clip(real, params.spec.qmin, params.spec.qmax)
        return bounded.astype(np.float16)
    if params.spec.binary:
        return np.where(real < 0, np.int8(-1), np.int8(1))
    scale, zero = broadcast_params(params, real.shape)
    codes = np.asarray(np.divide(real, scale, dtype=np.float32))
    if params.spec.floating:
        np.clip(codes, params.spec.qmin, params.spec.qmax, out=codes)
        return codes.astype(params.spec.onnx_type.numpy())
    np.rint(codes, out=codes)
    codes += zero.astype(np.float32)
    np.clip(codes, params.spec.qmin, params.spec.qmax, out=codes)
    return codes.astype(np.int8 if params.spec.signed else np.uint8)


def dequantize(codes: NDArray[np.number], params: QuantParams) -> NDArray[np.float32]:
    """The real values of integer codes, as ONNX DequantizeLinear computes them."""
    if params.spec.half:
        return codes.astype(np.float32)
    scale, zero = broadcast_params(params, codes.shape)
    if params.spec.floating:
        return np.asarray(codes.astype(np.float32) * scale, np.float32)
    return ((codes.astype(np.int32) - zero).astype(np.float32) * scale).astype(np.float32)


def broadcast_params(
    params: QuantParams, shape: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scale and zero point, expanded so that they broadcast against a tensor of `shape`."""
    return _expanded(params.scale, params.spec.granularity, shape), _expanded(
        params.zero_point, params.spec.granularity, shape
    )


def _expanded(
    array: NDArray[Entry], granularity: Granularity, shape: tuple[int, ...]
) -> NDArray[Entry]:
    match granularity:
        case PerTensor():
            return array
        case PerAxis(axis):
            return array.reshape([-1 if k == axis % len(shape) else 1 for k in range(len(shape))])
        case PerBlock(axis, size):
            repeated = np.repeat(array, size, axis=axis)
            return np.take(repeated, np.arange(shape[axis]), axis=axis)


@dataclass(frozen=True)
class _Grouped:
    array: NDArray[np.floating]
    reduced: tuple[int, ...]


def _grouped(weight: NDArray[np.floating], granularity: Granularity) -> _Grouped:
    match granularity:
        case PerTensor():
            return _Grouped(weight, tuple(range(weight.ndim)))
        case PerAxis(axis):
            others = tuple(k for k in range(weight.ndim) if k != axis % weight.ndim)
            return _Grouped(weight, others)
        case PerBlock(axis, size):
            axis %= weight.ndim
            short = -weight.shape[axis] % size
            if short:
                widths = [(0, short if k == axis else 0) for k in range(weight.ndim)]
                weight = np.pad(weight, widths)
            shape = [*weight.shape[:axis], -1, size, *weight.shape[axis + 1 :]]
            return _Grouped(weight.reshape(shape), (axis + 1,))
