"""Train what a compressed model keeps in float so that its outputs return to the original's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from octavo.ir.budgets import parse_bytes
from octavo.ir.errors import NotDifferentiable, UsageError
from octavo.ir.facts import Fact
from octavo.ir.reference import Original, Reference
from octavo.passes.base import Pass
from octavo.passes.distillation import Distillation
from octavo.passes.output_damage import Metric, OutputDamage
from octavo.passes.trainable import Trainable

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


@final
@dataclass(frozen=True)
class Recover(Pass):
    """Distil the compressed graph against the float one.

    **What it does.** Trains the scales of weights and activations, biases and the gains and shifts
    of norms; with `weights=flexround` or `straight-through` the codes as well, and weights that
    nothing quantizes: behind a pass that changes structure, all of them but zeros. With `mix`,
    training uses mixtures of two samples each, of which the float model says what they should give;
    without, few samples are soon known by heart. The loss is KL of the classes, or the error of
    other outputs, normalised, against the float model, and that of values between blocks with share
    `features`, as many of them as fit into `max`. Labels count with share `labels`; where the data
    has none, those are the classes that the float model gives a chance of `sure` at least, and
    samples that it is less sure of have none (SynQ, Kim et al. 2025, arXiv 2603.18423), as
    mixtures do. `maps` is the share of how far class activation maps move. Where structure changed,
    the float model is the one before.
    **Why.** Passes before it look at one layer or block; only the outputs say what matters.
    **When it does not apply.** No calibration data, operators without gradients, nothing
    compressed before.
    **Cost and accuracy.** `steps` batches, about `seconds`. One feed of `hold-out` is not
    trained on: the best state on those is kept, and nothing is changed where it is no better than
    what was there.
    """

    name = "recover"
    preserves = (Fact,)

    weights: Literal["none", "flexround", "straight-through"] = "none"
    steps: int = 400
    batch: int = 32
    seconds: float = 120.0
    features: float = 1.0
    labels: float = 0.0
    sure: float = 0.5
    maps: float = 0.0
    codes_rate: float = 0.003
    scales_rate: float = 0.002
    vectors_rate: float = 0.002
    activations_rate: float = 0.002
    matrices_rate: float = 0.0001
    mix: bool = False
    hold_out: int = 2
    patience: int = 8
    metric: Metric = "auto"
    max: str = "1GB"

    @property
    def max_bytes(self) -> float:
        """Memory for the float model's values between blocks."""
        return parse_bytes(self.max, "max", 0)

    def run(self, model: Model, ctx: PassContext) -> Model:
        trainable = Trainable.of(model)
        damage = OutputDamage.of(trainable.reference, self.metric)
        if self.hold_out < 2:
            raise UsageError(
                "hold-out must be at least 2: one feed of so many tells whether training helps",
                where=f"{self.name}{{hold-out={self.hold_out}}}",
            )
        why = self._why_not(model, ctx, damage)
        if ctx.calibration is None or why:
            ctx.remark("note", "", f"{why}: nothing is recovered")
            return model
        from octavo.ir.needs_torch import need_torch

        need_torch(self.name)
        distillation = Distillation(trainable, ctx, ctx.calibration, damage, self)
        from octavo.ir.torch_losses import one_thread

        try:
            with one_thread():
                distillation.run()
        except NotDifferentiable as error:
            ctx.remark("missed", "", str(error).splitlines()[0])
        return model

    def _why_not(self, model: Model, ctx: PassContext, damage: OutputDamage) -> str:
        if ctx.calibration is None:
            return "no calibration data"
        if not damage.kinds:
            return "no output of floats"
        compressed = model.find(Original) or model.find(Reference)
        return "" if compressed else "no pass before compressed the model"
