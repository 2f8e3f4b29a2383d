"""Lower more than one plan, measure them against the source, keep the fastest that is faithful."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, final

from octavo.backends.fidelity import compare
from octavo.cli.faithful import faithful
from octavo.ir.cost import AnalyticCost, MeasuredCost
from octavo.ir.facts import Plan

if TYPE_CHECKING:
    from octavo.cli.measured import Measured
    from octavo.ir.artifact import Artifact, PlannedNode
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation, Pipeline

_WITHOUT_RANGES = (
    "canonicalize,choose-kernels{weight-only=true,bits=4,block-size=64},insert-fake-quant"
)
# A mixture replaces a simpler one when it is faster by more than timing noise.
_CLEARLY = 1.02
# Rows whose arg-max may be another where a faster file replaces a slower one.
_FEW_ROWS = 0.05
# Interleaved medians of equal files differ by less than this.
NOT_SLOWER = 0.98


@final
@dataclass(frozen=True)
class Candidate:
    """One plan, compiled; it is lowered when somebody asks for the artifact."""

    pipeline: Pipeline
    compilation: Compilation
    lower: Callable[[], Artifact]

    @cached_property
    def artifact(self) -> Artifact:
        return self.lower()

    @property
    def plan(self) -> Plan:
        return self.compilation.model.find(Plan) or Plan({}, "")

    @property
    def options(self) -> dict[str, str]:
        """What the lowered file depends on: the option of every node."""
        return options_of(self.plan)

    def has(self, method: str) -> bool:
        return any(c.option.method == method for c in self.plan.by_node.values())


class Build(Protocol):
    """Runs the deciding passes with a context and options."""

    def __call__(self, name: str, ctx: PassContext, /, **options: object) -> Candidate: ...


def options_of(plan: Plan) -> dict[str, str]:
    """The option of every node, as text."""
    return {name: str(choice.option) for name, choice in plan.by_node.items()}


def fastest(
    build: Build,
    decide: Callable[[PassContext], Plan],
    base: Model,
    ctx: PassContext,
    measured: Measured,
) -> tuple[Candidate, tuple[str, ...]]:
    """The fastest faithful candidate, and what the search found, in sentences.

    `decide` makes a plan of `base` and nothing else; only a new one is worth building.
    """
    first = build("estimated", ctx)
    if not first.options:
        return first, (_undecided(first, ctx),)
    if not measured.request.measure:
        said = ("latency was not measured: the plan rests on estimates",)
        if measured.backend.times:
            return first, said
        kept, why = faithful(build, base, ctx, measured, first)
        return kept, (*said, *why)
    notes: list[str] = []
    if first.has("dynamic") and not first.has("static"):
        first = _faithful_without_data(build, base, ctx, measured, first, notes)
    candidates, own = [first], ctx
    if not first.has("weight-only"):
        own = replace(ctx, cost=_measured_cost(first, ctx, measured))
        plan = decide(own)
        same = options_of(plan) == first.options
        candidates = [_with_seconds(first, plan)] if same else [first, build("measured", own)]
        _add_recurrent(build, own, measured, candidates, notes)
    speeds = measured.speeds([c.artifact for c in candidates])
    if max(speeds) < NOT_SLOWER:
        stored = build("storage", own, static=False, dynamic=False)
        # Kernels that the pipeline itself asks for stay.
        asked = stored.options == candidates[0].options
        if not asked and _keeps_answers(base, candidates[0], stored, measured, notes):
            candidates.append(stored)
            speeds = measured.speeds([c.artifact for c in candidates])
            notes.append("integer kernels are slower than float here: weights are only stored")
    best = max(range(len(speeds)), key=lambda k: speeds[k])
    return candidates[best if speeds[best] > _CLEARLY * speeds[0] else 0], tuple(notes)


def _undecided(first: Candidate, ctx: PassContext) -> str:
    """Why no node has an option: no kernels, or none without ranges that data would give."""
    target = ctx.target
    supported = (target.support(node, "static").row for node in first.compilation.model.graph)
    count = sum(row is not None and bool(row.weights) for row in supported)
    if not count or ctx.calibration is not None:
        return "nothing to decide: the model has no node this target computes in int8"
    stays = "float16" if target.half_constants else "float"
    return (
        f"no calibration data: {target.name} has no int8 kernels that find ranges at run time, so "
        f"that all {count} nodes with weights stay {stays}; --calibration DATA gives int8, the "
        f"pipeline '{_WITHOUT_RANGES}' stores weights in 4 bits without data"
    )


def _measured_cost(first: Candidate, ctx: PassContext, measured: Measured) -> MeasuredCost:
    assert isinstance(ctx.cost, AnalyticCost)
    latencies = measured.latencies(first.artifact)
    return MeasuredCost.of(first.compilation.model, latencies, ctx.cost)


def _with_seconds(first: Candidate, plan: Plan) -> Candidate:
    """The file that exists, under the equal plan that knows the measured seconds."""
    known = plan.by_node

    def updated(row: PlannedNode) -> PlannedNode:
        return replace(row, seconds=dict(known[row.node].seconds)) if row.node in known else row

    rows = tuple(updated(row) for row in first.artifact.planned)
    artifact = replace(first.artifact, planned=rows)
    model = first.compilation.model.with_fact(plan)
    compilation = replace(first.compilation, model=model)
    return Candidate(first.pipeline, compilation, lambda: artifact)


def _faithful_without_data(
    build: Build,
    base: Model,
    ctx: PassContext,
    measured: Measured,
    dynamic: Candidate,
    notes: list[str],
) -> Candidate:
    """Weight-only kernels where per-tensor dynamic activations change what the model answers.

    A few channels of large activations, as decoders have, leave no codes for all others; kernels
    that quantize blocks of a row do not mind. What is not used is never lowered. What passes in
    front of the decision cost is not held against a kernel.
    """
    reference = measured.outputs(base)
    before = compare(reference, measured.outputs(dynamic.compilation.model)).agreement
    if before is None or before >= measured.request.min_agreement:
        return dynamic
    blocked = build("weight-only", ctx, weight_only=True)
    after = compare(reference, measured.outputs(blocked.compilation.model)).agreement
    if after is None or after <= before:
        return dynamic
    notes.append(
        f"dynamic kernels keep the arg-max of {before:.1%} of the rows, weight-only kernels of "
        f"{after:.1%}: weight-only used"
    )
    return blocked


def _keeps_answers(
    base: Model, blocked: Candidate, stored: Candidate, measured: Measured, notes: list[str]
) -> bool:
    """Whether stored weights answer as the file they are to replace does.

    They have a scale per channel: where kernels read blocks of few bits, the step is a large one.
    """
    if not blocked.has("weight-only"):
        return True
    reference = measured.outputs(base)
    rows = (compare(reference, measured.outputs(c.compilation.model)) for c in (blocked, stored))
    before, after = (row.agreement for row in rows)
    if before is None or after is None or after >= before - _FEW_ROWS:
        return True
    notes.append(
        f"weight-only kernels are slower than float here; stored weights, which are not, keep the "
        f"arg-max of {after:.1%} of the rows instead of {before:.1%}: not used"
    )
    return False


def _add_recurrent(
    build: Build,
    ctx: PassContext,
    measured: Measured,
    candidates: list[Candidate],
    notes: list[str],
) -> None:
    """Offer dynamic LSTM kernels where the outputs stay within the bound; say so either way."""
    base = candidates[-1]
    if not any(node.op_type == "LSTM" for node in base.compilation.model.graph):
        return
    dynamic = build("recurrent", ctx, recurrent=True)
    if dynamic.options == base.options:
        return
    before, after = (measured.fidelity(c.artifact).relative_error for c in (base, dynamic))
    limit = measured.request.max_recurrent_error
    found = f"dynamic LSTM kernels: output error {before:.4f} becomes {after:.4f}"
    if after - before > limit:
        notes.append(f"{found}, more than {limit} worse: not used")
    else:
        candidates.append(dynamic)
        notes.append(f"{found}, at most {limit} worse: offered")
