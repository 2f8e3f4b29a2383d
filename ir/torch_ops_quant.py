"""Casts, quantization and octavo's FakeQuant in torch.

FakeQuant passes gradients straight through its rounding: 1 inside the clip range, 0 outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.ir.torch_values import HELD_IN

_FLOAT8 = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
    torch.float8_e5m2fnuz: 57344.0,
}
_HALF_STEP = 16.0
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_U8 = 255


def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Cast; float8 clips to its largest value if it saturates."""
    if to in HELD_IN:
        held, low, high = HELD_IN[to]
        if held.is_floating_point:
            return _to_float4(x)
        bits = (high - low).bit_length()
        wrapped = x.to(torch.int64) & (2**bits - 1)
        return torch.where(wrapped > high, wrapped - 2**bits, wrapped).to(held)
    if to in _FLOAT8 and x.dtype not in _FLOAT8:
        return _to_float8(x, to, bool(saturate))
    if to == torch.bool:
        return x != 0
    return x.to(to)


def cast_like(x: Tensor, other: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """CastLike."""
    return cast(x, to=other.dtype, saturate=saturate)


def bit_cast(x: Tensor, *, to: torch.dtype) -> Tensor:
    """BitCast."""
    return x.view(to)


def dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """DequantizeLinear per tensor, axis or block."""
    codes = x.to(scale.dtype)
    if zero_point is not None:
        codes = codes - _along(zero_point.to(scale.dtype), x, axis, block_size)
    found = codes * _along(scale, x, axis, block_size)
    return found if output_dtype is None else found.to(output_dtype)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    precision: torch.dtype | None = None,
    saturate: int = 1,
) -> Tensor:
    """QuantizeLinear: codes, which have no gradient; FakeQuant has."""
    to = output_dtype or (torch.uint8 if zero_point is None else zero_point.dtype)
    divided = x / _along(scale, x, axis, block_size).to(x.dtype)
    if to in _FLOAT8:
        return _to_float8(divided, to, bool(saturate))
    held, low, high = HELD_IN[to] if to in HELD_IN else (to, _lowest(to), _highest(to))
    if held.is_floating_point:
        return _to_float4(divided)
    codes = torch.round(divided)
    if zero_point is not None:
        codes = codes + _along(zero_point, x, axis, block_size).to(x.dtype)
    return codes.clamp(low, high).to(held)


def quantize_dynamic(x: Tensor, *, outputs: int) -> tuple[Tensor, ...]:
    """DynamicQuantizeLinear: u8 codes over the range of x and zero, scale, zero point."""
    scale, zero = _dynamic_params(x)
    codes = (torch.round(x / scale) + zero).clamp(0, _LARGEST_U8)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def fake_quant(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: float, qmax: float, spec: str
) -> Tensor:
    """FakeQuant (ir/fake_quant.py); scale and zero point broadcast against x."""
    rounded = _straight_through(x / scale) + zero_point
    return (rounded.clamp(qmin, qmax) - zero_point) * scale


def fake_quant_dynamic(x: Tensor) -> Tensor:
    """FakeQuantDynamic; the parameters it finds count as constants."""
    scale, zero = _dynamic_params(x.detach())
    return fake_quant(x, scale, zero, qmin=0, qmax=_LARGEST_U8, spec="")


def fake_quant_float8(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: float, qmax: float, spec: str
) -> Tensor:
    """FakeQuantFloat8: to the nearest float8 number."""
    real = (x / scale).clamp(qmin, qmax)
    rounded = _to_float8(real, torch.float8_e4m3fn, True).float()
    return (real + (rounded - real).detach()) * scale


def fake_quant_float4(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: float, qmax: float, spec: str
) -> Tensor:
    """FakeQuantFloat4: to the nearest float4 number."""
    real = (x / scale).clamp(qmin, qmax)
    return (real + (_to_float4(real) - real).detach()) * scale


def in_blocks(rounding: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The form for blocks of an operator: what it does to x in `blocked_shape`."""

    def rounded(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        blocked_shape: Tensor,
        *,
        qmin: float,
        qmax: float,
        spec: str,
    ) -> Tensor:
        blocks = x.reshape(blocked_shape.tolist())
        found = rounding(blocks, scale, zero_point, qmin=qmin, qmax=qmax, spec=spec)
        return found.reshape(x.shape)

    return rounded


def fake_quant_levels(x: Tensor, levels: Tensor, *, axis: int, bits: int) -> Tensor:
    """FakeQuantLevels: x holds levels."""
    return x


def _straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def _dynamic_params(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / _LARGEST_U8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round((-low / scale).clamp(0, _LARGEST_U8))


def _along(params: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Parameters in a shape that broadcasts against x."""
    if params.numel() == 1 and params.dim() <= 1:
        return params.reshape(())
    if block_size:
        return params.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if params.dim() == x.dim():
        return params
    return params.reshape([-1 if k == axis % x.dim() else 1 for k in range(x.dim())])


def _lowest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


def _to_float8(x: Tensor, to: torch.dtype, saturate: bool) -> Tensor:
    limit = _FLOAT8[to]
    wide = x.float()
    if saturate:
        return wide.clamp(-limit, limit).to(to)
    if to == torch.float8_e4m3fn:
        # torch clips to the largest value here; ONNX wants NaN past half a step above it.
        wide = torch.where(wide.abs() > limit + _HALF_STEP, torch.nan, wide)
    return wide.to(to)


def _to_float4(x: Tensor) -> Tensor:
    """The nearest float4 value, the even mantissa in a tie, held in float32."""
    grid = torch.tensor(_FLOAT4)
    size = x.float().abs().clamp(max=_FLOAT4[-1])
    distance = (size.unsqueeze(-1) - grid).abs()
    # Even mantissas come first, so that argmin takes them in a tie.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    nearest = grid[order[distance[..., order].argmin(-1)]]
    return torch.copysign(nearest, x.float())


OPS: dict[str, Callable[..., Any]] = {
    "BitCast": bit_cast,
    "Cast": cast,
    "CastLike": cast_like,
    "DequantizeLinear": dequantize,
    "QuantizeLinear": quantize,
}
SEVERAL: dict[str, Callable[..., Any]] = {"DynamicQuantizeLinear": quantize_dynamic}
OCTAVO: dict[str, Callable[..., Any]] = {
    "FakeQuant": fake_quant,
    "FakeQuantBlocks": in_blocks(fake_quant),
    "FakeQuantDynamic": fake_quant_dynamic,
    "FakeQuantFloat4": fake_quant_float4,
    "FakeQuantFloat4Blocks": in_blocks(fake_quant_float4),
    "FakeQuantFloat8": fake_quant_float8,
    "FakeQuantLevels": fake_quant_levels,
}
