"""Find what every offer of every group does to the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.errors import UsageError
from octavo.ir.facts import Fact
from octavo.ir.menu import Menu, Sensitivity
from octavo.ir.moments import RoundingMethod
from octavo.passes.base import Pass
from octavo.passes.estimators import estimator
from octavo.passes.output_damage import Metric
from octavo.passes.rounding import gptq_macs, unseen, with_rounding
from octavo.passes.sample_macs import sample_macs

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class AnalyseSensitivity(Pass):
    """Estimate the damage of every offer, with its standard error.

    **What it does.** `measured` changes one group at a time and compares the outputs with the
    source's, forward only. The other estimators are cheaper stand-ins: layer errors scaled by a
    few measured layers (`scaled-error`), gradients (Fisher, Hessian trace), the layer's own
    output, or the weights alone. `auto` is `measured` where that takes no more than
    `measurable-macs` multiply-accumulates, and `scaled-error` beyond.
    **Why.** Layers differ by orders of magnitude in what their rounding does to the outputs.
    `rounding` is how offers round weights here and in `refine`: as they are rounded in the end,
    but to nearest where `gptq` would take more than `roundable-macs`. `gptq` rounds with the
    moments of half of the data, and damage is measured on the other half.
    **When it does not apply.** No calibration data: random numbers are used, and a note says so.
    **Cost and accuracy.** Changes nothing by itself. Every damage comes with its standard error
    over samples; damages of several groups are assumed to add, which `refine` checks.
    """

    name = "sensitivity"
    requires = (Menu,)
    produces = (Sensitivity,)
    preserves = (Fact,)

    estimator: str = "auto"
    samples: int = 64
    metric: Metric = "auto"
    # A few minutes on two cores.
    measurable_macs: float = 2e13
    rounding: RoundingMethod = "nearest"
    roundable_macs: float = 1e12

    def run(self, model: Model, ctx: PassContext) -> Model:
        batches = ctx.calibration or ctx.stand_in
        if batches is None:
            message = "sensitivity needs inputs to run the model on"
            raise UsageError(message, hint="give --calibration")
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: damage is estimated on random numbers")
        name = self._chosen(model, ctx, batches)
        model = with_rounding(model, ctx, self._rounding(model, ctx))
        batches = unseen(model, batches)
        found = estimator(name)(model, ctx, batches, self.samples, self.metric)
        ctx.count("samples", found.samples)
        ctx.remark("note", "", f"{found.estimator}: {found.metric}, {found.samples} samples")
        return model.with_fact(found)

    def _rounding(self, model: Model, ctx: PassContext) -> RoundingMethod:
        """How offers are rounded: GPTQ only where `auto` can afford it for every offer."""
        if self.estimator != "auto" or self.rounding != "gptq":
            return self.rounding
        macs = gptq_macs(model, ctx)
        if macs <= self.roundable_macs:
            return self.rounding
        ctx.remark("note", "", f"GPTQ for every offer would take {macs:.0e} multiply-accumulates")
        return "nearest"

    def _chosen(self, model: Model, ctx: PassContext, batches: Batches) -> str:
        """The estimator, by the work of measuring all offers: clocks must not decide a plan."""
        if self.estimator != "auto":
            return self.estimator
        macs = sample_macs(model, ctx, batches)
        trials = sum(len(offers) - 1 for offers in model.fact(Menu).offers.values())
        # A trial runs what lies behind a group: half of the model on average.
        work = macs / 2 * trials * min(self.samples, batches.samples)
        if work <= self.measurable_macs:
            return "measured"
        ctx.remark("note", "", f"measuring every offer would take {work:.0e} multiply-accumulates")
        return "scaled-error"
