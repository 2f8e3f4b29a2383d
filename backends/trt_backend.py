"""TensorRT as a backend: lowered here, held against its rules, and built where a wheel can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.backends import ort_session, trt_check, trt_engine, trt_lowering
from octavo.backends.fidelity import compare
from octavo.backends.trt_commands import profiles
from octavo.backends.trt_float4 import runnable
from octavo.backends.trt_layers import audit_of
from octavo.ir.artifact import Audit, AuditRow
from octavo.ir.errors import UsageError
from octavo.ir.read import read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from octavo.backends.ort_session import OrtEvaluator, Session
    from octavo.ir.artifact import Artifact, PlannedNode
    from octavo.ir.backend import Timing
    from octavo.ir.calibration import Feed
    from octavo.ir.conformance import Conformance, Finding
    from octavo.ir.facts import Latencies
    from octavo.ir.model import Model
    from octavo.ir.target import Target


@final
@dataclass(frozen=True)
class TensorRtBackend:
    """Lowers for one compute capability; what the file computes is run by ONNX Runtime."""

    target: Target
    times: bool = False

    def lower(self, model: Model, path: Path) -> Artifact:
        """Write the lowered model to `path`."""
        return trt_lowering.lower(model, path, self.target)

    def check(self, path: Path) -> Conformance:
        """Every rule of the target that a file breaks, its own or another's."""
        return trt_check.check(path, self.target)

    def audit(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> Audit:
        """The layers of an engine built here, where there is a device; else the rules.

        Without one kernels are not seen: the audit says so.
        """
        if trt_engine.version() is not None:
            session = self.open(artifact.path, threads=threads)
            return _device_audit(artifact, feed, session)
        found = self.check(artifact.path)
        errors = [finding for finding in found.findings if finding.error]
        by_node = {finding.node: finding for finding in errors}
        rows = tuple(_row(node, by_node) for node in artifact.planned)
        others = tuple(map(str, errors))
        described = "; ".join((*found.checked, *found.unverified))
        return Audit(rows, others, {}, described)

    def evaluator(self, threads: int = 2) -> OrtEvaluator:
        """Runs models in memory."""
        return ort_session.OrtEvaluator(threads=threads)

    def open(self, path: Path, *, threads: int, config: Mapping[str, str] | None = None) -> Session:
        """A session that computes what the file says, on the CPU.

        Without the runtime's rewrites: its WeightBiasQuantization changes what float biases beside
        quantized weights of float16 give. Float4 weights are given as the numbers they stand for.
        """
        model = runnable(path)
        return ort_session.make_session(model, threads=threads, config=config, optimization="none")

    def latencies(self, source: Path, artifact: Artifact, feed: Feed, *, threads: int) -> Latencies:
        """Raises UsageError: there is no device here."""
        raise self._untimed()

    def time_nodes(
        self, artifacts: Sequence[Artifact], feed: Feed, *, threads: int, seconds_limit: float
    ) -> list[Timing]:
        """Raises UsageError: there is no device here."""
        raise self._untimed()

    def environment(self, threads: int) -> str:
        """Why nothing is timed."""
        return (
            f"no device of {self.target.name} here, outputs by {ort_session.environment(threads)}"
        )

    def notes(self) -> tuple[str, ...]:
        """What a user has to do on the device."""
        return (
            "seconds are analytic estimates for this part; nothing was measured on it",
            "build_engine.py and build_engine.sh (trtexec) build the engine on the device",
            *trt_check.unverified(),
        )

    def _untimed(self) -> UsageError:
        message = f"nothing here tells the seconds of {self.target.name}"
        return UsageError(message, hint="build on the device, with build_engine.sh")


def _device_audit(artifact: Artifact, feed: Feed, session: Session) -> Audit:
    """Build, look inside, run: types of the layers, latency, distance from the same on the CPU."""
    engine = trt_engine.build(artifact.path, profiles(read(artifact.path)))
    outputs, seconds = engine.run(feed)
    distance = compare([session.run(feed)], [outputs])
    described = (
        f"TensorRT {trt_engine.version()}: {seconds * 1e3:.3f} ms, relative error "
        f"{distance.relative_error:.4f} against the same file on the CPU"
    )
    return audit_of(engine.layers(), artifact.planned, described)


def _row(node: PlannedNode, errors: Mapping[str, Finding]) -> AuditRow:
    found = errors.get(node.node)
    return AuditRow(
        node.node, node.op_type, node.option,
        kernel="", ok=found is None, reason=str(found) if found else node.reason,
    )  # fmt: skip
