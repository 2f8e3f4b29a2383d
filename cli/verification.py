"""What `octavo verify` checks: that an artifact still computes what it did when it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.cli.target import backend_of
from octavo.ir.errors import VerificationFailed

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.ir.arrays_io import Array
    from octavo.ir.artifact_io import SavedArtifact

# Kernels of other processors round differently, which moves a code by a step or two.
_OUTPUT_STEPS = 2


@final
@dataclass(frozen=True)
class ProbeRow:
    """One output of one probe: its largest difference from the stored one, and what is allowed.

    `rule` says in words where `allowed` comes from.
    """

    probe: int
    output: str
    difference: float
    allowed: float
    rule: str

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed


def replay_probes(saved: SavedArtifact, *, threads: int, tolerance: float) -> tuple[ProbeRow, ...]:
    """Run every probe again and compare, output by output.

    An output on an integer grid may move by two steps, another float one by `tolerance` times
    its largest stored magnitude, integers not at all. Raises VerificationFailed for outputs that
    cannot be compared.
    """
    artifact, probes = saved.artifact, saved.probes()
    config, backend = artifact.session_options, backend_of(artifact.target)
    session = backend.open(artifact.path, threads=threads, config=config)
    steps = _output_steps(artifact.path)
    rows = []
    for index, (feed, expected) in enumerate(zip(probes.feeds, probes.outputs, strict=True)):
        actual = session.run(feed)
        for name, stored in expected.items():
            if name not in actual or actual[name].shape != stored.shape:
                message = f"output '{name}' of probe {index} is missing or has another shape"
                raise VerificationFailed(message, where=str(artifact.path))
            allowed, rule = _allowed(stored, steps.get(name), tolerance)
            difference = _largest_difference(actual[name], stored)
            rows.append(ProbeRow(index, name, difference, allowed, rule))
    return tuple(rows)


def _allowed(stored: Array, step: float | None, tolerance: float) -> tuple[float, str]:
    if stored.dtype.kind != "f":
        return 0.0, "equal"
    if step is not None:
        return _OUTPUT_STEPS * step, f"{_OUTPUT_STEPS} output steps"
    largest = float(np.abs(stored[np.isfinite(stored)]).max(initial=0.0))
    return tolerance * largest, f"{tolerance:g} of the largest magnitude"


def _largest_difference(actual: Array, stored: Array) -> float:
    if stored.dtype.kind != "f":
        return 0.0 if np.array_equal(actual, stored) else float("inf")
    if not np.array_equal(np.isfinite(actual), np.isfinite(stored)):
        return float("inf")
    finite = np.isfinite(stored)
    wide = actual[finite].astype(np.float64) - stored[finite].astype(np.float64)
    return float(np.abs(wide).max(initial=0.0))


def _output_steps(path: Path) -> dict[str, float]:
    """The quantization step of every output that a DequantizeLinear writes."""
    steps = {}
    for value in onnx_ir.load(path).graph.outputs:
        node = value.producer()
        if node is not None and node.op_type == "DequantizeLinear" and node.inputs[1] is not None:
            scale = node.inputs[1].const_value
            if scale is not None:
                steps[value.name or ""] = float(scale.numpy().max())
    return steps
