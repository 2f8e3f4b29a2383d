"""Choose the codes of quantized weights by gradients, block by block."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from octavo.ir.budgets import parse_bytes
from octavo.ir.errors import NotDifferentiable
from octavo.ir.extract import extract
from octavo.ir.facts import Fact
from octavo.ir.reference import Reference
from octavo.passes.base import Pass
from octavo.passes.blocks import blocks
from octavo.passes.learned_rounding import Prefixes, Reconstruction
from octavo.passes.trainable import Trainable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.ir.torch_reconstruction import Reconstructed, Schedule
    from octavo.passes.base import PassContext, RemarkKind
    from octavo.passes.blocks import Block

# Inputs of both models and the target are in memory at once.
_COPIES = 3


@final
@dataclass(frozen=True)
class RoundLearned(Pass):
    """Learn codes, scales and biases so that every block computes what the float block does.

    **What it does.** Cuts the graph where one value is alive and goes from block to block: the
    input comes from the quantized blocks before, the target from the float model. `adaround`
    learns for every weight whether to round up or down, `flexround` divides it by learned factors
    before rounding, which may move it by several codes. Learning starts from the present codes.
    **Why.** The nearest code is best for a weight alone, not for what a block computes; and a
    block can make good what the blocks before it did wrong.
    **When it does not apply.** No calibration data, operators without gradients.
    **Cost and accuracy.** `steps` batches per block, about `seconds` in all. A block keeps what it
    learned where its error on held-out samples falls.
    """

    name = "round-learned"
    requires = (Reference,)
    preserves = (Fact,)

    method: Literal["adaround", "flexround", "straight-through"] = "flexround"
    prefix: Literal["quantized", "float", "mixed"] = "quantized"
    steps: int = 200
    batch: int = 32
    layers: int = 4
    seconds: float = 300.0
    codes_rate: float = 0.01
    scales_rate: float = 0.01
    vectors_rate: float = 0.005
    penalty: float = 1.0
    max: str = "2GB"

    def run(self, model: Model, ctx: PassContext) -> Model:
        self.learn(Trainable.of(model), ctx)
        return model

    def learn(self, trainable: Trainable, ctx: PassContext) -> None:
        """Learn those weights of a model in place, block by block."""
        if ctx.calibration is None or not trainable.weights:
            why = "no calibration data" if ctx.calibration is None else "no quantized weights"
            ctx.remark("note", "", f"{why}: nothing is learned")
            return
        from octavo.ir.needs_torch import need_torch

        need_torch(self.name)
        found = self._blocks(trainable)
        feeds = self._feeds(trainable.model, ctx, [block for block, _ in found])
        from octavo.ir.torch_losses import one_thread

        with one_thread():
            self._learn(Reconstruction(trainable, ctx, self._schedule()), found, feeds)

    def _blocks(self, trainable: Trainable) -> list[tuple[Block, list[str]]]:
        """Blocks with the quantizers that each learns: those that no earlier block reads."""
        model = trainable.model.fact(Reference).model
        readers = trainable.readers()
        weights = {name for names in readers.values() for name in names}
        taken: set[str] = set()
        found = []
        for block in blocks(model, weights, trainable.rounded_nodes(), self.layers):
            names = [
                n for n, by in readers.items() if n not in taken and set(by) & {*block.weights}
            ]
            taken.update(names)
            found.append((block, names))
        return found

    def _feeds(self, model: Model, ctx: PassContext, found: Sequence[Block]) -> list[Feed]:
        """As many feeds as fit into memory with what lives around the largest block."""
        assert ctx.calibration is not None
        feeds = list(ctx.calibration)
        reference = model.fact(Reference).model
        names = {name for block in found for name in (*block.exits, *block.following)}
        run = ctx.evaluator.load(extract(reference, (), sorted(names)))
        inputs = {value.name or "" for value in reference.graph.inputs}
        sizes = {n: a.nbytes for n, a in run({n: feeds[0][n] for n in inputs}).items()}
        sizes |= {name: feeds[0][name].nbytes for name in inputs}
        around = [
            sum(sizes[name] for name in (*block.entries, *block.exits, *block.following))
            for block in found
        ]
        limit = parse_bytes(self.max, "max", 0)
        count = max(1, int(limit / max(_COPIES * max(around, default=0), 1)))
        if count < len(feeds):
            text = f"{count} of {len(feeds)} feeds fit into {self.max}"
            ctx.remark("note", "", text)
        return feeds[:count]

    def _schedule(self) -> Schedule:
        from octavo.ir.torch_reconstruction import Schedule

        return Schedule(
            self.method, self.prefix, self.steps, self.batch,
            self.codes_rate, self.scales_rate, self.vectors_rate, self.penalty,
        )  # fmt: skip

    def _learn(
        self,
        reconstruction: Reconstruction,
        found: Sequence[tuple[Block, list[str]]],
        feeds: list[Feed],
    ) -> None:
        ctx = reconstruction.ctx
        state = Prefixes(list(feeds), list(feeds))
        deadline = time.perf_counter() + self.seconds
        for k, (block, names) in enumerate(found):
            share = (deadline - time.perf_counter()) / (len(found) - k)
            where = block.exits[0] if block.exits else ""
            try:
                result = reconstruction.block(block, names, state, max(share, 0.0))
            except NotDifferentiable as error:
                ctx.remark("missed", where, str(error).splitlines()[0])
                continue
            finally:
                ctx.progress("round-learned", k + 1, len(found))
            if result is not None:
                _report(ctx, where, names, result)


def _report(ctx: PassContext, where: str, names: Sequence[str], result: Reconstructed) -> None:
    """One remark per block, with the error of its exits before and after."""
    kind: RemarkKind = "applied" if result.better else "missed"
    ctx.count("blocks learned" if result.better else "blocks kept")
    ctx.count("steps", result.outcome.steps)
    how = "the clock ended it" if result.outcome.late else "all steps"
    if result.outcome.diverged:
        how = "the loss is not finite"
    if not result.better:
        how += "; no better on held-out samples, kept as it was"
    ctx.remark(
        kind, where,
        f"block of {len(names)} weights: error {result.before:.3e} before, "
        f"{min(result.before, result.after):.3e} after ({how})",
        before=result.before, after=min(result.before, result.after), steps=result.outcome.steps,
    )  # fmt: skip
