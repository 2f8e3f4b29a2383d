"""Remove attention heads, and make the projections behind them take over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.reference import Original
from octavo.passes.base import Pass
from octavo.passes.prune_ranking import Score
from octavo.passes.prune_units import Repair
from octavo.passes.pruning import Pruning

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class PruneHeads(Pass):
    """Remove whole attention heads that the outputs miss least.

    **What it does.** As `prune-channels`, for heads: a head is its part of the query, key and
    value projections and of the one behind; query heads that share a key and value go with it. A
    share `ratio` of the heads of all layers of the same structure goes, from the layers in which
    that is measured to cost the outputs least.
    **Why.** Many heads of trained transformers hardly matter, and a head costs time in four
    projections and two products.
    **When it does not apply.** Heads that are not an axis of their own anywhere in the graph, and
    where nothing but one head is left; the reason is a remark.
    **Cost and accuracy.** As `prune-channels`. The last head of a layer stays.
    """

    name = "prune-heads"
    produces = (Original,)

    ratio: float = 0.25
    score: Score = "surgeon"
    repair: Repair = "least-squares"
    offers: int = 6
    samples: int = 512
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def run(self, model: Model, ctx: PassContext) -> Model:
        return Pruning(
            self.name,
            ("heads",),
            self.ratio,
            "units",
            self.score,
            self.repair,
            1,
            self.offers,
            self.samples,
            self.only,
            self.keep,
        ).run(model, ctx)
