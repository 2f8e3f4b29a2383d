"""Distillation: train a compressed graph on what the original computes (Hinton et al. 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.nn import functional

from octavo.ir.torch_class_maps import class_map
from octavo.ir.torch_fit import Fit
from octavo.ir.torch_losses import distance
from octavo.ir.torch_reconstruction import target_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from octavo.ir.torch_fit import BatchSource, Outcome, Samples
    from octavo.ir.torch_student import Rates, Student

LABELS = "octavo.labels"
CLASSES, MAPS = "octavo.classes", "octavo.maps"
# The label of a row that has none.
UNSURE = -1
_CHECKED = 32
_PARTS = 2
# Dimensions of a batch of images.
_IMAGES = 4
_TINY = 1e-12


@final
@dataclass(frozen=True, eq=False)
class Lesson:
    """What a student is compared in, and for how long.

    `kinds` by output; `features` are further values, compared by normalised squared error with
    weight `feature_share`; `labels_share` weighs the cross entropy of the first output where the
    batches hold labels other than UNSURE. `maps_share` weighs the normalised squared error of the
    class activation maps where batches hold MAPS and the CLASSES they are of; `mapped` names the
    value with places and the logits. Every `check_every` steps the student is held against
    `check` samples; it stops when `patience` such tests in a row bring nothing, and is left at
    its best.
    """

    kinds: Mapping[str, str]
    features: tuple[str, ...]
    feature_share: float
    labels_share: float
    maps_share: float
    mapped: tuple[str, str] | None
    steps: int
    batch: int
    check_every: int
    patience: int

    def run(
        self,
        student: Student,
        train: BatchSource,
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
            return self.loss(student.run(_channels_last(batch)), batch)

        def on_step(done: int, steps: int) -> bool:
            progress(done, steps)
            return done % self.check_every == 0 and best.look() >= self.patience

        fit = Fit(self.steps, self.batch, seconds, seed, on_step, _PARTS)
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
            parts.append(self.labels_share * self._labelled(outputs, batch[LABELS]))
        if MAPS in batch and self.mapped is not None:
            value, logits = (outputs[name] for name in self.mapped)
            found = class_map(value, logits, batch[CLASSES])
            parts.append(self.maps_share * distance(found, batch[MAPS], "values"))
        return torch.stack(parts).sum()

    def _labelled(self, outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """-log p of the labels in nats, summed over the rows that have one, over all rows."""
        name, kind = next(iter(self.kinds.items()))
        rows = outputs[name].reshape(-1, outputs[name].shape[-1])
        rows = rows.clamp_min(_TINY).log() if kind == "probabilities" else rows
        wanted = labels.reshape(-1).to(torch.int64)
        total = functional.cross_entropy(rows, wanted, ignore_index=UNSURE, reduction="sum")
        return total / len(rows)

    def damage(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The distance of the outputs alone."""
        parts = [self._distance(outputs, batch, name, kind) for name, kind in self.kinds.items()]
        return torch.stack(parts).sum()

    def _distance(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], name: str, kind: str
    ) -> Tensor:
        return distance(outputs[name], batch[target_name(name)], kind)


def _channels_last(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as convolutions compute them fastest: half the time of a step."""
    images = {n: value for n, value in batch.items() if value.dim() == _IMAGES}
    moved = {n: v.contiguous(memory_format=torch.channels_last) for n, v in images.items()}
    return {**batch, **moved}


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
