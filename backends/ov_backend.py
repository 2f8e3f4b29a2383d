"""OpenVINO on the CPU as a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.backends import ort_session, ov_audit, ov_lowering, ov_session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from octavo.backends.ort_session import OrtEvaluator
    from octavo.backends.ov_session import OvSession
    from octavo.ir.artifact import Artifact, Audit
    from octavo.ir.backend import Timing
    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Latencies
    from octavo.ir.model import Model
    from octavo.ir.target import Target


@final
@dataclass(frozen=True)
class OpenVinoBackend:
    """Lowers to standard Q and DQ, and measures everything with OpenVINO on this machine."""

    target: Target
    times: bool = True

    def lower(self, model: Model, path: Path) -> Artifact:
        """Write the lowered model to `path`."""
        return ov_lowering.lower(model, path, self.target)

    def audit(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> Audit:
        """Find the layer of every planned node in the runtime model."""
        return ov_audit.audit(artifact, feed, threads=threads)

    def evaluator(self, threads: int = 2) -> OrtEvaluator:
        """Runs models inside the pipeline, where every value of the float graph is asked for."""
        return ort_session.OrtEvaluator(threads=threads)

    def open(
        self, path: Path, *, threads: int, config: Mapping[str, str] | None = None
    ) -> OvSession:
        """A session of a model file."""
        return ov_session.open_session(path, threads=threads, config=config)

    def latencies(self, source: Path, artifact: Artifact, feed: Feed, *, threads: int) -> Latencies:
        """Seconds of planned nodes in float and as planned, from two profiles."""
        return ov_audit.measure_latencies(source, artifact, feed, threads=threads)

    def time_nodes(
        self, artifacts: Sequence[Artifact], feed: Feed, *, threads: int, seconds_limit: float
    ) -> list[Timing]:
        """Profiled shares of unprofiled runs."""
        return ov_audit.time_nodes(artifacts, feed, threads=threads, seconds_limit=seconds_limit)

    def environment(self, threads: int) -> str:
        """Version of the runtime, processor, threads."""
        return ov_session.environment(threads)

    def notes(self) -> tuple[str, ...]:
        """Nothing: what runs is in the audit."""
        return ()
