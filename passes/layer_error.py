"""Damage as the error of a group's own outputs: forward only, and only the group's nodes run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.extract import extract
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.estimate import Estimate
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.operand_walk import OperandWalk
from octavo.passes.output_damage import OutputDamage, output_names, summary
from octavo.passes.suffix import Flow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.menu import Damage
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding
    from octavo.passes.output_damage import Metric


def layer_error(
    model: Model,
    ctx: PassContext,
    batches: Batches,
    limit: int,
    metric: Metric,
    known: Mapping[str, Damage] = MappingProxyType({}),
) -> Estimate:
    """‖f(X, Ŵ) - f(X, W)‖² / ‖f(X, W)‖² of the nodes of a group, mean over samples.

    X is what the nodes read in the source. Outputs of several nodes count their sum.
    Activations that are quantized at run time are rounded as well (LampQ's layer error L(B),
    arXiv 2511.10004; AdaQuant's objective, arXiv 2006.10518). Trials with a `known` error do
    not run.
    """
    flow = Flow(model)
    roundings = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    layers = [_Layer.of(flow, r) for r in roundings.values() if r.trials.keys() - known.keys()]
    feeds = tuple(first_samples(batches, limit))
    counts = [samples_of(feed) for feed in feeds]
    for done, (layer, fed) in enumerate(_fed(model, ctx, layers, feeds), start=1):
        layer.run(ctx, fed, counts, known)
        ctx.progress("layer error", done, len(layers))
    found = {
        key: summary(np.concatenate(rows)) for layer in layers for key, rows in layer.rows.items()
    }
    by_group = {name: r.damages({**known, **found}) for name, r in roundings.items()}
    return Estimate(by_group, "normalised squared error of the layer's outputs", sum(counts))


@final
@dataclass(frozen=True)
class _Layer:
    """The nodes of a group as a model, and the errors of every trial so far, one a sample."""

    model: Model
    rounding: OfferedRounding
    boundary: Sequence[str]
    rows: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    @staticmethod
    def of(flow: Flow, rounding: OfferedRounding) -> _Layer:
        made = {id(v): v for node in rounding.nodes for v in node.outputs if v.name}
        read = {id(v): v for node in rounding.nodes for v in node.inputs if v is not None}
        boundary = [v.name or "" for k, v in read.items() if k in flow.variable and k not in made]
        outputs = [v.name or "" for v in made.values() if v.uses() or v.is_graph_output()]
        model = extract(flow.model, (*boundary, *rounding.constants), outputs)
        return _Layer(model, rounding, boundary)

    def run(
        self,
        ctx: PassContext,
        feeds: Sequence[Feed],
        counts: Sequence[int],
        known: Mapping[str, Damage],
    ) -> None:
        """Add the errors of every trial on what the boundary holds for every feed."""
        run = ctx.evaluator.load(self.model)
        constants = self.rounding.constants
        damage = OutputDamage(dict.fromkeys(output_names(self.model), "values"))
        expected = [run({**fed, **constants}) for fed in feeds]
        for key in self.rounding.trials.keys() - known.keys():
            trial = self.rounding.trials[key]
            weights = {**constants, **trial.weights()}
            self.rows[key] = [
                damage.per_sample(truth, run({**fed, **weights, **trial.activations(fed)}), count)
                for truth, fed, count in zip(expected, feeds, counts, strict=True)
            ]


def _fed(
    model: Model, ctx: PassContext, layers: Sequence[_Layer], feeds: Sequence[Feed]
) -> Iterator[tuple[_Layer, list[Feed]]]:
    """Every layer with what it reads of every feed; the model runs once, from layer to layer."""
    place = {v.name or "": at for at, node in enumerate(model.graph) for v in node.outputs}
    ready = {
        id(layer): max((place.get(n, -1) for n in layer.boundary), default=-1) for layer in layers
    }
    ordered = sorted(layers, key=lambda layer: ready[id(layer)])
    last = {name: layer for layer in ordered for name in layer.boundary}
    names = sorted(last, key=lambda name: place.get(name, -1))
    walk = OperandWalk.of(model, ctx, feeds, names)
    waiting, alive, needed = deque(names), set[str](), set(names)
    for layer in ordered:
        while waiting and place.get(waiting[0], -1) <= ready[id(layer)]:
            walk.reach(waiting[0])
            alive.add(waiting.popleft())
        count = range(len(feeds))
        yield layer, [{n: walk.walk.read(at, n) for n in layer.boundary} for at in count]
        needed -= {name for name in layer.boundary if last[name] is layer}
        for name in sorted(alive & walk.by_value.keys()):
            if not needed & {*walk.by_value[name].drops, name}:
                walk.leave(name)
                alive.remove(name)
