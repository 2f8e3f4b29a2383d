"""How far the outputs of one file are from those of another, on the same feeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.backends.ort_session import make_session
from octavo.ir.errors import VerificationFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.backend import Session
    from octavo.ir.calibration import Feed

Outputs = dict[str, "NDArray[np.generic]"]
# So many numbers are float64 at a time.
_ELEMENTS = 1 << 20


@final
@dataclass(frozen=True)
class Fidelity:
    """Distance of outputs from a reference, worst output first.

    `relative_error` is ‖y - reference‖ / ‖reference‖, of a zero reference ‖y‖; `agreement` the
    share of rows with the same arg-max along the last axis, where an output has rows of at least
    two floats.
    """

    relative_error: float
    cosine: float
    agreement: float | None
    samples: int

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def run_file(
    path: Path, feeds: Sequence[Feed], *, threads: int, session: Session | None = None
) -> Iterator[Outputs]:
    """The outputs of a model file for one feed after another.

    By ONNX Runtime, or by a given session of the file.
    """
    session = session or make_session(path, threads=threads)
    for feed in feeds:
        yield session.run({name: feed[name] for name in session.inputs})


def compare(reference: Iterable[Outputs], outputs: Iterable[Outputs]) -> Fidelity:
    """Fidelity of `outputs` over all feeds. Raises VerificationFailed for NaN or a new shape."""
    per_output: dict[str, _Sums] = {}
    samples = 0
    for expected, actual in zip(reference, outputs, strict=True):
        samples += 1
        for name, array in expected.items():
            if array.dtype.kind == "f" and array.size:
                per_output.setdefault(name, _Sums()).add(name, array, actual[name])
    if not per_output:
        return Fidelity(0.0, 1.0, None, samples)
    worst = max(per_output.values(), key=lambda sums: sums.relative_error)
    agreements = [a for s in per_output.values() if (a := s.agreement) is not None]
    return Fidelity(worst.relative_error, worst.cosine, min(agreements, default=None), samples)


@dataclass
class _Sums:
    error: float = 0.0
    reference: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    rows: int = 0
    same: int = 0

    def add(self, name: str, expected: NDArray[np.generic], actual: NDArray[np.generic]) -> None:
        if expected.shape != actual.shape:
            why = f"{actual.shape} instead of {expected.shape}"
            raise VerificationFailed(f"output '{name}' has another shape", why=why)
        if not np.isfinite(actual).all() and np.isfinite(expected).all():
            raise VerificationFailed(f"output '{name}' is not finite", why="the source's is")
        flat, own = expected.reshape(-1), actual.reshape(-1)
        for start in range(0, flat.size, _ELEMENTS):
            part = slice(start, start + _ELEMENTS)
            a, b = flat[part].astype(np.float64), own[part].astype(np.float64)
            self.error += float(np.square(a - b).sum())
            self.reference += float(np.square(a).sum())
            self.actual += float(np.square(b).sum())
            self.product += float(np.vdot(a, b))
        if expected.ndim >= 2 and expected.shape[-1] >= 2:
            self.rows += expected[..., 0].size
            self.same += int((expected.argmax(-1) == actual.argmax(-1)).sum())

    @property
    def relative_error(self) -> float:
        return float(np.sqrt(self.error / (self.reference or 1.0)))

    @property
    def cosine(self) -> float:
        norm = float(np.sqrt(self.reference * self.actual))
        return self.product / norm if norm else 1.0

    @property
    def agreement(self) -> float | None:
        return self.same / self.rows if self.rows else None
