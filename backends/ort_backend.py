"""ONNX Runtime on the CPU as a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.backends import ort_audit, ort_lowering, ort_profile, ort_session, ort_timing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from octavo.backends.ort_session import OrtEvaluator, Session
    from octavo.ir.artifact import Artifact, Audit
    from octavo.ir.backend import Timing
    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Latencies
    from octavo.ir.model import Model
    from octavo.ir.target import Target


@final
@dataclass(frozen=True)
class OrtBackend:
    """Lowers to the forms that have integer kernels, and measures everything on this machine."""

    target: Target
    times: bool = True

    def lower(self, model: Model, path: Path) -> Artifact:
        """Write the lowered model to `path`."""
        return ort_lowering.lower(model, path, self.target.name)

    def audit(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> Audit:
        """Find the kernel of every planned node in the optimized graph and in one run."""
        return ort_audit.audit(artifact, feed, threads=threads)

    def evaluator(self, threads: int = 2) -> OrtEvaluator:
        """Runs models in memory."""
        return ort_session.OrtEvaluator(threads=threads)

    def open(self, path: Path, *, threads: int, config: Mapping[str, str] | None = None) -> Session:
        """A session of a model file."""
        return ort_session.make_session(path, threads=threads, config=config)

    def latencies(self, source: Path, artifact: Artifact, feed: Feed, *, threads: int) -> Latencies:
        """Seconds of planned nodes in float and as planned, from two profiles."""
        return ort_profile.measure_latencies(
            source, artifact.path, artifact.planned, feed, threads=threads
        )

    def time_nodes(
        self, artifacts: Sequence[Artifact], feed: Feed, *, threads: int, seconds_limit: float
    ) -> list[Timing]:
        """Profiled shares of unprofiled runs."""
        return ort_timing.time_nodes(artifacts, feed, threads=threads, seconds_limit=seconds_limit)

    def environment(self, threads: int) -> str:
        """Version of the runtime, processor, threads."""
        return ort_session.environment(threads)

    def notes(self) -> tuple[str, ...]:
        """Whether this processor's 8-bit products may saturate."""
        if self.target.weight_bits < 8 or ort_session.has_vnni():
            return ()
        return (
            "this processor has no VNNI, 8-bit weights may saturate: see --target ort-cpu-avx2",
        )
