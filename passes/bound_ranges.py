"""Activation ranges without data: what normalizations say, carried through the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.ir.facts import Fact, Norms, Range, Ranges
from octavo.ir.synthetic import ANALYTIC
from octavo.passes.base import Pass
from octavo.passes.input_laws import parse_laws
from octavo.passes.law_rules import Propagation

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.value_laws import Law


@final
@dataclass(frozen=True)
class BoundRanges(Pass):
    """Find the ranges that later passes asked for without data, or bound measured ones.

    **What it does.** A normalization with scale γ and shift β gives values within β ± k·|γ|
    (Nagel et al. 2019, "Data-free quantization"), k `deviations`. Mean, deviation and interval of
    each channel go on through linear operators, activations, pooling, sums and products.
    Ranges that calibration found before are cut to these; without data these are the ranges.
    **Why.** Nobody may hand out data, and a static integer kernel needs its ranges.
    **When it does not apply.** Values behind operators that bound nothing; the remark says which.
    **Cost and accuracy.** Less than a second. Channels count as independent and normal: ranges
    behind norms are close to measured ones, those behind sums and products wider. Inputs are
    taken as normal with mean 0 and deviation 1 where `inputs` says nothing, as x=uniform(0,1).
    """

    name = "bound-ranges"
    requires = (Norms,)
    produces = (Ranges,)
    preserves = (Fact,)

    deviations: float = 4.0
    inputs: tuple[str, ...] = ()

    def run(self, model: Model, ctx: PassContext) -> Model:
        bounds = Propagation(model, self.deviations)
        bounds.run(parse_laws(self.inputs))
        known = model.find(Ranges)
        by_value = dict(known.by_value) if known is not None else {}
        wanted = [s.value for s in ctx.statistics if s.kind == "range"]
        for name in dict.fromkeys([*by_value, *wanted]):
            law = bounds.laws.get(name)
            if law is None:
                ctx.remark("missed", name, bounds.why.get(name, "no value has this name"))
                continue
            found = by_value.get(name)
            by_value[name] = interval(law) if found is None else _cut(found, interval(law))
            ctx.count("ranges" if found is None else "bounded")
        if known is not None:
            return model.with_fact(replace(known, by_value=by_value))
        return model.with_fact(Ranges(by_value, ANALYTIC, 0, ""))


def interval(law: Law) -> Range:
    """The interval of all channels together, zero included."""
    low, high = min(float(law.low.min()), 0.0), max(float(law.high.max()), 0.0)
    return Range(low, high, low, high)


def _cut(found: Range, bound: Range) -> Range:
    return replace(found, low=max(found.low, bound.low), high=min(found.high, bound.high))
