"""Damage per unit of a score, for every structural type of layers, from a few measured layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.ir.menu import Damage, Menu
from octavo.ir.moments import WeightRounding
from octavo.passes.measure_damage import measure_damage

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.output_damage import Metric

_LAYERS_PER_TYPE = 2
# Measuring costs more than the gradients do. The standard error of the mean over so few samples,
# often a third of it, is part of every estimate.
_SAMPLES = 32


@final
@dataclass(frozen=True)
class TypeScales:
    """Damage per unit of a score for every group, and how many groups were measured for it."""

    by_group: Mapping[str, Damage]
    measured: int

    @property
    def text(self) -> str:
        """How much rests on measuring, for people."""
        return f"{self.measured} of {len(self.by_group)} groups measured"


def type_scales(
    model: Model,
    ctx: PassContext,
    batches: Batches,
    limit: int,
    metric: Metric,
    scores: Mapping[str, float],
    offers: Mapping[str, Offer],
) -> TypeScales:
    """α of every group: mean measured damage over mean score, over two layers of its type.

    LampQ's type factor (arXiv 2511.10004, "type-aware" sensitivity), with the damage of the
    outputs in place of an accuracy drop, which would need labels. `scores` and `offers`, by
    group, are those of the offer that the score stands for; only its weights are rounded. At
    most 32 samples are run.
    """
    by_role: dict[str, list[str]] = defaultdict(list)
    for name in offers:
        by_role[model.fact(Menu).groups[name].role].append(name)
    chosen = {role: spread(names, _LAYERS_PER_TYPE) for role, names in by_role.items()}
    layers = {name: stored(offers[name]) for names in chosen.values() for name in names}
    measured = measured_offers(model, ctx, batches, min(limit, _SAMPLES), metric, layers)
    found: dict[str, Damage] = {}
    for role, names in by_role.items():
        some = [measured[name] for name in chosen[role]]
        score = sum(scores[name] for name in chosen[role])
        error = sum(damage.standard_error**2 for damage in some) ** 0.5
        alpha = Damage(sum(d.mean for d in some) / score, error / score) if score else Damage(0.0)
        found |= dict.fromkeys(names, alpha)
    return TypeScales(found, len(layers))


def nearest_offers(model: Model, bits: int) -> dict[str, Offer]:
    """The offer of every group whose weights have nearly `bits` bits; the fewer bits win a tie."""
    found = {}
    for name, offers in model.fact(Menu).offers.items():
        rounding = [offer for offer in offers if weight_bits(offer)]
        if rounding:
            found[name] = min(rounding, key=lambda o: (abs(weight_bits(o) - bits), weight_bits(o)))
    return found


def weight_bits(offer: Offer) -> int:
    """The most bits that an offer gives to a weight; 0 where it rounds none."""
    specs = (option.weight for option in offer.options.values())
    return max((spec.bits for spec in specs if spec is not None), default=0)


def measured_offers(
    model: Model,
    ctx: PassContext,
    batches: Batches,
    limit: int,
    metric: Metric,
    layers: Mapping[str, Offer],
) -> dict[str, Damage]:
    """The measured damage of one offer of some groups."""
    menu = model.fact(Menu)
    some = Menu(
        {name: menu.groups[name] for name in layers},
        {name: (offer,) for name, offer in layers.items()},
        menu.fixed_bytes,
        menu.cost_source,
    )
    study = model.keeping((WeightRounding,)).with_fact(some)
    found = measure_damage(study, ctx, batches, limit, metric)
    return {name: found.damage(name, offer.name) for name, offer in layers.items()}


def stored(offer: Offer) -> Offer:
    """The offer without what it does to activations."""
    options = {
        name: replace(option, method="storage") if option.weight is not None else option
        for name, option in offer.options.items()
    }
    return replace(offer, options=options)


def spread(names: list[str], count: int) -> list[str]:
    """First, last, and evenly between."""
    if len(names) <= count:
        return names
    return [names[round(k * (len(names) - 1) / (count - 1))] for k in range(count)]
