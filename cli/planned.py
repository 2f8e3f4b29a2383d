"""Compile by a plan: profile, offer, measure, allocate, refine, build, and check what was built.

What a plan is predicted to take is held against the file: a file that is larger or slower than
its budget tightens the budget of the next plan by as much, and one that is faster than asked
loosens it: what is not needed for speed belongs to accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, final

from octavo.cli.aims import MARGIN_BYTES, NO_LIMIT, Aims
from octavo.cli.candidates import Candidate
from octavo.cli.profiling import COPY_KINDS, profile_model
from octavo.cli.recorded_profile import cost_of_profile
from octavo.cli.stand_in import stand_in
from octavo.ir.artifact_io import MODEL
from octavo.ir.budgets import parse_bytes, parse_drop, parse_seconds
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import BudgetInfeasible
from octavo.ir.menu import Menu, Solution
from octavo.ir.shapes import concrete_elements
from octavo.passes.planning import Planning
from octavo.passes.solve import solve

if TYPE_CHECKING:
    from octavo.cli.finishing import Finishing
    from octavo.cli.measured import Measured
    from octavo.cli.metric import Metric
    from octavo.cli.request import Request
    from octavo.ir.artifact import Artifact
    from octavo.ir.backend import Session
    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.evaluate import CostModel
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation, Pipeline

_TRIES = 5
_SEARCHES = 7
# What runs of a copy with other shapes may take, per kind of kernel.
_COPY_SECONDS = 0.3


@final
@dataclass(frozen=True)
class Planned:
    """The candidate that was built, the passes before it, and goals it misses, in sentences."""

    candidate: Candidate
    before: Compilation
    notes: tuple[str, ...]
    missed: tuple[str, ...] = ()


@final
@dataclass
class Planner:
    """One model with its budgets; `run` returns what keeps to them, or the best there is."""

    request: Request
    model: Model
    pipeline: Pipeline
    ctx: PassContext
    feed: Feed
    finish: Finishing
    measured: Measured
    metric: Metric | None = None
    notes: list[str] = field(default_factory=list)
    built: int = 0
    _base: Compilation = field(init=False)
    _ctx: PassContext = field(init=False)
    _solving: Pipeline = field(init=False)
    _budget: float | None = field(init=False, default=None)
    _latency: str = field(init=False, default="")
    _elsewhere: bool = field(init=False, default=False)

    def run(self) -> Planned:
        """Build within the budgets. Raises BudgetInfeasible where no plan keeps to them."""
        self._study()
        if self.metric is not None:
            return self._by_metric(self.metric)
        candidate, missed = self._finished(self._budget, self._latency)
        return self._planned(candidate, missed)

    def _finished(self, budget: float | None, latency: str) -> tuple[Candidate, list[str]]:
        """The candidate for these budgets with all passes done, and what it misses.

        A bias that a pass adds takes bytes: the plan is made again for so many fewer, once.
        """
        candidate, missed = self._within(budget, latency)
        done = self.finish(candidate, self._ctx)
        over = 0.0 if budget is None else done.artifact.bytes - budget
        if missed or over <= 0:
            return done, missed
        assert budget is not None
        aim = budget - (done.artifact.bytes - candidate.artifact.bytes) - MARGIN_BYTES
        done = self.finish(self._within(aim, latency)[0], self._ctx)
        return done, self._check(done, budget, latency)[0]

    def solve(self) -> Model:
        """The model with its plan, nothing built."""
        self._study()
        deciding, _ = self._pipeline_for(self._budget, self._latency).split("place-quantizers")
        return deciding.run(self._base.model, self._ctx, self.finish.instruments).model

    def _study(self) -> None:
        """Run everything that a plan rests on: ranges, seconds, offers, damages."""
        first, rest = self.pipeline.split("offer-options")
        studying, self._solving = rest.split("allocate")
        base = first.run(self.model, self.ctx, self.finish.instruments, rest.passes)
        cost = self._cost(base.model)
        self._ctx = replace(self.ctx, cost=cost, cost_of=self._cost_of, stand_in=self._stand_in())
        studied = studying.run(base.model, self._ctx, self.finish.instruments)
        self._base = replace(studied, records=(*base.records, *studied.records))
        size = self.request.size or _option(self.pipeline, "size")
        self._latency = self.request.latency or _option(self.pipeline, "latency")
        self._budget = self._bytes(size) if size else None
        if self._elsewhere and self._latency not in ("", NO_LIMIT):
            name = Path(self.request.profile).name
            self.notes.append(f"--latency is kept by the seconds of {name}, not by this machine's")

    def _planned(self, candidate: Candidate, missed: Sequence[str]) -> Planned:
        missed = (*missed, *self._unchanged(candidate))
        return Planned(candidate, self._base, tuple(self.notes), missed)

    def _unchanged(self, candidate: Candidate) -> tuple[str, ...]:
        """Why no structure was offered that was asked for; a note says what was chosen."""
        model = candidate.compilation.model
        menu, solution = model.fact(Menu), model.fact(Solution)
        if not self.request.structure:
            return ()
        if not menu.widths:
            remarks = (r for record in self._base.records for r in record.remarks)
            why = [r.text for r in remarks if r.text.startswith(("nothing could go", "no calib"))]
            return (f"--structure: {'; '.join(why)}",)
        fewer = [n for n in menu.widths if solution.options[n] != menu.offers[n][0].name]
        self.notes.append(f"structure: {len(fewer)} of {len(menu.widths)} widths are narrower")
        return ()

    def _cost(self, model: Model) -> CostModel:
        """Measured here, recorded elsewhere, or estimated."""
        request, target = self.request, self.ctx.target
        if request.profile:
            path = Path(request.profile)
            cost, warnings = cost_of_profile(path, model, target, self.feed, request.threads)
            self.notes += warnings
            here = self.measured.backend.environment(request.threads)
            self._elsewhere = bool(cost.table.differences(here))
            return cost
        if request.measure:
            return profile_model(model, self.feed, self.ctx, threads=request.threads).cost
        self.notes.append("latency was not measured: the plan rests on estimates")
        return AnalyticCost(target, concrete_elements(model, self.feed))

    def _cost_of(self, model: Model) -> CostModel:
        """What a copy of the model costs that has other shapes, in integer and float kernels."""
        request, target = self.request, self.ctx.target
        if request.profile:
            path = Path(request.profile)
            return cost_of_profile(path, model, target, self.feed, request.threads)[0]
        if request.measure:
            return profile_model(
                model, self.feed, self.ctx,
                kinds=COPY_KINDS, threads=request.threads, seconds_limit=_COPY_SECONDS,
            ).cost  # fmt: skip
        return AnalyticCost(target, concrete_elements(model, self.feed))

    def _stand_in(self) -> Batches | None:
        if self.ctx.calibration is not None:
            return None
        self.notes.append("no calibration data: damage is measured on random numbers")
        return stand_in(self.model, self.request.shapes, self.request.seed)

    def _bytes(self, text: str) -> float:
        return float(int(parse_bytes(text, "--size", self.model.source.bytes)))

    def _build(self, size: float | None, latency: str, *, refined: bool = False) -> Candidate:
        """The plan for these budgets, built."""
        pipeline = self._pipeline_for(size, latency)
        if not refined:
            pipeline = pipeline.with_options("refine", seconds=0.0)
        compiled = pipeline.run(self._base.model, self._ctx, self.finish.instruments)
        self.built += 1
        folder = self.ctx.workdir / f"plan-{self.built}"
        folder.mkdir(parents=True, exist_ok=True)
        path, backend = folder / MODEL, self.measured.backend
        return Candidate(pipeline, compiled, lambda: backend.lower(compiled.model, path))

    def _pipeline_for(self, size: float | None, latency: str) -> Pipeline:
        options: dict[str, object] = {"latency": latency}
        if size is not None:
            options["size"] = str(int(size))
        return self._solving.with_options("allocate", **options)

    def _within(self, budget: float | None, latency: str) -> tuple[Candidate, list[str]]:
        """A candidate whose file keeps to size and latency; else the last, and what it misses.

        Of plans that keep to both, the last was given the most time. Only that one is refined.
        One that keeps to the latency by less than its noise is the last resort.
        """
        aims = Aims(budget, latency)
        fitting: tuple[Candidate, Aims] | None = None
        last: tuple[Candidate, list[str]] | None = None
        for _ in range(_TRIES):
            try:
                candidate = self._build(aims.size, aims.scaled)
            except BudgetInfeasible:
                if last is None:
                    raise
                break
            missed, over, share = self._check(candidate, budget, latency)
            last = candidate, missed
            if not aims.keeps(over, share):
                aims.tighten(over, share)
                if fitting is not None and not aims.open:
                    break
                continue
            fitting = candidate, replace(aims)
            if self.metric is not None or not aims.loosen(share, _used(candidate)):
                break
        if fitting is None:
            assert last is not None
            return last
        return self._refined(*fitting, budget, latency), []

    def _refined(
        self, candidate: Candidate, aims: Aims, budget: float | None, latency: str
    ) -> Candidate:
        """The candidate, refined where the pipeline refines and the file still fits."""
        if not any(each.name == "refine" for each in self._solving.passes):
            return candidate
        refined = self._build(aims.size, aims.scaled, refined=True)
        return candidate if self._check(refined, budget, latency)[0] else refined

    def _check(
        self, candidate: Candidate, budget: float | None, latency: str
    ) -> tuple[list[str], float, float]:
        """What a built file misses, the bytes it has too many, and its share of the latency."""
        over = 0.0 if budget is None else candidate.artifact.bytes - budget
        slow = self._excess(candidate.artifact, latency)
        return _sentences(candidate.artifact.bytes, budget, over, slow, latency), over, slow

    def _excess(self, artifact: Artifact, latency: str) -> float:
        """Measured seconds as a share of the budget; 0 where there is none or nothing is timed.

        How long another device takes no clock here tells: the plan kept to its table.
        """
        if latency in ("", NO_LIMIT) or not self.request.measure or self._elsewhere:
            return 0.0
        return self.measured.share(artifact, partial(parse_seconds, latency, "--latency"))

    def _by_metric(self, metric: Metric) -> Planned:
        """The smallest or fastest candidate whose metric falls by no more than allowed."""
        reference = metric.score(self._session(self.measured.source).run)
        allowed = parse_drop(self.request.max_drop, "--max-drop", reference)
        self.notes.append(f"goal: {metric.text} at least {reference - allowed:.4f}")
        low, high = self._range()
        best: Candidate | None = None
        fallback, fallback_score = None, float("-inf")
        budget = high
        for step in range(_SEARCHES):
            self.ctx.progress("search budgets", step, _SEARCHES)
            candidate, _ = self._at(budget)
            score = metric.score(self._session(candidate.artifact.path).run)
            self.notes.append(
                f"{candidate.artifact.bytes} bytes: {score:.4f} against {reference:.4f}"
            )
            if score > fallback_score:
                fallback, fallback_score = candidate, score
            if reference - score <= allowed:
                best, high = candidate, budget
            elif step == 0:
                break
            else:
                low = budget
            budget = (low * high) ** 0.5
        self.ctx.progress("search budgets", _SEARCHES, _SEARCHES)
        if best is not None:
            return self._planned(best, ())
        assert fallback is not None
        message = f"the metric falls from {reference:.4f} to {fallback_score:.4f} at best"
        return self._planned(fallback, (f"{message}, more than --max-drop allows",))

    def _session(self, path: Path) -> Session:
        return self.measured.backend.open(path, threads=1)

    def _at(self, budget: float) -> tuple[Candidate, list[str]]:
        if self.request.goal == "fastest":
            return self._finished(self._budget, f"{budget:.9f}s")
        least = budget if self._budget is None else min(budget, self._budget)
        return self._finished(least, self._latency)

    def _range(self) -> tuple[float, float]:
        """The least total of what is searched, and that of the plan with the least damage."""
        resource = "seconds" if self.request.goal == "fastest" else "bytes"
        programme = replace(Planning(self._base.model, self._ctx).programme, memory_rows=())
        least = solve(programme, resource, {}, gap=1e-2, time_limit_seconds=10).totals[resource]
        calm = solve(programme, "damage", {}, gap=1e-2, time_limit_seconds=10).totals[resource]
        return 1.05 * least, max(calm, 1.06 * least)


def _option(pipeline: Pipeline, name: str) -> str:
    """An option of the pipeline's own allocate."""
    return next((str(getattr(p, name)) for p in pipeline.passes if p.name == "allocate"), "")


def _used(candidate: Candidate) -> float:
    """What a plan is predicted to take of the seconds it was given."""
    solution = candidate.compilation.model.fact(Solution)
    return solution.totals["seconds"] / solution.limits.get("seconds", math.inf)


def _sentences(
    size: int, budget: float | None, over: float, slow: float, latency: str
) -> list[str]:
    missed = []
    if over > 0:
        missed.append(f"the file has {size} bytes, --size allows {budget:.0f}")
    if slow > 1:
        missed.append(f"the file takes {slow:.2f}x of --latency {latency}")
    return missed
