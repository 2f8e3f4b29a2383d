"""Seconds of nodes at widths that were not measured, by those that were.

A kernel of w inputs and v outputs takes about a + b·w + c·v + d·w·v. The four are found from the
node in copies of the model that keep fewer units, all of them measured as the model itself is;
where one width touches a node, a + b·w. None is negative, so that less never takes longer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.cost import AnalyticCost
from octavo.ir.facts import FLOAT, Option
from octavo.ir.signature import option_key

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.evaluate import CostModel
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.width_shapes import Kept, WidthShapes

    Float64 = NDArray[np.float64]

_TINY = 1e-12


@final
@dataclass(frozen=True)
class Sample:
    """A copy of the model with fewer units: how many stay, its nodes, and what they cost."""

    kept: Kept
    nodes: Mapping[str, onnx_ir.Node]
    cost: CostModel


def designs(
    levels: Mapping[str, Sequence[int]], mixed: int, rng: np.random.Generator
) -> list[Kept]:
    """Widths to measure: every level of all groups, then `mixed` times one at random for each.

    `levels` are the units that may stay, most first, all of them among these. No kernel computes
    nothing: a level without units is not measured.
    """
    levels = {name: [kept for kept in some if kept] for name, some in levels.items()}
    steps = max((len(some) for some in levels.values()), default=0)
    even = (
        {name: some[min(step, len(some) - 1)] for name, some in levels.items()}
        for step in range(1, steps)
    )
    uneven = (
        {name: some[int(rng.integers(len(some)))] for name, some in levels.items()}
        for _ in range(mixed)
    )
    return [*even, *uneven]


def cost_of(model: Model, ctx: PassContext) -> CostModel:
    """What the nodes of another model cost than the one that `ctx.cost` knows."""
    return ctx.cost_of(model) if ctx.cost_of is not None else AnalyticCost(ctx.target)


@final
@dataclass(frozen=True)
class WidthSeconds:
    """Seconds of any node at any widths."""

    shapes: WidthShapes
    nodes: Mapping[str, onnx_ir.Node]
    cost: CostModel
    samples: Sequence[Sample]
    _fits: dict[tuple[str, str], tuple[tuple[str, ...], Float64]] = field(default_factory=dict)

    @staticmethod
    def of(shapes: WidthShapes, ctx: PassContext, kept: Sequence[Kept]) -> WidthSeconds:
        """Measure copies that keep so many units."""
        samples = []
        for at, some in enumerate(kept):
            model = shapes.smaller(some)
            nodes = {node.name or "": node for node in model.graph}
            samples.append(Sample(some, nodes, cost_of(model, ctx)))
            ctx.progress("measure widths", at + 1, len(kept))
        nodes = {node.name or "": node for node in shapes.model.graph}
        return WidthSeconds(shapes, nodes, ctx.cost, samples)

    def seconds(self, name: str, option: Option, kept: Kept) -> float | None:
        """Seconds of a node under an option, `None` where the target has no kernel for it."""
        whole = self.cost.option_seconds(self.nodes[name], option)
        touching = self.shapes.touching.get(name, ())
        if whole is None or not any(group in kept for group in touching):
            return whole
        if not all(kept.get(group, 1) for group in touching):
            return 0.0
        key = name, option_key(option)
        if key not in self._fits:
            self._fits[key] = touching, self._fit(name, option, touching, whole)
        groups, weights = self._fits[key]
        full = float(weights.sum())
        return whole * float(self._features(groups, kept) @ weights) / max(full, _TINY)

    def _fit(self, name: str, option: Option, groups: tuple[str, ...], whole: float) -> Float64:
        """Coefficients of the features, least squares of relative errors, none negative."""
        rows, seconds = [np.ones(len(self._features(groups, {})))], [whole]
        for sample in self.samples:
            node = sample.nodes.get(name)
            taken = sample.cost.option_seconds(node, option) if node is not None else None
            if taken is None and node is not None:
                taken = self._as_float(node, sample, whole)
            if taken:
                rows.append(self._features(groups, sample.kept))
                seconds.append(taken)
        times = np.maximum(np.array(seconds), _TINY)
        return nonnegative(np.array(rows) / times[:, None], np.ones(times.size))

    def _as_float(self, node: onnx_ir.Node, sample: Sample, whole: float) -> float | None:
        """What is not measured gets smaller as its float kernel does."""
        before = self.cost.option_seconds(self.nodes[node.name or ""], FLOAT)
        after = sample.cost.option_seconds(node, FLOAT)
        return whole * after / before if before and after is not None else None

    def _features(self, groups: tuple[str, ...], kept: Kept) -> Float64:
        """1, each width relative to the whole, and the product of the first two."""
        known = self.shapes.groups
        widths = [kept.get(g, known[g].units) / known[g].units for g in groups]
        product = [widths[0] * widths[1]] if len(widths) > 1 else []
        return np.array([1.0, *widths, *product])


def nonnegative(rows: Float64, wanted: Float64) -> Float64:
    """The x >= 0 with the least ‖rows·x - wanted‖², by all sets of few unknowns, 0 elsewhere."""
    count = rows.shape[1]
    best, least = np.zeros(count), float("inf")
    for size in range(1, min(count, 4) + 1):
        for chosen in itertools.combinations(range(count), size):
            part = rows[:, chosen]
            found = np.linalg.lstsq(part, wanted, rcond=None)[0]
            error = float(np.square(part @ found - wanted).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(count), error
                best[list(chosen)] = found
    return best
