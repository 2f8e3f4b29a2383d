"""Importance of dimensions that only products of two activations read: queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.passes.read_values import value_reader
from octavo.passes.rewrite import is_op

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Float64 = NDArray[np.float64]
    Side = tuple[str, int]


def product_scores(
    model: Model, ctx: PassContext, group: AxisGroup, feeds: Sequence[Feed]
) -> Float64 | None:
    """‖q_u‖·‖k_u‖ of every unit, over the tokens and heads of `feeds`, summed over the products.

    This is what leaving u out of q·kᵀ costs at most, the CR decomposition of queries and keys (Lin
    et al. 2024, MoDeGPT, arXiv 2408.09632, type II). Positions that rotate pairs of dimensions
    keep the norm of a pair. `None` where no product sums over the units.
    """
    sides = [side for pair in _products(model, group) for side in pair]
    if not sides or not feeds:
        return None
    read = value_reader(model, ctx.evaluator, (name for name, _ in sides))
    squares = {side: np.zeros(group.units) for side in sides}
    for feed in feeds:
        values = read(feed)
        for name, axis in sides:
            moved = np.moveaxis(values[name], axis, -1).astype(np.float64)
            each = np.square(moved).reshape(-1, moved.shape[-1]).sum(axis=0)
            labels = group.labels[name, axis]
            own = labels >= 0
            squares[name, axis] += np.bincount(labels[own], each[own], group.units)
    pairs = _products(model, group)
    return np.asarray(sum(np.sqrt(squares[left] * squares[right]) for left, right in pairs))


def _products(model: Model, group: AxisGroup) -> Iterator[tuple[Side, Side]]:
    """The products of two activations that sum over the units, by operand and axis."""
    inside = set(group.nodes)
    for node in (node for node in model.graph if node.name in inside and is_op(node, "MatMul")):
        sides = [_side(value, back) for value, back in zip(node.inputs, (1, 2), strict=True)]
        if all(side in group.labels for side in sides):
            yield sides[0], sides[1]


def _side(value: onnx_ir.Value | None, back: int) -> Side:
    """An operand with its contracted axis; a constant has none that counts."""
    if value is None or value.const_value is not None or value.shape is None:
        return "", -1
    return value.name or "", len(value.shape) - back
