"""What is measured on lowered files; cached, so that compiling again decides alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from octavo.backends.bench import bench, untimed
from octavo.backends.fidelity import Fidelity, compare, run_file
from octavo.cli.target import backend_of
from octavo.ir.cache import Cache, cache_key
from octavo.ir.facts import Latencies
from octavo.ir.memory import release_memory

if TYPE_CHECKING:
    from octavo.backends.fidelity import Outputs
    from octavo.cli.request import Request
    from octavo.ir.artifact import Artifact, Bench
    from octavo.ir.backend import Backend
    from octavo.ir.calibration import Feed
    from octavo.ir.evaluate import Evaluator
    from octavo.ir.model import Model

_BENCH_SECONDS = 0.3
# A plan that is built again because of noise may be a much worse one.
_BUDGET_SECONDS = 2.0
# Of outputs that an artifact's folder holds, beyond those of one probe.
_KEPT_BYTES = 32 << 20


@final
@dataclass(frozen=True)
class Measured:
    """Latencies, speeds and outputs of artifacts of one source, on one feed and some probes."""

    source: Path
    model: Model
    evaluator: Evaluator
    feed: Feed
    probes: Sequence[Feed]
    request: Request
    cache: Cache | None = None
    benches: dict[Path, Bench] = field(default_factory=dict)
    compared: dict[Path, Fidelity] = field(default_factory=dict)

    @property
    def backend(self) -> Backend:
        """Of the target that is compiled for."""
        return backend_of(self.request.target)

    def latencies(self, artifact: Artifact) -> Latencies:
        """Seconds per node in float and as planned."""
        key = self._key("latencies", artifact)
        if (stored := self._load(key)) is not None:
            return Latencies(**stored)
        threads = self.request.threads
        measured = self.backend.latencies(self.source, artifact, self.feed, threads=threads)
        self._store(key, asdict(measured))
        return measured

    def speeds(self, artifacts: Sequence[Artifact]) -> list[float]:
        """Speed of every artifact against the source; more than 1 is faster."""
        key = self._key("speeds", *artifacts)
        if (stored := self._load(key)) is not None:
            return [float(speed) for speed in stored]
        speeds = [row.speed for row in self._bench(artifacts).rows[1:]]
        self._store(key, speeds)
        return speeds

    def share(self, artifact: Artifact, seconds: Callable[[float], float]) -> float:
        """What an artifact takes of a budget, which may depend on the source's seconds."""
        source, own = self._bench([artifact], _BUDGET_SECONDS).rows
        return source.median_seconds / own.speed / seconds(source.median_seconds)

    def final_bench(self, best: Artifact) -> Bench:
        """The latency the output reports: of this process, never from the cache."""
        done = self.benches.get(best.path) or self._bench([best])
        mine = {str(self.source), str(best.path)}
        return replace(done, rows=tuple(row for row in done.rows if row.file in mine))

    def fidelity(self, artifact: Artifact) -> Fidelity:
        """How far the artifact's outputs are from the source's on the probes."""
        path = artifact.path
        if path not in self.compared:
            self.compared[path], _ = self.proven(artifact, 0)
            release_memory()
        return self.compared[path]

    def outputs(self, model: Model) -> tuple[Outputs, ...]:
        """What a model that is not lowered gives for the probes; a large one runs in parts."""
        return tuple(self.evaluator.outputs(model, self.probes))

    def proven(self, artifact: Artifact, count: int) -> tuple[Fidelity, tuple[Outputs, ...]]:
        """The fidelity of an artifact, and what it gives for the first probes alone.

        For `count` of them, or fewer where these outputs take too many bytes.
        """
        threads = self.request.threads
        first: list[Outputs] = []
        session = self.backend.open(artifact.path, threads=threads)

        def each() -> Iterator[Outputs]:
            run = run_file(artifact.path, self.probes, threads=threads, session=session)
            for at, made in enumerate(run):
                kept = sum(array.nbytes for some in (*first, made) for array in some.values())
                if len(first) == at < count and (not at or kept <= _KEPT_BYTES):
                    first.append(made)
                yield made

        return compare(self.reference, each()), tuple(first)

    @cached_property
    def reference(self) -> tuple[Outputs, ...]:
        """The outputs of the source for the probes."""
        return self.outputs(self.model)

    def _bench(self, artifacts: Sequence[Artifact], seconds: float = _BENCH_SECONDS) -> Bench:
        files = [artifact.path for artifact in artifacts]
        backend, threads = self.backend, self.request.threads
        measured = (
            bench(
                [self.source, *files],
                self.feed,
                threads=threads,
                seconds_limit=seconds,
                sessions=lambda file: backend.open(file, threads=threads),
                described=backend.environment(threads),
            )
            if backend.times
            else untimed([self.source, *files], self.feed, threads, backend.environment(threads))
        )
        self.benches.update(dict.fromkeys(files, measured))
        return measured

    def _key(self, kind: str, *artifacts: Artifact) -> str:
        shapes = {name: array.shape for name, array in self.feed.items()}
        files = [_sha256(path) for a in artifacts for path in _files(a.path)]
        measured_with = (
            repr(sorted(shapes.items())),
            self.backend.environment(self.request.threads),
        )
        return cache_key(kind, _sha256(self.source), *files, *measured_with)

    def _load(self, key: str) -> Any:
        stored = self.cache.get(key) if self.cache else None
        return json.loads(stored) if stored is not None else None

    def _store(self, key: str, value: object) -> None:
        if self.cache:
            self.cache.put(key, json.dumps(value).encode())


def _files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name + "*"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
