"""One weight rounded with the moments of what it multiplies, never worse than to nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.passes.gptq import Factor, RowGrid, gptq, row_errors, row_parts
from octavo.passes.scale_refit import refitted, stored_scale

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from octavo.ir.quant import QuantParams
    from octavo.passes.weight_matrix import WeightMatrix

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

_NARROWEST = 0.6
# Rows of several ranges that are rounded together hold about so many weights.
_STACKED_ELEMENTS = 1 << 21


@final
@dataclass(frozen=True)
class GptqOptions:
    """How weights are rounded; `damping` is relative to the mean diagonal of the moments.

    So many `ranges` are tried for every row, from the given one down to 0.6 of it.
    """

    damping: float = 0.01
    act_order: bool = True
    refit: bool = True
    ranges: int = 4

    @property
    def ratios(self) -> NDArray[np.float32]:
        """What scales are multiplied with, one after another."""
        return np.linspace(1, _NARROWEST, max(1, self.ranges), dtype=np.float32)


@final
@dataclass(frozen=True)
class Rounding:
    """A weight on a grid, in the shape of its constant.

    `before` and `after` are squared errors of the layer's output, of nearest codes and of these.
    """

    rounded: Float32
    params: QuantParams
    before: float
    after: float


def gptq_weight(
    weight: Float32,
    params: QuantParams,
    matrix: WeightMatrix,
    second: Float32,
    options: GptqOptions | None = None,
    target: Float32 | None = None,
    table: Float32 | None = None,
    factor: Factor | None = None,
) -> Rounding:
    """Codes by GPTQ, then scales that suit them; a row that is no better stays at nearest.

    `second` has shape `[groups, K, K]`. The rows `target` `[groups, N, K]` stand for the weight
    where the layer's input has changed: its errors count, and the nearest codes are still those
    of the weight. Of a `table` in rising order, only its codes are used. `factor` is that of
    `second`, where it is known.
    """
    options = options or GptqOptions()
    rows = matrix.rows(weight)
    if not rows.size:
        return Rounding(weight, params, 0.0, 0.0)
    scale, zero, cells = matrix.scales(params)
    wide = None if table is None else np.broadcast_to(table, (*rows.shape[:2], table.size))
    grid = RowGrid(params.spec, scale, zero.astype(np.float32), cells, wide)
    factor = factor or Factor.of(second, options.damping, options.act_order)
    layer = _Layer(second, factor, options)
    wanted = rows if target is None else target
    made = np.empty_like(rows)
    scales, zeros = scale.copy(), grid.zero.copy()
    before = after = 0.0
    for part in row_parts(grid, matrix.width * len(options.ratios)):
        found = layer.rounded(rows[:, part], wanted[:, part], grid.part(part))
        made[:, part] = found.grid.values(found.codes)
        scales[:, part], zeros[:, part] = found.grid.scale, found.grid.zero
        before, after = before + found.before, after + found.after
    new = matrix.params(params.spec, scales, zeros)
    return Rounding(matrix.restore(made), new, before, after)


@final
@dataclass(frozen=True)
class _Found:
    """Codes on a grid with their errors per row, and the sum of those of nearest codes."""

    codes: Float32
    grid: RowGrid
    errors: Float64
    before: float = 0.0

    @property
    def after(self) -> float:
        return float(self.errors.sum())

    def improved(self, other: _Found) -> _Found:
        """The better of two per row, or as a whole where rows share scales."""
        better = other.errors < self.errors
        if self.grid.shared:
            better = np.full_like(better, other.after < self.after)
        wins = better[..., None]
        grid = replace(
            self.grid,
            scale=np.where(wins, other.grid.scale, self.grid.scale),
            zero=np.where(wins, other.grid.zero, self.grid.zero),
        )
        codes = np.where(wins, other.codes, self.codes)
        return replace(
            self, codes=codes, grid=grid, errors=np.where(better, other.errors, self.errors)
        )


@final
@dataclass(frozen=True)
class _Layer:
    """The moments of a layer, factorized once for all its rows."""

    second: Float32
    factor: Factor
    options: GptqOptions

    def rounded(self, weight: Float32, target: Float32, grid: RowGrid) -> _Found:
        """The best codes for rows that fit in memory, `[groups, N, K]`."""
        best = self._found(target, grid.nearest(weight), grid)
        best = replace(best, before=best.after)
        for codes, tried in self._tried(target, grid):
            best = best.improved(self._found(target, codes, tried))
        if not self.options.refit:
            return best
        suited = refitted(target, best.codes, self.second, best.grid)
        return best.improved(self._found(target, best.codes, suited))

    def _tried(self, target: Float32, grid: RowGrid) -> Iterator[tuple[Float32, RowGrid]]:
        """Codes by GPTQ for every range, each with its grid.

        A step of GPTQ takes a column of all rows: those of several ranges are rounded together, as
        many as fit in memory.
        """
        rows = target.shape[1]
        grids = [
            replace(grid, scale=stored_scale(grid.scale * ratio, grid))
            for ratio in self.options.ratios
        ]
        count = max(1, _STACKED_ELEMENTS // target.size)
        for start in range(0, len(grids), count):
            some = grids[start : start + count]
            codes = gptq(np.tile(target, (1, len(some), 1)), self.factor, _stacked(some))
            for at, tried in enumerate(some):
                yield codes[:, at * rows : (at + 1) * rows], tried

    def _found(self, target: Float32, codes: Float32, grid: RowGrid) -> _Found:
        errors = row_errors(target - grid.values(codes), self.second)
        return _Found(codes, grid, errors)


def _stacked(grids: Sequence[RowGrid]) -> RowGrid:
    """The rows of several grids of one weight, one grid below the other."""
    first, count = grids[0], (1, len(grids), 1)
    index = np.tile(first.cells.index, count)
    return RowGrid(
        first.spec,
        np.concatenate([grid.scale for grid in grids], axis=1),
        np.concatenate([grid.zero for grid in grids], axis=1),
        replace(first.cells, index=index),
        None if first.table is None else np.tile(first.table, count),
    )
