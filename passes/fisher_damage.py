"""Damage from the Fisher diagonal: with the actual quantizer, and as LampQ estimates it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.menu import Damage
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.curvature import Curvatures, changes, initializers
from octavo.passes.estimate import Estimate
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.type_scale import nearest_offers, type_scales, weight_bits
from octavo.passes.weight_scores import score_offers

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.ir.torch_traces import Fisher
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding
    from octavo.passes.output_damage import Metric

# A step is half as wide with one bit more, and its squared error a quarter.
_GAMMA = 4.0
_SCALED_AT_BITS = 4


def fisher(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Estimate:
    """α Σ F_jj (W_j - Ŵ_j)²: LampQ's sensitivity with what the quantizer really does.

    α is damage per unit of that sum, by structural type, measured on two layers at 4 bits; where
    every layer is a type of its own, that measures all of them once.
    Activations that are quantized at run time count nothing. Raises NotDifferentiable.
    """
    how = Curvatures.of(model, ctx, batches, limit, metric)
    diagonals = how.fisher()
    groups = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    offers = nearest_offers(model, _SCALED_AT_BITS)
    sums = {name: _quadratic(diagonals, groups[name], offer) for name, offer in offers.items()}
    scores = {name: found.mean for name, found in sums.items()}
    scales = type_scales(model, ctx, batches, limit, metric, scores, offers)

    def score(group: OfferedRounding, offer: Offer) -> Damage:
        return _product(scales.by_group[group.group], _quadratic(diagonals, group, offer))

    text = f"{how.damage.text}, by Fisher ({how.text}, {scales.text})"
    return Estimate(score_offers(model, ctx, score), text, how.samples)


def lampq(model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric) -> Estimate:
    """LampQ's γ^(β - B) α tr(F) (AAAI 2026, arXiv 2511.10004), the baseline of `fisher`.

    B are the bits of the offer and β the fewest a group is offered, where α tr(F) is the damage:
    α is mean damage over mean trace by structural type, measured on two layers at β bits. The
    paper measures α by accuracy and leaves the constant γ^β out. γ is 4, which the error of a
    uniform quantizer falls by per bit. The trace knows nothing of how a weight is rounded, so
    block sizes do not differ. Activations that are quantized at run time count nothing. Raises
    NotDifferentiable.
    """
    how = Curvatures.of(model, ctx, batches, limit, metric)
    diagonals = how.fisher()
    groups = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    offers = nearest_offers(model, 0)
    traces = {name: _trace(diagonals, groups[name]) for name in offers}
    scores = {name: trace.mean for name, trace in traces.items()}
    scales = type_scales(model, ctx, batches, limit, metric, scores, offers)

    def score(group: OfferedRounding, offer: Offer) -> Damage:
        omega = _product(scales.by_group[group.group], traces[group.group])
        cost = _GAMMA ** (weight_bits(offers[group.group]) - weight_bits(offer))
        return Damage(cost * omega.mean, cost * omega.standard_error)

    text = f"{how.damage.text}, by LampQ ({how.text}, {scales.text})"
    return Estimate(score_offers(model, ctx, score), text, how.samples)


def _quadratic(diagonals: Mapping[str, Fisher], group: OfferedRounding, offer: Offer) -> Damage:
    """Σ F_jj (W_j - Ŵ_j)² over the weights of a group.

    Its relative error is taken to be that of the trace; weights share their samples, so their
    errors add.
    """
    mean = error = 0.0
    for name, added in changes(group, offer).items():
        if name in diagonals:
            found = diagonals[name]
            part = float(np.sum(found.diagonal * np.square(added)))
            mean += part
            error += part * _error(found) / found.trace if found.trace else 0.0
    return Damage(mean, error)


def _trace(diagonals: Mapping[str, Fisher], group: OfferedRounding) -> Damage:
    """tr(F) over the weights of a group."""
    names = {name for name, _ in initializers(group).values()}
    found = [diagonals[name] for name in sorted(names) if name in diagonals]
    return Damage(sum(f.trace for f in found), sum(map(_error, found)))


def _error(found: Fisher) -> float:
    return 0.0 if math.isnan(found.error) else found.error


def _product(left: Damage, right: Damage) -> Damage:
    """The product of two independent estimates, errors to first order."""
    error = math.hypot(left.mean * right.standard_error, right.mean * left.standard_error)
    return Damage(left.mean * right.mean, error)
