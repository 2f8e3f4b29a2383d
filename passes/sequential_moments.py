"""Moments of what weights multiply once the layers before them are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.moments import shrunk
from octavo.ir.reference import Reference
from octavo.passes.collect_moments import enough_columns
from octavo.passes.operand_walk import OperandWalk
from octavo.passes.weight_matrix import WeightMatrix, operand, why_no_matrix

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.weight_quantizers import WeightQuantizer

    Float32 = NDArray[np.float32]

# The pull towards the float weight, relative to the mean diagonal.
_DAMPING = 0.01


@final
@dataclass(frozen=True)
class Sighted:
    """The moments `[groups, K, K]` of what a weight multiplies.

    `lost` is Σ(x_float - x)·xᵀ/n in the same shape, where x is what rounded layers leave.
    """

    matrix: WeightMatrix
    second: Float32
    lost: Float32 | None = None

    def target(self, rows: Float32) -> Float32:
        """Float rows `[groups, N, K]` that give the float output on rounded inputs.

        `W + W·L·(C + λ)⁻¹` for L = `lost`, the least-squares solution damped towards W.
        """
        if self.lost is None:
            return rows
        second = self.second.astype(np.float64)
        width = second.shape[-1]
        mean = np.einsum("gkk->g", second) / max(width, 1)
        scale = np.where(mean > 0, mean, 1.0)[:, None, None]
        damped = second + _DAMPING * scale * np.eye(width)
        correction = np.linalg.solve(damped, self.lost.astype(np.float64).transpose(0, 2, 1))
        found: Float32 = rows + np.matmul(rows, correction.transpose(0, 2, 1).astype(np.float32))
        return found


def prefix_moments(
    model: Model,
    ctx: PassContext,
    quantizers: Sequence[WeightQuantizer],
    batches: Batches,
    samples: int,
) -> Iterator[tuple[WeightQuantizer, Sighted]]:
    """Quantizers in topological order, each with moments of its operand in `model` as it is then.

    The caller rounds a weight before it takes the next; every node runs once a feed. Quantizers
    without a matrix, or whose operand is no input of their reader (recurrent states), are left
    out, as all are where the model has no reference.
    """
    reference = model.find(Reference)
    if reference is None:
        return
    levels = _levels(reference.model, quantizers)
    feeds = tuple(first_samples(batches, samples))
    rounded = OperandWalk.of(model, ctx, feeds, [level.operand for level in levels])
    source = OperandWalk.of(reference.model, ctx, feeds, [level.source for level in levels])
    for at, level in enumerate(levels):
        rounded.reach(level.operand)
        source.reach(level.source)
        for quantizer in level.quantizers:
            yield quantizer, _sighted(level, quantizer, rounded, source)
        rounded.leave(level.operand)
        if level.source not in {later.source for later in levels[at + 1 :]}:
            source.leave(level.source)


@final
@dataclass(frozen=True)
class _Level:
    """An operand by its names in both models, and the quantizers of what multiplies it."""

    operand: str
    source: str
    quantizers: list[WeightQuantizer]


def _levels(reference: Model, quantizers: Sequence[WeightQuantizer]) -> list[_Level]:
    """In an order in which no operand depends on a later one."""
    nodes = {node.name: node for node in reference.graph}
    place = {v.name or "": at for at, node in enumerate(reference.graph) for v in node.outputs}
    found: dict[tuple[str, str], _Level] = {}
    for quantizer in quantizers:
        reader = _reader(quantizer)
        value, before = (n.inputs[0] if n else None for n in (reader, _same(reader, nodes)))
        if value is not None and before is not None:
            key = (before.name or "", value.name or "")
            level = found.setdefault(key, _Level(key[1], key[0], []))
            level.quantizers.append(quantizer)
    return sorted(found.values(), key=lambda level: place.get(level.source, -1))


def _same(
    reader: onnx_ir.Node | None, nodes: Mapping[str | None, onnx_ir.Node]
) -> onnx_ir.Node | None:
    return nodes.get(reader.name) if reader is not None else None


def _reader(quantizer: WeightQuantizer) -> onnx_ir.Node | None:
    """The first reader whose operand is one of its inputs."""
    for node, index in quantizer.readers:
        if not why_no_matrix(node, index) and operand(node, index) is node.inputs[0]:
            return node
    return None


def _sighted(
    level: _Level, quantizer: WeightQuantizer, rounded: OperandWalk, source: OperandWalk
) -> Sighted:
    """C = Σ x·xᵀ/n and Σ (x_float - x)·xᵀ/n, of the same columns of both."""
    node = _reader(quantizer)
    assert node is not None
    index = next(i for n, i in quantizer.readers if n is node)
    matrix = WeightMatrix.of(node, index)
    shape = (matrix.groups, matrix.width, matrix.width)
    second, lost = np.zeros(shape), np.zeros(shape)
    total, count = 0, sum(map(samples_of, rounded.walk.feeds))
    for at, feed in enumerate(rounded.walk.feeds):
        limit = enough_columns(matrix.width, count) * samples_of(feed)
        ours, theirs = (
            matrix.columns(walk.walk.read(at, name), limit, at)
            for walk, name in ((rounded, level.operand), (source, level.source))
        )
        second += np.matmul(ours.transpose(0, 2, 1), ours)
        lost += np.matmul((theirs - ours).transpose(0, 2, 1), ours)
        total += ours.shape[1]
    scale = 1 / max(total, 1)
    known = shrunk((second * scale).astype(np.float32), total)
    return Sighted(matrix, known, (lost * scale).astype(np.float32))
