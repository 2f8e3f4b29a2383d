"""What rounding leaves of a linear layer's outputs, when its channels carry scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.mapped import reading
from octavo.ir.quant import QuantSpec, dequantize, params_for_range, quantize
from octavo.passes.rewrite import is_op
from octavo.passes.weight_matrix import WeightMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.passes.linear import Linear

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]


_ROWS = 256


@final
@dataclass(frozen=True)
class Rounding:
    """The grid of weights (`bits`, per output channel, block of K or tensor) and activations.

    `block` 0 is the whole row, and convolutions have no blocks; `activation_bits` 0 is float.
    """

    bits: int
    block: int = 0
    per_tensor: bool = False
    activation_bits: int = 0

    def rows(self, rows: Float32, blocks: bool) -> Float32:
        """Rows `[groups, N, K]` rounded to the nearest codes, like `round_weight` of ir/quant.

        No code is beyond the grid, so that nothing needs to be clipped.
        """
        size = self.block if self.block and blocks and not self.per_tensor else rows.shape[-1]
        short = -rows.shape[-1] % max(size, 1)
        padded = np.pad(rows, ((0, 0), (0, 0), (0, short))) if short else rows
        cells = padded.reshape((1, -1) if self.per_tensor else (-1, max(size, 1)))
        largest = np.maximum(cells.max(1, initial=0.0), -cells.min(1, initial=0.0))
        scale = np.asarray(largest / ((1 << (self.bits - 1)) - 1), np.float32)[:, None]
        scale = np.where(scale <= np.finfo(np.float32).tiny, np.float32(1), scale)
        codes = cells / scale
        np.rint(codes, out=codes)
        codes *= scale
        return codes.reshape(padded.shape)[..., : rows.shape[-1]]

    def activations(self, x: Float32) -> Float32:
        """Activations on one grid that covers them."""
        if not self.activation_bits:
            return x
        spec = QuantSpec("u8", used_bits=self.activation_bits)
        params = params_for_range(spec, float(x.min(initial=0)), float(x.max(initial=0)))
        return dequantize(quantize(x, params), params)


@final
@dataclass
class Layer:
    """A linear operator, the scales its channels carry so far, and what it reads.

    `fed` (input channels) multiplies the weight's columns, `made` (output channels) divides its
    rows. `columns` are samples of the operand, `[groups, samples, K]`; where there is no data,
    `power` holds an estimate of every input channel's mean square. `signal` is ‖XWᵀ‖², once known.
    """

    linear: Linear
    matrix: WeightMatrix
    fed: Float64
    made: Float64
    columns: Float32 | None = None
    power: Float64 | None = None
    signal: float = 0.0

    @staticmethod
    def of(linear: Linear) -> Layer:
        matrix = WeightMatrix.of(linear.node, 1)
        return Layer(linear, matrix, np.ones(linear.input_channels), np.ones(linear.channels))

    @property
    def rows(self) -> Float32:
        """The float weight, `[groups, N, K]`, without scales."""
        assert self.linear.weight is not None
        tensor = self.linear.weight.const_value
        assert tensor is not None
        return reading(tensor, lambda array: np.array(self.matrix.rows(array)))

    def of_columns(self, channels: Float64) -> Float64:
        """One entry per input channel as `[groups, 1, K]`."""
        each = self.matrix.groups * self.matrix.width // max(channels.size, 1)
        return np.repeat(channels, each).reshape(self.matrix.groups, 1, -1)

    def of_rows(self, channels: Float64) -> Float64:
        """One entry per output channel as `[groups, N, 1]`."""
        each = self.matrix.groups * self.matrix.rows_per_group // max(channels.size, 1)
        return np.repeat(channels, each).reshape(self.matrix.groups, -1, 1)

    def scaled(self, rows: Float32, fed: Float64, made: Float64) -> Float32:
        """Rows that read inputs divided by `fed` and give outputs divided by `made`."""
        factor = self.of_columns(fed) / self.of_rows(made)
        return np.asarray(rows * factor, np.float32)

    def largest(self, rows: Float32, axis: int) -> Float64:
        """max |w| of every input channel (axis 1) or output channel (axis 2) as scaled so far."""
        now = np.abs(self.scaled(rows, self.fed, self.made)).max(axis=axis, initial=0.0)
        channels = self.fed.size if axis == 1 else self.made.size
        return np.asarray(now.reshape(channels, -1).max(axis=1, initial=0.0), np.float64)

    def mean_magnitude(self) -> Float64:
        """mean |x| of every input channel."""
        if self.columns is None:
            assert self.power is not None
            return np.sqrt(self.power)
        mean = np.abs(self.columns).mean(axis=1, dtype=np.float64)
        return np.asarray(mean.reshape(self.fed.size, -1).mean(axis=1))

    def peak_magnitude(self) -> Float64:
        """max |x| of every input channel."""
        if self.columns is None:
            return self.mean_magnitude()
        peak = np.abs(self.columns).max(axis=1, initial=0.0)
        return np.asarray(peak.reshape(self.fed.size, -1).max(axis=1), np.float64)

    def error(self, rows: Float32, rounding: Rounding, fed: Float64, made: Float64) -> float:
        """‖X̂Ŵᵀ - XWᵀ‖² / ‖XWᵀ‖² with both rounded under the scales, seen without the scales.

        Where rows do not share a scale, a few hundred of them tell the error. Without samples
        the channels of X count as independent: Σ power ‖Δw‖² / Σ power ‖w‖².
        """
        blocks = not is_op(self.linear.node, "Conv", "ConvTranspose")
        if not rounding.per_tensor:
            rows = rows[:, :: max(1, rows.shape[1] // _ROWS)]
        inward = np.asarray(self.of_columns(fed), np.float32)
        outward = np.asarray(self.of_rows(made), np.float32) if rounding.per_tensor else None
        scaled = rows * inward if outward is None else rows * (inward / outward)
        kept = rounding.rows(scaled, blocks)
        kept /= inward if outward is None else inward / outward
        if self.columns is None:
            assert self.power is not None
            power = self.of_columns(self.power)
            return _ratio(np.sum(power * (kept - rows) ** 2), np.sum(power * rows**2))
        if not self.signal:
            self.signal = _squares(self.columns @ rows.transpose(0, 2, 1))
        kept -= rows
        difference = self.columns @ kept.transpose(0, 2, 1)
        if rounding.activation_bits:
            kept += rows
            noise = rounding.activations(self.columns / inward) * inward - self.columns
            difference += noise @ kept.transpose(0, 2, 1)
        return _ratio(_squares(difference), self.signal)


def _squares(array: Float32) -> float:
    return float(np.vdot(array, array))


def _ratio(error: float, signal: float) -> float:
    return float(error) / float(signal) if signal > 0 else 0.0
