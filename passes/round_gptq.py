"""Round weights so that the errors of a layer's weights make up for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Fact
from octavo.ir.fake_quant import set_rounded
from octavo.ir.moments import Moments
from octavo.ir.quant import dequantize, quantize, turned_params
from octavo.passes.base import Pass
from octavo.passes.clip_search import clipped_params
from octavo.passes.float_moments import float_moments, float_sight
from octavo.passes.gptq import output_error
from octavo.passes.gptq_weight import GptqOptions, gptq_weight
from octavo.passes.sequential_moments import Sighted, prefix_moments
from octavo.passes.weight_matrix import why_no_matrix
from octavo.passes.weight_quantizers import WeightQuantizer, kept_on_grid, weight_quantizers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams
    from octavo.passes.base import PassContext

    Float32 = NDArray[np.float32]


@final
@dataclass(frozen=True)
class RoundGptq(Pass):
    """Round the columns of a weight one after another; later ones make up for earlier errors.

    **What it does.** GPTQ (Frantar et al. 2023, arXiv 2210.17323) on the second moments of what a
    weight multiplies, columns of large inputs first (`act_order`), each on the grid that its
    block had before. Then the scales, and zero points of a grid that has them, are fitted to the
    codes by least squares (`refit`; decoupleQ, arXiv 2404.12759). The best of several `ranges`
    is kept for every row. With `sequential` the inputs
    are those that the layers rounded before leave, and the float output is aimed at.
    **Why.** Rounding to nearest ignores that inputs are correlated; at 4 bits and below that
    costs most of the accuracy.
    **When it does not apply.** No calibration data, embeddings, weights that are on a grid.
    **Cost and accuracy.** `K³/3` products per layer and `4·N·K²` per range, and one float
    inference where no moments are known. No row's output error exceeds that of nearest rounding.
    """

    name = "round-gptq"
    preserves = (Fact,)

    damping: float = 0.01
    act_order: bool = True
    refit: bool = True
    ranges: int = 4
    sequential: bool = False
    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        found = list(weight_quantizers(model))
        if ctx.calibration is None and (self.sequential or model.find(Moments) is None):
            ctx.remark("note", "", "no calibration data: nothing tells which errors matter")
            return model
        for done, (quantizer, sighted) in enumerate(self._sighted(model, ctx, found), start=1):
            self._round(model, ctx, quantizer, sighted)
            ctx.progress("round", done, len(found))
        return model

    def _sighted(
        self, model: Model, ctx: PassContext, found: list[WeightQuantizer]
    ) -> Iterator[tuple[WeightQuantizer, Sighted | None]]:
        """Every quantizer with the moments of what it multiplies, `None` where there are none."""
        left = {id(q): q for q in found if not self._is_settled(model, ctx, q)}
        if self.sequential and ctx.calibration is not None:
            some = list(left.values())
            for one, sighted in prefix_moments(model, ctx, some, ctx.calibration, self.samples):
                del left[id(one)]
                yield one, sighted
        moments = float_moments(model, ctx, left.values(), self.samples) if left else None
        for quantizer in left.values():
            yield quantizer, float_sight(quantizer, moments or Moments({}))

    def _is_settled(self, model: Model, ctx: PassContext, quantizer: WeightQuantizer) -> bool:
        """Whether nothing is left to round; a weight on a smaller grid gets that grid."""
        name, params = quantizer.fake.name or "", quantizer.params
        if params.spec.half or params.spec.index_bits:
            ctx.remark("missed", name, "its codes are no even grid")
            return True
        weight = quantizer.original()
        if not weight.size:
            ctx.remark("missed", name, "an empty weight")
            return True
        exact = exact_params(weight, params)
        if exact is None:
            return False
        set_rounded(model.graph, quantizer.fake, weight, exact)
        kept_on_grid(ctx, name)
        return True

    def _round(
        self, model: Model, ctx: PassContext, quantizer: WeightQuantizer, sighted: Sighted | None
    ) -> None:
        name = quantizer.fake.name or ""
        if sighted is None:
            node, index = quantizer.readers[0]
            why = why_no_matrix(node, index) or "there are no moments of what it multiplies"
            ctx.remark("missed", name, why)
            return
        matrix, second = sighted.matrix, sighted.second
        weight = quantizer.as_read(quantizer.original())
        target = sighted.target(matrix.rows(weight))
        whole = output_error(target, None, second) or 1.0
        present = matrix.rows(quantizer.as_read(quantizer.rounded()))
        before = output_error(target, present, second) / whole
        options = GptqOptions(self.damping, self.act_order, self.refit, self.ranges)
        # A table takes a good part of the memory that there is: no copy of it stays needlessly.
        del present
        aim = target if sighted.lost is not None else None
        del target
        made = gptq_weight(weight, quantizer.params_as_read, matrix, second, options, aim)
        after = made.after / whole
        if not after < before:
            ctx.remark("missed", name, "no rounding is better", before=before, after=after)
            return
        params = turned_params(made.params) if quantizer.turned else made.params
        set_rounded(model.graph, quantizer.fake, quantizer.as_read(made.rounded), params)
        text = f"output error {before:.3e} before, {after:.3e} after"
        ctx.remark("applied", name, text, before=before, after=after)
        ctx.count("weights rounded")


def exact_params(weight: Float32, params: QuantParams) -> QuantParams | None:
    """Parameters of the same spec that hold a weight exactly, `None` where there are none."""
    for tried in (params, clipped_params(weight, params.spec, steps=1)):
        if np.array_equal(dequantize(quantize(weight, tried), tried), weight):
            return tried
    return None
