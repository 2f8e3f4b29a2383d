"""Damage that only depends on how an offer rounds the weights of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.ir.menu import Damage
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.offered_rounding import offered_roundings

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.ir.quant import QuantSpec
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding

    Score = Callable[[OfferedRounding, Offer], Damage]


def score_offers(model: Model, ctx: PassContext, score: Score) -> dict[str, dict[str, Damage]]:
    """The score of every offer by group and offer name; 0 for offers that round no weight.

    Offers that round alike are scored once, whatever they do to activations.
    """
    roundings = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    return {name: _scored(rounding, score) for name, rounding in roundings.items()}


def relative_error(rounding: OfferedRounding, offer: Offer) -> float:
    """‖W - Ŵ‖² / ‖W‖² over all weights of a group; 0 where they are all zero."""
    before, after = rounding.constants, rounding.rounded(offer)
    error = sum(squared(change(before[name], rounded)) for name, rounded in after.items())
    power = sum(squared(weight) for weight in before.values())
    return error / power if power else 0.0


def change(before: NDArray[np.generic], after: NDArray[np.generic]) -> NDArray[np.float32]:
    """What rounding adds to a weight, its type apart."""
    return after.astype(np.float32, copy=False) - before.astype(np.float32, copy=False)


def squared(array: NDArray[Any]) -> float:
    """‖a‖², summed in double precision."""
    return float(np.square(array, dtype=np.float64).sum())


def _scored(rounding: OfferedRounding, score: Score) -> dict[str, Damage]:
    found: dict[str, Damage] = {}
    by_specs: dict[tuple[QuantSpec | None, ...], Damage] = {}
    for offer in rounding.offers:
        specs = tuple(option.weight for option in offer.options.values())
        if any(specs) and specs not in by_specs:
            by_specs[specs] = score(rounding, offer)
        found[offer.name] = by_specs.get(specs, Damage(0.0))
    return found
