"""Prepare a distillation: targets of the float model, the parts that train, the verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.calibration import Part, samples_of
from octavo.ir.extract import extract, values_by_name
from octavo.ir.reference import Original
from octavo.passes.blocks import blocks
from octavo.passes.class_maps import ClassMaps

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.ir.torch_distillation import Lesson
    from octavo.ir.torch_fit import Samples
    from octavo.ir.torch_mixing import Mixtures
    from octavo.ir.torch_rounding import RoundingMethod
    from octavo.ir.torch_student import Student
    from octavo.passes.base import PassContext
    from octavo.passes.output_damage import Kind, OutputDamage
    from octavo.passes.recover import Recover
    from octavo.passes.trainable import Trainable

    Run = Callable[[Feed], dict[str, NDArray[np.generic]]]

_CHECKS = 20
_TINY = 1e-12


@final
@dataclass(frozen=True)
class Distillation:
    """One compressed model and the data it is trained on."""

    trainable: Trainable
    ctx: PassContext
    batches: Batches
    damage: OutputDamage
    options: Recover

    @property
    def teacher(self) -> Model:
        """The float model that is learned from: the one before structure changed, if any did."""
        original = self.trainable.model.find(Original)
        return original.model if original is not None else self.trainable.reference

    @cached_property
    def maps(self) -> ClassMaps | None:
        """What class activation maps are made of, where they are asked for and there are any."""
        found = ClassMaps.of(self.trainable.reference)
        return found if self.options.maps else None

    def run(self) -> None:
        """Train, and write what was learned if torch finds it better on the held-out half.

        Raises NotDifferentiable.
        """
        from octavo.ir.torch_student import Rates

        features = self.features() if self.options.features else ()
        student = self._student(features)
        feeds = sum(1 for _ in zip(self.batches, range(self.options.hold_out), strict=False))
        held_out = Part(self.batches, 1, max(2, feeds))
        check = self._samples(student, held_out, features)
        train = self._samples(student, replace(held_out, rest=True), features)
        options = self.options
        rates = Rates(
            options.codes_rate, options.scales_rate, options.vectors_rate, options.activations_rate,
            options.matrices_rate,
        )  # fmt: skip
        mixed = self._mixed(train, student, features)
        before, after, outcome = self._lesson(features).run(
            student, mixed, check, rates, options.seconds, self.ctx.seed,
            lambda done, steps: self.ctx.progress("recover", done, steps),
        )  # fmt: skip
        self.ctx.count("steps", outcome.steps)
        better = after < before
        if better:
            self.trainable.write(student)
        how = "the clock ended it" if outcome.late else f"{outcome.steps} steps"
        if outcome.diverged:
            how = "no loss was finite"
        self.ctx.remark(
            "applied" if better else "missed", "",
            f"{self.damage.text} on held-out samples: {before:.3e} before, {after:.3e} after "
            f"({how})",
            before=before, after=after, steps=outcome.steps, restarts=outcome.restarts,
        )  # fmt: skip

    def _student(self, features: tuple[str, ...]) -> Student:
        kind = self.options.weights
        method: RoundingMethod = "fixed" if kind == "none" else kind
        inputs = [value.name or "" for value in self.trainable.model.graph.inputs]
        mapped = (self.maps.value, self.maps.logits) if self.maps is not None else ()
        outputs = tuple(dict.fromkeys((*self.damage.kinds, *features, *mapped)))
        methods = dict.fromkeys(self.trainable.weights, method)
        return self.trainable.student(
            inputs, outputs, methods, vectors=True, activations=True, matrices=kind != "none"
        )

    def features(self) -> tuple[str, ...]:
        """Values between blocks, from the outputs back as far as memory allows.

        Of a model whose structure changed, those that are as wide as in the original one.
        """
        reference = self.trainable.reference
        weights = {name for names in self.trainable.readers().values() for name in names}
        free = {node.name or "" for node in self.trainable.matrices.values()}
        if self.options.weights == "none":
            free.clear()
        cut = blocks(reference, weights | free, self.trainable.rounded_nodes() | free, 1)
        names = [n for block in cut for n in block.exits if n not in self.damage.kinds]
        names = [n for n in names if _same_width(reference, self.teacher, n)]
        first, count = next(iter(self.batches)), sum(1 for _ in self.batches)
        if not names:
            return ()
        run: Run = self.ctx.evaluator.load(extract(self.teacher, (), names))
        found = run({v.name or "": first[v.name or ""] for v in reference.graph.inputs})
        left, kept = self.options.max_bytes / count, []
        for name in reversed(names):
            left -= found[name].nbytes
            if left < 0:
                break
            kept.append(name)
        return tuple(reversed(kept))

    def _samples(self, student: Student, part: Part, features: tuple[str, ...]) -> Samples:
        from octavo.ir.torch_distillation import CLASSES, LABELS, MAPS
        from octavo.ir.torch_fit import Samples
        from octavo.ir.torch_reconstruction import target_name

        reference = self.teacher
        wanted = (*self.damage.kinds, *features)
        run: Run = self.ctx.evaluator.load(extract(reference, (), wanted))
        inputs = [name for name in student.graph.inputs if name not in student.weights]
        labels, start, feeds = self._labels(part), 0, []
        logits, kind = next(iter(self.damage.kinds.items()))
        guessed = self.options.labels and labels is None and kind != "values"
        seen = self.maps.reader(reference) if self.maps is not None else None
        names = [value.name or "" for value in reference.graph.inputs]
        for feed in part:
            found = run({name: feed[name] for name in names})
            made = {name: feed[name] for name in inputs}
            made |= {target_name(name): found[name] for name in wanted}
            stop = start + samples_of(feed)
            if labels is not None:
                made[LABELS] = labels[start:stop]
            elif guessed:
                made[LABELS] = sure_classes(found[logits], kind, self.options.sure)
            if seen is not None:
                made[CLASSES], made[MAPS] = seen(feed)
            start = stop
            feeds.append(made)
        return Samples(feeds, rows=self.trainable.in_rows(inputs))

    def _mixed(
        self, samples: Samples, student: Student, features: tuple[str, ...]
    ) -> Samples | Mixtures:
        """Mixtures of the samples where they are asked for and can be made."""
        from octavo.ir.torch_mixing import Mixtures

        inputs = [name for name in student.graph.inputs if name not in student.weights]
        if not self.options.mix:
            return samples
        if not samples.rows or any(not samples.tensors[0][n].is_floating_point() for n in inputs):
            self.ctx.remark("note", "", "samples are not mixed: they are no floats of one shape")
            return samples
        targets = (*self.damage.kinds, *features)
        run: Run = self.ctx.evaluator.load(extract(self.teacher, (), targets))
        return Mixtures(samples, inputs, targets, run)

    def _labels(self, part: Part) -> NDArray[np.generic] | None:
        """Whole numbers, one or one row per sample, where they are wanted."""
        labels = part.labels if self.options.labels else None
        return labels if labels is not None and labels.dtype.kind in "iu" else None

    def _lesson(self, features: tuple[str, ...]) -> Lesson:
        from octavo.ir.torch_distillation import Lesson

        options = self.options
        return Lesson(
            self.damage.kinds, features, options.features, options.labels, options.maps,
            (self.maps.value, self.maps.logits) if self.maps is not None else None,
            options.steps, options.batch, max(1, options.steps // _CHECKS), options.patience,
        )  # fmt: skip


def _same_width(model: Model, other: Model, name: str) -> bool:
    """Whether both have a value of the name and of the same shape."""
    if model is other:
        return True
    shapes = [
        value.shape if (value := values_by_name(each).get(name)) is not None else None
        for each in (model, other)
    ]
    return None not in shapes and shapes[0] == shapes[1]


def sure_classes(outputs: NDArray[np.generic], kind: Kind, least: float) -> NDArray[np.int64]:
    """The class of every row that the float model gives a chance of `least`, else UNSURE.

    SynQ's rule (arXiv 2603.18423, section 4.3): where a model is not sure, only its chances are
    learned from.
    """
    from octavo.ir.torch_distillation import UNSURE

    rows = outputs.astype(np.float64)
    if kind == "logits":
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    chances = rows / np.maximum(rows.sum(-1, keepdims=True), _TINY)
    found: NDArray[np.int64] = np.where(chances.max(-1) >= least, chances.argmax(-1), UNSURE)
    return found
