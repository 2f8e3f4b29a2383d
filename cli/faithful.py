"""Nodes that stay float where integer kernels would move the outputs too far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.ir.facts import Plan
from octavo.passes.choose_kernels import ChooseKernels
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.cli.candidates import Build, Candidate
    from octavo.cli.measured import Measured
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

# Of the norm of the outputs. Where speed cannot be measured, nothing tells what more error buys.
LARGEST_ERROR = 0.1
# Shares of the largest error that damages may add up to, tried in turn: they do not simply add.
_SHARES = (0.8, 0.5)
_MEASURED = (
    "offer-options{{bits=8,dynamic=false,float8=false,float4=false,weight-only=false,"
    "storage=false,float16=false}},sensitivity{{samples=16,metric=error}},"
    "allocate{{objective=latency,max-damage={limit!r}}}"
)


def faithful(
    build: Build, base: Model, ctx: PassContext, measured: Measured, first: Candidate
) -> tuple[Candidate, tuple[str, ...]]:
    """A plan that is fast by estimates and keeps the outputs, and what it took, in sentences.

    `base` is the model in front of the decision. What the integer kernels of a node do to the
    outputs is measured one node at a time; of the plans that keep to the sum, the fastest is built.
    """
    before = measured.fidelity(first.artifact).relative_error
    if before <= LARGEST_ERROR or ctx.calibration is None or not first.has("static"):
        return first, ()
    best, after, kept = first, before, 0
    for share in _SHARES:
        names = _costly(first, base, ctx, (share * LARGEST_ERROR) ** 2)
        tried = build(f"faithful-{share}", ctx, keep_float=(*_asked(first), *names))
        error = measured.fidelity(tried.artifact).relative_error
        if error < after:
            best, after, kept = tried, error, len(names)
        if after <= LARGEST_ERROR:
            break
    note = (
        f"integer kernels everywhere move the outputs by {before:.3f}: the {kept} node(s) that "
        f"cost most for the time they save stay float, {after:.3f} is left"
    )
    return best, (note,) if kept else ()


def _costly(first: Candidate, base: Model, ctx: PassContext, limit: float) -> tuple[str, ...]:
    """Nodes with integer kernels that the fastest plan of that damage leaves float."""
    plan = Pipeline.parse(_MEASURED.format(limit=limit)).run(base, ctx).model.fact(Plan)
    return tuple(
        name
        for name, choice in first.plan.by_node.items()
        if choice.option.method == "static" and plan.method(name) == "float"
    )


def _asked(first: Candidate) -> tuple[str, ...]:
    """The patterns that keep nodes float already."""
    chosen = (p for p in first.pipeline.passes if isinstance(p, ChooseKernels))
    return next((pass_.keep_float for pass_ in chosen), ())
