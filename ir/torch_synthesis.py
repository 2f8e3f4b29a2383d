"""Inputs made from a model alone: found by descent so that its own statistics come out.

Batch statistics are matched as in ZeroQ (arXiv 2001.00281) and SynQ (arXiv 2603.18423), patches
are made diverse as in PSAQ-ViT (arXiv 2203.02250).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.nn import functional

from octavo.ir.torch_image_terms import low_passed, moved, patch_entropy, total_variation
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.torch_module import TorchGraph

Progress = Callable[[int, int], None]
_TINY = 1e-12
_RESTARTS = 3
_SLOWER = 4.0
_LAST_SHARE = 0.01


@final
@dataclass(frozen=True)
class Moments:
    """What the samples of a value shall have: mean and deviation, `[C]`, along `axis`."""

    value: str
    axis: int
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


@final
@dataclass(frozen=True)
class Terms:
    """The weights of the loss's terms, and what is done to the inputs; zero leaves one out.

    `statistics`: normalised distance of mean and deviation of every value with known ones.
    `labels`: cross entropy with an assigned class, times (1 - p)^`focus`: hard samples count
    more. `entropy`: less of how alike tokens are. `variation`: distance of the images' total
    variation from `smooth`. `low_pass`: the share of the width below which frequencies are kept,
    applied when all is done. `roll`: images move by up to this share of their width every step.
    """

    statistics: float = 1.0
    labels: float = 0.0
    focus: float = 0.5
    entropy: float = 0.0
    variation: float = 0.0
    smooth: float = 0.35
    low_pass: float = 0.0
    roll: float = 0.0


@final
@dataclass(frozen=True, eq=False)
class Start:
    """An input to optimise: where it begins, the scale of a step, and what bounds it."""

    array: NDArray[np.generic]
    deviation: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def image(self) -> bool:
        """Whether its last two axes may be those of an image."""
        return self.array.ndim == 4 and min(self.array.shape[-2:]) > 3


@final
@dataclass(frozen=True, eq=False)
class Objective:
    """What makes inputs good, on a graph that computes all the values named here.

    `first` is the number of the first sample among all that are made: classes go on from there.
    """

    graph: TorchGraph
    moments: Sequence[Moments]
    attended: Sequence[str]
    logits: str
    terms: Terms
    first: int = 0

    def loss(
        self, feed: Mapping[str, Tensor], images: Sequence[str], draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the distance of the statistics alone."""
        found, terms = self.graph.run(feed), self.terms
        parts = [self._distance(found[m.value], m) for m in self.moments]
        distance = torch.stack(parts).mean() if parts else torch.zeros(())
        loss = terms.statistics * distance
        if terms.labels and self.logits:
            loss = loss + terms.labels * self._labelled(found[self.logits])
        if terms.entropy and self.attended:
            alike = [patch_entropy(found[name], draw) for name in self.attended]
            loss = loss - terms.entropy * torch.stack(alike).mean()
        for name in images if terms.variation else ():
            loss = loss + terms.variation * (total_variation(feed[name]) - terms.smooth).abs()
        return loss, distance.detach()

    def _distance(self, value: Tensor, wanted: Moments) -> Tensor:
        """Squared errors of mean and deviation over the channels' mean variance."""
        axis = wanted.axis % value.dim()
        others = [d for d in range(value.dim()) if d != axis]
        mean = value.mean(others)
        deviation = (value.var(others, correction=0) + _TINY).sqrt()
        target, spread = torch.from_numpy(wanted.mean), torch.from_numpy(wanted.deviation)
        errors = (mean - target).square() + (deviation - spread).square()
        return errors.mean() / spread.square().mean().clamp_min(_TINY)

    def _labelled(self, logits: Tensor) -> Tensor:
        """Focal cross entropy with classes dealt in turn: mean of (1 - p)^focus · -log p."""
        rows = logits.reshape(-1, logits.shape[-1])
        numbers = self.first + torch.arange(len(rows))
        wanted = numbers * _stride(rows.shape[-1]) % rows.shape[-1]
        chances = torch.softmax(rows.detach(), 1).gather(1, wanted[:, None])[:, 0]
        losses = functional.cross_entropy(rows, wanted, reduction="none")
        return ((1 - chances).clamp_min(0) ** self.terms.focus * losses).mean()


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """Optimised inputs by name, and how it went.

    `distance` is that of the statistics at the end, `late` says that the clock ended it.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    distance: float
    steps: int
    restarts: int
    late: bool


@final
@dataclass(frozen=True)
class Descent:
    """Adam from given inputs: `steps` of size `rate` in deviations, falling as a cosine.

    Not before one step, it ends where another as long as those before would pass `seconds`.
    """

    steps: int
    rate: float
    seconds: float
    seed: int

    def run(
        self,
        objective: Objective,
        starts: Mapping[str, Start],
        fixed: Mapping[str, NDArray[np.generic]],
        progress: Progress,
    ) -> Outcome:
        """Optimise `starts`; where a loss is not finite, begin again with smaller steps."""
        deadline = time.monotonic() + self.seconds
        rate = self.rate
        for restarts in range(_RESTARTS + 1):
            found = self._try(objective, starts, fixed, rate, deadline, restarts, progress)
            if found is not None:
                return found
            rate /= _SLOWER
        arrays = {name: start.array for name, start in starts.items()}
        return Outcome(arrays, math.inf, 0, _RESTARTS, late=False)

    def _try(
        self,
        objective: Objective,
        starts: Mapping[str, Start],
        fixed: Mapping[str, NDArray[np.generic]],
        rate: float,
        deadline: float,
        restarts: int,
        progress: Progress,
    ) -> Outcome | None:
        """None where a loss is not finite."""
        draw = torch.Generator().manual_seed(self.seed)
        given = {name: as_torch(array) for name, array in fixed.items()}
        free = {n: _unit(start).requires_grad_(True) for n, start in starts.items()}
        images = [name for name, start in starts.items() if start.image]
        adam = torch.optim.Adam(list(free.values()), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps, rate * _LAST_SHARE)
        distance, step, begun = math.inf, 0, time.monotonic()
        while step < self.steps and _fits(begun, step, deadline):
            feed = {n: _scaled(z, starts[n]) for n, z in free.items()}
            if objective.terms.roll:
                feed |= {n: _rolled(feed[n], objective.terms.roll, draw) for n in images}
            loss, found = objective.loss({**given, **feed}, images, draw)
            if not bool(torch.isfinite(loss)):
                return None
            gradients = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
            for z, gradient in zip(free.values(), gradients, strict=True):
                z.grad = gradient
            adam.step()
            schedule.step()
            _bound(free, starts)
            distance, step = float(found), step + 1
            progress(step, self.steps)
        arrays = {n: _finished(z, starts[n], objective.terms) for n, z in free.items()}
        return Outcome(arrays, distance, step, restarts, step < self.steps)


def _fits(begun: float, steps: int, deadline: float) -> bool:
    """Whether another step as long as those before ends in time; the first one always does."""
    now = time.monotonic()
    return not steps or now + (now - begun) / steps <= deadline


def _stride(classes: int) -> int:
    """A step through the classes that spreads a few samples over all of them."""
    step = max(1, round(classes * 0.618))
    while math.gcd(step, classes) != 1:
        step += 1
    return step


def _unit(start: Start) -> Tensor:
    return as_torch(start.array).to(torch.float32) / start.deviation


def _scaled(unit: Tensor, start: Start) -> Tensor:
    return unit * start.deviation


def _rolled(image: Tensor, share: float, draw: torch.Generator) -> Tensor:
    return moved(image, max(1, round(share * image.shape[-1])), draw)


def _bound(free: Mapping[str, Tensor], starts: Mapping[str, Start]) -> None:
    with torch.no_grad():
        for name, unit in free.items():
            start = starts[name]
            unit.clamp_(start.low / start.deviation, start.high / start.deviation)


def _finished(unit: Tensor, start: Start, terms: Terms) -> NDArray[np.generic]:
    with torch.no_grad():
        array = _scaled(unit, start)
        if terms.low_pass and start.image:
            array = low_passed(array, terms.low_pass).clamp(start.low, start.high)
    found: NDArray[np.generic] = array.numpy().astype(start.array.dtype)
    return found
