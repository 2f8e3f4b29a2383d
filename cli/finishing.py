"""The passes behind insert-fake-quant, run once: on the plan that won, not on every candidate.

They choose codes, scales and biases, which changes neither the kernels nor their seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from octavo.cli.candidates import Candidate
from octavo.cli.target import backend_of
from octavo.ir.artifact_io import MODEL
from octavo.passes.damage_log import DamageLog
from octavo.passes.pipeline import Compilation, Pipeline

if TYPE_CHECKING:
    from octavo.passes.base import PassContext
    from octavo.passes.instruments import Instrument

_LAST = "insert-fake-quant"


@final
@dataclass(frozen=True)
class Finishing:
    """What is left of a pipeline when a plan has been chosen."""

    pipeline: Pipeline
    instruments: Sequence[Instrument]

    @staticmethod
    def of(whole: Pipeline, instruments: Sequence[Instrument]) -> tuple[Pipeline, Finishing]:
        """The pipeline up to the quantizers, and the rest."""
        names = [pass_.name for pass_ in whole.passes]
        at = names.index(_LAST) + 1 if _LAST in names else len(names)
        rest = Pipeline(whole.passes[at:], whole.first + at)
        return Pipeline(whole.passes[:at], whole.first), Finishing(rest, instruments)

    def __call__(self, candidate: Candidate, ctx: PassContext) -> Candidate:
        """The candidate with the rest done to it; itself where nothing is left.

        What every pass of the rest does to the outputs is logged.
        """
        if not self.pipeline.passes:
            return candidate
        before = candidate.compilation
        log = DamageLog()
        *first, last = before.records
        last = replace(last, damage=log.measure(before.model, ctx))
        done = self.pipeline.run(before.model, ctx, (*self.instruments, log))
        records = (*first, last, *done.records)
        pipeline = Pipeline((*candidate.pipeline.passes, *self.pipeline.passes))
        path = self._folder(candidate, ctx) / MODEL
        compilation = Compilation(done.model, records)
        backend = backend_of(ctx.target.name)
        lowered = Candidate(pipeline, compilation, lambda: backend.lower(done.model, path))
        planned = {row.node: row for row in candidate.artifact.planned}
        rows = tuple(
            replace(row, seconds=planned[row.node].seconds) if row.node in planned else row
            for row in lowered.artifact.planned
        )
        artifact = replace(lowered.artifact, planned=rows)
        return Candidate(pipeline, compilation, lambda: artifact)

    def _folder(self, candidate: Candidate, ctx: PassContext) -> Path:
        folder = ctx.workdir / f"{candidate.artifact.path.parent.name}-finished"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
