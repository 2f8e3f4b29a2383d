"""Execute the widths and ranks of a plan: prune, repair, factor; the graph gets smaller."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.ir.errors import UsageError
from octavo.ir.facts import HalfConstants, Norms, Plan, Portable
from octavo.ir.menu import Menu, Sensitivity, Solution, Units
from octavo.ir.moments import Moments
from octavo.ir.reference import Original, with_original
from octavo.passes.base import Pass
from octavo.passes.collect_moments import collected
from octavo.passes.factor_low_rank import low_rank_layer
from octavo.passes.low_rank_graph import split_layer
from octavo.passes.prune_allocation import Work
from octavo.passes.prune_units import Pruner
from octavo.passes.rewrite import Rewrite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.menu import LowRank
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class ApplyStructure(Pass):
    """Make the graph as small as the plan says.

    **What it does.** Removes the units of every width that the plan narrows; a residual branch
    of which no unit stays is its bias then. Fits all linear layers to what the original ones gave,
    first to last, and writes layers that get a rank as two. What the plan says of a layer holds
    for both of the two.
    **Why.** `allocate` decides, this pass executes; ranges and moments are collected behind it.
    **When it does not apply.** A plan without widths or ranks: nothing changes.
    **Cost and accuracy.** One inference of `samples` samples, and one solution per layer.
    """

    name = "apply-structure"
    requires = (Menu, Solution, Plan)
    produces = (Plan, Original)
    preserves = (Menu, Sensitivity, Solution, Units, Norms, Portable, HalfConstants)

    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        if self.samples < 1:
            raise UsageError("samples must be at least 1", where=self.name)
        menu, solution = model.fact(Menu), model.fact(Solution)
        removed = _removed(model, solution)
        ranks = {
            node: low
            for name, chosen in solution.options.items()
            for offer in menu.offers[name]
            if offer.name == chosen
            for node, low in offer.ranks.items()
        }
        if not removed and not ranks:
            return model
        found = with_original(model.clone(), model)
        if removed:
            found = self._pruned(found, ctx, removed)
        return self._factored(found, ctx, ranks) if ranks else found

    def _pruned(
        self, model: Model, ctx: PassContext, removed: Mapping[str, tuple[int, ...]]
    ) -> Model:
        pruner = Pruner.of(model, ctx, "magnitude", "least-squares", self.samples)
        smaller = pruner.pruned(removed)
        pruner.cut(smaller, removed)
        work = Work.of(model, ctx, pruner.groups)
        for name, units in removed.items():
            group = pruner.groups[name]
            kept = group.units - len(units)
            ctx.count("units removed", len(units))
            text = f"{kept} of {group.units} {group.kind} stay"
            text += "" if kept else ": the branch is a bias"
            ctx.remark("applied", name.partition("#")[0], text, kept=kept, units=group.units)
        left = {name: pruner.groups[name].units - len(units) for name, units in removed.items()}
        share = work.left(left) / max(work.total, 1)
        ctx.remark("note", "", f"{share:.1%} of the multiply-accumulates are left", macs=share)
        plan, nodes = smaller.fact(Plan), {node.name for node in smaller.graph}
        there = {name: choice for name, choice in plan.by_node.items() if name in nodes}
        gone = len(there) < len(plan.by_node)
        return smaller.with_fact(replace(plan, by_node=there)) if gone else smaller

    def _factored(self, model: Model, ctx: PassContext, ranks: Mapping[str, LowRank]) -> Model:
        nodes = [node for node in model.graph if node.name in ranks]
        moments = Moments({})
        if ctx.calibration is not None:
            wanted = [(node.name or "", 1) for node in nodes]
            moments = collected(model, ctx, wanted, ctx.calibration, samples=self.samples)
        plan, rewrite = model.fact(Plan), Rewrite(model, ctx)
        by_node = dict(plan.by_node)
        for node in nodes:
            low, layer = ranks[node.name or ""], low_rank_layer(node, moments)
            form = next(form for form in layer.forms if form.kind == low.form)
            made = layer.factors(form, low.rank)
            first = split_layer(rewrite, node, made)
            by_node[first.name or ""] = by_node[node.name or ""]
            text = f"rank {low.rank} of {form.full}, output error {made.error:.3e}"
            ctx.remark("applied", node.name or "", text, rank=low.rank, error=made.error)
            ctx.count("layers factored")
        return model.with_fact(replace(plan, by_node=by_node))


def _removed(model: Model, solution: Solution) -> dict[str, tuple[int, ...]]:
    """The units that go, by axis group."""
    known = model.find(Units)
    if known is None:
        return {}
    chosen = {name: units[solution.options[name]] for name, units in known.removed.items()}
    return {known.axis_group[name]: units for name, units in chosen.items() if units}
