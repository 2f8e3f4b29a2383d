"""In which order the units of a group can go, and what the first k of them cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.extract import values_by_name
from octavo.ir.mapped import reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.model import Model
    from octavo.passes.prune_readers import Reader

    Index = NDArray[np.int64]
    Float64 = NDArray[np.float64]

Score = Literal["surgeon", "magnitude", "activation", "taylor", "kprune"]

# Added to the diagonal of C, relative to its mean.
_DAMPING = 0.01
# So many eliminations are done at once that a group takes at most as many steps.
_STEPS = 96
_TINY = 1e-30


@final
@dataclass(frozen=True, eq=False)
class Ranking:
    """Units in the order in which they go, and what each adds to the cost when it goes.

    Costs of groups of one structure compare; all but a surgeon's do not fall along the order.
    """

    order: Index
    costs: Float64


def by_scores(scores: Float64) -> Ranking:
    """The lowest scores first."""
    order = np.argsort(scores, kind="stable")
    return Ranking(order, scores[order])


def magnitudes(model: Model, group: AxisGroup) -> Float64:
    """Mean over the constants of a group of a unit's L2 norm, relative to the mean unit.

    Fang et al. 2023 (DepGraph, arXiv 2301.12900), section 3.3.
    """
    values, found = values_by_name(model), []
    for (name, axis), labels in group.labels.items():
        value = values.get(name)
        if value is None or value.const_value is None:
            continue
        if not value.const_value.dtype.is_floating_point():
            continue
        squares = reading(value.const_value, partial(_squares, axis))
        own = labels >= 0
        of_unit = np.bincount(labels[own], squares[own], group.units)
        norms = np.sqrt(of_unit)
        found.append(norms / max(float(norms.mean()), _TINY))
    return np.asarray(np.mean(found, axis=0)) if found else np.ones(group.units)


def energies(readers: Sequence[Reader], moments: Mapping[tuple[str, int], Float64]) -> Float64:
    """Share of a unit in what its readers give: tr(W_u·C_uu·W_uᵀ)/tr(W·C·Wᵀ), ‖W·X‖² per unit."""
    count = max(int(reader.units.max()) for reader in readers) + 1
    total = np.zeros(count)
    for reader in readers:
        weight, second = reader.rows().astype(np.float64), moments[reader.key]
        power = np.einsum("gnk,gkl,gnl->", weight, second, weight, optimize=True)
        for unit in range(count):
            own = reader.units == unit
            part = weight[:, :, own]
            inner = second[:, own][:, :, own]
            share = np.einsum("gnk,gkl,gnl->", part, inner, part, optimize=True)
            total[unit] += share / max(float(power), _TINY)
    return total


def surgeon(
    readers: Sequence[Reader], moments: Mapping[tuple[str, int], Float64], units: int
) -> Ranking:
    """Remove the unit whose loss the rest of its readers' columns can make up for best, again.

    The optimal brain surgeon on whole units: unit u costs tr(W_u·(H⁻¹_uu)⁻¹·W_uᵀ), after which
    the other columns take W_u·(H⁻¹_uu)⁻¹·H⁻¹_u: (ZipLM, Kurtic et al. 2023, arXiv 2302.04089,
    equation 3). Costs are relative to the readers' output.
    """
    states = [_State.of(reader, moments[reader.key]) for reader in readers]
    left = np.arange(units)
    order: list[int] = []
    costs: list[float] = []
    at_once = max(1, units // _STEPS)
    while left.size > 1:
        cost = np.sum([state.costs(left) for state in states], axis=0)
        chosen = np.argsort(cost, kind="stable")[: min(at_once, left.size - 1)]
        for state in states:
            state.remove(left[chosen])
        order.extend(left[chosen].tolist())
        costs.extend(cost[chosen].tolist())
        left = np.delete(left, chosen)
    order.append(int(left[0]))
    costs.append(np.inf)
    return Ranking(np.array(order), np.array(costs))


@final
@dataclass
class _State:
    """A reader on its way: weights `[groups, N, K]` and H⁻¹ `[groups, K, K]` of what is left."""

    weight: Float64
    inverse: Float64
    columns: Index
    power: float

    @staticmethod
    def of(reader: Reader, second: Float64) -> _State:
        weight, width = reader.rows().astype(np.float64), second.shape[-1]
        mean = np.einsum("gkk->g", second) / width
        damping = _DAMPING * np.where(mean > 0, mean, 1.0)[:, None, None] * np.eye(width)
        power = float(np.einsum("gnk,gkl,gnl->", weight, second, weight, optimize=True))
        count = int(reader.units.max()) + 1
        columns = [np.flatnonzero(reader.units == unit) for unit in range(count)]
        inverse = np.asarray(np.linalg.inv(second + damping), np.float64)
        return _State(weight, inverse, np.array(columns, np.int64), max(power, _TINY))

    def costs(self, units: Index) -> Float64:
        columns = self.columns[units]
        inner = self.inverse[:, columns[:, :, None], columns[:, None, :]]
        part = self.weight[:, :, columns].transpose(0, 2, 3, 1)
        solved = np.linalg.solve(inner, part)
        return np.asarray(np.einsum("gukn,gukn->u", part, solved) / self.power)

    def remove(self, units: Index) -> None:
        """Eliminate some units at once, which gives what one after the other does."""
        own = self.columns[units].reshape(-1)
        inner = self.inverse[:, own[:, None], own[None, :]]
        across = self.inverse[:, own, :]
        share = np.linalg.solve(inner, across)
        self.weight -= self.weight[:, :, own] @ share
        self.inverse -= across.transpose(0, 2, 1) @ share
        # What rounding leaves of a removed unit must not look like a cheap one.
        self.weight[:, :, own] = 0
        self.inverse[:, own, :] = self.inverse[:, :, own] = 0
        self.inverse[:, own, own] = 1


def _squares(axis: int, array: NDArray[np.generic]) -> Float64:
    wide = np.asarray(array, np.float64)
    others = tuple(k for k in range(wide.ndim) if k != axis)
    return np.asarray(np.square(wide).sum(axis=others))
