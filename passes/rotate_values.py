"""Turn the values of every attention head so that few of their dimensions carry most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.axis_groups import axis_groups
from octavo.ir.facts import Portable
from octavo.ir.reference import Original, with_original
from octavo.passes.base import Pass
from octavo.passes.collect_moments import collected
from octavo.passes.prune_readers import readers
from octavo.passes.residual_streams import rotate_constants, rotated_constants, why_fixed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.axis_links import Axis
    from octavo.ir.model import Model
    from octavo.ir.moments import Moments
    from octavo.passes.base import PassContext
    from octavo.passes.prune_readers import Reader

    Float64 = NDArray[np.float64]
    Index = NDArray[np.int64]

# Directions with less than this share of the strongest one's power hold no values: C is in float32.
_WEAKEST = 1e-6


@final
@dataclass(frozen=True)
class RotateValues(Pass):
    """Rotate the values of attention heads into the directions that the outputs need most.

    **What it does.** Between the projection that gives a head's values and the one behind it lie
    only products that leave the values' dimensions alone, so that an orthogonal matrix can go into
    the first and its transpose into the second. It is chosen for every head such that the first r
    dimensions are those of the best approximation of rank r of both projections together on the
    calibration data: the SVD of the layer behind times the root of the values' second moments
    (Lin et al. 2024, MoDeGPT, arXiv 2408.09632, type III). Heads that share keys and values share
    the matrix. The outputs stay the same.
    **Why.** Behind this pass `prune-channels{dimensions=true}` removes the last dimensions of all
    heads of a layer, and its repair fits the projection behind.
    **When it does not apply.** Dimensions that anything treats one by one, as rotary positions do
    with those of queries and keys; dimensions that no linear layer reads. Without calibration
    data all values count alike.
    **Cost and accuracy.** One inference for the moments and one small SVD per head. Exact up to
    float rounding.
    """

    name = "rotate-values"
    produces = (Original,)
    preserves = (Portable,)

    samples: int = 64

    def run(self, model: Model, ctx: PassContext) -> Model:
        before, found = model.clone(), axis_groups(model).groups
        heads = [group for group in found if group.kind == "heads"]
        nodes = {node.name or "": node for node in model.graph}
        chosen: list[tuple[AxisGroup, Reader]] = []
        for group in (group for group in found if group.kind == "dimensions"):
            behind = readers(model, group)
            fixed = [(n, why_fixed(nodes[n], group.labels)) for n in group.nodes]
            why = next(((name, reason) for name, reason in fixed if reason), None)
            if why is not None:
                ctx.remark("missed", why[0], f"the dimensions of '{group.name}' stay: {why[1]}")
            elif len(behind) != 1 or not all(map(partial(_whole, group), group.labels)):
                text = "they lie apart, or not one linear layer alone reads them"
                ctx.remark("missed", group.name.partition("#")[0], text)
            else:
                chosen.append((group, behind[0]))
        if not chosen:
            ctx.remark("note", "", "no values that could be rotated")
            return model
        moments = self._moments(model, ctx, [reader for _, reader in chosen])
        for group, reader in chosen:
            owner = _owners(model, group, heads)
            rotate_heads(model, group, owner, _rotations(group, reader, owner, moments))
            text = f"{group.units} dimensions of every head are sorted by what they carry"
            ctx.remark("applied", group.name.partition("#")[0], text, dimensions=group.units)
            ctx.count("layers rotated")
        return with_original(model, before)

    def _moments(
        self, model: Model, ctx: PassContext, some: Sequence[Reader]
    ) -> Mapping[tuple[str, int], Float64]:
        """Second moments `[K, K]` of what layers read, the identity where there is no data."""
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: all values count alike")
            return {reader.key: np.eye(reader.matrix.width) for reader in some}
        wanted = [reader.key for reader in some]
        found = collected(model, ctx, wanted, ctx.calibration, samples=self.samples)
        return {key: _second(found, key) for key in wanted}


def rotate_heads(
    model: Model, group: AxisGroup, owner: Mapping[Axis, Index], rotations: Float64
) -> None:
    """Multiply every head's part of a group's constants by its matrix of `[heads, U, U]`.

    `owner` says for the blocks of U indices along each axis whose they are.
    """

    def rotated(axis: Axis, array: NDArray[np.generic]) -> NDArray[np.generic]:
        return _turned(axis[1], rotations[owner[axis]], array)

    rotate_constants(model, group, rotated)


def _turned(axis: int, rotations: Float64, array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Blocks of U indices along an axis, each times its matrix `[blocks, U, U]`."""
    moved = np.moveaxis(array, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], *rotations.shape[:2]).astype(np.float64)
    turned = np.einsum("...bu,buv->...bv", blocks, rotations).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(turned, -1, axis).astype(array.dtype))


def _rotations(
    group: AxisGroup,
    reader: Reader,
    owner: Mapping[Axis, Index],
    moments: Mapping[tuple[str, int], Float64],
) -> Float64:
    """One orthogonal matrix per head `[heads, U, U]`.

    The best r functionals of a head's values are rows of VᵀC^(-½), where the weights behind times
    C^½ are U·S·Vᵀ; an orthogonal basis whose first r span them, for all r, is that of a QR.
    """
    units, weight = group.units, reader.rows()[0].astype(np.float64)
    value = reader.node.inputs[reader.index]
    assert value is not None
    blocks = owner[value.name or "", reader.matrix.column_axes[0]]
    found = np.zeros((int(blocks.max()) + 1, units, units))
    for head in range(len(found)):
        own = [slice(at * units, (at + 1) * units) for at in np.flatnonzero(blocks == head)]
        second = sum(moments[reader.key][part, part] for part in own)
        power, basis = np.linalg.eigh(np.asarray(second))
        seen = power > _WEAKEST * float(power.max())
        root = np.sqrt(np.where(seen, power, 0.0))
        inverse = np.where(seen, 1 / np.where(seen, root, 1.0), 0.0)
        stacked = np.concatenate([weight[:, part] for part in own])
        _, _, needed = np.linalg.svd(stacked @ (basis * root), full_matrices=False)
        orthogonal, triangle = np.linalg.qr((basis * inverse) @ needed.T)
        found[head] = orthogonal * np.where(np.diag(triangle) < 0, -1, 1)
    return found


def _owners(model: Model, group: AxisGroup, heads: Sequence[AxisGroup]) -> dict[Axis, Index]:
    """Whose the blocks along a constant's axis are; one head's where no axis group tells heads."""
    constants = rotated_constants(model, group)
    axes = [(name, axis) for name, some in constants.items() for axis in some]
    for other in heads:
        if all(axis in other.labels for axis in axes):
            blocks = {axis: other.labels[axis].reshape(-1, group.units) for axis in axes}
            if all((b >= 0).all() and (b == b[:, :1]).all() for b in blocks.values()):
                return {axis: found[:, 0] for axis, found in blocks.items()}
    return {axis: np.zeros(group.labels[axis].size // group.units, np.int64) for axis in axes}


def _whole(group: AxisGroup, axis: Axis) -> bool:
    """Whether every head's dimensions lie together along an axis, in one order."""
    labels = group.labels[axis]
    if labels.size % group.units:
        return False
    return bool((labels.reshape(-1, group.units) == np.arange(group.units)).all())


def _second(moments: Moments, key: tuple[str, int]) -> Float64:
    moment = moments.of(*key)
    assert moment is not None
    return np.asarray(moment.measured()[0], np.float64)
