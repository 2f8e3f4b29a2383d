"""ONNX operators that read or write at computed places, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Gather whole slices; negative indices count from the end."""
    axis = axis % x.dim()
    found = x.index_select(axis, _from_start(indices, x.shape[axis]).reshape(-1))
    return found.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """GatherElements."""
    return torch.gather(x, axis, _from_start(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """GatherND: the last axis of the indices addresses `x` behind the batch axes."""
    batch, depth = x.shape[:batch_dims], indices.shape[-1]
    rest = x.shape[batch_dims + depth :]
    flat = x.reshape(math.prod(batch), -1, *rest)
    places = _linear(indices, x.shape[batch_dims : batch_dims + depth]).reshape(flat.shape[0], -1)
    found = flat[torch.arange(flat.shape[0]).reshape(-1, 1), places]
    return found.reshape(*indices.shape[:-1], *rest)


def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """ScatterElements."""
    places = _from_start(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCE[reduction])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """ScatterND: whole slices at the places that the last axis of the indices gives."""
    depth = indices.shape[-1]
    rest = math.prod(x.shape[depth:])
    flat = x.reshape(-1, rest)
    places = _linear(indices, x.shape[:depth]).reshape(-1, 1).expand(-1, rest)
    values = updates.reshape(-1, rest)
    if reduction == "none":
        return flat.scatter(0, places, values).reshape(x.shape)
    return flat.scatter_reduce(0, places, values, _REDUCE[reduction]).reshape(x.shape)


def tensor_scatter(
    cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """TensorScatter: one run of steps per sample, from its index on."""
    axis = axis % cache.dim()
    steps = torch.arange(update.shape[axis])
    first = torch.zeros(1, dtype=torch.int64) if write_indices is None else write_indices
    places = first.reshape(-1, 1) + steps
    places = places % cache.shape[axis] if mode == "circular" else places
    wide = [places.shape[0], *(1 for _ in cache.shape[1:])]
    wide[axis] = len(steps)
    return cache.scatter(axis, places.reshape(wide).expand(update.shape), update)


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Compress: the slices where the condition holds; elements without an axis."""
    flat = x.reshape(-1) if axis is None else x
    return flat.index_select(axis or 0, torch.nonzero(condition).reshape(-1))


def _from_start(indices: Tensor, size: int) -> Tensor:
    index = indices.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def _linear(indices: Tensor, sizes: torch.Size) -> Tensor:
    """One index into the flattened axes for each tuple of the last axis."""
    total = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for k, size in enumerate(sizes):
        total = total * size + _from_start(indices[..., k], size)
    return total


OPS: dict[str, Callable[..., Any]] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter,
}
