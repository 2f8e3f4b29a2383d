"""How passes run a model and ask what an option costs, without knowing a runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.facts import Method
    from octavo.ir.model import Model


class Evaluator(Protocol):
    """Runs a model; implemented by backends."""

    def stream(
        self, model: Model, batches: Batches, values: Sequence[str]
    ) -> Iterator[dict[str, NDArray[np.generic]]]:
        """The named values (intermediate ones too) for every feed, one feed at a time."""

    def run(self, model: Model, feed: Feed) -> dict[str, NDArray[np.generic]]:
        """The graph outputs of one feed, by output name."""


class CostModel(Protocol):
    """Seconds and bytes of one option on one node."""

    @property
    def source(self) -> str:
        """ "measured on …" or "analytic"; shown wherever a decision rests on it."""

    def seconds(self, node: onnx_ir.Node, method: Method) -> float | None:
        """Seconds of a node under a method, `None` where nothing is known."""

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        """Seconds to move a value between float and integer compute (one Q or DQ)."""
