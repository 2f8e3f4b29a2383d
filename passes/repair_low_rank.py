"""Put a thin float branch beside quantized layers, which adds what rounding took away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.errors import UsageError
from octavo.ir.facts import Fact, HalfConstants
from octavo.ir.fake_quant import OPTION, declare_functions, fake_quant_node
from octavo.ir.moments import Moments
from octavo.ir.quant import PerAxis, QuantSpec, params_for_weight
from octavo.passes.base import Pass
from octavo.passes.float_moments import float_moments
from octavo.passes.low_rank import relative_error
from octavo.passes.low_rank_graph import add_branch
from octavo.passes.low_rank_layer import LowRankLayer, why_not_factored
from octavo.passes.patterns import chosen
from octavo.passes.rewrite import Rewrite
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.moments import Moment
    from octavo.passes.base import PassContext
    from octavo.passes.low_rank_layer import LayerFactors
    from octavo.passes.weight_quantizers import WeightQuantizer

_LARGEST_HALF = float(np.finfo(np.float16).max)


@final
@dataclass(frozen=True)
class RepairLowRank(Pass):
    """Add a low-rank branch that repairs what rounding a weight did to the layer's output.

    **What it does.** Beside a quantized MatMul, Gemm or Conv come two thin layers of rank `rank`
    that multiply the same input; their result is added behind the bias. `method=eora` chooses the
    B·A that leaves least of ‖(W - Ŵ - B·A)·X‖ on the calibration data (EoRA, arXiv 2410.21271);
    `lorc` the best approximation of W - Ŵ itself (ZeroQuant-V2, arXiv 2303.08302), without data.
    **Why.** The error of few bits has directions in which inputs are strong; a few of them, in
    more bits, cost less than another bit for all.
    **When it does not apply.** Embeddings; grouped convolutions; a static integer Conv, whose
    kernel ends in a quantizer; layers that are as small as the branch. Without calibration data
    `eora` is `lorc`. Run it after whatever chooses codes or scales and after match-moments.
    **Cost and accuracy.** `rank`·(N + K) multiplications and numbers per layer, stored in `bits`
    (8: codes that are unpacked when the model loads). No layer's output error grows.
    """

    name = "repair-low-rank"
    preserves = (Fact,)

    rank: int = 16
    method: Literal["eora", "lorc"] = "eora"
    bits: int = 16
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        if self.rank < 1 or self.bits not in (8, 16, 32):
            message = "a repair needs a rank of at least 1, and 8, 16 or 32 bits"
            where = f"{self.name}{{rank={self.rank},bits={self.bits}}}"
            raise UsageError(message, where=where)
        names = {node.name for node in chosen(model, self.only, self.keep)}
        found = [
            (quantizer, node)
            for quantizer in weight_quantizers(model)
            for node, index in quantizer.readers
            if index == 1 and node.name in names
        ]
        moments = self._moments(model, ctx, [quantizer for quantizer, _ in found])
        rewrite, halves = Rewrite(model, ctx), list[str]()
        for done, (quantizer, node) in enumerate(found, start=1):
            if why := self._why_not(quantizer, node):
                ctx.remark("missed", node.name or "", why)
            else:
                moment = moments.of(node.name or "", 1)
                halves += self._repair(rewrite, quantizer, node, moment)
            ctx.progress("repair", done, len(found))
        declare_functions(model.ir)
        known = model.find(HalfConstants)
        names_of = (*(known.names if known is not None else ()), *halves)
        return model.with_fact(HalfConstants(names_of)) if halves else model

    def _moments(
        self, model: Model, ctx: PassContext, quantizers: list[WeightQuantizer]
    ) -> Moments:
        found = float_moments(model, ctx, quantizers, self.samples)
        if found is None and self.method == "eora":
            ctx.remark("note", "", "no calibration data: all inputs count alike")
        return found or Moments({})

    def _why_not(self, quantizer: WeightQuantizer, node: onnx_ir.Node) -> str:
        if why := why_not_factored(node):
            return why
        method = node.metadata_props.get(OPTION, "").partition(":")[0]
        if node.op_type == "Conv" and method == "static":
            return "its integer kernel ends in a quantizer: nothing can be added before it"
        count, width = _rows_of(node, quantizer).shape
        if self.rank * (count + width) * self.bits >= count * width * quantizer.params.spec.bits:
            return f"a branch of rank {self.rank} takes as many bytes as the layer"
        return ""

    def _repair(
        self,
        rewrite: Rewrite,
        quantizer: WeightQuantizer,
        node: onnx_ir.Node,
        moment: Moment | None,
    ) -> list[str]:
        """Add the branch, unless it does not help; the names of constants that are half floats."""
        weight = quantizer.as_read(quantizer.original())
        lost = weight - quantizer.as_read(quantizer.rounded())
        layer = LowRankLayer.of(node, lost, moment if self.method == "eora" else None, biased=False)
        made = layer.factors(layer.forms[0], self.rank)
        before, after = _errors(layer, made, weight, moment)
        numbers = {"before": before, "after": after, "rank": self.rank}
        name, ctx = node.name or "", rewrite.ctx
        if not after < before:
            ctx.remark("missed", name, "no branch is better", **numbers)
            return []
        thin = add_branch(rewrite, node, self._stored(made))
        text = f"output error {before:.3e} before, {after:.3e} with a branch of rank {self.rank}"
        ctx.remark("applied", name, text, **numbers)
        ctx.count("layers repaired")
        if self.bits == 8:
            for added in thin:
                _quantize(rewrite, added)
        return [_name_of_weight(added) for added in thin] if self.bits == 16 else []

    def _stored(self, made: LayerFactors) -> LayerFactors:
        """The factors as float16 holds them, where that is how they are stored."""
        if self.bits != 16:
            return made
        bounded = (np.clip(a, -_LARGEST_HALF, _LARGEST_HALF) for a in (made.first, made.second))
        first, second = (a.astype(np.float16).astype(np.float64) for a in bounded)
        return replace(made, first=first, second=second)


def _rows_of(node: onnx_ir.Node, quantizer: WeightQuantizer) -> NDArray[np.float64]:
    return LowRankLayer(node, quantizer.as_read(quantizer.stored())).rows


def _errors(
    layer: LowRankLayer,
    made: LayerFactors,
    weight: NDArray[np.float32],
    moment: Moment | None,
) -> tuple[float, float]:
    """‖(W - Ŵ)·X‖² / ‖W·X‖² without the branch and with it."""
    second = None if moment is None else moment.matrix()[0].astype(np.float64)
    rows = np.asarray(layer.matrix.rows(weight)[0], np.float64)
    branch = layer.matrix.rows(made.product)[0]
    before = relative_error(rows, rows - layer.rows, second)
    return before, relative_error(rows, rows - layer.rows + branch, second)


def _quantize(rewrite: Rewrite, node: onnx_ir.Node) -> None:
    """Let a thin layer read its weight as int8 codes with a scale per output."""
    value, graph = node.inputs[1], node.graph
    assert value is not None
    assert value.const_value is not None
    assert graph is not None
    turned = node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1
    spec = QuantSpec("s8", PerAxis(0 if turned else 1), symmetric=True)
    params = params_for_weight(value.const_value.numpy(), spec)
    name = rewrite.fresh(f"{value.name}_storage")
    fake = fake_quant_node(value, params, name, graph)
    fake.outputs[0].name = f"{name}_fq"
    graph.insert_before(node, fake)
    node.replace_input_with(1, fake.outputs[0])
    node.metadata_props[OPTION] = f"storage:{spec}"


def _name_of_weight(node: onnx_ir.Node) -> str:
    value = node.inputs[1]
    return value.name or "" if value is not None else ""
