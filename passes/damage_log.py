"""What every pass that rounds or repairs does to the outputs, in its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.reference import Original, Reference
from octavo.passes.instruments import Instrument
from octavo.passes.output_damage import OutputDamage
from octavo.passes.sample_macs import affordable_samples, sample_macs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.instruments import Step
    from octavo.passes.record import PassRecord

    Outputs = Mapping[str, NDArray[np.generic]]

_SAMPLES = 16
# Of a large model fewer: both it and its outputs take time and memory.
_MACS = 1e11
_LEAST_SAMPLES = 2


@final
class DamageLog(Instrument):
    """Completes `damage`: that of the outputs against the reference, on up to 16 samples.

    The model is run after every pass that changed it once its weights are quantized.
    """

    def __init__(self) -> None:
        self._known: dict[str, Sequence[tuple[Feed, Outputs]]] = {}

    def after_pass(self, step: Step, record: PassRecord, model: Model) -> PassRecord:
        if record.status != "changed":
            return record
        return replace(record, damage=self.measure(model, step.ctx))

    def measure(self, model: Model, ctx: PassContext) -> float | None:
        """Mean damage of the outputs; `None` without data or reference."""
        reference = model.find(Original) or model.find(Reference)
        if reference is None or ctx.calibration is None:
            return None
        damage = OutputDamage.of(reference.model)
        known = self._expected(reference.model, ctx, ctx.calibration)
        found = ctx.evaluator.outputs(model, [feed for feed, _ in known])
        rows = [
            damage.per_sample(expected, outputs, samples_of(feed))
            for (feed, expected), outputs in zip(known, found, strict=True)
        ]
        return float(np.concatenate(rows).mean())

    def _expected(
        self, reference: Model, ctx: PassContext, batches: Batches
    ) -> Sequence[tuple[Feed, Outputs]]:
        """Feeds with the outputs of the reference, which is run once."""
        key = f"{reference.fingerprint} {batches.sha256}"
        if key not in self._known:
            macs = sample_macs(reference, ctx, batches)
            samples = affordable_samples(macs, _MACS, _SAMPLES, _LEAST_SAMPLES)
            feeds = list(first_samples(batches, samples))
            expected = ctx.evaluator.outputs(reference, feeds)
            self._known[key] = list(zip(feeds, expected, strict=True))
        return self._known[key]
