"""Estimators of damage by name, all behind one call; those that need gradients load torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from octavo.ir.errors import UnknownName
from octavo.ir.needs_torch import need_torch
from octavo.passes.block_importance import lim, zd
from octavo.passes.estimate import Estimate, resumable
from octavo.passes.fisher_damage import fisher, lampq
from octavo.passes.hessian_damage import hessian
from octavo.passes.layer_error import layer_error
from octavo.passes.measure_damage import measure_damage
from octavo.passes.scaled_error import scaled_error
from octavo.passes.weight_error import weight_error

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Sensitivity
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.estimate import Finder
    from octavo.passes.output_damage import Metric

# (model with a Menu, services, data, samples to use, how outputs are compared)
Estimator = Callable[["Model", "PassContext", "Batches", int, "Metric"], "Sensitivity"]


def _measured(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Estimate:
    found = measure_damage(model, ctx, batches, limit, metric)
    return Estimate(found.by_group, found.metric, found.samples, found.by_value)


def _by_gradients(name: str, find: Finder) -> Finder:
    """An estimator that is refused where torch is missing."""

    def found(
        model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
    ) -> Estimate:
        need_torch(f"the estimator {name}")
        return find(model, ctx, batches, limit, metric)

    return found


_FINDERS: Mapping[str, Finder] = {
    "measured": _measured,
    "fisher": _by_gradients("fisher", fisher),
    "lampq": _by_gradients("lampq", lampq),
    "hessian": _by_gradients("hessian", hessian),
    "scaled-error": scaled_error,
    "layer-error": layer_error,
    "weight-error": weight_error,
    "lim": lim,
    "zd": zd,
}
ESTIMATORS: Mapping[str, Estimator] = {n: resumable(n, find) for n, find in _FINDERS.items()}


def estimator(name: str) -> Estimator:
    """The estimator of a name; UnknownName with near misses."""
    if name not in ESTIMATORS:
        raise UnknownName("estimator", name, ESTIMATORS)
    return ESTIMATORS[name]
