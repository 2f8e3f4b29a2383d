"""Damage as the relative error of the weights: no data, no runs, no gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.menu import Damage
from octavo.passes.estimate import Estimate
from octavo.passes.weight_scores import relative_error, score_offers

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.output_damage import Metric


def weight_error(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Estimate:
    """‖W - Ŵ‖² / ‖W‖² over the weights of a group; 0 for activations quantized at run time."""
    by_group = score_offers(model, ctx, lambda group, offer: Damage(relative_error(group, offer)))
    return Estimate(by_group, "relative squared error of the weights")
