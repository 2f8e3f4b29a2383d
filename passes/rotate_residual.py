"""Turn residual streams so that their channels are principal directions, strongest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Portable
from octavo.ir.reference import Original, with_original
from octavo.passes.base import Pass
from octavo.passes.collect_moments import collected
from octavo.passes.linear import Linear
from octavo.passes.low_rank import with_sign
from octavo.passes.residual_streams import folds, residual_streams, rotate_constants, scale_input
from octavo.passes.rewrite import Rewrite, constant

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.axis_links import Axis
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.residual_streams import Stream

    Float64 = NDArray[np.float64]


@final
@dataclass(frozen=True)
class RotateResidual(Pass):
    """Rotate the residual stream so that its channels are principal directions.

    **What it does.** Finds axes that only linear layers, sums and root-mean-square norms touch.
    Scales of the norms move into the layers behind them; where those share their weight, as a head
    does with the embedding, the scale becomes a small MatMul. Then whatever gives the stream gives
    it in the basis of the eigenvectors of what the norms hand on, second moments summed over all
    norms, the strongest first, and whatever reads it reads that basis. The outputs stay the same.
    **Why.** Channels of a language model cannot go: all of them are in use. Directions can: behind
    this pass, `prune-channels` removes the weakest from the embedding to the head (Ashkboos et al.
    2024, SliceGPT, arXiv 2401.15024), here with one rotation for all blocks, which needs no
    MatMul on the shortcuts.
    **When it does not apply.** Streams that meet a LayerNorm with a mean, a Softmax, or any
    operator that treats channels one by one; the node and the reason are a remark. Without
    calibration data the directions are those of the weights that read the stream.
    **Cost and accuracy.** One inference for the moments and one eigenvalue problem per stream.
    Exact up to float rounding.
    """

    name = "rotate-residual"
    produces = (Original,)
    preserves = (Portable,)

    samples: int = 64

    def run(self, model: Model, ctx: PassContext) -> Model:
        before = model.clone()
        streams, refused = residual_streams(model)
        for refusal in refused:
            where = refusal.node or refusal.layer.partition("#")[0]
            ctx.remark("missed", where, f"the channels of '{refusal.layer}' stay: {refusal.reason}")
        if not streams:
            ctx.remark("note", "", "no stream that could be rotated")
            return model
        fold_scales(model, ctx, streams)
        for stream in residual_streams(model)[0]:
            self._rotate(model, ctx, stream)
        return with_original(model, before)

    def _rotate(self, model: Model, ctx: PassContext, stream: Stream) -> None:
        group = stream.group
        second = self._second(model, ctx, group)
        power, directions = np.linalg.eigh((second + second.T) / 2)
        power = np.maximum(power[::-1], 0.0)
        rotate(model, group, with_sign(directions[:, ::-1]))
        half = int(np.searchsorted(np.cumsum(power), power.sum() / 2)) + 1
        text = f"{group.units} channels are principal directions, {half} of them hold half"
        ctx.remark("applied", group.name.partition("#")[0], text, channels=group.units, half=half)
        ctx.count("streams rotated")

    def _second(self, model: Model, ctx: PassContext, group: AxisGroup) -> Float64:
        """Second moments of what layers read of a stream, each of trace 1, or of their weights."""
        layers = list(_readers(model, group))
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: directions are those of the weights")
            return np.asarray(sum(_gram(node, group) for node in layers))
        wanted = [(node.name or "", 1) for node in layers]
        moments = collected(model, ctx, wanted, ctx.calibration, samples=self.samples)
        different = {id(moment): moment for moment in moments.by_weight.values()}
        parts = [moment.measured()[0].astype(np.float64) for moment in different.values()]
        return np.asarray(sum(part / max(float(np.trace(part)), 1e-30) for part in parts))


def fold_scales(model: Model, ctx: PassContext, streams: Sequence[Stream]) -> None:
    """Move the scales of norms into what reads them, or make them a MatMul of their own."""
    rewrite = Rewrite(model, ctx)
    for scale in (node for stream in streams for node in stream.scales):
        at = scale_input(scale)
        vector = constant(scale.inputs[at])
        source = scale.inputs[1 - at]
        assert vector is not None
        assert source is not None
        vector, layers = vector.reshape(-1), folds(scale)
        if not layers:
            scale.op_type = "MatMul"
            scale.replace_input_with(0, source)
            rewrite.set_constant(scale, 1, np.diag(vector), "scale")
            ctx.count("scales that became a MatMul")
            continue
        for node in layers:
            weight = constant(node.inputs[1])
            assert weight is not None
            along = vector if Linear(node, node).transposed else vector[:, None]
            scaled = np.multiply(weight, along, dtype=np.float64).astype(weight.dtype)
            rewrite.set_constant(node, 1, scaled, "scaled")
        scale.replace_input_with(0, source)
        rewrite.drop(scale)
        ctx.count("scales folded")


def rotate(model: Model, group: AxisGroup, rotation: Float64) -> None:
    """Multiply every constant of a group by `rotation` `[D, D]` along the axes it shares."""

    def rotated(axis: Axis, array: NDArray[np.generic]) -> NDArray[np.generic]:
        turned = np.tensordot(array, rotation.astype(array.dtype), axes=(axis[1], 0))
        return np.ascontiguousarray(np.moveaxis(turned, -1, axis[1]))

    rotate_constants(model, group, rotated)


def _readers(model: Model, group: AxisGroup) -> Iterator[onnx_ir.Node]:
    """The layers with a weight of their own that multiplies the stream."""
    inside = set(group.nodes)
    for node in (node for node in model.graph if node.name in inside):
        if node.op_type in ("MatMul", "Gemm") and constant(node.inputs[1]) is not None:
            weight = node.inputs[1]
            contracted = 1 if Linear(node, node).transposed else 0
            if weight is not None and (weight.name or "", contracted) in group.labels:
                yield node


def _gram(node: onnx_ir.Node, group: AxisGroup) -> Float64:
    weight = constant(node.inputs[1])
    assert weight is not None
    wide = weight.astype(np.float64)
    wide = wide.T if Linear(node, node).transposed else wide
    return np.asarray(wide @ wide.T / max(float(np.square(wide).sum()), 1e-30))
