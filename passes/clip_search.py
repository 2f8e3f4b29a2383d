"""Which scale loses least of a weight: a search between its whole range and a fifth of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.float4 import stored_scales
from octavo.ir.kernel_codes import channel_unit
from octavo.ir.multiples import most_multiple
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantParams, fitted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from octavo.ir.quant import Granularity, QuantSpec

    Float32 = NDArray[np.float32]

_NARROWEST = 0.2
# The best magnitude of a binary weight lies between the median and the middle of all, and the
# mean is not far from either.
_BINARY = (0.6, 1.8)
# Every so many scales are tried first, then those around the best of them.
_STRIDE = 4
_CHUNK_ELEMENTS = 1 << 16
_TINY = np.finfo(np.float32).tiny
# So many entries tell a grid from other numbers; float32 codes up to 255 are off by 3e-5.
_SAMPLE = 64
_OFF_GRID = 1e-4
_ULPS = (0, 1, -1, 2, -2)


@final
@dataclass(frozen=True)
class ScaleRows:
    """A weight as rows of entries that share a scale.

    The first `scale_axes` axes of `view` are those of the scale; a tensor's scale is one row.
    """

    view: NDArray[np.floating]
    scale_axes: int = 1

    @staticmethod
    def of(weight: NDArray[np.floating], granularity: Granularity) -> ScaleRows:
        """A view, or a copy filled with zeros where blocks do not divide their axis."""
        match granularity:
            case PerTensor():
                return ScaleRows(weight.reshape(1, -1))
            case PerAxis(axis):
                return ScaleRows(np.moveaxis(weight, axis, 0))
            case PerBlock(axis, size):
                axis %= weight.ndim
                short = -weight.shape[axis] % size
                if short:
                    widths = [(0, short if k == axis else 0) for k in range(weight.ndim)]
                    weight = np.pad(weight, widths)
                blocks = weight.shape[axis] // size
                shape = (*weight.shape[:axis], blocks, size, *weight.shape[axis + 1 :])
                turned = np.moveaxis(weight.reshape(shape), axis + 1, -1)
                return ScaleRows(turned, weight.ndim)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return self.view.shape[: self.scale_axes]

    def parts(self, elements: int) -> Iterator[tuple[slice, Float32]]:
        """Slices of the scale's first axis with their rows `[n, K]`, about that many elements."""
        width = math.prod(self.view.shape[self.scale_axes :])
        count = max(elements * len(self.view) // max(self.view.size, 1), 1)
        for start in range(0, len(self.view), count):
            part = slice(start, start + count)
            yield part, np.asarray(self.view[part], np.float32, order="C").reshape(-1, width)


def clipped_params(
    weight: NDArray[np.floating], spec: QuantSpec, p: float = 2.4, steps: int = 80
) -> QuantParams:
    """The parameters that minimise `sum |w - dequantize(quantize(w))|^p` per scale of `spec`.

    `steps` scales lie between the whole range and a fifth of it (Frantar et al. 2023, GPTQ, the
    grid search of its reference implementation), tried from coarse to fine. Where the entries of a
    scale are codes times a number already, that number is found and nothing is lost. An
    asymmetric grid has a code for zero, and narrows both of its ends alike.
    """
    spec = fitted(spec, weight.shape)
    rows = ScaleRows.of(weight, spec.granularity)
    scale = np.ones(rows.scale_shape, np.float32)
    zero = np.zeros(rows.scale_shape, np.int32)
    if weight.size:
        for part, held in rows.parts(_CHUNK_ELEMENTS):
            grid = _Search(held, spec, p).best(steps)
            scale[part] = grid.scale.reshape(scale[part].shape)
            zero[part] = grid.zero.reshape(zero[part].shape)
    if isinstance(spec.granularity, PerTensor):
        scale, zero = scale.reshape(()), zero.reshape(())
    found = QuantParams(spec, scale, zero)
    return _multiples(rows, found, scale, p) if spec.multiples and weight.size else found


def _multiples(rows: ScaleRows, found: QuantParams, wanted: Float32, p: float) -> QuantParams:
    """For every block the multiple of its channel's scale, and the zero point, that lose least."""
    spec, unit = found.spec, np.broadcast_to(channel_unit(found), found.scale.shape)
    scale, zero = found.scale.copy(), found.zero_point.copy()
    for part, held in rows.parts(_CHUNK_ELEMENTS):
        search = _Search(held, spec, p)
        grid = _Grid(*(a[part].reshape(-1).astype(np.float32) for a in (scale, zero)))
        grid = search.on_multiples(grid, unit[part].reshape(-1), wanted[part].reshape(-1))
        scale[part], zero[part] = (a.reshape(scale[part].shape) for a in (grid.scale, grid.zero))
    return QuantParams(spec, scale, zero)


@final
@dataclass(frozen=True)
class _Grid:
    """A scale and a zero point for every row, shape `[n]`."""

    scale: Float32
    zero: Float32


@final
@dataclass(frozen=True)
class _Search:
    """Rows `[n, K]` that are rounded to one grid after another."""

    rows: Float32
    spec: QuantSpec
    p: float

    def best(self, steps: int) -> _Grid:
        """The grid of least error per row among every few of `steps` and those around the best."""
        whole = self._whole()
        grid, error = whole, self._error(whole, whole.scale)
        first, last = _BINARY if self.spec.binary else (1.0, _NARROWEST)
        ratios = np.linspace(first, last, steps, endpoint=False, dtype=np.float32)
        chosen = np.zeros(len(self.rows), np.int64)
        stride = _STRIDE if steps > _STRIDE**2 else 1
        for offsets in (range(stride, steps, stride), range(1 - stride, stride)):
            centre = chosen
            for offset in filter(None, offsets):
                at = np.clip(centre + offset, 0, steps - 1)
                scale = self._stored(np.maximum(whole.scale * ratios[at], _TINY))
                tried = _Grid(scale, whole.zero)
                left = self._error(tried, whole.scale)
                chosen = np.where(left < error, at, chosen)
                grid, error = _better(grid, error, tried, left)
        for tried in self._recognised(np.flatnonzero(error > 0)):
            grid, error = _better(grid, error, tried, self._error(tried, whole.scale))
        return grid

    def on_multiples(self, grid: _Grid, unit: Float32, wanted: Float32) -> _Grid:
        """The grid of least error per row whose scale is one of the three multiples of `unit`
        nearest to `wanted`; its zero point is that of `grid`, or of a range that is cut below.
        """
        error = self._error(grid, unit)
        most = most_multiple(self.spec.bits, self.spec.symmetric)
        nearest = np.rint(wanted / unit)
        low, _ = self._range
        for offset in (-1, 0, 1):
            scale = np.asarray(unit * np.clip(nearest + offset, 1, most), np.float32)
            fresh = np.clip(self.spec.qmin - np.rint(low / scale), self.spec.qmin, self.spec.qmax)
            zeros = (grid.zero,) if self.spec.symmetric else (grid.zero, fresh.astype(np.float32))
            for zero in zeros:
                tried = _Grid(scale, zero)
                grid, error = _better(grid, error, tried, self._error(tried, unit))
        return grid

    def _whole(self) -> _Grid:
        """The grid that covers the range of a row; a row of zeros has scale 1."""
        if self.spec.binary:
            scale = np.abs(self.rows).mean(axis=1, dtype=np.float64).astype(np.float32)
            return _Grid(np.maximum(scale, _TINY), np.zeros_like(scale))
        return self._covering(np.full(len(self.rows), self._levels, np.float32))

    @property
    def _levels(self) -> int:
        """Steps between the ends of the grid, counted from zero where it is symmetric."""
        return self.spec.qmax - (0 if self.spec.symmetric else self.spec.qmin)

    @cached_property
    def _range(self) -> tuple[Float32, Float32]:
        """The least and the largest entry of every row, and zero."""
        return self.rows.min(axis=1, initial=0.0), self.rows.max(axis=1, initial=0.0)

    def _covering(self, levels: Float32) -> _Grid:
        """The grid on which the range of a row takes that many steps."""
        low, high = self._range
        span = np.maximum(high, -low) if self.spec.symmetric else high - low
        scale = np.asarray(span / levels, np.float32)
        # What the largest scale of float4 codes is decides how the others are stored.
        scale = np.where(scale <= _TINY, _TINY if self.spec.float4 else np.float32(1), scale)
        scale = self._stored(scale)
        zero = np.zeros_like(scale)
        if not self.spec.symmetric:
            zero = self.spec.qmin - np.rint(low / scale)
        return _Grid(scale, np.asarray(zero, np.float32))

    def _stored(self, scale: Float32) -> Float32:
        """Scales as a file holds them, where that is coarse."""
        return stored_scales(scale) if self.spec.float4 else scale

    def _error(self, grid: _Grid, unit: Float32) -> NDArray[np.float64]:
        """Per row, in units of a scale so that no power overflows."""
        total = np.zeros(len(self.rows))
        scale, zero, inverse = grid.scale[:, None], grid.zero[:, None], 1 / unit[:, None]
        for start in range(0, self.rows.shape[1], _CHUNK_ELEMENTS):
            real = self.rows[:, start : start + _CHUNK_ELEMENTS]
            error = self._rounded(real, scale, zero)
            np.subtract(real, error, out=error)
            np.multiply(np.abs(error, out=error), inverse, out=error)
            total += np.power(error, np.float32(self.p), out=error).sum(axis=1, dtype=np.float64)
        return total

    def _rounded(self, real: Float32, scale: Float32, zero: Float32) -> Float32:
        """As `quantize` and `dequantize` do it."""
        if self.spec.binary:
            return np.asarray(np.where(real < 0, -scale, scale), np.float32)
        codes = np.divide(real, scale)
        if self.spec.floating:
            np.clip(codes, self.spec.qmin, self.spec.qmax, out=codes)
            codes = codes.astype(self.spec.onnx_type.numpy()).astype(np.float32)
            return np.multiply(codes, scale, out=codes)
        np.rint(codes, out=codes)
        codes += zero
        np.maximum(codes, self.spec.qmin, out=codes)
        np.minimum(codes, self.spec.qmax, out=codes)
        codes -= zero
        return np.multiply(codes, scale, out=codes)

    def _recognised(self, open_rows: NDArray[np.intp]) -> Iterator[_Grid]:
        """Grids on which all entries of some of the rows lie, within what float32 can tell.

        The range of such a row is a whole number of steps, of which there are not many.
        """
        if self.spec.binary or self.spec.floating or not open_rows.size:
            return
        every = max(self.rows.shape[1] // _SAMPLE, 1)
        sample = self.rows[open_rows, ::every]
        levels = np.full(len(self.rows), self._levels, np.float32)
        found = np.zeros(len(self.rows), bool)
        for count in range(1, self._levels + 1):
            scale = self._covering(np.full_like(levels, count)).scale[open_rows, None]
            codes = sample / scale
            fits = np.abs(codes - np.rint(codes)).max(axis=1) < _OFF_GRID
            levels[open_rows[fits & ~found[open_rows]]] = count
            found[open_rows[fits]] = True
        if found.any():
            grid = self._covering(levels)
            for ulps in _ULPS:
                near = (grid.scale.view(np.int32) + np.int32(ulps)).view(np.float32)
                yield _Grid(near, grid.zero)


def _better(
    old: _Grid, old_error: NDArray[np.float64], new: _Grid, new_error: NDArray[np.float64]
) -> tuple[_Grid, NDArray[np.float64]]:
    wins = new_error < old_error
    scale, zero = np.where(wins, new.scale, old.scale), np.where(wins, new.zero, old.zero)
    return _Grid(scale, zero), np.where(wins, new_error, old_error)
