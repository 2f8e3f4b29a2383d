"""One weight rounded with the moments of what it multiplies, never worse than to nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.passes.gptq import Factor, RowGrid, gptq, row_errors, row_parts
from octavo.passes.scale_refit import refitted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import QuantParams
    from octavo.passes.weight_matrix import WeightMatrix

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]


@final
@dataclass(frozen=True)
class GptqOptions:
    """How weights are rounded; `damping` is relative to the mean diagonal of the moments."""

    damping: float = 0.01
    act_order: bool = True
    refit: bool = True


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
) -> Rounding:
    """Codes by GPTQ, then scales that suit them; a row that is no better stays at nearest.

    `second` has shape `[groups, K, K]`. The rows `target` `[groups, N, K]` stand for the weight
    where the layer's input has changed: its errors count, and the nearest codes are still those
    of the weight.
    """
    options = options or GptqOptions()
    rows = matrix.rows(weight)
    if not rows.size:
        return Rounding(weight, params, 0.0, 0.0)
    scale, zero, cells = matrix.scales(params)
    grid = RowGrid(params.spec, scale, zero.astype(np.float32), cells)
    layer = _Layer(second, Factor.of(second, options.damping, options.act_order), options)
    wanted = rows if target is None else target
    made = np.empty_like(rows)
    scales, zeros = scale.copy(), grid.zero.copy()
    before = after = 0.0
    for part in row_parts(grid, matrix.width):
        found = layer.rounded(rows[:, part], wanted[:, part], grid.part(part))
        made[:, part] = found.grid.values(found.codes)
        scales[:, part], zeros[:, part] = found.grid.scale, found.grid.zero
        before, after = before + found.before, after + found.after
    new = matrix.params(params.spec, scales, zeros)
    return Rounding(matrix.restore(made), new, before, after)


@final
@dataclass(frozen=True)
class _Found:
    codes: Float32
    grid: RowGrid
    before: float
    after: float


@final
@dataclass(frozen=True)
class _Layer:
    """The moments of a layer, factorized once for all its rows."""

    second: Float32
    factor: Factor
    options: GptqOptions

    def rounded(self, weight: Float32, target: Float32, grid: RowGrid) -> _Found:
        """Rows that fit in memory, `[groups, N, K]`."""
        nearest = grid.nearest(weight)
        before = self._errors(target, nearest, grid)
        codes, new = gptq(target, self.factor, grid), grid
        if self.options.refit:
            new = refitted(target, codes, self.second, grid)
        after = self._errors(target, codes, new)
        better = after < before
        if grid.shared:
            better = np.full_like(better, after.sum() < before.sum())
        wins = better[..., None]
        best = replace(
            grid,
            scale=np.where(wins, new.scale, grid.scale),
            zero=np.where(wins, new.zero, grid.zero),
        )
        kept = np.where(wins, codes, nearest)
        left = np.where(better, after, before)
        return _Found(kept, best, float(before.sum()), float(left.sum()))

    def _errors(self, target: Float32, codes: Float32, grid: RowGrid) -> Float64:
        return row_errors(target - grid.values(codes), self.second)
