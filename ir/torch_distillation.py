"""Distillation: train a compressed graph on what the original computes (Hinton et al. 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.nn import functional

from octavo.ir.torch_fit import Fit
from octavo.ir.torch_losses import distance
from octavo.ir.torch_reconstruction import target_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from octavo.ir.torch_fit import Outcome, Samples
    from octavo.ir.torch_student import Rates, Student

LABELS = "octavo.labels"
_CHECKED = 32


@final
@dataclass(frozen=True, eq=False)
class Lesson:
    """What a student is compared in, and for how long.

    `kinds` by output; `features` are further values, compared by normalised squared error with
    weight `feature_share`; `labels_share` weighs the cross entropy of the first output where the
    batches hold labels. Every `check_every` steps the student is held against `check` samples; it
    stops when `patience` such tests in a row bring nothing, and is left at its best.
    """

    kinds: Mapping[str, str]
    features: tuple[str, ...]
    feature_share: float
    labels_share: float
    steps: int
    batch: int
    check_every: int
    patience: int

    def run(
        self,
        student: Student,
        train: Samples,
        check: Samples,
        rates: Rates,
        seconds: float,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> tuple[float, float, Outcome]:
        """Damage on `check` before and after, and how training went."""
        best = _Best(self, student, check)
        before = best.damage

        def loss(_: float, batch: dict[str, Tensor]) -> Tensor:
            return self.loss(student.run(batch), batch)

        def on_step(done: int, steps: int) -> bool:
            progress(done, steps)
            return done % self.check_every == 0 and best.look() >= self.patience

        fit = Fit(self.steps, self.batch, seconds, seed, on_step)
        outcome = fit.run(student, train, rates, loss)
        best.look()
        student.restore(best.snapshot)
        return before, best.damage, outcome

    def loss(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """What is minimised."""
        parts = [self.damage(outputs, batch)]
        parts += [
            self.feature_share / len(self.features) * self._distance(outputs, batch, name, "values")
            for name in self.features
        ]
        if LABELS in batch and self.labels_share:
            logits = outputs[next(iter(self.kinds))]
            logits = logits.reshape(-1, logits.shape[-1])
            labels = batch[LABELS].reshape(-1).to(torch.int64)
            parts.append(self.labels_share * functional.cross_entropy(logits, labels))
        return torch.stack(parts).sum()

    def damage(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The distance of the outputs alone."""
        parts = [self._distance(outputs, batch, name, kind) for name, kind in self.kinds.items()]
        return torch.stack(parts).sum()

    def _distance(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], name: str, kind: str
    ) -> Tensor:
        return distance(outputs[name], batch[target_name(name)], kind)


class _Best:
    """The best student so far, by its damage with the weights that will be emitted."""

    def __init__(self, lesson: Lesson, student: Student, check: Samples) -> None:
        self.lesson, self.student, self.check = lesson, student, check
        self.damage, self.idle = math.inf, 0
        self.look()

    def look(self) -> int:
        """Test the student; how many tests in a row brought nothing."""
        damage = self._measured()
        self.idle += 1
        if damage < self.damage:
            self.damage, self.idle, self.snapshot = damage, 0, self.student.snapshot()
        return self.idle

    @torch.no_grad()
    def _measured(self) -> float:
        total = count = 0.0
        for batch in self.check.all(_CHECKED):
            size = len(next(iter(batch.values())))
            total += size * float(self.lesson.damage(self.student.run(batch, hard=True), batch))
            count += size
        return total / count
