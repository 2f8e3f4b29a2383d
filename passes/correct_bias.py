"""Give every quantized layer the mean that its channels have in the float model."""

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
class CorrectBias(Pass):
    """Give the channels of every layer the mean they have in the float model.

    **What it does.** Goes through the layers in topological order and adds to each bias the
    difference between the means of the float and the quantized output, `E[y] - E[y_q]`, measured
    behind layers already corrected (Nagel et al. 2019, arXiv 1906.04721, with data).
    Data made from stored statistics never has them quite: behind such a layer both models go on
    with values that were given them.
    **Why.** Rounding shifts the means of channels, more than anything in depthwise convolutions.
    **When it does not apply.** There is no calibration data; a MatMul that no constant Add
    follows. Means that do not come closer on the other half of the data stay as they are, and so
    does the whole model where its outputs do not.
    **Cost and accuracy.** One forward pass of each model, no gradients. `match-moments` does this
    and more; here neither codes nor scales change.
    """

    name = "correct-bias"
    requires = (Reference,)
    preserves = (Fact,)

    samples: int = 256

    def run(self, model: Model, ctx: PassContext) -> Model:
        return ChannelRepair(ctx, scales=False, samples=self.samples).run(model)
