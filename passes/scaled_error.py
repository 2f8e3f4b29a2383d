"""Layer errors in units of damage, for models whose every offer would take hours to measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.menu import Damage, Menu
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.estimate import Estimate
from octavo.passes.layer_error import layer_error
from octavo.passes.moment_error import moment_errors
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.output_damage import OutputDamage
from octavo.passes.rounding import rounding_of
from octavo.passes.sample_macs import affordable_samples, sample_macs
from octavo.passes.type_scale import measured_offers, spread, weight_bits

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.output_damage import Metric

_LAYERS_PER_ROLE = 5
_SCALED_AT_BITS = 4
_MACS = 5e12
# Layers are measured until they take so many multiply-accumulates.
_MEASURED_MACS = 4e12
_TINY = 1e-30
# Rounding noise of activations is alike in all samples, and small beside that of weights.
_SAMPLES_OF_ACTIVATIONS = 2


def scaled_error(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Estimate:
    """α times the layer error of every offer, run-time activations included.

    Where the moments of what weights multiply are known, and weights go to the nearest codes,
    their errors follow from them.
    α is damage over layer error, measured on some layers of every role at 4 bits, at least five,
    and interpolated between them, in its logarithm, by the place of a layer among those of its
    role. A large model runs on fewer samples than `limit`.
    """
    limit = few_samples(model, ctx, batches, limit)
    roundings = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    # GPTQ has seen some of the data of the moments: its errors are smaller there than elsewhere.
    known = {} if rounding_of(model) == "gptq" else moment_errors(model, ctx, roundings)
    few = min(limit, _SAMPLES_OF_ACTIVATIONS) if known else limit
    errors = layer_error(model, ctx, batches, few, metric, known)
    anchors = {n: offer for n, of in model.fact(Menu).offers.items() if (offer := _anchor(of))}
    groups = model.fact(Menu).groups
    by_role: dict[str, list[str]] = defaultdict(list)
    for name in anchors:
        by_role[groups[name].role].append(name)
    work = sample_macs(model, ctx, batches) / 2 * limit * max(len(by_role), 1)
    count = max(_LAYERS_PER_ROLE, int(_MEASURED_MACS / max(work, 1.0)))
    chosen = {role: spread(names, count) for role, names in by_role.items()}
    some = {name: anchors[name] for names in chosen.values() for name in names}
    measured = measured_offers(model, ctx, batches, limit, metric, some)
    scale = {
        n: d.mean / max(errors.by_group[n][some[n].name].mean, _TINY) for n, d in measured.items()
    }
    scales: dict[str, float] = {}
    for role, names in by_role.items():
        scales |= _interpolated(names, {name: scale[name] for name in chosen[role]})
    by_group = {
        name: {o: _scaled(damage, scales.get(name, 0.0)) for o, damage in offers.items()}
        for name, offers in errors.by_group.items()
    }
    measure = OutputDamage.of(model, metric).text
    text = f"{measure}, by layer error ({len(some)} of {len(groups)} groups measured)"
    return Estimate(by_group, text, limit)


def few_samples(model: Model, ctx: PassContext, batches: Batches, limit: int) -> int:
    """Samples on which the layer errors of all offers, and the measured layers, take a minute."""
    menu = model.fact(Menu)
    trials = sum(map(len, menu.offers.values())) / max(len(menu.offers), 1)
    macs = sample_macs(model, ctx, batches) * (trials + _LAYERS_PER_ROLE)
    return affordable_samples(macs, _MACS, limit)


def _anchor(offers: Sequence[Offer]) -> Offer | None:
    """The offer that only rounds weights, to nearly 4 bits; `None` where there is none."""
    stored = [o for o in offers if {p.method for p in o.options.values()} == {"storage"}]
    return min(stored, key=lambda o: abs(weight_bits(o) - _SCALED_AT_BITS), default=None)


def _interpolated(names: Sequence[str], known: Mapping[str, float]) -> dict[str, float]:
    """The scale of every layer from those of a few, linear in its logarithm."""
    places = [names.index(name) for name in known]
    logs = [float(np.log(max(scale, _TINY))) for scale in known.values()]
    found = np.exp(np.interp(np.arange(len(names)), places, logs))
    return dict(zip(names, map(float, found), strict=True))


def _scaled(error: Damage, scale: float) -> Damage:
    return Damage(scale * error.mean, scale * error.standard_error)
