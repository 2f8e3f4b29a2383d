"""Offer fewer channels, heads and ranks beside the bits, for one programme to choose among."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.ir.calibration import Part, first_samples
from octavo.ir.errors import UsageError
from octavo.ir.facts import Fact
from octavo.ir.menu import Menu, Sensitivity, Units
from octavo.passes.base import Pass
from octavo.passes.branch_groups import branch_groups
from octavo.passes.collect_moments import collected, quantizable
from octavo.passes.patterns import chosen
from octavo.passes.prune_allocation import output_loss, widths
from octavo.passes.prune_ranking import Score
from octavo.passes.prune_units import Pruner
from octavo.passes.rank_offers import RankOffers
from octavo.passes.width_offers import WidthOffers, width_name, width_text
from octavo.passes.width_seconds import WidthSeconds, designs
from octavo.passes.width_shapes import WidthShapes

if TYPE_CHECKING:
    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_KINDS = ("channels", "heads")
# Of the half of the data that repair is fitted to.
_FITTED_SAMPLES = 512


@final
@dataclass(frozen=True)
class OfferStructure(Pass):
    """Add widths of channels, neurons and heads, and ranks of layers, to the menu.

    **What it does.** Every set of axes that can only shrink together becomes a decision of its
    own, with `widths` numbers of units that may stay, and none where they are all that a residual
    branch computes: such a block goes, but for a bias. Damage is measured with that one width, its
    readers repaired by the moments of half of the calibration data, on the other half. What a
    layer's other options take is offered at every width of what it reads and gives: bytes by its
    shapes, seconds from copies of the model that are measured at some widths, interpolated. Layers
    whose widths stay whole are offered as two of lower rank as well, at shares `ranks` of the rank
    that saves nothing, with the damage of the best such weight on the data. `allocate` then decides
    blocks, widths, ranks and bits in one programme, and `apply-structure` executes them.
    **Why.** Half of the channels in 8 bits and all of them in 4 take the same bytes and do very
    different things to outputs and to seconds.
    **When it does not apply.** No calibration data: nothing tells what a width costs. Axes of
    graph inputs and outputs stay, as do those that `keep` names. Where nothing can go, a remark
    says why, and bits alone are planned.
    **Cost and accuracy.** One inference of `samples` samples per width, and one measurement of
    latency per copy. Damages of widths and of bits are assumed to add; `refine` measures.
    """

    name = "offer-structure"
    requires = (Menu, Sensitivity)
    produces = (Menu, Sensitivity, Units)
    preserves = (Fact,)

    widths: int = 5
    ranks: tuple[float, ...] = ()
    round_to: int = 8
    score: Score = "surgeon"
    samples: int = 64
    copies: int = 4
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def run(self, model: Model, ctx: PassContext) -> Model:
        self._check()
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: no structure is offered")
            return model
        seen = replace(ctx, calibration=Part(ctx.calibration, 0))
        pruner = Pruner.of(model, seen, self.score, "least-squares", _FITTED_SAMPLES)
        shapes = WidthShapes.of(model, [pruner.groups[n] for n in self._names(model, pruner)])
        branches = branch_groups(pruner)
        levels = {
            name: (group.units, *some)
            for name, group in shapes.groups.items()
            if (some := self._fewer(group, name in branches))
        }
        if not levels:
            ctx.remark("missed", "", f"nothing could go: {_reasons(pruner)}")
            return model.with_fact(Units({}, {}))
        shapes = WidthShapes(model, {name: shapes.groups[name] for name in levels})
        copies = designs(levels, self.copies, ctx.rng(self.name))
        seconds = WidthSeconds.of(shapes, ctx, copies)
        unseen = replace(pruner, feeds=tuple(first_samples(Part(ctx.calibration, 1), self.samples)))
        loss = output_loss(unseen, self.samples)
        if loss is None:
            raise UsageError("nothing of the outputs can be compared", where=self.name)
        damages = self._damages(pruner, loss, levels)
        ranks = self._ranks(model, ctx, loss) if self.ranks else None
        inside = {name: branch.nodes for name, branch in branches.items() if name in levels}
        found = WidthOffers(model, ctx, seconds, levels, damages, inside, ranks).with_widths()
        units = {
            width_name(name): {
                width_text(k, some[0]): () if k == some[0] else pruner.removed(name, k)
                for k in some
            }
            for name, some in levels.items()
        }
        ctx.count("widths", sum(map(len, levels.values())))
        return found.with_fact(Units(units, {width_name(name): name for name in levels}))

    def _check(self) -> None:
        if not all(0 < share < 1 for share in self.ranks):
            message = "ranks are shares between 0 and 1 of the rank that saves nothing"
            raise UsageError(message, where=self.name, hint="ranks=0.25;0.5")
        if self.widths < 2 or self.round_to < 1 or self.samples < 1 or self.copies < 0:
            message = "widths must be at least 2, round-to and samples 1, and copies 0"
            raise UsageError(message, where=self.name)

    def _fewer(self, group: AxisGroup, branch: bool) -> list[int]:
        """Numbers of units that may stay; none at all where they are a whole branch."""
        return [*widths(group, self.round_to, self.widths - 1), *([0] if branch else [])]

    def _names(self, model: Model, pruner: Pruner) -> list[str]:
        """The groups that may shrink, by the patterns."""
        nodes = {node.name for node in chosen(model, self.only, self.keep)}
        return [
            name
            for name, group in pruner.groups.items()
            if group.kind in _KINDS and group.layers and nodes.issuperset(group.layers)
        ]

    def _ranks(self, model: Model, ctx: PassContext, loss: Callable[[Model], float]) -> RankOffers:
        """Layers at some ranks, by the moments of what they read."""
        assert ctx.calibration is not None
        # As widths do, factors see the half of the data that their damage is not measured on.
        wanted, seen = quantizable(model, ctx), Part(ctx.calibration, 0)
        moments = collected(model, ctx, wanted, seen, samples=_FITTED_SAMPLES)
        return RankOffers.of(model, ctx, moments, loss, self.ranks, self.round_to)

    def _damages(
        self,
        pruner: Pruner,
        loss: Callable[[Model], float],
        levels: Mapping[str, Sequence[int]],
    ) -> Mapping[str, Mapping[int, float]]:
        """Damage of the outputs for every width, all others whole."""
        found: dict[str, dict[int, float]] = {}
        for at, (name, some) in enumerate(levels.items()):
            found[name] = {some[0]: 0.0}
            found[name] |= {kept: loss(pruner.offer_model(name, kept)) for kept in some[1:]}
            pruner.ctx.progress("damage of widths", at + 1, len(levels))
        return found


def _reasons(pruner: Pruner) -> str:
    """Why nothing can go, the most common reasons first."""
    counts = Counter(refusal.reason for refusal in pruner.refused)
    found = [reason for reason, _ in counts.most_common(3)]
    return "; ".join(found) or "no layer is wider than round-to"
