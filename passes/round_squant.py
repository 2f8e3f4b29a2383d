"""Round weights without data: errors that a layer adds up are made to cancel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Fact
from octavo.ir.fake_quant import set_rounded
from octavo.ir.quant import PerAxis, PerBlock, broadcast_params, dequantize
from octavo.passes.base import Pass
from octavo.passes.squant import balanced_codes
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams
    from octavo.passes.base import PassContext
    from octavo.passes.weight_quantizers import WeightQuantizer

    Float32 = NDArray[np.float32]


@final
@dataclass(frozen=True)
class RoundSquant(Pass):
    """Round so that the errors of every kernel and of every output channel nearly add up to 0.

    **What it does.** Moves a few codes to the other neighbour of their weight: those closest to a
    tie, as few as bring the sum of rounding errors of each kernel, and then of each output
    channel, below half a step (SQuant, ICLR 2022). With blocks, each block is a channel.
    **Why.** Inputs of one kernel are alike, so that what counts is the sum of its errors; nearest
    rounding ignores it.
    **When it does not apply.** Embeddings, which are looked up and not summed; binary weights; a
    scale per input channel; weights on their grid already.
    **Cost and accuracy.** No data, no gradients; under a second per million weights. Every code
    stays one of the two neighbours of its weight.
    """

    name = "round-squant"
    preserves = (Fact,)

    def run(self, model: Model, ctx: PassContext) -> Model:
        quantizers = list(weight_quantizers(model))
        for done, quantizer in enumerate(quantizers, start=1):
            name = quantizer.fake.name or ""
            reason = _why_not(quantizer)
            if reason:
                ctx.remark("missed", name, reason)
            else:
                _round(model, quantizer, ctx)
            ctx.progress("round squant", done, len(quantizers))
        return model


def _round(model: Model, quantizer: WeightQuantizer, ctx: PassContext) -> None:
    name, params = quantizer.fake.name or "", quantizer.params
    scaled = _scaled(quantizer.stored(), params)
    layout = Layout.of(quantizer)
    rows = layout.rows(scaled)
    codes = balanced_codes(rows, params.spec.qmin, params.spec.qmax)
    nearest = np.clip(np.rint(rows), params.spec.qmin, params.spec.qmax)
    moved = np.count_nonzero(codes != nearest)
    if not moved:
        ctx.remark("missed", name, "nearest rounding has no error that could cancel")
        return
    rounded = dequantize(layout.restore(codes).astype(np.int32), params)
    set_rounded(model.graph, quantizer.fake, rounded)
    before, after = (_imbalance(c - rows) for c in (nearest, codes))
    text = f"moved {moved / codes.size:.1%} of the codes"
    ctx.remark("applied", name, text, before=before, after=after)
    ctx.count("codes moved", int(moved))


def _scaled(weight: Float32, params: QuantParams) -> Float32:
    """The weight in codes before rounding."""
    scale, zero = broadcast_params(params, weight.shape)
    return np.asarray(weight / scale + zero, np.float32)


def _imbalance(error: Float32) -> float:
    """Mean over the channels of the magnitude of their summed error, in steps."""
    return float(np.abs(error.sum(axis=(1, 2), dtype=np.float64)).mean())


@final
@dataclass(frozen=True)
class Layout:
    """A weight of `shape` as `[channels, kernels, entries]`: `order` of its axes, and `split`.

    The first axis in the order begins the channels, `split` counts those of channels and kernels.
    A block of `block` entries along the last axis in the order is a channel, if not 0.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    split: tuple[int, int]
    block: int = 0

    @staticmethod
    def of(quantizer: WeightQuantizer) -> Layout:
        """Channels are blocks where there are some, else what the reader's outputs are."""
        value = quantizer.fake.inputs[0]
        assert value is not None
        assert value.const_value is not None
        shape = tuple(value.const_value.shape.numpy())
        granularity, axes = quantizer.params.spec.granularity, list(range(len(shape)))
        if isinstance(granularity, PerBlock):
            inner = axes.pop(granularity.axis)
            return Layout(shape, (*axes, inner), (len(axes), len(shape)), granularity.size)
        node = quantizer.readers[0][0]
        if node.op_type in _RECURRENT:
            return Layout(shape, tuple(axes), (len(shape) - 1, len(shape)))
        axes.remove(channel_axis(node, len(shape)))
        kernels = 2 if node.op_type in _CONVOLUTIONS else len(shape)
        return Layout(shape, (channel_axis(node, len(shape)), *axes), (1, kernels))

    def rows(self, array: Float32) -> Float32:
        """`[channels, kernels, entries]`; a last block is filled with zeros."""
        turned = array.transpose(self.order)
        if self.block:
            short = -turned.shape[-1] % self.block
            turned = np.pad(turned, [(0, 0)] * (turned.ndim - 1) + [(0, short)])
            return np.ascontiguousarray(turned).reshape(-1, self.block, 1)
        return np.ascontiguousarray(turned).reshape(self._sizes(turned.shape))

    def restore(self, rows: Float32) -> Float32:
        """`[channels, kernels, entries]` as the weight."""
        turned = [self.shape[k] for k in self.order]
        if self.block:
            wide = rows.reshape(*turned[:-1], -1)[..., : turned[-1]]
        else:
            wide = rows.reshape(turned)
        return wide.transpose([self.order.index(k) for k in range(len(self.order))])

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        first, second = self.split
        parts = shape[:first], shape[first:second], shape[second:]
        channels, kernels, entries = (math.prod(part) for part in parts)
        return channels, kernels, entries


_CONVOLUTIONS = ("Conv", "ConvTranspose")
_RECURRENT = ("LSTM", "GRU", "RNN")


def channel_axis(node: onnx_ir.Node, rank: int) -> int:
    """The axis of a weight that counts the outputs of its reader."""
    match node.op_type:
        case "MatMul":
            return rank - 1
        case "Gemm":
            return 1 - node.attributes.get_int("transB", 0)
        case "ConvTranspose":
            return 1
    return 0


def _why_not(quantizer: WeightQuantizer) -> str:
    """Why a weight is left alone, "" where it is rounded."""
    node, spec = quantizer.readers[0][0], quantizer.params.spec
    if node.op_type not in (*_CONVOLUTIONS, *_RECURRENT, "MatMul", "Gemm"):
        return f"{node.op_type} does not add up what it reads"
    if spec.binary or spec.floating or spec.index_bits is not None:
        return "its codes have no neighbours"
    rank = len(quantizer.stored().shape)
    axis = spec.granularity.axis % rank if isinstance(spec.granularity, PerAxis) else None
    if node.op_type not in _RECURRENT and axis not in (None, channel_axis(node, rank)):
        return "the scales are not those of output channels"
    return "" if quantizer.stored().size else "the weight is empty"
