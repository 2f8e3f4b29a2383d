"""The scales, and zero points, that suit given codes best: a least-squares problem per row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.float4 import stored_scales
from octavo.ir.multiples import most_multiple, whole_multiples
from octavo.passes.gptq import RowGrid, row_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

# Systems of more scales a row cost more than they gain.
_MOST_BLOCKS = 128
_RIDGE = 1e-6
_TINY = float(np.finfo(np.float32).tiny)


def refitted(weight: Float32, codes: Float32, second: Float32, grid: RowGrid) -> RowGrid:
    """The grid that minimises `δ C δᵀ` for codes `[groups, N, K]` that stay as they are.

    Per row, all blocks together: the normal equations of `w ≈ s_b (q - z_b)` in the metric C
    (decoupleQ, arXiv 2404.12759, the step for s and z). Where the grid is not symmetric, integer
    zero points are found first. Rows whose error does not fall keep what they have.
    """
    blocks = grid.scale.shape[2]
    if blocks > _MOST_BLOCKS or (grid.shared and blocks > 1):
        return grid
    best = _kept_where_better(weight, codes, second, grid, _scaled(weight, codes, second, grid))
    if not grid.spec.symmetric and not grid.spec.binary and not grid.shared:
        moved = _moved(weight, codes, second, best)
        moved = _scaled(weight, codes, second, moved)
        best = _kept_where_better(weight, codes, second, best, moved)
    return best


def _scaled(weight: Float32, codes: Float32, second: Float32, grid: RowGrid) -> RowGrid:
    """Other scales, the zero points as they are."""
    centred = codes - grid.zero[..., grid.cells.block]
    residual = weight - grid.values(codes)
    (change,) = _solved(residual, [centred], second, grid)
    return replace(grid, scale=stored_scale(grid.scale + change, grid))


def _moved(weight: Float32, codes: Float32, second: Float32, grid: RowGrid) -> RowGrid:
    """Other zero points: those nearest to the offsets that go with the best scales."""
    centred = codes - grid.zero[..., grid.cells.block]
    residual = weight - grid.values(codes)
    change, offset = _solved(residual, [centred, np.ones_like(codes)], second, grid)
    scale = stored_scale(grid.scale + change, grid)
    zero = np.clip(np.rint(grid.zero - offset / scale), grid.spec.qmin, grid.spec.qmax)
    return replace(grid, scale=scale, zero=zero.astype(np.float32))


def _solved(
    residual: Float32, features: Sequence[Float32], second: Float32, grid: RowGrid
) -> Sequence[Float32]:
    """Multiples of every feature, `[groups, N, blocks]` each, that explain the residual best."""
    groups, rows, blocks = grid.scale.shape
    count = len(features)
    width = len(grid.cells.block)
    even = np.array_equal(grid.cells.block, np.arange(width) * blocks // width)
    order = slice(None) if even else np.argsort(grid.cells.block, kind="stable")
    starts = np.searchsorted(grid.cells.block[order], np.arange(blocks))
    pulled = np.matmul(residual, second)
    normal = np.empty((groups, rows, count, blocks, count, blocks))
    wanted = np.empty((groups, rows, count, blocks))
    for f, feature in enumerate(features):
        wanted[:, :, f] = _summed(feature * pulled, order, starts)
        for b in range(blocks):
            columns = np.flatnonzero(grid.cells.block == b)
            product = np.matmul(feature[..., columns], second[:, columns])
            for other, second_feature in enumerate(features):
                normal[:, :, f, b, other] = _summed(product * second_feature, order, starts)
    if grid.shared:
        normal, wanted = _pooled(normal, grid), _pooled(wanted, grid)
    size = count * blocks
    matrix, right = normal.reshape(groups, rows, size, size), wanted.reshape(groups, rows, size)
    found = np.linalg.solve(_regular(matrix), right[..., None])[..., 0]
    split = found.reshape(groups, rows, count, blocks).astype(np.float32)
    return [split[:, :, f] for f in range(count)]


def _summed(array: Float32, order: NDArray[np.intp] | slice, starts: NDArray[np.intp]) -> Float64:
    """Sums over the columns of each block: `[groups, N, blocks]`."""
    return np.add.reduceat(array[..., order], starts, axis=2, dtype=np.float64)


def _pooled(array: Float64, grid: RowGrid) -> Float64:
    """Sums over all rows that share a scale; there is one block a row."""
    index = grid.cells.index.reshape(-1)
    flat = array.reshape(index.size, -1)
    total = np.zeros((int(index.max(initial=-1)) + 1, flat.shape[1]))
    np.add.at(total, index, flat)
    return total[index].reshape(array.shape)


def _regular(matrix: Float64) -> Float64:
    """The matrix with a small ridge; scales that nothing depends on stay as they are."""
    diagonal = np.einsum("grss->grs", matrix)
    mean = diagonal.mean(axis=2, keepdims=True)
    ridge = np.where(diagonal > 0, _RIDGE * mean, np.where(mean > 0, mean, 1.0))
    return matrix + ridge[..., None] * np.eye(matrix.shape[-1])


def stored_scale(scale: Float32, old: RowGrid) -> Float32:
    """A scale as it is stored, the old one where it cannot be."""
    if old.spec.multiples:
        kept = np.where(np.isfinite(scale) & (scale > _TINY), scale, old.scale)
        return whole_multiples(kept, (2,), most_multiple(old.spec.bits, old.spec.symmetric))
    if old.spec.float4:
        return stored_scales(np.where(np.isfinite(scale) & (scale > _TINY), scale, old.scale))
    if old.spec.half_scales:
        with np.errstate(over="ignore"):
            scale = scale.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(scale) & (scale > _TINY), scale, old.scale)


def _kept_where_better(
    weight: Float32, codes: Float32, second: Float32, old: RowGrid, new: RowGrid
) -> RowGrid:
    """`new` in the rows whose error it lowers; in all or none where rows share scales."""
    before = row_errors(weight - old.values(codes), second)
    after = row_errors(weight - new.values(codes), second)
    better = after < before
    if old.shared:
        better = np.full_like(better, after.sum() < before.sum())
    wins = better[..., None]
    return replace(
        old, scale=np.where(wins, new.scale, old.scale), zero=np.where(wins, new.zero, old.zero)
    )
