"""How much work a sample of the calibration data is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.calibration import samples_of
from octavo.ir.cost import AnalyticCost
from octavo.ir.shapes import concrete_elements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


def sample_macs(model: Model, ctx: PassContext, batches: Iterable[Feed]) -> float:
    """Multiply-accumulates of one sample, by the shapes of the first feed."""
    feed = next(iter(batches), None)
    if feed is None:
        return 0.0
    cost = AnalyticCost(ctx.target, concrete_elements(model, feed))
    return sum(cost.macs(node) for node in model.graph) / max(samples_of(feed), 1)


def affordable_samples(macs_per_sample: float, macs: float, limit: int, least: int = 4) -> int:
    """As many samples as `macs` allow, at most `limit` and at least `least`."""
    if macs_per_sample * limit <= macs:
        return limit
    return max(min(least, limit), int(macs / macs_per_sample))
