"""Give every channel of a weight levels of its own, and learn them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Fact
from octavo.ir.fake_quant import OPTION, set_rounded
from octavo.ir.levels import OP_TYPE, binary_levels, set_levels
from octavo.ir.moments import Moments
from octavo.ir.quant import PerAxis, QuantParams
from octavo.ir.reference import Reference
from octavo.passes.base import Pass
from octavo.passes.float_moments import float_moments, float_sight
from octavo.passes.gptq import row_errors
from octavo.passes.round_learned import RoundLearned
from octavo.passes.trainable import Trainable
from octavo.passes.uniquanf import Coding, coded_rows, initial_coding, uniform_coding
from octavo.passes.weight_matrix import Cells
from octavo.passes.weight_quantizers import kept_on_grid, weight_quantizers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.sequential_moments import Sighted
    from octavo.passes.weight_quantizers import WeightQuantizer

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

_WIDTHS = range(2, 7)
_BYTE, _NUMBER_BITS = 8, 16
# Levels this close to a grid, in its steps, are one: float16 tells no less apart.
_EVEN = 1e-3


@final
@dataclass(frozen=True)
class RoundUniquanf(Pass):
    """Let the 2^k numbers that a channel's weights may take be any sums ±α_1 … ±α_k + z.

    **What it does.** UniQuanF (arXiv 2506.03781): finds α and z per channel from the best even
    grid by alternating signs and least squares (binary coding), chooses signs by GPTQ where there
    is calibration data, and then learns both with a factor per weight and channel, block by block
    as `round-learned` does. What is left is plain binary coding: k bits per weight, and k + 1
    float16 numbers per channel, from which the runtime makes the float weight when it loads.
    Levels that turn out to be an even grid become codes.
    **Why.** Weights of a channel crowd around zero; at 2 and 3 bits even steps do not suit them.
    **When it does not apply.** Weights that integer kernels multiply (`round-nupes` is for them),
    blocks, one scale per tensor, widths beyond 2 to 6 bits, weights on a grid already, channels of
    so few weights that 8-bit codes take fewer bytes.
    **Cost and accuracy.** Some seconds per million weights for the levels, then `steps` batches
    per block, about `seconds` in all (0 learns nothing). A channel keeps its even codes where
    their error is not higher, a block what it had where its held-out error does not fall.
    """

    name = "round-uniquanf"
    requires = (Reference,)
    preserves = (Fact,)

    steps: int = 200
    batch: int = 32
    layers: int = 4
    seconds: float = 300.0
    codes_rate: float = 0.005
    vectors_rate: float = 0.005
    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        quantizers = list(weight_quantizers(model))
        usable = [q for q in quantizers if not _why_not(q)]
        found = float_moments(model, ctx, usable, self.samples) or Moments({})
        for done, quantizer in enumerate(quantizers, start=1):
            name, reason = quantizer.fake.name or "", _why_not(quantizer)
            if reason:
                ctx.remark("missed", name, reason)
            else:
                _code(model, ctx, quantizer, float_sight(quantizer, found))
            ctx.progress("round uniquanf", done, len(quantizers))
        trainable = Trainable.of(model, (OP_TYPE,))
        if self.steps > 0 and self.seconds > 0 and trainable.weights:
            RoundLearned(
                steps=self.steps, batch=self.batch, layers=self.layers, seconds=self.seconds,
                codes_rate=self.codes_rate, scales_rate=self.codes_rate,
                vectors_rate=self.vectors_rate,
            ).learn(trainable, ctx)  # fmt: skip
        return model


def _code(
    model: Model, ctx: PassContext, quantizer: WeightQuantizer, sighted: Sighted | None
) -> None:
    name, weight, present = quantizer.fake.name or "", quantizer.original(), quantizer.rounded()
    if np.array_equal(weight, present):
        kept_on_grid(ctx, name)
        return
    channels = _Channels.of(quantizer, weight, sighted)
    rows, coding = channels.coded(present)
    whole = float(channels.errors(np.zeros_like(rows)).sum()) or 1.0
    before, after = (
        float(channels.errors(r).sum()) / whole for r in (channels.of_all(present), rows)
    )
    if not after < before:
        ctx.remark("missed", name, "even codes are as good", before=before, after=after)
        return
    rounded = channels.restored(rows)
    params = even_params(coding, rows, quantizer.params)
    set_rounded(model.graph, quantizer.fake, rounded, params)
    if params is None:
        levels = binary_levels(coding.alpha, coding.offset)
        set_levels(model, quantizer.fake, levels, channels.axis)
        ctx.count("weights of levels")
    form = "levels" if params is None else "an even grid"
    text = f"{form}: error {before:.3e} before, {after:.3e} after"
    ctx.remark("applied", name, text, before=before, after=after)


@final
@dataclass(frozen=True)
class _Channels:
    """A weight as rows `[N, K]`, one for each channel of `axis`, in `groups` of equal inputs.

    `second` has shape `[groups, K, K]`, `None` where nothing is known about the inputs.
    """

    quantizer: WeightQuantizer
    axis: int
    rows: Float32
    shape: tuple[int, ...]
    second: Float32 | None

    @staticmethod
    def of(quantizer: WeightQuantizer, weight: Float32, sighted: Sighted | None) -> _Channels:
        granularity = quantizer.params.spec.granularity
        assert isinstance(granularity, PerAxis)
        axis = granularity.axis % weight.ndim
        rows = _rows(weight, axis)
        second = None
        if sighted is not None:
            # The channels must be the rows that are multiplied, in their order.
            same = sighted.matrix.rows(weight)
            if np.array_equal(same.reshape(rows.shape if same.size == rows.size else -1), rows):
                second = sighted.second
        return _Channels(quantizer, axis, rows, weight.shape, second)

    def of_all(self, array: Float32) -> Float32:
        return _rows(array, self.axis)

    def restored(self, rows: Float32) -> Float32:
        moved = [self.shape[self.axis], *self.shape[: self.axis], *self.shape[self.axis + 1 :]]
        return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, self.axis))

    def errors(self, rows: Float32) -> Float64:
        """Squared errors of the channels' outputs, `[N]`, or of the channels themselves."""
        error = self.rows - rows
        if self.second is None:
            return np.asarray(np.square(error, dtype=np.float64).sum(axis=1), np.float64)
        grouped = error.reshape(len(self.second), -1, error.shape[1])
        return row_errors(grouped, self.second).reshape(-1)

    def coded(self, present: Float32) -> tuple[Float32, Coding]:
        """Rows of levels; those of the even grid where no others are better."""
        params = self.quantizer.params
        bits = params.spec.used_bits or params.spec.bits
        even = uniform_coding(params.scale, params.zero_point.astype(np.float32), bits).stored
        kept = even.nearest(self.of_all(present))
        rows, coding = self._searched(bits)
        wins = self.errors(rows) < self.errors(kept)
        return np.where(wins[:, None], rows, kept), coding.where(wins, even)

    def _searched(self, bits: int) -> tuple[Float32, Coding]:
        if self.second is None:
            coding = initial_coding(self.rows, bits).stored
            return coding.nearest(self.rows), coding
        grouped = self.rows.reshape(len(self.second), -1, self.rows.shape[1])
        found = []
        for rows, second in zip(grouped, self.second, strict=True):
            diagonal = np.diagonal(second) / max(float(np.trace(second)), 1e-30)
            importance = np.broadcast_to(diagonal, rows.shape)
            start = initial_coding(rows, bits, np.ascontiguousarray(importance, np.float32))
            found.append(coded_rows(rows, start, second, _cells(rows), self.quantizer.params.spec))
        alpha, offset, rows = (
            np.concatenate(parts)
            for parts in (
                [f.coding.alpha for f in found], [f.coding.offset for f in found],
                [f.rows for f in found],
            )
        )  # fmt: skip
        return rows, Coding(alpha, offset)


def even_params(coding: Coding, rows: Float32, present: QuantParams) -> QuantParams | None:
    """The parameters of the spec whose codes the rows are, `None` where there are none."""
    levels = coding.levels
    step = np.diff(levels, axis=1).mean(axis=1)
    if not (np.all(np.isfinite(step)) and np.all(step > np.finfo(np.float32).tiny)):
        return None
    step = step.astype(np.float32)[:, None]
    codes = np.rint(levels / step)
    used = np.rint(rows / step)
    even = np.abs(levels / step - codes).max() < _EVEN
    fits = used.min() >= present.spec.qmin and used.max() <= present.spec.qmax
    if not (even and fits):
        return None
    return QuantParams(present.spec, step[:, 0], np.zeros(len(step), np.int32))


def _cells(rows: Float32) -> Cells:
    """One scale per row."""
    index = np.arange(len(rows), dtype=np.int64).reshape(1, -1, 1)
    return Cells(index, np.zeros(rows.shape[1], np.int64))


def _rows(weight: Float32, axis: int) -> Float32:
    moved = np.moveaxis(weight, axis, 0)
    return np.ascontiguousarray(moved.reshape(len(moved), -1), np.float32)


def _why_not(quantizer: WeightQuantizer) -> str:
    """Why a weight has no levels, "" where it may."""
    spec, nodes = quantizer.params.spec, [node for node, _ in quantizer.readers]
    if spec.binary or spec.floating or spec.index_bits is not None or not spec.signed:
        return "its codes are no even grid of signed codes"
    bits = spec.used_bits or spec.bits
    if bits not in _WIDTHS:
        return f"{bits} bits: levels are worth it from {_WIDTHS[0]} to {_WIDTHS[-1]}"
    if any(not n.metadata_props.get(OPTION, "").startswith("storage") for n in nodes):
        return "its kernel multiplies codes and not floats"
    stored = quantizer.stored()
    if not stored.size:
        return "an empty weight"
    axis = spec.granularity.axis % stored.ndim if isinstance(spec.granularity, PerAxis) else None
    if axis not in (0, stored.ndim - 1):
        return "levels belong to the first or the last axis, one channel each"
    width = stored.size // stored.shape[axis]
    wide = bits * (width + _NUMBER_BITS) > _BYTE * width
    return f"{width} weights a channel: 8-bit codes take less than its levels" if wide else ""
