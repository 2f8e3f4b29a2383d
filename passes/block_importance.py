"""Damage as the error of the weights times how much a block matters: cheap scores of LLM layers.

LIM and ZD (arXiv 2406.17415) order whole blocks and say nothing of bits. Here the relative error
of the rounded weights, ‖W - Ŵ‖² / ‖W‖², tells bits apart, and the score multiplies it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.menu import Damage
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.estimate import Estimate
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.output_damage import summary
from octavo.passes.read_values import value_reader
from octavo.passes.residual_blocks import Block, residual_blocks
from octavo.passes.weight_scores import relative_error, score_offers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding
    from octavo.passes.output_damage import Metric


def lim(model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric) -> Estimate:
    """Layer input modification, 1 - cos(x_in, x_out), times the relative error of the weights.

    x_in and x_out are those of the residual block around a group's first node, and of the node
    itself outside of blocks; the cosine is taken over all elements of a sample. Where their
    shapes differ LIM does not apply, and the importance is 1. Activations that are quantized at
    run time count nothing.
    """
    feeds = tuple(first_samples(batches, limit))
    groups = _weighted(model, ctx)
    blocks = residual_blocks(model)
    ends = {name: _ends(group.nodes[0], blocks) for name, group in groups.items()}
    read = value_reader(model, ctx.evaluator, (n for e in ends.values() for n in (e.entry, e.exit)))
    rows: dict[Block, list[NDArray[np.float64]]] = {block: [] for block in ends.values()}
    for done, feed in enumerate(feeds):
        values = read(feed)
        for block, found in rows.items():
            found.append(modification(values[block.entry], values[block.exit], samples_of(feed)))
        ctx.progress("layer input modification", done + 1, len(feeds))
    importance = {block: summary(np.concatenate(found)) for block, found in rows.items()}
    by_group = _damage(model, ctx, {name: importance[block] for name, block in ends.items()})
    samples = sum(map(samples_of, feeds))
    return Estimate(by_group, "input modification times relative error of the weights", samples)


def zd(model: Model, ctx: PassContext, batches: Batches, limit: int, metric: Metric) -> Estimate:
    """The share of weights with |z| <= 1, z = (w - mean) / deviation, times their relative error.

    Mean and deviation are those of all weights of a residual block, and of the group outside of
    blocks. Fewer large weights make a block more important, so the importance is one minus the
    share of large ones; both tails count, the paper's z > 1 has one. Data-free; activations that
    are quantized at run time count nothing.
    """
    groups = _weighted(model, ctx)
    blocks = residual_blocks(model)
    members: dict[Block, list[OfferedRounding]] = defaultdict(list)
    ends = {name: _ends(group.nodes[0], blocks) for name, group in groups.items()}
    for name, block in ends.items():
        members[block].append(groups[name])
    importance = {
        block: Damage(1.0 - _large(w for group in some for w in group.constants.values()))
        for block, some in members.items()
    }
    by_group = _damage(model, ctx, {name: importance[block] for name, block in ends.items()})
    return Estimate(by_group, "share of small weights times relative error of the weights")


def _damage(
    model: Model, ctx: PassContext, importance: Mapping[str, Damage]
) -> dict[str, dict[str, Damage]]:
    """Importance times the relative error of the weights, of every offer."""

    def score(group: OfferedRounding, offer: Offer) -> Damage:
        factor, error = importance[group.group], relative_error(group, offer)
        return Damage(factor.mean * error, factor.standard_error * error)

    return score_offers(model, ctx, score)


def _weighted(model: Model, ctx: PassContext) -> dict[str, OfferedRounding]:
    """The groups that hold weights."""
    found = offered_roundings(model, ctx.target, ActivationRounding(ctx.evaluator))
    return {name: group for name, group in found.items() if group.constants}


def _ends(node: onnx_ir.Node, blocks: Mapping[str, Block]) -> Block:
    """The block around a node, or the node itself as one."""
    read = next(v for v in node.inputs if v is not None and v.const_value is None)
    made = next(v for v in node.outputs if v.name)
    own = Block(read.name or "", made.name or "")
    return blocks.get(node.name or "", own)


def modification(
    before: NDArray[np.generic], after: NDArray[np.generic], samples: int
) -> NDArray[np.float64]:
    """1 - cos of every sample, shape `[samples]`; 1 where the shapes differ."""
    if before.shape != after.shape:
        return np.ones(samples)
    rows = samples if before.ndim and before.shape[0] == samples else 1
    left = before.astype(np.float64).reshape(rows, -1)
    right = after.astype(np.float64).reshape(rows, -1)
    norms = np.sqrt(np.square(left).sum(axis=1) * np.square(right).sum(axis=1))
    cosine = np.divide((left * right).sum(axis=1), norms, out=np.zeros(rows), where=norms > 0)
    return np.broadcast_to(1.0 - cosine, (samples,))


def _large(weights: Iterable[NDArray[np.generic]]) -> float:
    """The share of weights further than one standard deviation from the mean."""
    flat = np.concatenate([weight.reshape(-1) for weight in weights]).astype(np.float64)
    deviation = flat.std()
    return float(np.mean(np.abs(flat - flat.mean()) > deviation)) if deviation > 0 else 0.0
