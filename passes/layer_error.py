"""Damage as the error of a group's own outputs: forward only, and only the group's nodes run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.extract import extract
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.estimate import Estimate
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.output_damage import OutputDamage, output_names, summary
from octavo.passes.read_values import value_reader
from octavo.passes.suffix import Flow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding
    from octavo.passes.output_damage import Metric

# What groups read is computed for as many groups at once as this much memory holds.
_KEPT_BYTES = 96 << 20


def layer_error(
    model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric
) -> Estimate:
    """‖f(X, Ŵ) - f(X, W)‖² / ‖f(X, W)‖² of the nodes of a group, mean over samples.

    X is what the nodes read in the source. Outputs of several nodes count their sum.
    Activations that are quantized at run time are rounded as well (LampQ's layer error L(B),
    arXiv 2511.10004; AdaQuant's objective, arXiv 2006.10518).
    """
    flow = Flow(model)
    roundings = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    layers = [_Layer.of(flow, rounding) for rounding in roundings.values() if rounding.trials]
    feeds = tuple(first_samples(batches, limit))
    done = 0
    for some in _packed(layers, _sizes(model, ctx, layers, feeds), len(feeds)):
        for layer, fed in zip(some, _operands(model, ctx, some, feeds), strict=True):
            layer.run(ctx, fed, [samples_of(feed) for feed in feeds])
            done += 1
            ctx.progress("layer error", done, len(layers))
    found = {
        key: summary(np.concatenate(rows)) for layer in layers for key, rows in layer.rows.items()
    }
    by_group = {name: rounding.damages(found) for name, rounding in roundings.items()}
    samples = sum(map(samples_of, feeds))
    return Estimate(by_group, "normalised squared error of the layer's outputs", samples)


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

    def run(self, ctx: PassContext, feeds: Sequence[Feed], counts: Sequence[int]) -> None:
        """Add the errors of every trial on what the boundary holds for every feed."""
        run = ctx.evaluator.load(self.model)
        constants = self.rounding.constants
        damage = OutputDamage(dict.fromkeys(output_names(self.model), "values"))
        expected = [run({**fed, **constants}) for fed in feeds]
        for key, trial in self.rounding.trials.items():
            weights = {**constants, **trial.weights()}
            self.rows[key] = [
                damage.per_sample(truth, run({**fed, **weights, **trial.activations(fed)}), count)
                for truth, fed, count in zip(expected, feeds, counts, strict=True)
            ]


def _sizes(
    model: Model, ctx: PassContext, layers: Sequence[_Layer], feeds: Sequence[Feed]
) -> list[int]:
    """Bytes of what every layer reads of the first feed."""
    operands = _operands(model, ctx, layers, feeds[:1])
    return [sum(array.nbytes for array in fed[0].values()) for fed in operands]


def _packed(layers: Sequence[_Layer], sizes: Sequence[int], feeds: int) -> Iterator[list[_Layer]]:
    """The layers in their order, as many at a time as memory allows."""
    some: list[_Layer] = []
    total = 0
    for layer, size in zip(layers, sizes, strict=True):
        if some and total + size * feeds > _KEPT_BYTES:
            yield some
            some, total = [], 0
        some.append(layer)
        total += size * feeds
    if some:
        yield some


def _operands(
    model: Model, ctx: PassContext, layers: Sequence[_Layer], feeds: Sequence[Feed]
) -> list[list[Feed]]:
    """What every layer reads of every feed."""
    read = value_reader(model, ctx.evaluator, (n for layer in layers for n in layer.boundary))
    found: list[list[Feed]] = [[] for _ in layers]
    for feed in feeds:
        known = read(feed)
        for layer, fed in zip(layers, found, strict=True):
            fed.append({name: known[name] for name in layer.boundary})
    return found
