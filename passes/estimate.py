"""What an estimator finds, timed and kept: finding it again costs nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, final

from octavo.ir.cache import cache_key
from octavo.ir.facts import Ranges
from octavo.ir.menu import Damage, Menu, Sensitivity
from octavo.ir.versions import versions
from octavo.passes.rounding import rounding_of

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.output_damage import Metric


@final
@dataclass(frozen=True)
class Estimate:
    """Damage of every offer by group and offer name, what it is, and how many samples it used.

    `by_value` is that of static quantizers of activations, where an estimator knows it.
    """

    by_group: Mapping[str, Mapping[str, Damage]]
    metric: str
    samples: int = 0
    by_value: Mapping[str, Damage] = field(default_factory=dict)


# (model with a Menu, services, data, samples to use, how outputs are compared)
Finder = Callable[["Model", "PassContext", "Batches", int, "Metric"], Estimate]


def resumable(
    name: str, find: Finder
) -> Callable[[Model, PassContext, Batches, int, Metric], Sensitivity]:
    """The estimator `name`: what `find` finds, from the cache where it was found before.

    `seconds` of the result are those of finding it first.
    """

    def estimate(
        model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
    ) -> Sensitivity:
        key = _key(name, model, ctx, batches, limit, metric)
        stored = ctx.cache.get(key) if ctx.cache is not None else None
        if stored is not None:
            return _read(name, stored)
        begin = time.perf_counter()
        found = find(model, ctx, batches, limit, metric)
        seconds = time.perf_counter() - begin
        result = Sensitivity(
            found.by_group, found.by_value, name, found.metric, found.samples, seconds
        )
        if ctx.cache is not None:
            ctx.cache.put(key, _written(result))
        return result

    return estimate


def _key(
    name: str, model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> str:
    menu, ranges = model.fact(Menu), model.find(Ranges)
    offered = {group: [dict(o.options) for o in offers] for group, offers in menu.offers.items()}
    return cache_key(
        f"estimate {name}",
        model.fingerprint,
        repr([(group.nodes, group.role) for group in menu.groups.values()]),
        repr(offered),
        ctx.target.name,
        ranges.calibration_sha256 + ranges.method if ranges is not None else "",
        batches.sha256,
        f"{limit} {metric} {ctx.seed} {rounding_of(model)}",
        repr(sorted(versions().items())),
    )


def _written(found: Sensitivity) -> bytes:
    groups = {g: {o: astuple(d) for o, d in of.items()} for g, of in found.by_group.items()}
    values = {name: astuple(damage) for name, damage in found.by_value.items()}
    return json.dumps([groups, values, found.metric, found.samples, found.seconds]).encode()


def _read(name: str, stored: bytes) -> Sensitivity:
    groups, values, metric, samples, seconds = json.loads(stored)
    by_group = {g: {o: Damage(*d) for o, d in of.items()} for g, of in groups.items()}
    by_value = {value: Damage(*d) for value, d in values.items()}
    return Sensitivity(by_group, by_value, name, metric, samples, seconds)
