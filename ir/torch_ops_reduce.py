"""ONNX operators that reduce, order or accumulate along axes, in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Axes = Tensor | Sequence[int] | None


def axes_of(x: Tensor, axes: Axes) -> list[int]:
    """Axes as non-negative integers; None means all."""
    if axes is None:
        return list(range(x.dim()))
    given = axes.tolist() if isinstance(axes, Tensor) else axes
    return [int(axis) % max(x.dim(), 1) for axis in given]


def _reduced(
    function: Callable[[Tensor, list[int], bool], Tensor],
    x: Tensor,
    axes: Axes,
    keepdims: int,
    noop_with_empty_axes: int,
) -> Tensor:
    """`function` over the axes; over none where ONNX says that none means none."""
    listed = axes is not None and len(axes) > 0
    if not listed and noop_with_empty_axes:
        return function(x.unsqueeze(0), [0], False)
    if x.dim() == 0:
        return function(x.reshape(1), [0], False)
    return function(x, axes_of(x, axes if listed else None), bool(keepdims))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduction(
        x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        return _reduced(function, x, axes, keepdims, noop_with_empty_axes)

    return reduction


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    return torch.mean(x.double(), axes, keepdim=keep).to(x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(x: Tensor, axes: list[int], keep: bool, *, sign: int) -> Tensor:
    empty = any(x.shape[axis] == 0 for axis in axes)
    if x.dtype == torch.bool:
        return _extreme(x.to(torch.uint8), axes, keep, sign=sign).to(torch.bool)
    if not empty:
        return (torch.amax if sign > 0 else torch.amin)(x, axes, keepdim=keep)
    if x.is_floating_point():
        limit = -sign * torch.inf
    else:
        limit = torch.iinfo(x.dtype).min if sign > 0 else torch.iinfo(x.dtype).max
    kept = [1 if k in axes else n for k, n in enumerate(x.shape) if keep or k not in axes]
    return x.new_full(kept, limit)


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sqrt(_sum_square(x, axes, keep))


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep))


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


def _arg_extreme(x: Tensor, sign: int, axis: int, keepdims: int, last: int) -> Tensor:
    scores = sign * x.to(torch.int64) if not x.is_floating_point() else sign * x
    scores = scores.flip(axis) if last else scores
    found = torch.sort(scores, dim=axis, descending=True, stable=True).indices.narrow(axis, 0, 1)
    found = x.shape[axis] - 1 - found if last else found
    return found if keepdims else found.squeeze(axis)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMax; the first of equals, or the last."""
    return _arg_extreme(x, 1, axis, keepdims, select_last_index)


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMin; the first of equals, or the last."""
    return _arg_extreme(x, -1, axis, keepdims, select_last_index)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Hardmax: one at the first largest element."""
    where = _arg_extreme(x.detach(), 1, axis, 1, 0)
    return torch.zeros_like(x).scatter(axis, where, 1)


def cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumSum."""
    return _cumulative(torch.cumsum, 0, x, axis, exclusive, reverse)


def cumulative_product(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumProd."""
    return _cumulative(torch.cumprod, 1, x, axis, exclusive, reverse)


def _cumulative(
    function: Callable[[Tensor, int], Tensor],
    neutral: int,
    x: Tensor,
    axis: Tensor,
    exclusive: int,
    reverse: int,
) -> Tensor:
    dim = int(axis.reshape(-1).tolist()[0])
    x = x.flip(dim) if reverse else x
    if exclusive:
        first = torch.full_like(x.narrow(dim, 0, 1), neutral)
        x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    found = function(x, dim).to(x.dtype)
    return found.flip(dim) if reverse else found


def top_k(
    x: Tensor, k: Tensor, *, outputs: int, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, ...]:
    """TopK; the lower index first among equals, in order whether asked for or not."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = int(k.reshape(-1).tolist()[0])
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def non_zero(x: Tensor) -> Tensor:
    """NonZero: one column per element."""
    return torch.nonzero(x).T


def unique(
    x: Tensor, *, outputs: int, axis: int | None = None, sorted: int = 1
) -> tuple[Tensor, ...]:
    """Unique values with first positions, inverse and counts, in order of value or of place."""
    dim = 0 if axis is None else axis
    x = x.reshape(-1) if axis is None else x
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=dim)
    places = torch.arange(x.shape[dim])
    first = places.new_full(counts.shape, x.shape[dim])
    first = first.scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = torch.argsort(first)
        values, first, counts = values.index_select(dim, order), first[order], counts[order]
        inverse = torch.argsort(order)[inverse]
    # The values again as a choice among the inputs, which has a gradient.
    return x.index_select(dim, first), first, inverse, counts


def l_normalize(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """LpNormalization; a zero vector stays zero."""
    if p == 1:
        norm = x.abs().sum(axis, keepdim=True)
    else:
        square = (x * x).sum(axis, keepdim=True)
        norm = torch.sqrt(torch.where(square == 0, torch.ones_like(square), square))
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


OPS: dict[str, Callable[..., Any]] = {
    "ArgMax": arg_max,
    "ArgMin": arg_min,
    "CumProd": cumulative_product,
    "CumSum": cumulative_sum,
    "Hardmax": hardmax,
    "LpNormalization": l_normalize,
    "NonZero": non_zero,
    "ReduceL1": _reduction(_l1),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(partial(_extreme, sign=1)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(partial(_extreme, sign=-1)),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_square),
}
SEVERAL: dict[str, Callable[..., Any]] = {"TopK": top_k, "Unique": unique}
