"""Adam over the variables of a student, bounded by steps and by the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor

from octavo.ir.calibration import samples_of
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from octavo.ir.calibration import Feed
    from octavo.ir.torch_student import Rates, Student

    Loss = Callable[[float, dict[str, Tensor]], Tensor]

_RESTARTS = 3
_SLOWER = 0.25
_WARM_STEPS = 5
_TINY = 1e-9


class BatchSource(Protocol):
    """Where training gets its batches."""

    @property
    def rows(self) -> bool:
        """Whether a batch is made of samples along the first axis of all its arrays."""

    def draw(self, generator: torch.Generator, size: int) -> dict[str, Tensor]:
        """A batch of `size` samples, or a feed."""


@final
class Samples:
    """Feeds with whatever else belongs to them, from which batches are drawn.

    Where every array has one row per sample and all feeds agree in shape, a batch is made of
    samples; otherwise it is one feed.
    """

    def __init__(self, feeds: Sequence[Feed], *, rows: bool) -> None:
        shapes = [{name: array.shape[1:] for name, array in feed.items()} for feed in feeds]
        counts = [{array.shape[:1] for array in feed.values()} for feed in feeds]
        alike = all(shape == shapes[0] for shape in shapes) and all(len(c) == 1 for c in counts)
        tensors = [{name: as_torch(array) for name, array in feed.items()} for feed in feeds]
        self.rows = rows and alike
        if self.rows:
            joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
            tensors = [joined]
        self.tensors = tensors
        self.count = sum(map(samples_of, feeds))

    def draw(self, generator: torch.Generator, size: int) -> dict[str, Tensor]:
        """A batch of `size` samples, or a feed."""
        if not self.rows:
            return self.tensors[int(torch.randint(len(self.tensors), (), generator=generator))]
        chosen = torch.randperm(self.count, generator=generator)[:size]
        return {name: tensor[chosen] for name, tensor in self.tensors[0].items()}

    def all(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Every sample once."""
        if not self.rows:
            yield from self.tensors
            return
        for start in range(0, self.count, size):
            yield {name: t[start : start + size] for name, t in self.tensors[0].items()}


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """How long to train: at most `steps` batches of `batch` samples and about `seconds`.

    Step sizes fall by a half cosine. `on_step(done, steps)` may return True to stop. Where a loss
    is not finite, training starts over with smaller steps, three times at most. A batch of samples
    is divided into `parts` that are differentiated at the same time, whatever the number of cores,
    so that sums are the same everywhere.
    """

    steps: int
    batch: int
    seconds: float
    seed: int
    on_step: Callable[[int, int], bool] = field(default=lambda done, steps: False)
    parts: int = 1

    def run(self, student: Student, samples: BatchSource, rates: Rates, loss: Loss) -> Outcome:
        """Train; the student is left where it ended, or began if every loss diverged.

        `loss(progress, batch)` runs the student; it is told what share of the training is done.
        """
        start, slower = student.snapshot(), 1.0
        deadline = time.perf_counter() + self.seconds
        for restarts in range(_RESTARTS + 1):
            clock = _Clock(self.steps, deadline)
            groups = student.groups(rates.times(slower))
            with ThreadPoolExecutor(self.parts, initializer=_on_one_core) as executor:
                descent = _Descent(loss, self.parts if samples.rows else 1, executor)
                taken = self._attempt(samples, groups, descent, clock)
            if taken is not None:
                return Outcome(taken, restarts, clock.late)
            student.restore(start)
            slower *= _SLOWER
        return Outcome(0, _RESTARTS, False)

    def _attempt(
        self,
        samples: BatchSource,
        groups: list[dict[str, object]],
        descent: _Descent,
        clock: _Clock,
    ) -> int | None:
        """Steps taken, `None` where a loss was not finite."""
        if not groups:
            return 0
        generator = torch.Generator().manual_seed(self.seed)
        adam = torch.optim.Adam(groups)
        rates = [group["lr"] for group in adam.param_groups]
        for step in range(self.steps):
            progress = clock.progress(step)
            if progress >= 1:
                return step
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            batch = samples.draw(generator, self.batch)
            variables = [v for group in adam.param_groups for v in group["params"]]
            if not descent.gradients(progress, batch, variables):
                return None
            adam.step()
            if self.on_step(step + 1, self.steps):
                return step + 1
        return self.steps


@final
@dataclass(frozen=True, eq=False)
class _Descent:
    """Gradients of a loss, of several parts of a batch at the same time."""

    loss: Loss
    parts: int
    executor: ThreadPoolExecutor
    # A graph holds one set of variables at a time: only the ways back run side by side.
    forward: Lock = field(default_factory=Lock)

    def gradients(
        self, progress: float, batch: Mapping[str, Tensor], variables: Sequence[Tensor]
    ) -> bool:
        """Set the gradient of every variable; False where a loss is not finite."""

        def one(share: dict[str, Tensor], weight: float) -> tuple[Tensor | None, ...] | None:
            with self.forward:
                value = self.loss(progress, share)
            if not math.isfinite(float(value.detach())):
                return None
            return torch.autograd.grad(weight * value, variables, allow_unused=True)

        found = list(self.executor.map(one, *zip(*_shares(batch, self.parts), strict=True)))
        rows = [row for row in found if row is not None]
        for variable, *grads in zip(variables, *rows, strict=True):
            known = [grad for grad in grads if grad is not None]
            variable.grad = sum(known[1:], start=known[0]) if known else None
        return len(rows) == len(found)


def _shares(batch: Mapping[str, Tensor], parts: int) -> list[tuple[dict[str, Tensor], float]]:
    """Parts of a batch of samples, and the share of its samples that each holds."""
    if parts == 1:
        return [(dict(batch), 1.0)]
    count = len(next(iter(batch.values())))
    rows = torch.arange(count).tensor_split(min(parts, count))
    return [({n: v[own] for n, v in batch.items()}, len(own) / count) for own in rows]


def _on_one_core() -> None:
    torch.set_num_threads(1)


@final
@dataclass(frozen=True)
class Outcome:
    """Steps taken, how often training started over, and whether the clock ended it."""

    steps: int
    restarts: int
    late: bool

    @property
    def diverged(self) -> bool:
        """Whether every attempt ended in a loss that is not finite."""
        return not self.steps and bool(self.restarts)


class _Clock:
    """Counts steps, or seconds where the first steps say that these end before."""

    def __init__(self, steps: int, deadline: float) -> None:
        self.steps, self.deadline = steps, deadline
        self.begin = self.warm = time.perf_counter()
        self.late = False

    def progress(self, step: int) -> float:
        """The share of the training that is done."""
        now = time.perf_counter()
        if step == _WARM_STEPS:
            self.warm = now
        if step == 2 * _WARM_STEPS:
            pace = (now - self.warm) / _WARM_STEPS
            self.late = now + pace * (self.steps - step) > self.deadline
        self.late |= now >= self.deadline
        if not self.late:
            return step / self.steps
        return max(step / self.steps, (now - self.begin) / (self.deadline - self.begin + _TINY))
