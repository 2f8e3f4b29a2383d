"""Importance of units by gradients: what the loss says of a gate on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.calibration import samples_of
from octavo.ir.needs_torch import need_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.prune_readers import Reader

    Float64 = NDArray[np.float64]


def gate_fisher(
    model: Model,
    feeds: Sequence[Feed],
    groups: Mapping[str, tuple[AxisGroup, Sequence[Reader]]],
    seed: int,
) -> dict[str, Float64]:
    """½·E[(Σ x·∂L/∂x)²] per unit: the expected loss when its gate goes from 1 to 0, to 2nd order.

    x is what readers multiply, L as for `gate_products`. This is K-prune's measure (Park et al.
    2024, arXiv 2308.03449, equation 5), whose KL against the model itself has no gradient before
    something is pruned, with the Fisher of the model's own classes in its place.
    """
    need_torch("taylor")
    from octavo.ir.torch_gates import gate_products

    places = {name: _places(group, readers) for name, (group, readers) in groups.items()}
    operands = list(dict.fromkeys(value for found in places.values() for value, _ in found))
    total = {name: np.zeros(group.units) for name, (group, _) in groups.items()}
    count = 0
    for feed, products in zip(feeds, gate_products(model, operands, feeds, seed), strict=True):
        samples = samples_of(feed)
        count += samples
        for name, (group, _) in groups.items():
            total[name] += _squares(products, places[name], group, samples)
    return {name: 0.5 * found / max(count, 1) for name, found in total.items()}


def _places(group: AxisGroup, readers: Sequence[Reader]) -> list[tuple[str, int]]:
    """Operands of readers with the axis that the units divide; an operand counts once."""
    found = {}
    for reader in readers:
        name = reader.operand
        axes = [axis for value, axis in group.labels if value == name]
        if axes:
            found[name] = axes[0]
    return list(found.items())


def _squares(
    products: Mapping[str, NDArray[np.float32]],
    places: Sequence[tuple[str, int]],
    group: AxisGroup,
    samples: int,
) -> Float64:
    """Σ over samples of (Σ over what belongs to a unit)²."""
    gate = np.zeros((samples, group.units))
    for name, axis in places:
        if name not in products or products[name].shape[0] != samples or axis == 0:
            continue
        labels = group.labels[name, axis]
        moved = np.moveaxis(products[name], axis, 1).reshape(samples, labels.size, -1).sum(axis=2)
        for unit in range(group.units):
            gate[:, unit] += moved[:, labels == unit].sum(axis=1)
    return np.asarray(np.square(gate).sum(axis=0))
