"""Reconstruct one block after the other: learn its codes so that its outputs stay those of float.

AdaRound (arXiv 2004.10568) of blocks as in BRECQ (arXiv 2102.05426), FlexRound (2306.00317).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.extract import extract
from octavo.ir.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.ir.torch_fit import Samples
    from octavo.ir.torch_reconstruction import Reconstructed, Schedule
    from octavo.ir.torch_student import Student
    from octavo.passes.base import PassContext
    from octavo.passes.blocks import Block
    from octavo.passes.trainable import Trainable


@dataclass
class Prefixes:
    """Values that live between two blocks, one mapping per feed: in float, and compressed."""

    floats: list[Feed]
    rounded: list[Feed]


@final
@dataclass(frozen=True)
class Reconstruction:
    """Learns blocks of a model in their order; every `held_out`-th feed only decides."""

    trainable: Trainable
    ctx: PassContext
    schedule: Schedule
    held_out: int = 4

    def block(
        self, block: Block, names: Sequence[str], state: Prefixes, seconds: float
    ) -> Reconstructed | None:
        """Learn the quantizers `names` of a block and write them where they help.

        `None` where the block has none. `state` then holds what lives behind the block. Raises
        NotDifferentiable, with the state moved on as well.
        """
        reference = self.trainable.model.fact(Reference).model
        wanted = dict.fromkeys((*block.exits, *block.following))
        ahead = self._run(reference, block, list(wanted), state.floats)
        try:
            if not names or not block.exits:
                return None
            return self._learn(block, names, state, ahead, seconds)
        finally:
            behind = self._run(self.trainable.model, block, block.following, state.rounded)
            state.floats = [{n: feed[n] for n in block.following} for feed in ahead]
            state.rounded = behind

    def _learn(
        self,
        block: Block,
        names: Sequence[str],
        state: Prefixes,
        ahead: list[Feed],
        seconds: float,
    ) -> Reconstructed:
        from octavo.ir.torch_reconstruction import reconstruct

        student = self.trainable.student(
            block.entries,
            block.exits,
            dict.fromkeys(names, self.schedule.method),
            vectors=self.schedule.vectors_rate > 0,
            activations=False,
        )
        train, check = self._samples(student, block, state, ahead)
        result = reconstruct(student, train, check, self.schedule, seconds, self.ctx.seed)
        if result.better:
            self.trainable.write(student)
        return result

    def _samples(
        self, student: Student, block: Block, state: Prefixes, ahead: list[Feed]
    ) -> tuple[Samples, Samples]:
        """Inputs with targets: to learn from, and held out (all where there are too few)."""
        from octavo.ir.torch_fit import Samples
        from octavo.ir.torch_reconstruction import float_name, target_name

        inputs = [name for name in student.graph.inputs if name not in student.weights]
        feeds = []
        for floats, rounded, after in zip(state.floats, state.rounded, ahead, strict=True):
            feed = {n: rounded[n] if self.schedule.prefix != "float" else floats[n] for n in inputs}
            feed |= {target_name(name): after[name] for name in block.exits}
            if self.schedule.prefix == "mixed":
                feed |= {float_name(n): floats[n] for n in inputs if rounded[n].dtype.kind == "f"}
            feeds.append(feed)
        every = self.held_out if len(feeds) > 1 else 1
        train = [f for k, f in enumerate(feeds) if k % every != 1] or feeds
        check = [f for k, f in enumerate(feeds) if k % every == 1] or feeds
        rows = self.trainable.in_rows(inputs)
        return Samples(train, rows=rows), Samples(check, rows=rows)

    def _run(
        self, model: Model, block: Block, outputs: Sequence[str], feeds: list[Feed]
    ) -> list[Feed]:
        """Outputs of the block for every feed; an entry that lives on is passed along."""
        made = [name for name in outputs if name not in block.entries]
        if not made:
            return [{name: feed[name] for name in outputs} for feed in feeds]
        part = extract(model, block.entries, made)
        inputs = [value.name or "" for value in part.graph.inputs]
        run = self.ctx.evaluator.load(part)
        found: list[Feed] = []
        for feed in feeds:
            computed: dict[str, NDArray[np.generic]] = run({name: feed[name] for name in inputs})
            found.append({n: computed[n] if n in computed else feed[n] for n in outputs})
        return found
