"""Give weights of few bits codes that lie where the weights are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.facts import Fact
from octavo.ir.fake_quant import OPTION, set_rounded
from octavo.ir.moments import Moments
from octavo.ir.quant import PerTensor, QuantParams, dequantize
from octavo.passes.base import Pass
from octavo.passes.clip_search import ScaleRows
from octavo.passes.float_moments import float_moments, float_sight
from octavo.passes.gptq import output_error
from octavo.passes.gptq_weight import gptq_weight
from octavo.passes.power_codes import best_centres, best_power, nearest_entries
from octavo.passes.weight_quantizers import kept_on_grid, weight_quantizers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantSpec
    from octavo.passes.base import PassContext
    from octavo.passes.power_codes import Fitted
    from octavo.passes.sequential_moments import Sighted
    from octavo.passes.weight_quantizers import WeightQuantizer

    Float32 = NDArray[np.float32]

_BYTE = 8
# A table and the nodes that read it take bytes, and must gain something.
_WORTH = 0.99
_THREE_CODES = 2
_TINY = float(np.finfo(np.float32).tiny)


@final
@dataclass(frozen=True)
class RoundNupes(Pass):
    """Round weights of less than 8 bits to int8 codes out of a table that their tensor shares.

    **What it does.** `power` spaces the codes of k bits as `sign(j)·|j|^(1/a)`, with the exponent
    that loses least of the tensor (NUPES, arXiv 2308.05600); `centres` takes those that weighted
    k-means finds. The file holds k bits per weight and one table of int8 codes, which integer
    kernels multiply. With calibration data (`feedback`), errors count as the inputs do, and GPTQ
    chooses the codes; without, each weight takes the nearest.
    **Why.** Most weights are small, and an even grid spends half of its codes on few large ones.
    **When it does not apply.** Kernels that read blocks of 2, 4 or 8 bits; binary and float16
    weights; weights on a grid already.
    **Cost and accuracy.** What `round-gptq` takes, and about a second per weight for its
    table. A weight keeps its even codes where a table gains less than 1 %.
    """

    name = "round-nupes"
    preserves = (Fact,)

    table: Literal["power", "centres"] = "centres"
    feedback: bool = True
    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        quantizers = list(weight_quantizers(model))
        found = float_moments(model, ctx, quantizers, self.samples) if self.feedback else None
        for done, quantizer in enumerate(quantizers, start=1):
            name, reason = quantizer.fake.name or "", self._why_not(quantizer)
            if reason:
                ctx.remark("missed", name, reason)
            else:
                self._round(model, ctx, quantizer, float_sight(quantizer, found or Moments({})))
            ctx.progress("round nupes", done, len(quantizers))
        return model

    def _round(
        self, model: Model, ctx: PassContext, quantizer: WeightQuantizer, sighted: Sighted | None
    ) -> None:
        name, weight, present = quantizer.fake.name or "", quantizer.original(), quantizer.rounded()
        if np.array_equal(weight, present):
            kept_on_grid(ctx, name)
            return
        spec = _indexed(quantizer.params.spec, ctx.target.weight_bits)
        how, rows = self._table(weight, spec, sighted)
        scale = rows.scale.reshape(quantizer.params.scale.shape)
        params = QuantParams(spec, scale, np.zeros(scale.shape, np.int32))
        rounded, params = _rounded(weight, params, rows.table, sighted)
        before, after = (_error(weight, w, sighted) for w in (present, rounded))
        if not after < _WORTH * before:
            ctx.remark("missed", name, "even codes are as good", before=before, after=after)
            return
        set_rounded(model.graph, quantizer.fake, rounded, params)
        text = f"{how}: error {before:.3e} before, {after:.3e} after"
        ctx.remark("applied", name, text, before=before, after=after)
        ctx.count("weights rounded")

    def _why_not(self, quantizer: WeightQuantizer) -> str:
        """Why a weight keeps its even codes, "" where it need not."""
        spec, nodes = quantizer.params.spec, [node for node, _ in quantizer.readers]
        if spec.binary or spec.floating or spec.index_bits is not None or not spec.signed:
            return "its codes are no even grid of signed codes"
        if spec.bits >= _BYTE:
            return "a table of 8-bit codes is the even grid"
        if self.table == "power" and spec.bits == _THREE_CODES:
            return "-1, 0 and 1 are an even grid whatever the exponent"
        if any(n.metadata_props.get(OPTION, "").startswith("weight-only") for n in nodes):
            return "its kernel reads blocks of codes and not a table"
        return "" if quantizer.stored().size else "an empty weight"

    def _table(
        self, weight: Float32, spec: QuantSpec, sighted: Sighted | None
    ) -> tuple[str, Fitted]:
        """The table of a tensor, and what it is called."""
        assert spec.index_bits is not None
        rows, importance = _rows(weight, spec), None
        if sighted is not None:
            diagonal = np.einsum("gkk->gk", sighted.second)[:, None]
            wide = np.broadcast_to(diagonal, sighted.matrix.rows(weight).shape)
            importance = _rows(sighted.matrix.restore(wide), spec)
        # Every row counts by its relative error: the next layers may read any of them.
        power = np.square(rows) if importance is None else np.square(rows) * importance
        whole = power.sum(axis=1, keepdims=True)
        share = np.divide(1, whole, out=np.zeros_like(whole), where=whole > _TINY)
        importance = share * (np.ones_like(rows) if importance is None else importance)
        if self.table == "power":
            exponent, made = best_power(rows, spec.index_bits, spec.qmax, importance)
            return f"exponent {exponent:.2f}", made
        made = best_centres(rows, spec.index_bits, spec.qmax, importance)
        return f"{made.table.size} centres", made


def _indexed(spec: QuantSpec, kernel_bits: int) -> QuantSpec:
    """Indices of as many bits into codes that the target's kernels can multiply."""
    used = kernel_bits if kernel_bits < _BYTE else None
    return replace(spec, dtype="s8", used_bits=used, index_bits=spec.used_bits or spec.bits)


def _rows(weight: Float32, spec: QuantSpec) -> Float32:
    """The entries of every scale, `[n, K]`."""
    found = ScaleRows.of(weight, spec.granularity)
    count = 1 if isinstance(spec.granularity, PerTensor) else int(np.prod(found.scale_shape))
    return np.ascontiguousarray(found.view, np.float32).reshape(count, -1)


def _rounded(
    weight: Float32, params: QuantParams, table: Float32, sighted: Sighted | None
) -> tuple[Float32, QuantParams]:
    """The weight in codes of the table, by GPTQ where there are moments."""
    if sighted is not None:
        made = gptq_weight(weight, params, sighted.matrix, sighted.second, table=table)
        return made.rounded, made.params
    scale = dequantize(np.ones(weight.shape, np.int8), params)
    return dequantize(nearest_entries(weight / scale, table).astype(np.int8), params), params


def _error(weight: Float32, rounded: Float32, sighted: Sighted | None) -> float:
    """The relative error of the layer's output, or of the weight where no moments are known."""
    if sighted is None:
        whole = float(np.square(weight, dtype=np.float64).sum())
        return float(np.square(weight - rounded, dtype=np.float64).sum()) / (whole or 1.0)
    matrix, second = sighted.matrix, sighted.second
    whole = output_error(matrix.rows(weight), None, second)
    return output_error(matrix.rows(weight), matrix.rows(rounded), second) / (whole or 1.0)
