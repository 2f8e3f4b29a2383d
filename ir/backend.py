"""What a target's runtime does for a compilation: lower, load, audit, and time where it can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from octavo.ir.artifact import Artifact, Audit
    from octavo.ir.calibration import Feed
    from octavo.ir.conformance import Conformance
    from octavo.ir.evaluate import Evaluator
    from octavo.ir.facts import Latencies
    from octavo.ir.model import Model
    from octavo.ir.target import Target


class Session(Protocol):
    """A loaded model file; every error of the runtime leaves it as an `OctavoError`."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""

    def run(self, feed: Feed, outputs: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """The named outputs (none named: all) for one feed."""

    def bound(self, feed: Feed) -> Callable[[], None]:
        """A call that runs one fixed feed, for timing."""


@final
@dataclass(frozen=True)
class Timing:
    """One lowered file: median seconds of a run, and each node's share of them.

    `by_node` covers every planned node that a kernel was found for; with the quantizers it adds
    up to `seconds`. `quantizers` are seconds and bytes of the float tensors, by operator.
    """

    seconds: float
    by_node: dict[str, float]
    quantizers: dict[str, tuple[float, int]]


class Backend(Protocol):
    """One target with its runtime, looked up by the target's name.

    Where `times` is false nothing here tells how fast the target is: `latencies` and
    `time_nodes` are not called then, and sessions compute what the target is to compute.
    """

    @property
    def target(self) -> Target:
        """What it lowers for."""

    @property
    def times(self) -> bool:
        """Whether a clock on this machine tells the seconds of the target."""

    def lower(self, model: Model, path: Path) -> Artifact:
        """Write the lowered model to `path`; the given model is not changed.

        Raises UsageError for what the target cannot run, VerificationFailed for a result that
        is not well-formed.
        """

    def audit(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> Audit:
        """Which kernel every planned node got, as far as this machine can tell."""

    def evaluator(self, threads: int = 2) -> Evaluator:
        """Runs models inside the pipeline."""

    def open(self, path: Path, *, threads: int, config: Mapping[str, str] | None = None) -> Session:
        """Load a model file; `config` holds the session options that it relies on."""

    def latencies(self, source: Path, artifact: Artifact, feed: Feed, *, threads: int) -> Latencies:
        """Seconds of planned nodes in float, from the source, and as planned."""

    def time_nodes(
        self, artifacts: Sequence[Artifact], feed: Feed, *, threads: int, seconds_limit: float
    ) -> list[Timing]:
        """Seconds by node of lowered files, that add up to their latencies."""

    def environment(self, threads: int) -> str:
        """What a measurement rests on: runtime, version, processor."""

    def notes(self) -> tuple[str, ...]:
        """What a user should know of an artifact made on this machine, in sentences."""


@runtime_checkable
class Checker(Protocol):
    """A backend that knows what its runtime refuses."""

    def check(self, path: Path) -> Conformance:
        """Every rule of the target that a file breaks, its own or another's."""
