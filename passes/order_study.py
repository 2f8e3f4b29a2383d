"""Which of two compressions should come first: both orders measured, and what intensity says.

Progressive Intensity Hypothesis (ICLR 2026, arXiv 2603.18426): put the weaker one first; the
advantage of doing so grows with how much stronger the other is. A compression is the text of a
pass, or `bits=4`, which rounds the weights of all linear layers. Rounding that comes before
another compression is done again at the end, so that every order leaves weights on their grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, cast, final

import numpy as np

from octavo.ir.calibration import Part, first_samples, samples_of
from octavo.ir.errors import UsageError
from octavo.ir.quant import PerAxis, QuantSpec, round_weight
from octavo.passes.output_damage import OutputDamage, summary
from octavo.passes.pipeline import Pipeline
from octavo.passes.rewrite import Rewrite, is_op
from octavo.passes.weight_matrix import WeightMatrix, why_no_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.ir.quant import QuantType
    from octavo.passes.base import PassContext

_ROUNDING = re.compile(r"bits=([2-8])$")
_CURVE_BITS = (8, 6, 5, 4, 3, 2)
# The ratio of rounding to so many bits, in the paper's units.
_WHOLE_BITS = 16


@final
@dataclass(frozen=True)
class Compression:
    """One compression alone.

    `intensity` is the damage of the outputs, `ratio` the C* of the paper: 16 over the bits of
    plain rounding that would do the same damage.
    """

    text: str
    intensity: float
    ratio: float


@final
@dataclass(frozen=True)
class Pair:
    """Two neighbours of the proposed order, with the held-out damage of the whole in both orders.

    `gap` is intensity(second) - intensity(first), `advantage` the damage that the proposed order
    saves (negative: the swapped one is better), `standard_error` that of the advantage: the mean
    over the same samples.
    """

    first: str
    second: str
    proposed: float
    swapped: float
    gap: float
    standard_error: float

    @property
    def advantage(self) -> float:
        return self.swapped - self.proposed

    @property
    def agrees(self) -> bool:
        """Whether the swap saves no more than what may be chance: one standard error."""
        return self.advantage >= -self.standard_error


@final
@dataclass(frozen=True)
class OrderStudy:
    """Compressions in the order that is proposed, every adjacent swap, and the best order.

    That is the proposed one unless a swap saves more than one standard error.
    """

    compressions: tuple[Compression, ...]
    pairs: tuple[Pair, ...]
    best: tuple[str, ...]
    metric: str
    samples: int

    @property
    def agrees(self) -> bool:
        """Whether no swap was better than what was proposed."""
        return all(pair.agrees for pair in self.pairs)


def order_study(
    model: Model, ctx: PassContext, texts: Sequence[str], samples: int = 256
) -> OrderStudy:
    """Propose an order by intensity on half of the data, and measure swaps on the other half.

    Rounding comes after whatever would undo it; otherwise the weaker is first.
    Raises UsageError for fewer than two compressions, or without calibration data.
    """
    if len(texts) < 2 or ctx.calibration is None:
        message = "an order needs two compressions or more, and calibration data"
        raise UsageError(message, hint="prune-weights{sparsity=0.3} bits=4")
    fit = replace(ctx, calibration=Part(ctx.calibration, 0))
    near, far = (_Outputs.of(model, ctx, Part(ctx.calibration, k), samples) for k in (0, 1))
    alone = {text: near.damage(compressed(model, fit, [text])) for text in texts}
    curve = [(bits, near.damage(rounded(model, ctx, bits))) for bits in _CURVE_BITS]
    order = sorted(texts, key=lambda text: (bool(_bits(text)), alone[text]))
    proposed = far.per_sample(compressed(model, fit, order))
    pairs, best = [], (float(proposed.mean()), tuple(order))
    for at, (first, second) in enumerate(pairwise(order)):
        swapped = [*order[:at], second, first, *order[at + 2 :]]
        lost = far.per_sample(compressed(model, fit, swapped))
        means, gap = (float(proposed.mean()), float(lost.mean())), alone[second] - alone[first]
        pairs.append(Pair(first, second, *means, gap, summary(lost - proposed).standard_error))
        if not pairs[-1].agrees:
            best = min(best, (means[1], tuple(swapped)))
        ctx.progress("orders", at + 1, len(order) - 1)
    found = tuple(Compression(t, alone[t], equivalent_ratio(curve, alone[t])) for t in order)
    return OrderStudy(found, tuple(pairs), best[1], far.metric, far.samples)


def equivalent_ratio(curve: Sequence[tuple[int, float]], damage: float) -> float:
    """16 over the bits at which plain rounding does a damage, linear in its logarithm.

    `curve` holds bits and damage, most bits first; beyond its ends, the ratio of the end.
    """
    ratios = [_WHOLE_BITS / bits for bits, _ in curve]
    logs = np.maximum.accumulate([math.log(max(lost, 1e-12)) for _, lost in curve])
    return float(np.interp(math.log(max(damage, 1e-12)), logs, ratios))


def rounded(model: Model, ctx: PassContext, bits: int) -> Model:
    """A copy whose linear layers have weights of so many bits, to nearest, a scale per output."""
    own = model.clone()
    rewrite = Rewrite(own, ctx)
    for node in own.graph:
        if not is_op(node, "Conv", "MatMul", "Gemm") or why_no_matrix(node, 1):
            continue
        value = node.inputs[1]
        if value is None or value.const_value is None:
            continue
        axis = WeightMatrix.of(node, 1).row_axes[0]
        spec = QuantSpec(cast("QuantType", f"s{bits}"), PerAxis(axis), symmetric=True)
        array = value.const_value.numpy()
        made = round_weight(array.astype(np.float32), spec)
        rewrite.set_constant(node, 1, made.astype(array.dtype), "weight")
    return own


def compressed(model: Model, ctx: PassContext, texts: Sequence[str]) -> Model:
    """The model behind some compressions; rounding that others followed is done again."""
    widths = [_bits(text) for text in texts]
    for text, bits in zip(texts, widths, strict=True):
        model = rounded(model, ctx, bits) if bits else Pipeline.parse(text).run(model, ctx).model
    again = [bits for bits in widths if bits]
    return rounded(model, ctx, again[-1]) if again and not widths[-1] else model


def _bits(text: str) -> int:
    """The bits of a rounding, 0 for a pass."""
    match = _ROUNDING.match(text)
    return int(match[1]) if match is not None else 0


@final
@dataclass(frozen=True)
class _Outputs:
    """What a model gives for some data, and how far others are from it."""

    feeds: Sequence[Feed]
    expected: Sequence[Feed]
    kinds: OutputDamage
    ctx: PassContext

    @staticmethod
    def of(model: Model, ctx: PassContext, batches: Batches, samples: int) -> _Outputs:
        names = [value.name or "" for value in model.graph.inputs]
        feeds = [{name: feed[name] for name in names} for feed in first_samples(batches, samples)]
        return _Outputs(feeds, ctx.evaluator.outputs(model, feeds), OutputDamage.of(model), ctx)

    @property
    def metric(self) -> str:
        return self.kinds.text

    @property
    def samples(self) -> int:
        return sum(map(samples_of, self.feeds))

    def damage(self, model: Model) -> float:
        """Mean over samples."""
        return float(self.per_sample(model).mean())

    def per_sample(self, model: Model) -> NDArray[np.float64]:
        found = self.ctx.evaluator.outputs(model, self.feeds)
        rows = [
            self.kinds.per_sample(truth, outputs, samples_of(feed))
            for truth, outputs, feed in zip(self.expected, found, self.feeds, strict=True)
        ]
        return np.concatenate(rows)
