"""Resize and Upsample of ONNX in torch: one axis after the other, by index or by a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from octavo.ir.torch_ops_reduce import axes_of


@final
@dataclass(frozen=True)
class _Rule:
    """How positions of a resized axis are found and weighed; ONNX's attributes."""

    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    antialias: bool
    exclude_outside: bool
    outside: float


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resize to sizes or by scales."""
    rule = _Rule(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
        extrapolation_value,
    )
    where = axes_of(x, axes)
    factors, wanted = _factors(x, where, scales, sizes, keep_aspect_ratio_policy)
    region = [] if roi is None else roi.tolist()
    for k, axis in enumerate(where):
        part = (region[k], region[k + len(where)]) if len(region) else (0.0, 1.0)
        if factors[k] != 1 or coordinate_transformation_mode == "tf_crop_and_resize":
            x = _along(x, axis, factors[k], wanted[k], part, rule)
    return x


def upsample(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Upsample of opset 9."""
    return resize(
        x,
        None,
        scales,
        mode=mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _factors(
    x: Tensor, axes: list[int], scales: Tensor | None, sizes: Tensor | None, policy: str
) -> tuple[list[float], list[int]]:
    """Scale and size of each resized axis."""
    now = [x.shape[axis] for axis in axes]
    if scales is not None and scales.numel():
        factors = scales.tolist()
        return factors, [math.floor(n * f) for n, f in zip(now, factors, strict=True)]
    assert sizes is not None
    wanted = sizes.tolist()
    factors = [w / n for w, n in zip(wanted, now, strict=True)]
    if policy != "stretch":
        one = min(factors) if policy == "not_larger" else max(factors)
        factors = [one] * len(axes)
        wanted = [math.floor(one * n + 0.5) for n in now]
    return factors, wanted


def _along(
    x: Tensor, axis: int, scale: float, size: int, region: tuple[float, float], rule: _Rule
) -> Tensor:
    n = x.shape[axis]
    places = _places(n, size, scale, region, rule.coordinates)
    if rule.mode == "nearest":
        y = x.index_select(axis, _nearest(places, rule.nearest).clamp(0, n - 1))
    else:
        matrix = _matrix(places, n, scale, rule).to(x.dtype)
        y = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    if rule.coordinates != "tf_crop_and_resize":
        return y
    shape = [-1 if k == axis else 1 for k in range(x.dim())]
    lost = ((places < 0) | (places > n - 1)).reshape(shape)
    return torch.where(lost, torch.full_like(y, rule.outside), y)


def _places(n: int, size: int, scale: float, region: tuple[float, float], mode: str) -> Tensor:
    """Where each output position lies on the input axis, float64 [size]."""
    k = torch.arange(size, dtype=torch.float64)
    start, end = region
    match mode:
        case "align_corners":
            # ONNX takes the resized length before it is rounded down.
            last = scale * n - 1
            return k * (n - 1) / last if last > 0 else k * 0
        case "asymmetric":
            return k / scale
        case "tf_crop_and_resize":
            if size == 1:
                return k + 0.5 * (start + end) * (n - 1)
            return start * (n - 1) + k * (end - start) * (n - 1) / (size - 1)
        case "pytorch_half_pixel" if size <= 1:
            return k * 0
        case "half_pixel_symmetric":
            adjustment = size / (scale * n)
            return n / 2 * (1 - adjustment) + (k + 0.5) / scale - 0.5
        case _:
            return (k + 0.5) / scale - 0.5


def _nearest(places: Tensor, mode: str) -> Tensor:
    match mode:
        case "round_prefer_floor":
            found = torch.ceil(places - 0.5)
        case "round_prefer_ceil":
            found = torch.floor(places + 0.5)
        case "floor":
            found = torch.floor(places)
        case _:
            found = torch.ceil(places)
    return found.to(torch.int64)


def _matrix(places: Tensor, n: int, scale: float, rule: _Rule) -> Tensor:
    """Weights of the inputs for each output, float64 [outputs, inputs]; edges are repeated."""
    reach = 1 if rule.mode == "linear" else 2
    shrink = min(scale, 1.0) if rule.antialias else 1.0
    first = math.floor(-reach / shrink) + 1
    offsets = torch.arange(first, 2 - first)
    index = torch.floor(places).to(torch.int64).reshape(-1, 1) + offsets
    distance = ((index - places.reshape(-1, 1)) * shrink).abs()
    weights = (1 - distance).clamp(min=0) if reach == 1 else _cubic(distance, rule.cubic_a)
    if rule.exclude_outside:
        weights = torch.where((index < 0) | (index >= n), torch.zeros_like(weights), weights)
    if rule.antialias or rule.exclude_outside:
        weights = weights / weights.sum(1, keepdim=True)
    matrix = weights.new_zeros(len(places), n)
    return matrix.scatter_add(1, index.clamp(0, n - 1), weights)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (1981, equation 4), a its free parameter."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    inside = torch.where(distance <= 1, near, far)
    return torch.where(distance < 2, inside, torch.zeros_like(inside))


OPS: dict[str, Callable[..., Any]] = {"Resize": resize, "Upsample": upsample}
