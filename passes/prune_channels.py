"""Remove channels and neurons, and make the layers behind them take over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.reference import Original
from octavo.passes.base import Pass
from octavo.passes.prune_ranking import Score
from octavo.passes.prune_units import Repair
from octavo.passes.pruning import Of, Pruning

if TYPE_CHECKING:
    from octavo.ir.axis_groups import Kind
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels of convolutions, neurons and hidden units that the outputs miss least.

    **What it does.** Finds which axes of which tensors have to shrink together, through residuals,
    depthwise convolutions, concatenation, reshapes and recurrences, and removes a share `ratio`
    of the `units` of every set of groups of the same structure, or of the model's `macs` or
    `parameters` (`of`); `heads` lets whole attention heads go too, and `dimensions` those inside
    of all heads of a layer, which `rotate-values` sorts. Within a group the order is that of
    `score`: `surgeon` removes what the layers behind can make up for best, `magnitude` looks at
    weights, `activation` at ‖W·X‖, `taylor` at the loss by a gate's gradient, `kprune` at both;
    dimensions of queries and keys, which no layer reads, go by ‖q‖·‖k‖.
    Between groups it is measured what each width of each group does to the outputs; with
    `offers=1` what one width does, and the others cost as the order's own costs grow. Widths are
    multiples of `round-to`. `repair=least-squares` then fits every linear layer to its original
    output on what it reads now, first to last; `closed-form` fits the layers right behind by
    second moments that follow from the weights before them, without data.
    **Why.** A layer with half of the channels takes half of the time on any runtime.
    **When it does not apply.** Axes of graph inputs and outputs, axes that a Softmax or a norm
    runs over, and whatever meets an operator without a rule, with the reason as a remark; of two
    ways to divide the same axis, as heads that share keys have, only the first. Without
    calibration data moments and repair are those of closed form, and nothing is measured.
    **Cost and accuracy.** `offers` inferences per group, of at most 128 samples and fewer where a
    sample is much work, and one more of all `samples` for the repair. The few longest columns of a
    layer count in it as if they were no more than twice as long as most. Remarks give every
    layer's ‖Ŵ·X̂ - W·X‖² / ‖W·X‖² before and after repair.
    """

    name = "prune-channels"
    produces = (Original,)

    ratio: float = 0.3
    of: Of = "units"
    score: Score = "surgeon"
    repair: Repair = "least-squares"
    heads: bool = False
    dimensions: bool = False
    round_to: int = 8
    offers: int = 6
    samples: int = 512
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        wanted: dict[Kind, bool] = {"heads": self.heads, "dimensions": self.dimensions}
        return ("channels", *(kind for kind, asked in wanted.items() if asked))

    def run(self, model: Model, ctx: PassContext) -> Model:
        return Pruning(
            self.name,
            self._kinds,
            self.ratio,
            self.of,
            self.score,
            self.repair,
            self.round_to,
            self.offers,
            self.samples,
            self.only,
            self.keep,
        ).run(model, ctx)
