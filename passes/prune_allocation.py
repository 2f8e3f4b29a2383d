"""How many units of every group stay: the least damage for a share of units or of work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import samples_of
from octavo.ir.extract import values_by_name
from octavo.passes.output_damage import OutputDamage
from octavo.passes.sample_macs import affordable_samples, sample_macs

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.axis_links import Axis
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.prune_units import Pruner

# Kept units by group.
Widths = Mapping[str, int]

_BISECTIONS = 60
# Widths that are offered where only one is measured.
_CURVE_WIDTHS = 48
# What one measurement may multiply: a language model is measured on few samples of many tokens.
_MACS = 1.5e11
_TINY = 1e-30


@final
@dataclass(frozen=True)
class Width:
    """One number of units that stay, and what the model loses by it."""

    kept: int
    damage: float


def widths(group: AxisGroup, round_to: int, most: int) -> list[int]:
    """Numbers of units that may stay, falling: multiples of `round_to`, at most `most` of them.

    Whole heads are counted one by one; a group that is not wider than `round_to` has none.
    """
    step = 1 if group.kind == "heads" else round_to
    found = list(range((group.units - 1) // step * step, 0, -step))
    picked = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return [found[k] for k in picked] if found else []


def offers(
    pruner: Pruner, names: Sequence[str], round_to: int, most: int, samples: int, at: float
) -> dict[str, list[Width]]:
    """What every width of every group costs: damage of the outputs, measured group by group.

    Where `most` is 1, only the width that leaves about the share `at` is measured, and others cost
    as the ranking's own costs grow. Without data, or where nothing of the outputs can be
    compared, those costs are all there is.
    """
    loss = output_loss(pruner, samples)
    many = _CURVE_WIDTHS if most == 1 else most
    counts = {name: widths(pruner.groups[name], round_to, many) for name in names}
    found: dict[str, list[Width]] = {}
    for done, (name, some) in enumerate(counts.items(), start=1):
        if loss is None or most == 1:
            found[name] = _along_costs(pruner, name, some, loss, at)
        else:
            found[name] = [Width(k, loss(pruner.offer_model(name, k))) for k in some]
        pruner.ctx.progress("measure widths", done, len(counts))
    return found


def _along_costs(
    pruner: Pruner,
    name: str,
    some: Sequence[int],
    loss: Callable[[Model], float] | None,
    at: float,
) -> list[Width]:
    """Widths by the costs of the ranking, scaled to the loss at one width where there is one."""
    costs, scale = pruner.ranking(name).costs, 1.0
    total = {k: float(costs[: costs.size - k].sum()) for k in some}
    if some and loss is not None:
        middle = min(some, key=lambda k: abs(k - at * costs.size))
        scale = loss(pruner.offer_model(name, middle)) / max(total[middle], _TINY)
    return [Width(k, scale * total[k]) for k in some]


def output_loss(pruner: Pruner, samples: int) -> Callable[[Model], float] | None:
    """Damage of the outputs of a model, on so many samples; `None` where nothing compares."""
    damage, ctx = OutputDamage.of(pruner.model), pruner.ctx
    samples = affordable_samples(sample_macs(pruner.model, ctx, pruner.feeds), _MACS, samples)
    feeds, seen = [], 0
    for feed in pruner.feeds:
        if seen < samples:
            feeds.append(feed)
            seen += samples_of(feed)
    if not feeds or not damage.kinds:
        return None
    names = [value.name or "" for value in pruner.model.graph.inputs]
    fed = [{name: feed[name] for name in names} for feed in feeds]
    truth = ctx.evaluator.load(pruner.model)
    expected = list(ctx.executor.map(truth, fed))

    def loss(model: Model) -> float:
        run = ctx.evaluator.load(model)

        def lost(feed: Feed, wanted: Feed) -> NDArray[np.float64]:
            return damage.per_sample(wanted, run(feed), samples_of(feed))

        return float(np.concatenate(list(ctx.executor.map(lost, fed, expected))).mean())

    return loss


@final
@dataclass(frozen=True)
class Work:
    """What shrinks with the units of groups: multiply-accumulates of nodes, or sizes of constants.

    `whole` by name, and `axes` whose sizes that is a product of, as far as units divide them: per
    axis its size, and by group the indices that one unit has along it.
    """

    whole: Mapping[str, int]
    axes: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]
    units: Mapping[str, int]

    @staticmethod
    def of(model: Model, ctx: PassContext, groups: Mapping[str, AxisGroup]) -> Work:
        """Multiply-accumulates by node."""
        nodes = {node.name or "": node for node in model.graph}
        macs = {name: ctx.cost.macs(node) for name, node in nodes.items()}
        macs = {name: count for name, count in macs.items() if count}
        known = {name for name, value in values_by_name(model).items() if value.shape is not None}
        multiplied = {
            name: [axis for axis in _multiplied(nodes[name]) if axis[0] in known] for name in macs
        }
        return Work._along(macs, multiplied, groups)

    @staticmethod
    def parameters(model: Model, groups: Mapping[str, AxisGroup]) -> Work:
        """Numbers in constants of floats, by the constant; one that nodes share counts once."""
        shapes = {
            name: tuple(value.const_value.shape.numpy())
            for name, value in values_by_name(model).items()
            if value.const_value is not None and value.const_value.dtype.is_floating_point()
        }
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        axes = {name: [(name, axis) for axis in range(len(dims))] for name, dims in shapes.items()}
        return Work._along(sizes, axes, groups)

    @staticmethod
    def _along(
        whole: Mapping[str, int],
        multiplied: Mapping[str, Sequence[Axis]],
        groups: Mapping[str, AxisGroup],
    ) -> Work:
        axes: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
        for name, axis in ((name, axis) for name, some in multiplied.items() for axis in some):
            labels = {n: g.labels[axis] for n, g in groups.items() if axis in g.labels}
            if labels:
                per_unit = {
                    n: float(np.count_nonzero(own >= 0)) / groups[n].units
                    for n, own in labels.items()
                }
                size = max(own.size for own in labels.values())
                axes.setdefault(name, []).append((size, per_unit))
        return Work(whole, axes, {name: group.units for name, group in groups.items()})

    @property
    def total(self) -> int:
        return sum(self.whole.values())

    def left(self, kept: Widths) -> float:
        """What is left of all when some groups keep fewer units."""
        return sum(self.left_of(name, kept) for name in self.whole)

    def left_of(self, name: str, kept: Widths) -> float:
        """What is left of one."""
        gone = {group: self.units[group] - count for group, count in kept.items()}
        return self.whole.get(name, 0) * self._share(name, gone)

    def _share(self, name: str, gone: Mapping[str, int]) -> float:
        share = 1.0
        for size, per_unit in self.axes.get(name, ()):
            share *= 1 - sum(gone.get(n, 0) * each for n, each in per_unit.items()) / size
        return share


def _multiplied(node: onnx_ir.Node) -> list[tuple[str, int]]:
    """The axes whose sizes a node's work is the product of, as far as units may divide them."""
    first, second = node.inputs[0], node.inputs[1]
    assert first is not None
    assert second is not None
    constant = second.const_value is not None
    rank = len(second.shape or ())
    if constant or node.op_type not in ("MatMul", "Gemm"):
        return [(second.name or "", axis) for axis in range(rank)]
    left = [(first.name or "", axis) for axis in range(len(first.shape or ()))]
    return [*left, (second.name or "", rank - 1)]


def allocate(
    found: Mapping[str, Sequence[Width]],
    full: Widths,
    saved: Callable[[Widths], float],
    goal: float,
) -> dict[str, int] | None:
    """Kept units by group with the least damage for which `saved` reaches `goal`.

    A Lagrangian over the groups, whose damages are taken to add, with each group's saving as if
    it were alone; then groups widen again as long as the goal holds. `None` if it is too high.
    """
    alone = {
        name: [(Width(full[name], 0.0), 0.0), *((w, saved({name: w.kept})) for w in some)]
        for name, some in found.items()
    }

    def chosen(price: float) -> dict[str, int]:
        best = {n: min(some, key=lambda o: o[0].damage - price * o[1]) for n, some in alone.items()}
        return {name: width.kept for name, (width, _) in best.items() if width.kept < full[name]}

    low, high = -30.0, 30.0
    if saved(chosen(np.exp(high))) < goal:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(chosen(np.exp(middle))) >= goal else (middle, high)
    return _widened(chosen(np.exp(high)), found, full, saved, goal)


def _widened(
    kept: dict[str, int],
    found: Mapping[str, Sequence[Width]],
    full: Widths,
    saved: Callable[[Widths], float],
    goal: float,
) -> dict[str, int]:
    """Give units back where that helps most and the goal still holds."""
    damage = {name: {w.kept: w.damage for w in some} for name, some in found.items()}
    for name in full:
        damage.setdefault(name, {})[full[name]] = 0.0
    while True:
        moves = [
            (damage[name][count] - damage[name][wider], name, wider)
            for name, count in kept.items()
            for wider in damage[name]
            if wider > count and saved({**kept, name: wider}) >= goal
        ]
        gain, name, wider = max(moves, default=(0.0, "", 0))
        if gain <= 0:
            return {n: count for n, count in kept.items() if count < full[n]}
        kept[name] = wider
