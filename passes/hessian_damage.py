"""Damage from the trace of the Hessian, as HAWQ-V2 estimates it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from octavo.ir.menu import Damage
from octavo.passes.curvature import Curvatures, changes
from octavo.passes.estimate import Estimate
from octavo.passes.weight_scores import score_offers, squared

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding
    from octavo.passes.output_damage import Metric

_DRAWS = 16


def hessian(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Estimate:
    """tr(H) / n · ‖W - Ŵ‖², summed over the weights of a group (HAWQ-V2, arXiv 1911.03852).

    H is the Hessian of the labels' cross entropy, or of the outputs' distance from the source's
    where there are no labels; its trace is Hutchinson's estimate over 16 draws. A trace below
    zero, which says that rounding helps, counts as none. Activations that are quantized at run
    time count nothing. Raises NotDifferentiable.
    """
    how = Curvatures.of(model, ctx, batches, limit, metric)
    traces = how.traces(_DRAWS)

    def score(group: OfferedRounding, offer: Offer) -> Damage:
        mean = variance = 0.0
        for name, added in changes(group, offer).items():
            if name in traces:
                moved = squared(added) / added.size
                mean += max(traces[name].trace, 0.0) * moved
                variance += (traces[name].error * moved) ** 2
        return Damage(mean, math.sqrt(variance))

    loss = "the labels' cross entropy" if how.labels is not None else how.damage.text
    text = f"mean Hessian trace of {loss} times squared error of the weights"
    return Estimate(score_offers(model, ctx, score), text, how.samples)
