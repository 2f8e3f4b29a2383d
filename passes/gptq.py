"""Rounding that lets later weights of a row make up for the errors of earlier ones.

Everything is per group: weights `[groups, N, K]`, moments `[groups, K, K]`. Errors are those of
the layer's output, `δ C δᵀ` per row for δ = w - ŵ, mean over columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import QuantSpec
    from octavo.passes.weight_matrix import Cells

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]
    Index = NDArray[np.int64]

# Columns whose shares of earlier errors are one product.
_BLOCK = 128
# Rows that are rounded at once hold about so many weights.
_ELEMENTS_AT_ONCE = 1 << 21
_MOST_DAMPING = 1e6


@final
@dataclass(frozen=True)
class RowGrid:
    """The codes that rows may take; scale and zero point have shape `[groups, N, blocks]`.

    Codes of a grid with a `table` `[groups, N, entries]` are those of it, in rising order.
    """

    spec: QuantSpec
    scale: Float32
    zero: Float32
    cells: Cells
    table: Float32 | None = None

    def part(self, rows: slice) -> RowGrid:
        """The grid of some rows of every group."""
        cells = replace(self.cells, index=self.cells.index[:, rows])
        table = None if self.table is None else self.table[:, rows]
        return RowGrid(self.spec, self.scale[:, rows], self.zero[:, rows], cells, table)

    def nearest(self, weight: Float32) -> Float32:
        """The nearest codes of `[groups, N, K]`, as floats."""
        block = self.cells.block
        scale, zero = self.scale[..., block], self.zero[..., block]
        if self.table is not None:
            return table_codes(weight, scale, zero, self.table[:, :, None])
        return codes_of(weight, scale, zero, self.spec)

    def values(self, codes: Float32) -> Float32:
        """What codes `[groups, N, K]` stand for."""
        block = self.cells.block
        values: Float32 = codes - self.zero[..., block]
        values *= self.scale[..., block]
        return values

    @property
    def shared(self) -> bool:
        """Whether rows share scales."""
        return self.cells.shared


def codes_of(real: Float32, scale: Float32, zero: Float32, spec: QuantSpec) -> Float32:
    """The nearest codes, as floats, where scale and zero point broadcast."""
    if spec.binary:
        return np.where(real < 0, np.float32(-1), np.float32(1))
    if spec.floating:
        codes = np.clip(np.divide(real, scale), spec.qmin, spec.qmax)
        return codes.astype(spec.onnx_type.numpy()).astype(np.float32)
    return _codes(real, scale, zero, np.float32(spec.qmin), np.float32(spec.qmax))


def table_codes(real: Float32, scale: Float32, zero: Float32, table: Float32) -> Float32:
    """The nearest entries of `table`, whose last axis rises, the lower one in a tie."""
    codes = real / scale + zero
    index = np.zeros(codes.shape, np.int64)
    for low, high in pairwise(np.moveaxis(table, -1, 0)):
        index += codes > (low + high) / 2
    wide = np.broadcast_to(table, (*codes.shape, table.shape[-1]))
    return np.take_along_axis(wide, index[..., None], axis=-1)[..., 0]


def _codes(
    real: Float32, scale: Float32, zero: Float32, low: np.float32, high: np.float32
) -> Float32:
    codes: Float32 = np.divide(real, scale)
    np.rint(codes, out=codes)
    codes += zero
    np.maximum(codes, low, out=codes)
    np.minimum(codes, high, out=codes)
    return codes


@final
@dataclass(frozen=True)
class Factor:
    """C = U·Uᵀ with its columns in `order` `[groups, K]`, damped.

    `unit` is U (upper triangular) with every column divided by its diagonal entry: the share of
    each error that the column takes up.
    """

    order: Index
    unit: Float32

    @staticmethod
    def of(second: Float32, damping: float, act_order: bool) -> Factor:
        """Factorize moments `[groups, K, K]`; `damping` is relative to their mean diagonal.

        Columns that never differ from zero are rounded to nearest. Where the damped moments are
        singular, damping grows by powers of ten.
        """
        diagonal = np.einsum("gkk->gk", second).astype(np.float64)
        by_size = np.argsort(-diagonal, axis=1, kind="stable")
        order = by_size if act_order else np.broadcast_to(np.arange(second.shape[1]), by_size.shape)
        unit = np.empty_like(second)
        for g, own in enumerate(order):
            ordered = second[g][np.ix_(own, own)].astype(np.float64)
            unit[g] = _unit(upper_factor(ordered, damping))
        return Factor(np.ascontiguousarray(order), unit)


def upper_factor(second: Float64, damping: float) -> Float64:
    """The upper triangular U with `C + λ = U·Uᵀ`."""
    width = len(second)
    mean = float(np.trace(second)) / max(width, 1)
    scale = mean if mean > 0 and np.isfinite(mean) else 1.0
    dead = np.diagonal(second) <= 0
    while damping < _MOST_DAMPING:
        damped = second + np.diag(np.where(dead, scale, damping * scale))
        try:
            # Reversed rows and columns turn the lower factor into the upper one.
            return np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping = max(damping * 10, 1e-6)
    return np.eye(width)


def _unit(upper: Float64) -> Float32:
    return np.asarray(upper / np.diagonal(upper), np.float32)


def gptq(weight: Float32, factor: Factor, grid: RowGrid) -> Float32:
    """Codes `[groups, N, K]` that keep `δ C δᵀ` small (Frantar et al. 2023, algorithm 1).

    In the order of the factor, every column is rounded to the code nearest to the value that
    makes up best for all errors before it: `w_c + sum_{r<c} δ_r U_rc / U_cc`. This is Babai's
    nearest plane, which is GPTQ without an inverse (Chen et al. 2025, arXiv 2507.18553).
    """
    groups, rows, width = weight.shape
    order = factor.order
    real = _of_columns(weight, order)
    error, codes = np.empty_like(real), np.empty_like(real)
    block = grid.cells.block[order]
    if grid.table is not None:
        rounding = partial(table_codes, table=grid.table)
    elif grid.spec.binary or grid.spec.floating:
        rounding = partial(codes_of, spec=grid.spec)
    else:
        low, high = np.float32(grid.spec.qmin), np.float32(grid.spec.qmax)
        rounding = partial(_codes, low=low, high=high)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        unit = factor.unit[:, :stop, start:stop]
        target = real[:, start:stop].copy()
        if start:
            target += np.matmul(unit[:, :start].transpose(0, 2, 1), error[:, :start])
        own = np.ascontiguousarray(unit[:, start:].transpose(0, 2, 1))
        scale, zero = (_of_columns(a, block[:, start:stop]) for a in (grid.scale, grid.zero))
        for k in range(stop - start):
            at = start + k
            if k:
                target[:, k] += np.matmul(own[:, k, None, :k], error[:, start:at])[:, 0]
            codes[:, at] = rounding(target[:, k], scale[:, k], zero[:, k])
            error[:, at] = real[:, at] - (codes[:, at] - zero[:, k]) * scale[:, k]
    back = np.empty((groups, width, rows), np.float32)
    back[np.arange(groups)[:, None], order] = codes
    return np.ascontiguousarray(back.transpose(0, 2, 1))


def _of_columns(array: Float32, index: Index) -> Float32:
    """Of `[groups, N, K]`, columns with an index `[groups, n]`, as rows: `[groups, n, N]`."""
    turned = np.ascontiguousarray(array.transpose(0, 2, 1))
    return turned[np.arange(len(turned))[:, None], index]


def row_errors(error: Float32, second: Float32) -> Float64:
    """`δ C δᵀ` of every row, shape `[groups, N]`."""
    product = np.matmul(error, second)
    product *= error
    return np.asarray(product.sum(axis=2, dtype=np.float64))


def output_error(wanted: Float32, given: Float32 | None, second: Float32) -> float:
    """`δ C δᵀ` over all rows of `wanted` minus `given` (`None`: zeros), a few rows at a time."""
    groups, rows, width = wanted.shape
    total = 0.0
    for part in _slices(rows, groups * width):
        own = wanted[:, part]
        error = own if given is None else own - given[:, part]
        total += float(row_errors(error, second).sum())
    return total


def row_parts(grid: RowGrid, width: int) -> Iterator[slice]:
    """Slices of rows that fit in memory together; all rows where they share scales."""
    groups, rows = grid.scale.shape[:2]
    return iter([slice(0, rows)]) if grid.shared else _slices(rows, groups * width)


def _slices(rows: int, weights_per_row: int) -> Iterator[slice]:
    count = max(1, _ELEMENTS_AT_ONCE // max(1, weights_per_row))
    for start in range(0, rows, count):
        yield slice(start, start + count)
