"""ONNX operators that make, move and choose elements, in torch.

Shapes are integer tensors that are computed as the graph runs, so that every size may differ
from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from octavo.ir.torch_ops_reduce import Axes, axes_of


def integers(x: Tensor | Sequence[int]) -> list[int]:
    """The elements as Python integers."""
    flat = x.reshape(-1).tolist() if isinstance(x, Tensor) else x
    return [int(n) for n in flat]


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Shape, or a slice of it."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def size(x: Tensor) -> Tensor:
    """Size: the number of elements."""
    return torch.tensor(x.numel())


def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Reshape; a zero keeps the size of the input."""
    sizes = integers(shape)
    if not allowzero:
        sizes = [x.shape[k] if n == 0 else n for k, n in enumerate(sizes)]
    if x.numel() == 0 and -1 in sizes:
        sizes[sizes.index(-1)] = 0
    return x.reshape(sizes)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to a matrix."""
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeeze(x: Tensor, axes: Axes = None) -> Tensor:
    """Squeeze."""
    return x.squeeze() if axes is None else x.squeeze(axes_of(x, axes))


def unsqueeze(x: Tensor, axes: Tensor | Sequence[int]) -> Tensor:
    """Unsqueeze; axes count in the result."""
    given = integers(axes)
    for axis in sorted(axis % (x.dim() + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Transpose; all axes reversed without `perm`."""
    return x.permute(list(perm) if perm else list(range(x.dim()))[::-1])


def concat(*xs: Tensor, axis: int) -> Tensor:
    """Concat."""
    return torch.cat(xs, axis)


def split(
    x: Tensor,
    split: Tensor | Sequence[int] | None = None,
    *,
    outputs: int,
    axis: int = 0,
    num_outputs: int | None = None,
) -> tuple[Tensor, ...]:
    """Split into the given sizes, or into equal parts of which the last may be smaller."""
    if split is not None:
        return torch.split_with_sizes(x, integers(split), axis)
    part = -(-x.shape[axis] // (num_outputs or outputs))
    sizes = [part] * ((num_outputs or outputs) - 1)
    return torch.split_with_sizes(x, [*sizes, x.shape[axis] - sum(sizes)], axis)


def slices(
    x: Tensor,
    starts: Tensor | Sequence[int],
    ends: Tensor | Sequence[int],
    axes: Tensor | Sequence[int] | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Slice, with steps of either sign."""
    first, last = integers(starts), integers(ends)
    where = list(range(len(first))) if axes is None else axes_of(x, axes)
    strides = [1] * len(first) if steps is None else integers(steps)
    for axis, low, high, step in zip(where, first, last, strides, strict=True):
        n = x.shape[axis]
        # Python's name for the place before the first element is None.
        chosen = range(n)[low : None if step < 0 and high < -n else high : step]
        if step == 1:
            x = x.narrow(axis, chosen.start if len(chosen) else 0, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Expand, either side broadcasting."""
    sizes = integers(shape)
    missing = max(len(sizes) - x.dim(), 0)
    whole = [1] * (x.dim() - len(sizes)) + sizes
    own = [1] * missing + list(x.shape)
    return x.expand([a if b == 1 else b for a, b in zip(own, whole, strict=True)])


def tile(x: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return x.repeat(integers(repeats))


def pad(
    x: Tensor,
    pads: Tensor | Sequence[int],
    value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Pad, or crop where a number is negative; constant, edge, reflect and wrap."""
    listed = integers(pads)
    where = axes_of(x, axes)
    before, after = listed[: len(where)], listed[len(where) :]
    if mode == "constant":
        widths = [0] * (2 * x.dim())
        for axis, low, high in zip(where, before, after, strict=True):
            last = 2 * (x.dim() - 1 - axis)
            widths[last : last + 2] = [low, high]
        padded = functional.pad(x, widths)
        if value is None or not value.numel():
            return padded
        inside = functional.pad(torch.ones(x.shape, dtype=torch.bool), widths)
        return torch.where(inside, padded, value.reshape(()))
    for axis, low, high in zip(where, before, after, strict=True):
        n = x.shape[axis]
        index = torch.arange(-low, n + high)
        if mode == "edge":
            index = index.clamp(0, n - 1)
        elif mode == "wrap":
            index = index % n
        elif n > 1:
            index = (n - 1) - ((index % (2 * n - 2)) - (n - 1)).abs()
        x = x.index_select(axis, index.clamp(0, n - 1))
    return x


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DepthToSpace in depth-column-row or column-row-depth order."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        split_up = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        split_up = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return split_up.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """SpaceToDepth, the inverse of DepthToSpace."""
    n, c, h, w = x.shape
    b = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    cut = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return cut.reshape(n, c * b * b, h // b, w // b)


def reverse_sequence(
    x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """ReverseSequence: the first `lengths[k]` steps of sequence k, the rest stays."""
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(moved.shape[1]).expand(moved.shape[0], -1)
    ends = lengths.to(torch.int64).reshape(-1, 1)
    index = torch.where(steps < ends, ends - 1 - steps, steps)
    found = moved[torch.arange(moved.shape[0]).reshape(-1, 1), index]
    return found.movedim((0, 1), (batch_axis, time_axis))


def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Range."""
    first, last, step = (n.reshape(-1).tolist()[0] for n in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0)
    steps = torch.arange(count) * delta.reshape(())
    return (start.reshape(()) + steps).to(start.dtype)


def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """ConstantOfShape; float32 zeros without a value."""
    one = torch.zeros(1) if value is None else value
    return one.reshape(-1)[0].expand(integers(shape))


def eye_like(x: Tensor, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    """EyeLike: ones on the k-th diagonal."""
    rows, columns = (torch.arange(n) for n in x.shape)
    return (columns - rows.reshape(-1, 1) == k).to(dtype or x.dtype)


def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """Trilu: the upper or lower triangle."""
    diagonal = 0 if k is None else integers(k)[0]
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """OneHot; an index out of range gives a row of off values."""
    count = int(depth.reshape(-1).tolist()[0])
    given = indices.to(torch.int64)
    given = torch.where(given < 0, given + count, given)
    hot = given.unsqueeze(-1) == torch.arange(count)
    found = torch.where(hot, values[1], values[0])
    return found.movedim(-1, axis if axis >= 0 else axis + found.dim())


def einsum(*xs: Tensor, equation: str) -> Tensor:
    """Einsum."""
    product: Tensor = torch.einsum(equation, *xs)
    return product


def center_crop_pad(x: Tensor, shape: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """CenterCropPad: crop or pad with zeros around the middle."""
    where = axes_of(x, axes)
    for axis, wanted in zip(where, integers(shape), strict=True):
        n = x.shape[axis]
        if wanted < n:
            x = x.narrow(axis, (n - wanted) // 2, wanted)
        else:
            low = (wanted - n) // 2
            x = pad(x, [low, wanted - n - low], axes=torch.tensor([axis]))
    return x


OPS: dict[str, Callable[..., Any]] = {
    "CenterCropPad": center_crop_pad,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Einsum": einsum,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "OneHot": one_hot,
    "Pad": pad,
    "Range": arange,
    "Reshape": reshape,
    "ReverseSequence": reverse_sequence,
    "Shape": shape,
    "Size": size,
    "Slice": slices,
    "SpaceToDepth": space_to_depth,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
SEVERAL: dict[str, Callable[..., Any]] = {"Split": split}
