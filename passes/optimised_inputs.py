"""Groups of optimised inputs, each from a seed of its own; what is finished is kept."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.cache import cache_key
from octavo.ir.errors import CalibrationError
from octavo.ir.synthetic import Synthetic
from octavo.ir.versions import versions
from octavo.passes.leaf_images import leaf_images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.torch_synthesis import Objective, Outcome, Start
    from octavo.passes.base import PassContext
    from octavo.passes.evidence import Evidence
    from octavo.passes.input_laws import InputLaw
    from octavo.passes.synthesis import Synthesis

    Feed = dict[str, NDArray[np.generic]]

_FEED_SAMPLES = 8
# Groups that run at once, on one thread each: the sums of one group never depend on the others.
_ABREAST = 2
# Steps that are enough to tell how long all of them take.
_ENOUGH_STEPS = 6


@final
@dataclass(frozen=True)
class InputGroups:
    """One synthesis: groups of samples, each from a seed of its own."""

    how: Synthesis
    model: Model
    ctx: PassContext
    evidence: Evidence
    shapes: Mapping[str, tuple[int, ...]]
    laws: Mapping[str, InputLaw]

    def run(self) -> Synthetic:
        from octavo.ir.torch_losses import one_thread

        rounds = group_count(self.how.samples, self.shapes)
        clock = _Clock(time.monotonic(), self.how.seconds, rounds)
        with one_thread(), ThreadPoolExecutor(_ABREAST) as executor:
            objective = self._objective()
            watch = _Watch(self.ctx, clock, rounds * self.how.steps, self.how.all_or_nothing)
            jobs = [
                executor.submit(self._group, objective, group, clock, watch)
                for group in range(rounds)
            ]
            try:
                made = [job.result() for job in jobs]
            finally:
                watch.stop()
        late = any(found is None or found[1].late for found in made)
        if late and self.how.all_or_nothing:
            raise _too_slow(self.how.seconds)
        return self._joined([found for found in made if found is not None], rounds)

    def _joined(self, made: Sequence[tuple[Feed, Outcome]], rounds: int) -> Synthetic:
        feeds: list[Feed] = []
        groups: list[int] = []
        for group, (whole, _) in enumerate(made):
            parts = list(divided(whole))
            feeds += parts
            groups += [group] * len(parts)
        outcomes = [outcome for _, outcome in made]
        distance = float(np.mean([outcome.distance for outcome in outcomes]))
        notes = tuple(_notes(outcomes, rounds))
        origin = self.evidence.origin if self.how.statistics else "synthetic-attention"
        return Synthetic(tuple(feeds), origin, tuple(groups), distance, notes)

    def _objective(self) -> Objective:
        from octavo.ir.torch_module import differentiable
        from octavo.ir.torch_synthesis import Objective, Terms

        how, found = self.how, self.evidence
        moments = found.moments if how.statistics else ()
        attended = found.attended if how.entropy else ()
        logits = found.logits if how.labels else ""
        wanted = dict.fromkeys([*(m.value for m in moments), *attended, *filter(None, [logits])])
        terms = Terms(
            statistics=how.statistics, labels=how.labels, focus=how.focus, entropy=how.entropy,
            variation=how.variation, low_pass=how.low_pass, roll=how.roll,
        )  # fmt: skip
        return Objective(differentiable(self.model, list(wanted)), moments, attended, logits, terms)

    def _group(
        self, objective: Objective, group: int, clock: _Clock, watch: _Watch
    ) -> tuple[Feed, Outcome] | None:
        """One group, from the cache where an earlier run has made it; None if it is too late."""
        from octavo.ir.torch_losses import one_thread
        from octavo.ir.torch_synthesis import Descent

        seconds = clock.share
        if seconds <= 0 and group:
            return None
        rng = self.ctx.rng(f"synthesis {group}")
        made = draw(self.shapes, self.laws, self.model, rng)
        starts = self._starts(made, rng)
        fixed = {name: array for name, array in made.items() if name not in starts}
        cache, key = self.ctx.cache, self._key(group)
        stored = cache.get(key) if cache is not None else None
        if stored is not None:
            arrays, outcome = _decode(stored)
        else:
            descent = Descent(self.how.steps, self.how.rate, seconds, self.ctx.seed + group)
            first = group * next((shape[0] for shape in self.shapes.values() if shape), 1)
            with one_thread():
                outcome = descent.run(
                    replace(objective, first=first), starts, fixed, watch.of(group)
                )
            arrays = dict(outcome.arrays)
            if not np.isfinite(outcome.distance) and not outcome.steps:
                raise _diverged(self.model, starts)
            if cache is not None and not outcome.late:
                cache.put(key, _encode(outcome))
        return {name: {**made, **arrays}[name] for name in made}, outcome

    def _starts(self, drawn: Feed, rng: np.random.Generator) -> dict[str, Start]:
        from octavo.ir.torch_synthesis import Start

        starts = {
            name: Start(drawn[name], law.deviation, law.low, law.high)
            for name, law in self.laws.items()
            if law.kind != "ids" and drawn[name].dtype.kind == "f"
        }
        for name, start in starts.items():
            if self.how.start == "leaves" and start.image:
                law, dtype = self.laws[name], start.array.dtype
                leaves = law.mean + law.deviation * leaf_images(start.array.shape, rng)
                clipped = leaves.clip(law.low, law.high).astype(dtype)
                starts[name] = replace(start, array=clipped)
        return starts

    def _key(self, group: int) -> str:
        options = repr(replace(self.how, seconds=0.0, samples=0))
        return cache_key(
            "synthesis", self.model.fingerprint, options, f"{self.ctx.seed} {group}",
            repr(self.shapes), repr(sorted(versions().items())),
        )  # fmt: skip


@final
@dataclass(frozen=True)
class _Clock:
    """The time of all groups, of which a few run at once."""

    begun: float
    seconds: float
    rounds: int

    @property
    def share(self) -> float:
        """Seconds that a group which begins now may take."""
        left = self.begun + self.seconds - time.monotonic()
        return min(left, self.seconds * min(_ABREAST, self.rounds) / self.rounds)

    def require(self, steps: int, pace: float) -> None:
        """CalibrationError where so many more steps of `pace` seconds will not be done in time."""
        if time.monotonic() - self.begun + steps * pace > self.seconds:
            raise _too_slow(self.seconds)


@final
@dataclass(frozen=True)
class _Watch:
    """Steps done by group; a group that is no longer wanted ends at its next step.

    With `must_fit`, so does one of many that would not be finished in time: `seen` are the seconds
    at which steps were done, and the first of them, which prepares others, tells nothing.
    """

    ctx: PassContext
    clock: _Clock
    total: int
    must_fit: bool
    steps: dict[int, int] = field(default_factory=dict)
    seen: list[float] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def of(self, group: int) -> Callable[[int, int], None]:
        """What a group reports to."""

        def report(done: int, steps: int) -> None:
            if self.stopped.is_set():
                raise CancelledError
            self.steps[group] = done
            count = sum(self.steps.values())
            self.seen.append(time.monotonic())
            paced = self.seen[_ABREAST:]
            if self.must_fit and len(paced) > _ENOUGH_STEPS:
                pace = (paced[-1] - paced[0]) / (len(paced) - 1)
                self.clock.require(self.total - count, pace)
            self.ctx.progress("synthesize", count, self.total)

        return report

    def stop(self) -> None:
        """End what still runs."""
        self.stopped.set()


def draw(
    shapes: Mapping[str, tuple[int, ...]],
    laws: Mapping[str, InputLaw],
    model: Model,
    rng: np.random.Generator,
) -> Feed:
    """One group of every input, by its law."""
    types = {v.name or "": v.dtype.numpy() if v.dtype else np.float32 for v in model.graph.inputs}
    return {n: laws[n].sample(shape, np.dtype(types[n]), rng) for n, shape in shapes.items()}


def divided(feed: Feed) -> Iterator[Feed]:
    """Feeds of a few samples each where all inputs count samples first."""
    counts = {array.shape[:1] for array in feed.values()}
    if len(counts) > 1 or not next(iter(counts), ()):
        yield feed
        return
    ((count,),) = counts
    for k in range(0, count, _FEED_SAMPLES):
        yield {name: array[k : k + _FEED_SAMPLES] for name, array in feed.items()}


def _notes(outcomes: Sequence[Outcome], rounds: int) -> Iterator[str]:
    if any(outcome.late for outcome in outcomes) or len(outcomes) < rounds:
        steps = sum(outcome.steps for outcome in outcomes)
        yield f"the clock ended the synthesis after {steps} steps in {len(outcomes)} groups"
    if restarts := sum(outcome.restarts for outcome in outcomes):
        yield f"the optimisation was not finite and began again {restarts} time(s), more slowly"


def _encode(outcome: Outcome) -> bytes:
    content = io.BytesIO()
    how = np.array([outcome.distance, outcome.steps, outcome.restarts])
    names = list(outcome.arrays)
    arrays = {f"array_{k}": outcome.arrays[name] for k, name in enumerate(names)}
    np.savez(content, allow_pickle=False, how=how, names=np.array(names), **arrays)
    return content.getvalue()


def _decode(stored: bytes) -> tuple[Feed, Outcome]:
    from octavo.ir.torch_synthesis import Outcome

    with np.load(io.BytesIO(stored), allow_pickle=False) as content:
        names = [str(name) for name in content["names"]]
        arrays: Feed = {name: content[f"array_{k}"] for k, name in enumerate(names)}
        distance, steps, restarts = content["how"].tolist()
    return arrays, Outcome(arrays, distance, int(steps), int(restarts), late=False)


def _too_slow(seconds: float) -> CalibrationError:
    return CalibrationError(
        f"it would take more than {seconds:.0f} s",
        hint="give --calibration synthetic, and --synthesis-seconds if that is too little",
    )


def _diverged(model: Model, names: Mapping[str, Start]) -> CalibrationError:
    bounds = " ".join(f"--input '{name}=uniform(0.01,2)'" for name in names)
    return CalibrationError(
        "the optimisation of inputs is not finite, with smaller steps neither",
        where=model.source.name,
        hint=f"keep inputs to where the model and its gradients are finite, as {bounds}",
    )


def group_count(samples: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many groups of the shapes' first axis hold that many samples."""
    first = next((shape[0] for shape in shapes.values() if shape), 1)
    return max(1, -(-samples // first))
