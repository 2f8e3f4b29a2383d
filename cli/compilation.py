"""Compile a model: run the pipeline, lower, measure, keep the fastest mixture, prove it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from octavo.backends.bench import random_feed
from octavo.backends.fidelity import Fidelity
from octavo.cli.candidates import Candidate, fastest
from octavo.cli.finishing import Finishing
from octavo.cli.html_report import REPORT, write_report
from octavo.cli.measured import Measured
from octavo.cli.metric import labelled, named
from octavo.cli.planned import Planner
from octavo.cli.report_data import report_data
from octavo.cli.request import DEFAULT_SIZE, Request
from octavo.cli.requested_pipeline import pipeline_of, suited
from octavo.cli.scratch import scratch_folder
from octavo.cli.target import backend_of
from octavo.ir.artifact import Artifact, Audit, Bench, Probes
from octavo.ir.artifact_io import MODEL, Manifest, write_artifact
from octavo.ir.cache import Cache
from octavo.ir.calibration import Part, samples_of
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import UsageError
from octavo.ir.facts import Plan, Ranges
from octavo.ir.menu import Menu, Sensitivity, Solution
from octavo.ir.plan_json import planning_json
from octavo.ir.read import read
from octavo.ir.shapes import concrete_elements
from octavo.ir.synthetic import origin_of
from octavo.ir.write import write
from octavo.passes.allocate import Allocate
from octavo.passes.base import PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.record import Header, PassRecord, write_records
from octavo.passes.sample_macs import affordable_samples, sample_macs

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.instruments import Instrument

Progress = Callable[[str, int, int], None]
_PROBES = 2
_DEFAULTS = Request()
_COMPARED_SAMPLES = 16
_COMPARED_MACS = 1e11
# A source of fewer bytes is run beside the passes; a larger one would add to their memory.
_SMALL_BYTES = 128 << 20


def _silent(label: str, done: int, total: int) -> None:
    pass


@final
@dataclass(frozen=True)
class Compiled:
    """A compiled model with its evidence; `save` writes the artifact folder."""

    request: Request
    source: Model
    model: Model
    pipeline: Pipeline
    records: tuple[PassRecord, ...]
    artifact: Artifact
    audit: Audit
    bench: Bench
    fidelity: Fidelity
    probes: Probes
    notes: tuple[str, ...]
    calibration: Batches | None = None
    missed: tuple[str, ...] = ()

    def save(self, path: str | Path, *, force: bool = False) -> Manifest:
        """Write OUT/ whole or not at all; raises UsageError where it cannot."""
        from octavo.ir.output_folder import open_output

        with open_output(Path(path), force=force) as folder:
            return self.write(folder)

    def write(self, folder: Path) -> Manifest:
        """Fill an existing folder; the lowered model moves there if it lies elsewhere."""
        artifact = _moved(self.artifact, folder)
        header = Header(str(self.pipeline), self.source.source, artifact.target, self.request.seed)
        write_records(folder / "passes.jsonl", header, self.records)
        manifest = write_artifact(
            artifact,
            self._manifest(),
            plan=self.model.find(Plan),
            audit=self.audit,
            probes=self.probes,
            planning=self._planning(),
        )
        write_report(report_data(self, manifest), folder / REPORT)
        return manifest

    def _planning(self) -> dict[str, object] | None:
        """How the plan was found, where one integer programme made it."""
        menu, found = self.model.find(Menu), self.model.find(Sensitivity)
        solution = self.model.find(Solution)
        if menu is None or found is None or solution is None:
            return None
        return planning_json(menu, found, solution)

    def _manifest(self) -> Manifest:
        calibration = self.calibration
        return Manifest(
            source=self.source.source,
            target=self.artifact.target,
            pipeline=str(self.pipeline),
            seed=self.request.seed,
            calibration_sha256=calibration.sha256 if calibration else "",
            calibration_samples=calibration.samples if calibration else 0,
            calibration_source=origin_of(calibration, self.model.find(Ranges)),
            config={
                "keep_float": " ".join(self.request.keep_float),
                "shapes": " ".join(f"{k}={v}" for k, v in self.bench.shapes.items()),
                "threads": self.request.threads,
                "max_recurrent_error": self.request.max_recurrent_error,
                "min_agreement": self.request.min_agreement,
                **self.request.budgets,
            },
            results={
                "model_bytes": self.artifact.bytes,
                "source_bytes": self.source.source.bytes,
                "relative_output_error": round(self.fidelity.relative_error, 6),
                "cosine": round(self.fidelity.cosine, 6),
                "argmax_agreement": self.fidelity.agreement,
                "compared_samples": self.fidelity.samples,
            },
        )


def compile_model(
    source: object,
    *,
    calibration: Batches | None = None,
    request: Request = _DEFAULTS,
    cache: Cache | None = None,
    workdir: Path | None = None,
    instruments: Sequence[Instrument] = (),
    progress: Progress = _silent,
) -> Compiled:
    """Compile a model (a path, a Model, or a torch program) for a target.

    `workdir` is where lowered candidates go (default: a temporary folder that lives as long as
    the process). Raises OctavoError.
    """
    given = _Given(source, calibration, request, cache, workdir, instruments, progress)
    with given.job() as job:
        return job.run(cache)


def plan_model(
    source: object,
    *,
    calibration: Batches | None = None,
    request: Request = _DEFAULTS,
    cache: Cache | None = None,
    workdir: Path | None = None,
    progress: Progress = _silent,
) -> tuple[Model, tuple[str, ...]]:
    """The model with its Menu, Sensitivity, Plan and Solution, and what to know; nothing is built.

    Raises OctavoError, BudgetInfeasible among them.
    """
    request = request if request.planned or request.pipeline else replace(request, pipeline="mixed")
    given = _Given(source, calibration, request, cache, workdir, (), progress)
    with given.job() as job:
        return job.plan(cache)


@dataclass(frozen=True)
class _Given:
    """What a compilation starts from."""

    source: object
    calibration: Batches | None
    request: Request
    cache: Cache | None
    workdir: Path | None
    instruments: Sequence[Instrument]
    progress: Progress

    @contextmanager
    def job(self) -> Iterator[_Job]:
        """The model read, with the services its passes get while the block runs."""
        request, calibration = self.request, self.calibration
        if request.pipeline == "mixed" and not request.planned:
            request = replace(request, size=DEFAULT_SIZE)
        backend = backend_of(request.target)
        request = replace(request, measure=request.measure and backend.times)
        pipeline = pipeline_of(request, calibration is not None)
        pipeline.check(())
        model = read(self.source)
        pipeline = suited(pipeline, model, request)
        folder = self.workdir or scratch_folder()
        feed = bench_feed(model, calibration, request)
        with ThreadPoolExecutor(2) as executor:
            ctx = PassContext(
                target=backend.target,
                cost=AnalyticCost(backend.target),
                evaluator=backend.evaluator(),
                executor=executor,
                workdir=folder,
                calibration=calibration,
                seed=request.seed,
                cache=self.cache,
                progress=self.progress,
            )
            deciding, finish = Finishing.of(pipeline, self.instruments)
            yield _Job(request, model, deciding, ctx, feed, finish, self.progress)


@dataclass(frozen=True)
class _Job:
    request: Request
    model: Model
    pipeline: Pipeline
    ctx: PassContext
    feed: Feed
    finish: Finishing
    progress: Progress

    @property
    def instruments(self) -> Sequence[Instrument]:
        return self.finish.instruments

    def run(self, cache: Cache | None) -> Compiled:
        source = _source_file(self.model, self.ctx.workdir)
        probes = self._probe_feeds()
        measured = Measured(
            source, self.model, self.ctx.evaluator, self.feed, probes, self.request, cache
        )
        early = None
        if self.model.source.bytes < _SMALL_BYTES:
            early = self.ctx.executor.submit(lambda: measured.reference)
        if any(pass_.name == Allocate.name for pass_ in self.pipeline.passes):
            return self._planned(measured)
        before, after = self.pipeline.split("choose-kernels")
        base = before.run(self.model, self.ctx, self.instruments, after.passes)
        ctx = replace(
            self.ctx, cost=AnalyticCost(self.ctx.target, concrete_elements(base.model, self.feed))
        )
        if early is not None:
            # Nothing else may run while latencies are measured.
            early.result()

        def build(name: str, context: PassContext, /, **options: object) -> Candidate:
            pipeline = after.with_options("choose-kernels", **options)
            compiled = pipeline.run(base.model, context, self.instruments)
            path = _fresh(ctx.workdir, name) / MODEL
            backend = measured.backend
            return Candidate(pipeline, compiled, lambda: backend.lower(compiled.model, path))

        def decide(context: PassContext) -> Plan:
            model = Pipeline(after.passes[:1]).run(base.model, context).model
            return model.find(Plan) or Plan({}, "")

        best, notes = fastest(build, decide, base.model, ctx, measured)
        best = self.finish(best, ctx)
        proven = self._prove(best, measured, (*notes, *measured.backend.notes()))
        return replace(
            proven,
            pipeline=Pipeline((*before.passes, *best.pipeline.passes)),
            records=(*base.records, *best.compilation.records),
        )

    def _planned(self, measured: Measured) -> Compiled:
        """Compile by one plan for the whole graph, within budgets."""
        request, calibration = self.request, self.ctx.calibration
        metric = None
        if request.max_drop:
            metric = named(request.metric) if request.metric else labelled(_held_out(calibration))
            calibration = calibration if request.metric else _fitted(calibration)
        ctx = replace(self.ctx, calibration=calibration)
        found = Planner(
            request, self.model, self.pipeline, ctx, self.feed, self.finish, measured, metric
        ).run()
        notes = (*found.notes, *measured.backend.notes())
        proven = self._prove(found.candidate, measured, notes)
        studying, _ = self.pipeline.split(Allocate.name)
        return replace(
            proven,
            pipeline=Pipeline((*studying.passes, *found.candidate.pipeline.passes)),
            records=(*found.before.records, *found.candidate.compilation.records),
            missed=found.missed,
        )

    def plan(self, cache: Cache | None) -> tuple[Model, tuple[str, ...]]:
        """The planned model, and what to know of it."""
        source = _source_file(self.model, self.ctx.workdir)
        measured = Measured(
            source, self.model, self.ctx.evaluator, self.feed, (), self.request, cache
        )
        planner = Planner(
            self.request, self.model, self.pipeline, self.ctx, self.feed, self.finish, measured
        )
        return planner.solve(), tuple(planner.notes)

    def _prove(self, best: Candidate, measured: Measured, notes: tuple[str, ...]) -> Compiled:
        """The evidence for the artifact that was chosen."""
        self.progress("prove", 0, 1)
        threads = self.request.threads
        proof = measured.backend.audit(best.artifact, self.feed, threads=threads)
        timing = measured.final_bench(best.artifact)
        self.progress("prove", 1, 1)
        fidelity, shown = measured.proven(best.artifact, _PROBES)
        return Compiled(
            request=self.request,
            source=self.model,
            model=best.compilation.model,
            pipeline=best.pipeline,
            records=best.compilation.records,
            artifact=best.artifact,
            audit=proof,
            bench=timing,
            fidelity=fidelity,
            probes=Probes(tuple(measured.probes[: len(shown)]), shown),
            notes=notes,
            calibration=self.ctx.calibration,
        )

    def _probe_feeds(self) -> tuple[Feed, ...]:
        """Feeds that outputs are compared on: the first samples of the calibration data."""
        batches = self.ctx.calibration
        if batches is None:
            return (self.feed,)
        macs = sample_macs(self.model, self.ctx, batches)
        enough = affordable_samples(macs, _COMPARED_MACS, _COMPARED_SAMPLES, _PROBES)
        feeds: list[Feed] = []
        for feed in batches:
            feeds.append(feed)
            if sum(map(samples_of, feeds)) >= enough:
                break
        return tuple(feeds)


def _held_out(calibration: Batches | None) -> Batches:
    """The half of labelled data that an accuracy goal is checked on."""
    if calibration is None:
        raise UsageError("an accuracy goal needs data", hint="give --calibration or --eval")
    return Part(calibration, 1)


def _fitted(calibration: Batches | None) -> Batches | None:
    return None if calibration is None else Part(calibration, 0)


def bench_feed(model: Model, calibration: Batches | None, request: Request) -> Feed:
    """One sample of the calibration data, or random numbers; `shapes` decides before both."""
    feed = random_feed(model, request.shapes, request.seed)
    if calibration is None or request.shapes:
        return feed
    first = next(iter(calibration))
    if len({len(array) for array in first.values() if array.ndim}) > 1:
        # Not all inputs count samples first: nothing tells what one sample is.
        return first
    return {
        name: array if array.ndim == 0 or len(feed[name]) == len(array) else array[:1]
        for name, array in first.items()
    }


def _source_file(model: Model, workdir: Path) -> Path:
    """The file the model was read from, or a file written from it."""
    path = Path(model.source.name)
    if path.suffix == ".onnx" and path.is_file():
        return path
    path = workdir / "source.onnx"
    write(model, path)
    return path


def _fresh(workdir: Path, name: str) -> Path:
    folder = workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _moved(artifact: Artifact, folder: Path) -> Artifact:
    for file in artifact.path.parent.glob(artifact.path.name + "*"):
        shutil.copyfile(file, folder / file.name)
    return replace(artifact, path=folder / artifact.path.name)
