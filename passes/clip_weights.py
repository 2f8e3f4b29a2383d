"""Choose the range of every quantized weight anew: large entries may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.facts import Fact
from octavo.ir.fake_quant import DOMAIN, params_of, set_rounded
from octavo.ir.mapped import reading
from octavo.ir.quant import dequantize, quantize
from octavo.passes.base import Pass
from octavo.passes.clip_search import clipped_params

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class ClipWeights(Pass):
    """Let few large weights be cut so that all others are rounded more finely.

    **What it does.** Tries `steps` scales between the whole range and a fifth of it, for every
    channel or block, and keeps the one that minimises the sum of `|w - ŵ|^p`. Weights that are
    codes times some number keep exactly their values.
    **Why.** At few bits a single outlier costs all other weights of its channel their resolution.
    **When it does not apply.** Weights that lie on their grid already.
    **Cost and accuracy.** Data-free; 2 ns per weight and step. The error in the p-norm never
    rises. A `p` above 2 spares the large weights, which count for more than others.
    """

    name = "clip-weights"
    preserves = (Fact,)

    p: float = 2.4
    steps: int = 80

    def run(self, model: Model, ctx: PassContext) -> Model:
        fakes = list(weight_fakes(model))
        for done, fake in enumerate(fakes):
            self._clip(model, fake, ctx)
            ctx.progress("clip weights", done + 1, len(fakes))
        return model

    def _clip(self, model: Model, fake: onnx_ir.Node, ctx: PassContext) -> None:
        assert fake.inputs[0] is not None
        tensor = fake.inputs[0].const_value
        assert tensor is not None
        weight = reading(tensor, lambda array: np.array(array, np.float32))
        old = params_of(fake)
        before = self._relative(weight, old)
        if not before:
            ctx.remark("missed", fake.name or "", "the weight lies on its grid already")
            return
        new = clipped_params(weight, old.spec, self.p, self.steps)
        after = self._relative(weight, new)
        if after >= before:
            ctx.remark("note", fake.name or "", "no other range is better", before=before)
            return
        set_rounded(model.graph, fake, weight, new)
        narrowed = float(np.mean(new.scale < old.scale))
        text = f"narrowed {narrowed:.0%} of the ranges"
        ctx.remark("applied", fake.name or "", text, before=before, after=after)
        ctx.count("weights clipped")

    def _relative(self, weight: NDArray[np.float32], params: QuantParams) -> float:
        """`sum |w - ŵ|^p / sum |w|^p`, in units of the largest weight so that nothing overflows."""
        largest = np.abs(weight).max(initial=0.0)
        if not largest:
            return 0.0
        error = np.abs(weight - dequantize(quantize(weight, params), params)) / largest
        power = np.power(error, np.float32(self.p)).sum(dtype=np.float64)
        return float(power / np.power(np.abs(weight) / largest, self.p).sum(dtype=np.float64))


def weight_fakes(model: Model) -> Iterator[onnx_ir.Node]:
    """The quantizers of constants, in graph order."""
    for node in model.graph:
        value = node.inputs[0] if node.domain == DOMAIN and len(node.inputs) > 1 else None
        if value is not None and value.const_value is not None and not value.is_graph_input():
            yield node
