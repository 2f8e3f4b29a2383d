"""Least squares for the weights behind removed units, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.calibration import samples_of
from octavo.ir.extract import values_by_name
from octavo.ir.mapped import reading
from octavo.passes.affine_layers import AffineLayer
from octavo.passes.collect_moments import enough_columns, tempering
from octavo.passes.operand_walk import OperandWalk
from octavo.passes.rewrite import Rewrite
from octavo.passes.window import drawn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.axis_groups import AxisGroup
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.prune_readers import Reader

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]
    Mask = NDArray[np.bool_]

# The pull towards the weight as it is, relative to the mean diagonal: the least, and those that
# are tried on the half of the samples that a layer was not fitted to.
_DAMPING = 0.003
_DAMPINGS = (0.003, 0.03, 0.3, 3.0)
_SHIFT_DAMPING = 1e-9
_TINY = 1e-30


@final
@dataclass(frozen=True, eq=False)
class Normal:
    """The normal equations of one layer, per group of a convolution, means over columns.

    `second` `[groups, K + 1, K + 1]` is E[x̂·x̂ᵀ] of what the layer reads now, with a 1 behind it;
    `wanted` `[groups, N, K + 1]` is E[y·x̂ᵀ] of what it should give, and `power` E‖y‖².
    """

    second: Float64
    wanted: Float64
    power: float

    def error(self, rows: Float64) -> float:
        """E‖W·x̂ - y‖² relative to E‖y‖²; `rows` `[groups, N, K + 1]` end with the shift."""
        ours = np.einsum("gnk,gkl,gnl->", rows, self.second, rows, optimize=True)
        both = np.einsum("gnk,gnk->", self.wanted, rows)
        return max(float(ours - 2 * both) + self.power, 0.0) / max(self.power, _TINY)

    def solve(
        self, rows: Float64, kept: Mask, shifted: bool, damping_share: float = _DAMPING
    ) -> Float64:
        """The rows that give y best, from `kept` columns and maybe a shift.

        `rows` are where the pull of the damping leads.
        """
        chosen = np.flatnonzero(np.append(kept, shifted))
        second = self.second[:, chosen[:, None], chosen[None, :]]
        mean = np.einsum("gkk->g", second) / max(int(kept.sum()), 1)
        damping = damping_share * np.where(mean > 0, mean, 1.0)[:, None] * np.ones(chosen.size)
        if shifted:
            damping[:, -1] = _SHIFT_DAMPING
        damped = second + damping[:, :, None] * np.eye(chosen.size)
        missing = self.wanted[:, :, chosen] - rows[:, :, chosen] @ second
        found = np.zeros_like(rows)
        step = np.linalg.solve(damped, missing.transpose(0, 2, 1)).transpose(0, 2, 1)
        found[:, :, chosen] = rows[:, :, chosen] + step
        return found


def pooled(normals: Sequence[Normal]) -> Normal:
    """The normal equations of all samples, from those of parts of as many each."""
    share = 1 / len(normals)
    return Normal(
        np.asarray(sum(n.second for n in normals) * share),
        np.asarray(sum(n.wanted for n in normals) * share),
        sum(n.power for n in normals) * share,
    )


def best_damping(
    normals: Sequence[Normal], rows: Float64, kept: Mask, shifted: bool
) -> float | None:
    """The damping whose fit to one half is best on the other, both ways round.

    `None` where the rows as they are do better on what a fit has not seen. The least damping
    where there is one part only.
    """
    if len(normals) < 2:
        return _DAMPING
    pairs = ((0, 1), (1, 0))
    unseen = {
        damping: sum(
            normals[b].error(normals[a].solve(rows, kept, shifted, damping)) for a, b in pairs
        )
        for damping in _DAMPINGS
    }
    best = min(unseen, key=unseen.__getitem__)
    return best if unseen[best] < sum(normal.error(rows) for normal in normals) else None


def without_units(model: Model, removed: Mapping[AxisGroup, Collection[int]]) -> None:
    """Zero the constants of removed units in place: the outputs are those of the smaller model."""
    values = values_by_name(model)
    for group, units in removed.items():
        for (name, axis), labels in group.labels.items():
            value = values.get(name)
            tensor = value.const_value if value is not None else None
            gone = np.isin(labels, list(units))
            if value is None or tensor is None or not gone.any():
                continue
            if tensor.dtype.is_floating_point():
                array = reading(tensor, np.array)
                np.moveaxis(array, axis, 0)[gone] = 0
                value.const_value = onnx_ir.tensor(array, tensor.dtype, name=name)


def repair(
    model: Model,
    reference: Model,
    ctx: PassContext,
    feeds: Sequence[Feed],
    layers: Sequence[Reader],
) -> None:
    """Fit every layer to its original output on what it reads now, in the order of the graph.

    `model` is `reference` without some units. The units of a layer are those that are gone: its
    columns stay zero. Targets are of the original model, so that a layer also makes up for
    damage that earlier ones left; where its output is added to another branch, for that of the
    sum (K-prune, Park et al. 2024, arXiv 2308.03449, section 4.4).
    """
    ours = OperandWalk.of(model, ctx, feeds, [layer.operand for layer in layers])
    theirs = OperandWalk.of(reference, ctx, feeds, [layer.operand for layer in layers])
    originals = {node.name: node for node in reference.graph}
    rewrite = Rewrite(model, ctx)
    for at, layer in enumerate(layers):
        for walk in (ours, theirs):
            walk.reach(layer.operand)
        original = originals[layer.node.name].inputs[layer.index]
        assert original is not None
        assert original.const_value is not None
        target = reading(original.const_value, layer.matrix.rows)
        _fit(rewrite, layer, target, ours, theirs)
        if layer.operand not in {later.operand for later in layers[at + 1 :]}:
            for walk in (ours, theirs):
                walk.leave(layer.operand)
        ctx.progress("repair", at + 1, len(layers))


def repair_from_moments(
    model: Model,
    reference: Model,
    layers: Sequence[Reader],
    moments: Mapping[tuple[str, int], Float64],
    ctx: PassContext,
) -> None:
    """Fit readers to their original output by moments of the original model, in place.

    This takes one product and one solution per layer, and no data; it knows nothing of what
    earlier layers lost.
    """
    rewrite = Rewrite(model, ctx)
    originals = {node.name: node for node in reference.graph}
    for layer in layers:
        original = originals[layer.node.name].inputs[layer.index]
        assert original is not None
        assert original.const_value is not None
        target = reading(original.const_value, layer.matrix.rows).astype(np.float64)
        target = target * layer.rows().any(axis=2, keepdims=True)
        second = moments[layer.key]
        wanted = target @ second[:, :-1, :]
        power = float(np.einsum("gnk,gnk->", wanted[:, :, :-1], target))
        _solve(rewrite, layer, [Normal(second, wanted, power)])


def _fit(
    rewrite: Rewrite, layer: Reader, target: Float32, ours: OperandWalk, theirs: OperandWalk
) -> None:
    affine = AffineLayer.of(layer.node)
    # Outputs that are gone have no target.
    there = np.asarray(layer.rows().any(axis=2))
    branch = _branch(affine) if affine is not None else ""
    _solve(rewrite, layer, _normals(layer, target, there, (ours, theirs), branch))


def _solve(rewrite: Rewrite, layer: Reader, normals: Sequence[Normal]) -> None:
    """Give a layer its least-squares rows and shift, and report the errors."""
    normal = pooled(normals)
    affine = AffineLayer.of(layer.node)
    shifted = affine is not None and affine.bias() is not None
    groups, count, wide = normal.wanted.shape
    rows = np.zeros((groups, count, wide))
    rows[:, :, :-1] = layer.rows()
    damping = best_damping(normals, rows, layer.units < 0, shifted)
    found = rows if damping is None else normal.solve(rows, layer.units < 0, shifted, damping)
    before, after = normal.error(rows), normal.error(found)
    name, ctx = layer.node.name or "", rewrite.ctx
    if not after < before:
        ctx.remark("missed", name, "least squares finds nothing better", before=before, after=after)
        return
    _set_rows(layer, found[:, :, :-1])
    if shifted and affine is not None:
        affine.transform(rewrite, np.ones(affine.channels), found[:, :, -1].reshape(-1))
    ctx.count("layers repaired")
    ctx.remark("applied", name, "least squares on what is left", before=before, after=after)


def _branch(layer: AffineLayer) -> str:
    """The value that the output of a layer is added to, "" where there is none."""
    uses = list(layer.last.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or uses[0].node.domain:
        return ""
    other = uses[0].node.inputs[1 - uses[0].idx]
    return other.name or "" if other is not None and other.producer() is not None else ""


def _set_rows(layer: Reader, rows: Float64) -> None:
    value = layer.node.inputs[layer.index]
    assert value is not None
    assert value.const_value is not None
    array = layer.matrix.restore(rows)
    value.const_value = onnx_ir.tensor(array, value.const_value.dtype, name=value.name)


def _normals(
    layer: Reader,
    target: Float32,
    there: Mask,
    walks: tuple[OperandWalk, OperandWalk],
    branch: str,
) -> list[Normal]:
    """The normal equations of every second feed, and of the others; of all where there is one."""
    feeds = walks[0].walk.feeds
    parts = [range(k, len(feeds), 2) for k in range(min(2, len(feeds)))]
    return [_normal(layer, target, there, walks, branch, part) for part in parts]


def _normal(
    layer: Reader,
    target: Float32,
    there: Mask,
    walks: tuple[OperandWalk, OperandWalk],
    branch: str,
    part: Sequence[int],
) -> Normal:
    matrix, feeds = layer.matrix, walks[0].walk.feeds
    wide = matrix.width + 1
    second = np.zeros((matrix.groups, wide, wide))
    wanted = np.zeros((*target.shape[:2], wide))
    power, total, count = 0.0, 0, sum(map(samples_of, feeds))
    for at in part:
        limit = enough_columns(matrix.width, count) * samples_of(feeds[at])
        now, then = (matrix.columns(walk.walk.read(at, layer.operand), limit, at) for walk in walks)
        y = np.matmul(then, target.transpose(0, 2, 1))
        sums = [_outputs(layer, walk, at, branch, limit) for walk in walks]
        if sums[0] is not None and sums[1] is not None:
            y += sums[1] - sums[0]
        y *= there[:, None, :]
        share = tempering(then)
        y *= share
        now = np.concatenate([now * share, np.broadcast_to(share, (*now.shape[:2], 1))], axis=2)
        second += np.matmul(now.transpose(0, 2, 1), now)
        wanted += np.matmul(y.transpose(0, 2, 1), now)
        power += float(np.square(y).sum(dtype=np.float64))
        total += now.shape[1]
    scale = 1 / max(total, 1)
    return Normal(second * scale, wanted * scale, power * scale)


def _outputs(layer: Reader, walk: OperandWalk, at: int, branch: str, limit: int) -> Float32 | None:
    """The other term of a sum `[groups, samples, N]`, at the columns that are drawn."""
    if (at, branch) not in walk.walk.alive:
        return None
    matrix, array = layer.matrix, walk.walk.read(at, branch)
    last = np.moveaxis(array, 1, -1) if matrix.window is not None else array
    flat = last.reshape(-1, last.shape[-1])
    if flat.shape[1] != matrix.groups * matrix.rows_per_group:
        return None
    picked = flat[drawn(len(flat), limit, at)].reshape(-1, matrix.groups, matrix.rows_per_group)
    return np.asarray(picked.transpose(1, 0, 2), np.float32)
