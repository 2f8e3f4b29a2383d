"""Lower more than one plan, measure them against the source, keep the fastest that is faithful."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from octavo.backends.bench import bench
from octavo.backends.fidelity import compare, run_file
from octavo.backends.ort_profile import measure_latencies
from octavo.backends.ort_session import environment
from octavo.ir.cache import Cache, cache_key
from octavo.ir.cost import AnalyticCost, MeasuredCost
from octavo.ir.facts import Latencies, Plan

if TYPE_CHECKING:
    from octavo.backends.fidelity import Outputs
    from octavo.cli.request import Request
    from octavo.ir.artifact import Artifact, Bench
    from octavo.ir.calibration import Feed
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation, Pipeline

# A mixture replaces a simpler one when it is faster by more than timing noise.
_CLEARLY = 1.02
# Interleaved medians of equal files differ by less than this.
NOT_SLOWER = 0.98
_BENCH_SECONDS = 0.4


@final
@dataclass(frozen=True)
class Candidate:
    """One plan, compiled and lowered."""

    name: str
    pipeline: Pipeline
    compilation: Compilation
    artifact: Artifact

    @property
    def methods(self) -> dict[str, str]:
        plan = self.compilation.model.find(Plan)
        return {n: str(c.option) for n, c in plan.by_node.items()} if plan else {}


class Build(Protocol):
    """Runs the deciding passes with a context and options, and lowers the result."""

    def __call__(self, name: str, ctx: PassContext, /, **options: object) -> Candidate: ...


@final
@dataclass(frozen=True)
class Measured:
    """Everything that is measured on files; kept in the cache, so that a rebuild decides alike."""

    source: Path
    feed: Feed
    probes: Sequence[Feed]
    request: Request
    cache: Cache | None = None
    benches: dict[Path, Bench] = field(default_factory=dict)

    def latencies(self, candidate: Candidate) -> Latencies:
        """Seconds per node in float and as planned."""
        key = self._key("latencies", candidate)
        if (stored := self._load(key)) is not None:
            return Latencies(**stored)
        measured = measure_latencies(
            self.source,
            candidate.artifact.path,
            candidate.artifact.planned,
            self.feed,
            threads=self.request.threads,
        )
        self._store(key, asdict(measured))
        return measured

    def speeds(self, candidates: Sequence[Candidate]) -> list[float]:
        """Speed of every candidate against the source; more than 1 is faster."""
        key = self._key("speeds", *candidates)
        if (stored := self._load(key)) is not None:
            return [float(speed) for speed in stored]
        speeds = [row.speed for row in self._bench(candidates).rows[1:]]
        self._store(key, speeds)
        return speeds

    def final_bench(self, best: Candidate) -> Bench:
        """The latency the output reports: of this process, never from the cache."""
        done = self.benches.get(best.artifact.path)
        if done is None:
            return self._bench([best])
        mine = {self.source, best.artifact.path}
        return replace(done, rows=tuple(r for r in done.rows if Path(r.file) in mine))

    def outputs(self, candidate: Candidate) -> tuple[Outputs, ...]:
        return run_file(candidate.artifact.path, self.probes, threads=self.request.threads)

    @cached_property
    def reference(self) -> tuple[Outputs, ...]:
        return run_file(self.source, self.probes, threads=self.request.threads)

    def _bench(self, candidates: Sequence[Candidate]) -> Bench:
        files = [self.source, *(c.artifact.path for c in candidates)]
        return bench(files, self.feed, threads=self.request.threads, seconds_limit=_BENCH_SECONDS)

    def _key(self, kind: str, *candidates: Candidate) -> str:
        shapes = {name: array.shape for name, array in self.feed.items()}
        files = [_sha256(path) for c in candidates for path in _files(c.artifact.path)]
        measured_with = (repr(sorted(shapes.items())), environment(self.request.threads))
        return cache_key(kind, _sha256(self.source), *files, *measured_with)

    def _load(self, key: str) -> Any:
        stored = self.cache.get(key) if self.cache else None
        return json.loads(stored) if stored is not None else None

    def _store(self, key: str, value: object) -> None:
        if self.cache:
            self.cache.put(key, json.dumps(value).encode())


def fastest(
    build: Build, ctx: PassContext, measured: Measured
) -> tuple[Candidate, tuple[str, ...]]:
    """The fastest faithful candidate, and what the search found, in sentences."""
    first = build("estimated", ctx)
    if not measured.request.measure or not first.methods:
        return first, ("latency was not measured: the plan rests on estimates",)
    own = replace(ctx, cost=_measured_cost(first, ctx, measured))
    second = build("measured", own)
    # The same plan either way: the one that knows the measured seconds is reported.
    candidates = [second] if second.methods == first.methods else [first, second]
    notes = _add_recurrent(build, own, measured, candidates)
    speeds = measured.speeds(candidates)
    if max(speeds) < NOT_SLOWER:
        candidates.append(build("storage", own, static=False, dynamic=False))
        speeds = measured.speeds(candidates)
        notes.append("integer kernels are slower than float here: weights are only stored int8")
    best = max(range(len(speeds)), key=lambda k: speeds[k])
    if speeds[best] < _CLEARLY * speeds[0] and not notes:
        best = 0
    return candidates[best], tuple(notes)


def _measured_cost(first: Candidate, ctx: PassContext, measured: Measured) -> MeasuredCost:
    assert isinstance(ctx.cost, AnalyticCost)
    return MeasuredCost.of(first.compilation.model, measured.latencies(first), ctx.cost)


def _add_recurrent(
    build: Build, ctx: PassContext, measured: Measured, candidates: list[Candidate]
) -> list[str]:
    """Offer dynamic LSTM kernels where the outputs stay within the bound; say so either way."""
    base = candidates[-1]
    if not any(node.op_type == "LSTM" for node in base.compilation.model.graph):
        return []
    dynamic = build("recurrent", ctx, recurrent=True)
    if dynamic.methods == base.methods:
        return []
    before, after = (
        compare(measured.reference, measured.outputs(c)).relative_error for c in (base, dynamic)
    )
    limit = measured.request.max_recurrent_error
    found = f"dynamic LSTM kernels: output error {before:.4f} becomes {after:.4f}"
    if after - before > limit:
        return [f"{found}, more than {limit} worse: not used"]
    candidates.append(dynamic)
    return [f"{found}, at most {limit} worse: offered"]


def _files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name + "*"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
