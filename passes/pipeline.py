"""A pipeline: parsed from text, checked before it runs, run pass by pass on private copies."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.ir.errors import OctavoError, PassFailed, UsageError, VerificationFailed
from octavo.ir.facts import Ranges
from octavo.ir.memory import release_memory
from octavo.ir.verify import verify
from octavo.passes.base import Recorder, Statistic
from octavo.passes.instruments import Step
from octavo.passes.record import GraphDiff, PassRecord, structural_diff, summarise
from octavo.passes.registry import PASSES
from octavo.passes.spec import format_pass, format_passes, parse_passes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.ir.facts import Fact
    from octavo.ir.model import Model
    from octavo.passes.base import Pass, PassContext
    from octavo.passes.instruments import Instrument


@final
@dataclass(frozen=True)
class Compilation:
    """A model after a pipeline, and one record per pass."""

    model: Model
    records: tuple[PassRecord, ...]


@final
@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes; `str(Pipeline.parse(text))` parses back to an equal pipeline.

    `first` is the number of passes that ran before: records of a split pipeline count on.
    """

    passes: tuple[Pass, ...]
    first: int = 0

    @staticmethod
    def parse(text: str) -> Pipeline:
        return Pipeline(parse_passes(text, PASSES))

    def __str__(self) -> str:
        return format_passes(self.passes)

    def split(self, name: str) -> tuple[Pipeline, Pipeline]:
        """The passes before the first one called `name`, and the rest."""
        names = [p.name for p in self.passes]
        at = names.index(name) if name in names else len(names)
        rest = Pipeline(self.passes[at:], self.first + at)
        return Pipeline(self.passes[:at], self.first), rest

    def with_options(self, name: str, **options: object) -> Pipeline:
        """The same pipeline with other options for every pass called `name`."""
        passes = (replace(p, **options) if p.name == name else p for p in self.passes)  # type: ignore[type-var]
        return Pipeline(tuple(passes), self.first)

    def check(self, available: Sequence[type[Fact]]) -> None:
        """Refuse a pipeline in which a pass misses a fact, naming the pass that produces it."""
        have = set(available)
        for index, pass_ in enumerate(self.passes):
            missing = [fact for fact in pass_.requires if fact not in have]
            if missing:
                raise _missing_fact(pass_, index, missing[0], self)
            have = {f for f in have if issubclass(f, pass_.preserves)} | set(pass_.produces)

    def run(
        self,
        model: Model,
        ctx: PassContext,
        instruments: Sequence[Instrument] = (),
        following: Sequence[Pass] = (),
    ) -> Compilation:
        """Run every pass on a private clone, verify after each, and record what it did.

        Calibration also measures what the passes in `following` ask for, which run later.
        """
        self.check(tuple(model.facts))
        records: list[PassRecord] = []
        for at, pass_ in enumerate(self.passes):
            own = replace(
                ctx, recorder=Recorder(), statistics=self._requests(at, model, ctx, following)
            )
            step = Step(self.first + at, pass_, (*self.passes[at:], *following), model, own)
            model, record = _run_step(step, instruments)
            records.append(record)
        return Compilation(model, tuple(records))

    def _requests(
        self, index: int, model: Model, ctx: PassContext, following: Sequence[Pass]
    ) -> tuple[Statistic, ...]:
        if Ranges not in self.passes[index].produces:
            return ()
        passes = (*self.passes[index + 1 :], *following)
        later = (s for p in passes for s in p.statistics(model, ctx))
        return tuple(dict.fromkeys(later))


def _run_step(step: Step, instruments: Sequence[Instrument]) -> tuple[Model, PassRecord]:
    for instrument in instruments:
        instrument.before_pass(step)
    try:
        begin = time.perf_counter()
        returned = step.pass_.run(step.before.clone(), step.ctx)
        seconds = time.perf_counter() - begin
        after = _settle(step.before, returned, step.pass_)
        begin = time.perf_counter()
        verify(after, after_pass=step.pass_.name)
        verify_seconds = time.perf_counter() - begin
    except VerificationFailed as error:
        again = _reproduce(step, error, instruments)
        error.hint = "; ".join(text for text in (error.hint, again) if text)
        raise
    except OctavoError:
        raise
    except Exception as error:
        raise _failed(step, error, instruments) from error
    release_memory()
    record = _record(step, after, seconds, verify_seconds)
    for instrument in reversed(instruments):
        record = instrument.after_pass(step, record, after)
    return after, record


def _reproduce(step: Step, error: Exception, instruments: Sequence[Instrument]) -> str:
    """Let every instrument see the failure; the command that runs the pass again, if any."""
    folders = [folder for i in instruments if (folder := i.failed(step, error))]
    return f"octavo replay {folders[0]} runs it again" if folders else ""


def _failed(step: Step, error: Exception, instruments: Sequence[Instrument]) -> PassFailed:
    return PassFailed(
        f"{step.pass_.name}: {type(error).__name__}: {error}",
        where=f"pass {step.index + 1}, {step.before.source.name}",
        why="this is a defect of octavo, not of the model",
        hint=_reproduce(step, error, instruments),
    )


def _settle(before: Model, after: Model, pass_: Pass) -> Model:
    """Drop the facts a changed graph has made stale."""
    if after.fingerprint == before.fingerprint:
        return after
    return after.keeping((*pass_.preserves, *pass_.produces))


def _record(step: Step, after: Model, seconds: float, verify_seconds: float) -> PassRecord:
    before, recorder = step.before, step.ctx.recorder
    changed = after.fingerprint != before.fingerprint
    added = {k.__name__ for k, v in after.facts.items() if before.facts.get(k) is not v}
    dropped = {k.__name__ for k in before.facts.keys() - after.facts.keys()}
    return PassRecord(
        index=step.index,
        spec=format_pass(step.pass_),
        status="changed" if changed or added else "unchanged",
        seconds=seconds,
        verify_seconds=verify_seconds,
        peak_bytes=0,
        before=summarise(before),
        after=summarise(after),
        diff=structural_diff(before, after) if changed else GraphDiff((), (), ()),
        facts_added=tuple(sorted(added)),
        facts_dropped=tuple(sorted(dropped)),
        counters=dict(sorted(recorder.counters.items())),
        remarks=tuple(recorder.remarks),
    )


def _missing_fact(pass_: Pass, index: int, fact: type[Fact], pipeline: Pipeline) -> UsageError:
    producers = sorted(name for name, p in PASSES.items() if fact in p.produces)
    return UsageError(
        f"{pass_.name} needs {fact.__name__}, and no pass before it produces it",
        where=f"pass {index + 1} of '{pipeline}'",
        hint=f"put {' or '.join(producers)} before {pass_.name}" if producers else "",
    )
