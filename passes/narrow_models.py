"""A model at other widths without other shapes: what goes is zero, and readers are repaired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.extract import values_by_name
from octavo.ir.menu import Menu, Units
from octavo.passes.affine_layers import AffineLayer, affine_layers
from octavo.passes.base import Recorder
from octavo.passes.prune_units import Pruner
from octavo.passes.rewrite import Rewrite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.evolve import Choice

    Values = dict[str, NDArray[np.generic]]

_SAMPLES = 128
_KEPT_MODELS = 16


@final
@dataclass(frozen=True)
class NarrowModels:
    """Copies of a model by the widths of a choice, repaired by the moments of the original."""

    pruner: Pruner
    menu: Menu
    units: Units
    known: dict[tuple[str, ...], Model] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, ctx: PassContext) -> NarrowModels:
        """Layers that repair may shift get a bias, so that it can be fed."""
        own, quiet = model.clone(), replace(ctx, recorder=Recorder())
        rewrite = Rewrite(own, quiet)
        for layer in list(affine_layers(own)):
            if layer.bias_value is None and layer.bias() is not None:
                layer.transform(rewrite, np.ones(layer.channels), np.zeros(layer.channels))
        pruner = Pruner.of(own, quiet, "magnitude", "least-squares", _SAMPLES)
        # Repair by moments takes no walk through the data for every choice.
        return NarrowModels(replace(pruner, feeds=()), model.fact(Menu), model.fact(Units))

    @property
    def model(self) -> Model:
        """The model at whole widths."""
        return self.pruner.model

    def at(self, choice: Choice) -> Model:
        """The model at the widths of a choice."""
        names = self.widths(choice)
        if names not in self.known:
            if len(self.known) >= _KEPT_MODELS:
                self.known.pop(next(iter(self.known)))
            removed = {
                self.units.axis_group[width]: units
                for width, name in zip(self.menu.widths, names, strict=True)
                if (units := self.units.removed[width][name])
            }
            self.known[names] = self.pruner.pruned(removed)
        return self.known[names]

    def widths(self, choice: Choice) -> tuple[str, ...]:
        """The names of the widths of a choice."""
        return tuple(self.menu.offers[name][choice[name]].name for name in self.menu.widths)

    def constants(self, model: Model) -> Values:
        """The numbers of a copy that widths may change."""
        return {name: array for name, array in _floats(model).items() if name in self._names}

    @cached_property
    def _names(self) -> frozenset[str]:
        """What belongs to units, and the biases by which readers make up for them."""
        names = self.units.axis_group.values()
        owned = {tensor for name in names for tensor, _ in self.pruner.groups[name].labels}
        behind = (AffineLayer.of(r.node) for name in names for r in self.pruner.readers[name])
        biases = (layer.bias_value for layer in behind if layer is not None)
        return frozenset(owned | {value.name or "" for value in biases if value is not None})


def _floats(model: Model) -> Mapping[str, NDArray[np.generic]]:
    return {
        name: value.const_value.numpy()
        for name, value in values_by_name(model).items()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    }
