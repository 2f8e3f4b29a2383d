"""Damage is measured with the quantizer that rounds the weights in the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.ir.calibration import Part
from octavo.ir.facts import Choice, Plan
from octavo.ir.menu import Menu, Sensitivity
from octavo.ir.moments import WeightRounding
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.collect_moments import collected, quantizable
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.pipeline import Pipeline
from octavo.passes.rounding import gptq_macs, with_rounding
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.moments import RoundingMethod
    from octavo.passes.base import PassContext

OFFERED = "offer-options{bits=3,static=false,dynamic=false,weight-only=false,float16=false}"
# The same float32 arithmetic, on moments of the same columns.
RELATIVE = 1e-6


def offered(model: Model, ctx: PassContext) -> Model:
    return Pipeline.parse(OFFERED).run(model, ctx).model


def rounded_in_the_end(model: Model, ctx: PassContext, text: str) -> dict[str, NDArray[np.float32]]:
    """What the last offer of every group leaves of the weights, after some passes."""
    offers = [offers[-1] for offers in model.fact(Menu).offers.values()]
    options = {node: Choice(o, "") for offer in offers for node, o in offer.options.items()}
    planned = model.with_fact(Plan(options, "test"))
    made = Pipeline.parse(f"insert-fake-quant{text}").run(planned, ctx).model
    return {q.readers[0][0].name or "": q.rounded() for q in weight_quantizers(made)}


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("nearest", ""),
        ("clip", ",clip-weights{steps=12}"),
        ("gptq", ",clip-weights{steps=12},round-gptq{ranges=1,refit=false}"),
    ],
)
def test_offers_round_as_the_passes_do(
    method: RoundingMethod, text: str, tiny_model: Model, calibrated: Callable[..., PassContext]
) -> None:
    ctx = calibrated(tiny_model)
    model = offered(tiny_model, ctx)
    assert ctx.calibration is not None
    seen = replace(ctx, calibration=Part(ctx.calibration, 0)) if method == "gptq" else ctx
    expected = rounded_in_the_end(model, seen, text)
    known = with_rounding(model, ctx, method)
    found = offered_roundings(known, ctx.target, ActivationRounding(ctx.evaluator))
    assert len(found) == len(expected) == 2
    for rounding in found.values():
        (weight,) = rounding.rounded(rounding.offers[-1]).values()
        truth = expected[rounding.nodes[0].name or ""]
        np.testing.assert_allclose(weight, truth, rtol=RELATIVE, atol=0)


def test_sensitivity_knows_how_weights_are_rounded(
    tiny_model: Model, calibrated: Callable[..., PassContext]
) -> None:
    """GPTQ hurts the layers' outputs less than nearest rounding, and the planner sees it."""
    ctx = calibrated(tiny_model)
    model = offered(tiny_model, ctx)
    damages = []
    for method in ("nearest", "gptq"):
        text = f"sensitivity{{estimator=layer-error,rounding={method}}}"
        studied = Pipeline.parse(text).run(model, ctx).model
        assert studied.fact(WeightRounding).method == method
        found = studied.fact(Sensitivity).by_group.values()
        damages.append([max(d.mean for d in offers.values()) for offers in found])
    nearest, ours = np.array(damages)
    assert np.all(ours < nearest)


def test_gptq_is_judged_on_samples_that_it_has_not_seen(
    tiny_model: Model, calibrated: Callable[..., PassContext]
) -> None:
    ctx = calibrated(tiny_model)
    assert ctx.calibration is not None
    model = offered(tiny_model, ctx)
    halves = [Part(ctx.calibration, index) for index in (0, 1)]
    seen = collected(model, ctx, quantizable(model, ctx), halves[0]).by_weight
    whole = sum(half.samples for half in halves)
    for method, samples in (("gptq", halves[1].samples), ("nearest", whole)):
        studied = Pipeline.parse(f"sensitivity{{rounding={method}}}").run(model, ctx).model
        assert studied.fact(Sensitivity).samples == samples
        kept = studied.fact(WeightRounding).moments.by_weight
        assert set(kept) == (set(seen) if method == "gptq" else set())
        for name, moment in kept.items():
            np.testing.assert_array_equal(moment.matrix(), seen[name].matrix())


def test_offers_are_rounded_to_nearest_where_gptq_would_take_too_long(
    tiny_model: Model, calibrated: Callable[..., PassContext]
) -> None:
    """The work is N·K² of every weight, summed over its offers."""
    ctx = calibrated(tiny_model)
    model = offered(tiny_model, ctx)
    menu, nodes = model.fact(Menu), {node.name or "": node for node in model.graph}
    expected = 0.0
    for name, offers in menu.offers.items():
        weight = nodes[name].inputs[1]
        assert weight is not None
        assert weight.shape is not None
        rows, *rest = weight.shape.numpy()
        columns = np.prod(rest) if nodes[name].op_type == "Conv" else rows
        expected += float(np.prod([rows, *rest]) * columns * (len(offers) - 1))
    assert gptq_macs(model, ctx) == expected
    for allowed, method in ((expected, "gptq"), (expected - 1, "nearest")):
        text = f"sensitivity{{rounding=gptq,roundable-macs={allowed}}}"
        studied = Pipeline.parse(text).run(model, ctx).model
        assert studied.fact(WeightRounding).method == method


def test_without_data_ranges_are_clipped(tiny_model: Model, pass_context: PassContext) -> None:
    model = with_rounding(tiny_model, pass_context, "gptq")
    assert model.fact(WeightRounding).method == "clip"
    assert [r.kind for r in pass_context.recorder.remarks] == ["note"]
