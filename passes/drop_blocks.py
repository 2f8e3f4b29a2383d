"""Remove residual blocks whose absence the outputs show least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import onnx_ir.passes.common

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.errors import UsageError
from octavo.ir.facts import Norms, Portable
from octavo.ir.reference import Original, with_original
from octavo.passes.base import Pass
from octavo.passes.block_importance import modification
from octavo.passes.block_search import BlockSearch
from octavo.passes.output_damage import Metric, OutputDamage
from octavo.passes.patterns import chosen
from octavo.passes.read_values import value_reader
from octavo.passes.residual_blocks import residual_blocks
from octavo.passes.rewrite import Rewrite

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

Of = Literal["blocks", "macs", "seconds"]
# A block that seems to cost nothing still saves something.
_LEAST = 1e-6


@final
@dataclass(frozen=True)
class DropBlocks(Pass):
    """Remove whole residual blocks: `y = x + f(x)` becomes `y = x`.

    **What it does.** Finds sums of a value and what a branch makes of it, and removes `count` of
    them, or so many that a share `ratio` of the `blocks`, of the model's `macs` or of its `seconds`
    (`of`) is gone: those without which the outputs on the calibration data move least (KL or
    normalised error) for what they save. Sets of blocks grow one by one, the best `beam` of them
    at a time, by the `tries` blocks that did least alone; every set is measured.
    **Why.** Neighbouring blocks of a deep network often do nearly the same; one less saves the
    time and bytes of all its layers.
    **When it does not apply.** A skip with a projection, or a branch that changes the shape; a
    branch that the caller reads from inside saves little and is left out.
    **Cost and accuracy.** One inference per block on `samples` samples, and `tries` per later
    block and set. Remarks give the damage, what is saved, and the block influence 1 - cos(x, y), a
    cheap forecast. Seconds are those of float kernels, measured or estimated.
    """

    name = "drop-blocks"
    produces = (Original,)
    preserves = (Norms, Portable)

    count: int = 0
    ratio: float = 0.0
    of: Of = "blocks"
    tries: int = 4
    beam: int = 1
    samples: int = 64
    metric: Metric = "auto"
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def run(self, model: Model, ctx: PassContext) -> Model:
        self._check()
        names = {node.name or "" for node in chosen(model, self.only, self.keep)}
        branches = {n: index for n, index in removable_branches(model).items() if n in names}
        if not branches:
            ctx.remark("missed", "", "no residual block has an identity beside its branch")
            return model
        saves, goal = self._saves(model, ctx, branches)
        data = ctx.calibration or ctx.stand_in
        if data is None:
            ctx.remark("note", "", "no data: nothing tells which blocks matter")
            return model
        feeds = tuple(first_samples(data, self.samples))
        study = _Study(model, ctx, branches, feeds, OutputDamage.of(model, self.metric))
        search = BlockSearch(saves, study.lost, self.tries, self.beam, study.progress)
        influence, order = study.influence(), search.least(goal)
        for at, name in enumerate(order):
            damage, saved = search.total(order[: at + 1]), sum(saves[n] for n in order[: at + 1])
            text = f"block removed: {study.damage.text} {damage:.4g} so far"
            if self.of != "blocks":
                text += f", {saved:.1%} of the {self.of} ({ctx.cost.source}) saved"
            ctx.remark("applied", name, text, damage=damage, influence=influence[name], saved=saved)
            ctx.count("blocks removed")
        found = without_branches(model, ctx, {name: branches[name] for name in order})
        ctx.count("nodes removed", len(list(model.graph)) - len(list(found.graph)))
        return with_original(found, model)

    def _saves(
        self, model: Model, ctx: PassContext, branches: Mapping[str, int]
    ) -> tuple[dict[str, float], float]:
        """What each block saves, and how much of that is wanted.

        Blocks count 1 each, anything else as a share of the model. Raises UsageError.
        """
        if self.of == "blocks":
            wanted = self.count or max(1, round(self.ratio * len(branches)))
            if wanted > len(branches):
                raise _too_many(wanted, branches)
            return dict.fromkeys(branches, 1.0), wanted
        whole = _amount(model, ctx, self.of)
        left = {
            name: _amount(without_branches(model, ctx, {name: index}), ctx, self.of)
            for name, index in branches.items()
        }
        saves = {name: max(_LEAST, (whole - amount) / whole) for name, amount in left.items()}
        if sum(saves.values()) < self.ratio:
            raise _too_little(self.ratio, self.of, saves)
        return saves, self.ratio

    def _check(self) -> None:
        by_ratio = 0 < self.ratio < 1
        options = f"count={self.count},ratio={self.ratio:g},of={self.of},tries={self.tries}"
        where = f"{self.name}{{{options},beam={self.beam}}}"
        if (self.count > 0) == by_ratio or self.count < 0 or min(self.tries, self.beam) < 1:
            raise UsageError(
                "give drop-blocks either a count above 0 or a ratio between 0 and 1, and tries "
                "and a beam of at least 1",
                where=where,
            )
        if self.count and self.of != "blocks":
            raise UsageError(
                f"a count is one of blocks; a share of {self.of} needs a ratio", where=where
            )
        if self.samples < 1:
            raise UsageError("samples must be at least 1", where=self.name)


def removable_branches(model: Model) -> dict[str, int]:
    """The sums `x + f(x)` of the top-level graph in running order: node name → input that is x."""
    exits = {block.exit: block.entry for block in residual_blocks(model).values()}
    found = {}
    for node in model.graph:
        entry = exits.get(node.outputs[0].name or "")
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == entry and _same_shape(value, node.outputs[0]):
                found[node.name or ""] = index
    return found


def without_branches(model: Model, ctx: PassContext, branches: Mapping[str, int]) -> Model:
    """A copy in which some sums hand on one input each, and what only the others read is gone."""
    own = model.clone()
    rewrite = Rewrite(own, ctx)
    for node in [n for n in own.graph if n.name in branches]:
        identity = node.inputs[branches[node.name or ""]]
        node.replace_input_with(0, identity)
        node.replace_input_with(1, None)
        node.resize_inputs(1)
        # Where the graph needs a node between its input and its output, it stays.
        node.op_type = "Identity"
        rewrite.drop(node)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(own.ir)
    return own


@final
@dataclass(frozen=True)
class _Study:
    """What the outputs of a model lose without some of its `branches`."""

    model: Model
    ctx: PassContext
    branches: Mapping[str, int]
    feeds: Sequence[Feed]
    damage: OutputDamage

    @cached_property
    def expected(self) -> list[Mapping[str, NDArray[np.generic]]]:
        """Outputs of the whole model."""
        run = self.ctx.evaluator.load(self.model)
        return [run(feed) for feed in self.feeds]

    def influence(self) -> dict[str, float]:
        """1 - cos of what every block reads and gives, mean over samples."""
        nodes = {node.name or "": node for node in self.model.graph}
        ends = {}
        for name, index in self.branches.items():
            before, after = nodes[name].inputs[index], nodes[name].outputs[0]
            ends[name] = ((before.name or "") if before is not None else "", after.name or "")
        wanted = (value for pair in ends.values() for value in pair)
        read = value_reader(self.model, self.ctx.evaluator, wanted)
        found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ends}
        for feed in self.feeds:
            values = read(feed)
            for name, (entry, made) in ends.items():
                found[name].append(modification(values[entry], values[made], samples_of(feed)))
        return {name: float(np.concatenate(some).mean()) for name, some in found.items()}

    def progress(self, done: int, total: int) -> None:
        """Say how many sets were measured, of those that are known to be wanted."""
        self.ctx.progress("drop blocks", done, total)

    def lost(self, names: Sequence[str]) -> float:
        """Damage without some blocks, mean over samples."""
        left = without_branches(self.model, self.ctx, {n: self.branches[n] for n in names})
        run = self.ctx.evaluator.load(left)
        rows = [
            self.damage.per_sample(truth, run(feed), samples_of(feed))
            for truth, feed in zip(self.expected, self.feeds, strict=True)
        ]
        return float(np.concatenate(rows).mean())


def _same_shape(left: onnx_ir.Value, right: onnx_ir.Value) -> bool:
    """Whether two shapes can be told to be the same; unknown sizes are taken to agree."""
    if left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return False
    pairs = zip(left.shape.dims, right.shape.dims, strict=True)
    return all(a == b or not (isinstance(a, int) or isinstance(b, int)) for a, b in pairs)


def _amount(model: Model, ctx: PassContext, of: Of) -> float:
    """Multiply-accumulates of a model, or its seconds in float kernels."""
    if of == "macs":
        return float(sum(ctx.cost.macs(node) for node in model.graph))
    return sum(ctx.cost.seconds(node, "float") or 0.0 for node in model.graph)


def _too_little(ratio: float, of: Of, saves: Mapping[str, float]) -> UsageError:
    return UsageError(
        f"{ratio:.0%} of the {of} are to go, and without all that can be removed "
        f"({', '.join(list(saves)[:6])}) {sum(saves.values()):.0%} of them are gone",
        where="drop-blocks",
        hint="give a smaller ratio, and leave the rest to prune-channels",
    )


def _too_many(wanted: int, branches: Mapping[str, int]) -> UsageError:
    return UsageError(
        f"{wanted} blocks are to be removed, and {len(branches)} can be",
        where="drop-blocks",
        hint=f"give count={len(branches)} or less: {', '.join(list(branches)[:6])}",
    )
