"""Pooling of ONNX in torch: windows with pads on either side, dilations and rounding up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MAX_POOL = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


def window_pads(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    auto_pad: str,
    pads: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Elements to add before and after each spatial axis (ONNX Conv and pools, auto_pad)."""
    n = len(kernel)
    if auto_pad == "VALID" or (auto_pad == "NOTSET" and not pads):
        return [0] * n, [0] * n
    if auto_pad == "NOTSET" and pads is not None:
        return list(pads[:n]), list(pads[n:])
    low, high = [], []
    for k in range(n):
        size, span = x.shape[k + 2], (kernel[k] - 1) * dilations[k] + 1
        total = max((-(-size // strides[k]) - 1) * strides[k] + span - size, 0)
        small = total // 2
        low.append(small if auto_pad == "SAME_UPPER" else total - small)
        high.append(total - low[-1])
    return low, high


def max_pool(
    x: Tensor,
    *,
    outputs: int,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """MaxPool; indices count in the whole flattened input."""
    n = len(kernel_shape)
    stride, dilation = list(strides or [1] * n), list(dilations or [1] * n)
    low, high = window_pads(x, kernel_shape, stride, dilation, auto_pad, pads)
    more = _rounded_up(x, kernel_shape, stride, dilation, low, high) if ceil_mode else [0] * n
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    padded = _spread(x, low, [h + m for h, m in zip(high, more, strict=True)], lowest)
    pool = _MAX_POOL[n - 1]
    kernel = list(kernel_shape)
    if outputs == 1:
        if not x.is_floating_point():
            return (pool(padded.double(), kernel, stride, 0, dilation).to(x.dtype),)
        return (pool(padded, kernel, stride, 0, dilation),)
    y, places = pool(padded, kernel, stride, 0, dilation, return_indices=True)
    return y, _whole_indices(x, padded, places, low, storage_order)


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """AveragePool; what rounding up adds never counts, pads count if asked for."""
    n = len(kernel_shape)
    stride, dilation = list(strides or [1] * n), list(dilations or [1] * n)
    low, high = window_pads(x, kernel_shape, stride, dilation, auto_pad, pads)
    more = _rounded_up(x, kernel_shape, stride, dilation, low, high) if ceil_mode else [0] * n
    sums = _window_sum(_spread(x, low, _plus(high, more)), kernel_shape, stride, dilation)
    ones = x.new_ones(1, 1, *x.shape[2:])
    if count_include_pad:
        counted = _spread(_spread(ones, low, high, 1), [0] * n, more)
    else:
        counted = _spread(ones, low, _plus(high, more))
    return sums / _window_sum(counted, kernel_shape, stride, dilation)


def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """LpPool: the p-norm of each window."""
    n = len(kernel_shape)
    stride, dilation = list(strides or [1] * n), list(dilations or [1] * n)
    low, high = window_pads(x, kernel_shape, stride, dilation, auto_pad, pads)
    more = _rounded_up(x, kernel_shape, stride, dilation, low, high) if ceil_mode else [0] * n
    powers = _spread(x.abs() ** p, low, _plus(high, more))
    return _window_sum(powers, kernel_shape, stride, dilation) ** (1 / p)


def global_average_pool(x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    """GlobalMaxPool."""
    return x.amax(list(range(2, x.dim())), keepdim=True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """GlobalLpPool."""
    return (x.abs() ** p).sum(list(range(2, x.dim())), keepdim=True) ** (1 / p)


def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """MaxUnpool; indices count in the flattened result without `output_shape`."""
    n = len(kernel_shape)
    stride, cut = strides or [1] * n, pads or [0] * (2 * n)
    sizes = [
        (x.shape[k + 2] - 1) * stride[k] + kernel_shape[k] - cut[k] - cut[k + n] for k in range(n)
    ]
    plain = [*x.shape[:2], *sizes]
    whole = torch.Size(plain).numel()
    found = x.new_zeros(whole).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(plain)
    if output_shape is None:
        return found
    missing = [a - b for a, b in zip(output_shape.tolist()[2:], sizes, strict=True)]
    return _spread(found, [0] * n, missing)


def col2im(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Col2Im: the sum of overlapping blocks; x is [batch, channels · block, places]."""
    image, block = image_shape.tolist(), block_shape.tolist()
    n = len(image)
    gaps, cut, steps = dilations or [1] * n, pads or [0] * (2 * n), strides or [1] * n
    whole = [image[k] + cut[k] + cut[k + n] for k in range(n)]
    index = torch.zeros((), dtype=torch.int64)
    for k in range(n):
        places = (whole[k] - (block[k] - 1) * gaps[k] - 1) // steps[k] + 1
        grid = torch.arange(block[k]).reshape(-1, 1) * gaps[k] + torch.arange(places) * steps[k]
        # Axes of the index: the block's axes, then those of the places.
        shape = [1] * (2 * n)
        shape[k], shape[n + k] = block[k], places
        index = index * whole[k] + grid.reshape(shape)
    flat = x.reshape(x.shape[0], -1, index.numel())
    summed = flat.new_zeros(*flat.shape[:2], torch.Size(whole).numel())
    summed = summed.index_add(2, index.reshape(-1), flat).reshape(*flat.shape[:2], *whole)
    return _spread(summed, [-c for c in cut[:n]], [-c for c in cut[n:]])


def _rounded_up(
    x: Tensor,
    kernel: Sequence[int],
    stride: list[int],
    dilation: list[int],
    low: list[int],
    high: list[int],
) -> list[int]:
    """Elements that the last window of each axis reaches past the padded input.

    A window that would start in the padding behind is dropped.
    """
    more = []
    for k, width in enumerate(kernel):
        span = (width - 1) * dilation[k] + 1
        padded = x.shape[k + 2] + low[k] + high[k]
        count = -(-(padded - span) // stride[k]) + 1
        if (count - 1) * stride[k] >= x.shape[k + 2] + low[k]:
            count -= 1
        more.append(max((count - 1) * stride[k] + span - padded, 0))
    return more


def _window_sum(x: Tensor, kernel: Sequence[int], stride: list[int], dilation: list[int]) -> Tensor:
    for axis, (width, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        span = (width - 1) * gap + 1
        x = x.unfold(axis, span, step)[..., ::gap].sum(-1)
    return x


def _spread(x: Tensor, low: list[int], high: list[int], value: float = 0) -> Tensor:
    if not any(low) and not any(high):
        return x
    pairs = zip(reversed(low), reversed(high), strict=True)
    return functional.pad(x, [width for pair in pairs for width in pair], value=value)


def _plus(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _whole_indices(
    x: Tensor, padded: Tensor, places: Tensor, low: list[int], storage_order: int
) -> Tensor:
    """Indices in a padded plane as indices in the whole unpadded tensor."""
    sizes, rest = list(padded.shape[2:]), places
    coordinates: list[Tensor] = []
    for size in reversed(sizes):
        coordinates.insert(0, rest % size)
        rest = rest // size
    spatial = [c - before for c, before in zip(coordinates, low, strict=True)]
    axes = list(range(len(sizes)))
    flat = torch.zeros_like(places)
    for axis in reversed(axes) if storage_order else axes:
        flat = flat * x.shape[axis + 2] + spatial[axis]
    plane = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(sizes))
    return flat + plane * torch.Size(x.shape[2:]).numel()


OPS: dict[str, Callable[..., Any]] = {
    "AveragePool": average_pool,
    "Col2Im": col2im,
    "GlobalAveragePool": global_average_pool,
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxUnpool": max_unpool,
}
SEVERAL: dict[str, Callable[..., Any]] = {"MaxPool": max_pool}
