"""Give every quantized layer the mean and variance that its channels have in the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.facts import Fact
from octavo.ir.reference import Reference
from octavo.passes.base import Pass
from octavo.passes.channel_repair import ChannelRepair

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class MatchMoments(Pass):
    """Give the channels of every layer the mean and deviation they have in the float model.

    **What it does.** Goes through the layers in topological order. For a channel with moments
    `m, v` in the float model and `m', v'` in the quantized one, behind layers already corrected,
    weight scale and bias are multiplied by `r = sqrt(v/v')`, and `m - m'·r` is added to the bias.
    Codes stay. Layers without scales per output channel get the mean alone.
    **Why.** Rounding narrows some channels and shifts others, and later layers and activation
    ranges expect neither. This is batch-norm tuning (Hubara et al. 2020, arXiv 2006.10518) of a
    graph that has no batch norms any more. Data made from stored statistics never has them quite:
    behind such a layer both models go on with values that were given them.
    **When it does not apply.** There is no calibration data; a MatMul that no constant Add
    follows. Moments that do not come closer on the other half of the data stay as they are, and
    so does the whole model where its outputs do not.
    **Cost and accuracy.** One forward pass of each model, no gradients. Exact: on the calibration
    data the moments of every corrected layer are those of the float model.
    """

    name = "match-moments"
    requires = (Reference,)
    preserves = (Fact,)

    samples: int = 256

    def run(self, model: Model, ctx: PassContext) -> Model:
        return ChannelRepair(ctx, scales=True, samples=self.samples).run(model)
