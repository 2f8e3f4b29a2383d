"""Which units of a group to remove, and what the weights behind them become: one group at a time.

What passes and planners share: `Pruner.offer` gives the units and the repaired constants of a
group for any number of units that stay, `Pruner.pruned` a whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.axis_groups import axis_groups
from octavo.ir.calibration import first_samples
from octavo.ir.extract import values_by_name
from octavo.ir.remove_units import remove_units
from octavo.passes.affine_layers import affine_layers
from octavo.passes.base import Recorder
from octavo.passes.branch_groups import branch_groups, without_branch
from octavo.passes.collect_moments import collected
from octavo.passes.prune_gradients import gate_fisher
from octavo.passes.prune_moments import all_of, centred, closed_form, measured
from octavo.passes.prune_products import product_scores
from octavo.passes.prune_ranking import by_scores, energies, magnitudes, surgeon
from octavo.passes.prune_readers import linear_layers, readers, wanted
from octavo.passes.prune_repair import repair, repair_from_moments, without_units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup, Refusal
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.prune_ranking import Ranking, Score
    from octavo.passes.prune_readers import Reader

    Array = NDArray[np.generic]
    Float64 = NDArray[np.float64]

Repair = Literal["least-squares", "closed-form", "none"]

# K-prune's weights of what a unit gives and of what the loss says of it.
_GIVES, _PREDICTS = 2.5e-4, 1.0


@final
@dataclass(frozen=True, eq=False)
class PrunedGroup:
    """A group with some units gone: the constants that change, in their old shapes, by name.

    Whatever belongs to the units is zero in them, so that the model computes what the smaller
    one does. `kept` units stay.
    """

    group: AxisGroup
    units: tuple[int, ...]
    constants: Mapping[str, Array]

    @property
    def kept(self) -> int:
        return self.group.units - len(self.units)


@final
@dataclass(frozen=True, eq=False)
class Pruner:
    """The groups of a float model with their readers, moments and rankings.

    `moments` by reader are second moments of columns with a 1 behind them, measured where there
    is calibration data and in closed form otherwise.
    """

    model: Model
    ctx: PassContext
    groups: Mapping[str, AxisGroup]
    refused: Sequence[Refusal]
    readers: Mapping[str, Sequence[Reader]]
    moments: Mapping[tuple[str, int], Float64]
    fisher: Mapping[str, Float64]
    feeds: Sequence[Feed]
    score: Score
    how: Repair
    _rankings: dict[str, Ranking] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, ctx: PassContext, score: Score, how: Repair, samples: int) -> Pruner:
        """Analyse a model; without calibration data moments are those of closed form."""
        found = axis_groups(model)
        groups = {group.name: group for group in found.groups}
        behind = {name: readers(model, group) for name, group in groups.items()}
        every = [reader for some in behind.values() for reader in some]
        data = ctx.calibration
        feeds = tuple(first_samples(data, samples)) if data is not None else ()
        needs = score in ("surgeon", "activation", "kprune") or how != "none"
        moments: dict[tuple[str, int], Float64] = {}
        if data is not None and how != "closed-form" and needs:
            moments = measured(collected(model, ctx, wanted(every), data, samples=samples), every)
        elif needs:
            known = {reader.key: closed_form(reader) for reader in every}
            moments = {key: moment for key, moment in known.items() if moment is not None}
        fisher: Mapping[str, Float64] = {}
        if score in ("taylor", "kprune"):
            pairs = {name: (groups[name], some) for name, some in behind.items() if some}
            fisher = gate_fisher(model, feeds, pairs, ctx.seed)
        return Pruner(model, ctx, groups, found.refused, behind, moments, fisher, feeds, score, how)

    def ranking(self, name: str) -> Ranking:
        """The order in which the units of a group go; by magnitude where nothing else is known."""
        if name not in self._rankings:
            self._rankings[name] = self._ranked(name)
        return self._rankings[name]

    def _ranked(self, name: str) -> Ranking:
        group, behind = self.groups[name], self.readers[name]
        known = all_of(behind, self.moments)
        if self.score == "surgeon" and known:
            spread = {key: centred(self.moments[key]) for key in {r.key for r in behind}}
            return surgeon(behind, spread, group.units)
        if self.score == "activation" and known:
            return by_scores(energies(behind, self._seconds(behind)))
        if self.score == "taylor" and name in self.fisher:
            return by_scores(self.fisher[name])
        if self.score == "kprune" and name in self.fisher and known:
            gives = _GIVES * energies(behind, self._seconds(behind))
            return by_scores(gives + _PREDICTS * self.fisher[name])
        if self.score != "magnitude" and not behind:
            products = product_scores(self.model, self.ctx, group, self.feeds)
            if products is not None:
                return by_scores(products)
        return by_scores(magnitudes(self.model, group))

    def _seconds(self, behind: Sequence[Reader]) -> dict[tuple[str, int], Float64]:
        return {r.key: self.moments[r.key][:, :-1, :-1] for r in behind}

    def removed(self, name: str, kept: int) -> tuple[int, ...]:
        """The units that go when `kept` stay."""
        order = self.ranking(name).order
        return tuple(sorted(int(unit) for unit in order[: order.size - kept]))

    def offer(self, name: str, kept: int) -> PrunedGroup:
        """A group with `kept` of its units, its readers repaired by their moments."""
        changed = _changed(self.model, self.offer_model(name, kept))
        return PrunedGroup(self.groups[name], self.removed(name, kept), changed)

    def offer_model(self, name: str, kept: int) -> Model:
        """The model with the constants of an offer, in the old shapes."""
        group, units = self.groups[name], self.removed(name, kept)
        model = self.model.clone()
        without_units(model, {group: units})
        if self.how != "none":
            some = [r for r in self._gone(model, {name: units}) if r.key in self.moments]
            quiet = replace(self.ctx, recorder=Recorder())
            repair_from_moments(model, self.model, some, self.moments, quiet)
        return model

    def pruned(self, removed: Mapping[str, Collection[int]]) -> Model:
        """The model without some units, every layer repaired, in the old shapes.

        With data every linear layer is fitted to its original output behind the ones before it.
        """
        model = self.model.clone()
        without_units(model, {self.groups[name]: units for name, units in removed.items()})
        if self.how == "least-squares" and self.feeds:
            gone = {reader.key: reader for reader in self._gone(model, removed)}
            layers = [gone.pop(layer.key, layer) for layer in linear_layers(model)]
            repair(model, self.model, self.ctx, self.feeds, layers)
        elif self.how != "none":
            some = [r for r in self._gone(model, removed) if r.key in self.moments]
            repair_from_moments(model, self.model, some, self.moments, self.ctx)
        return model

    def cut(self, model: Model, removed: Mapping[str, Collection[int]]) -> None:
        """Take the units out of what `pruned` gave, in place.

        A group that loses all of its units goes with its residual branch.
        """
        whole = {n for n, units in removed.items() if len(units) == self.groups[n].units}
        for name, branch in branch_groups(self).items() if whole else ():
            if name in whole:
                without_branch(model, self.ctx, branch)
                whole.remove(name)
                removed = {n: units for n, units in removed.items() if n != name}
        groups = {name: _with_biases(model, self.groups[name]) for name in removed}
        remove_units(model, groups, removed)

    def _gone(self, model: Model, removed: Mapping[str, Collection[int]]) -> list[Reader]:
        """The readers of some groups in a clone; units are 0 for columns that go, else -1."""
        found: dict[tuple[str, int], Reader] = {}
        for name, units in removed.items():
            for reader in readers(model, self.groups[name]):
                mark = np.where(np.isin(reader.units, list(units)), 0, -1)
                known = found.get(reader.key)
                if known is not None:
                    mark = np.maximum(mark, known.units)
                found[reader.key] = replace(reader, units=mark)
        place = {node.name: at for at, node in enumerate(model.graph)}
        return sorted(found.values(), key=lambda reader: place[reader.node.name])


def _with_biases(model: Model, group: AxisGroup) -> AxisGroup:
    """A group with the biases that repair gave to layers which had none of their own."""
    labels = dict(group.labels)
    known = {tensor for tensor, _ in labels}
    for layer in affine_layers(model):
        given, bias = layer.last.outputs[0], layer.bias_value
        shape = given.shape
        if bias is None or bias.const_value is None or bias.name in known or shape is None:
            continue
        own = labels.get((given.name or "", layer.axis % len(shape)))
        rank = len(bias.const_value.shape)
        if own is not None and rank and bias.const_value.shape[rank - 1] == own.size:
            labels[bias.name or "", rank - 1] = own
    return replace(group, labels=labels)


def _changed(before: Model, after: Model) -> dict[str, Array]:
    """Constants that are other tensors than before, or new, by name."""
    old = {name: value.const_value for name, value in values_by_name(before).items()}
    return {
        name: value.const_value.numpy()
        for name, value in values_by_name(after).items()
        if value.const_value is not None and value.const_value is not old.get(name)
    }
