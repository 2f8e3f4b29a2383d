"""How passes run a model and ask what an option costs, without knowing a runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.facts import Method, Option
    from octavo.ir.model import Model


class Evaluator(Protocol):
    """Runs a model; implemented by backends."""

    def stream(
        self, model: Model, batches: Batches, values: Sequence[str]
    ) -> Iterator[dict[str, NDArray[np.generic]]]:
        """The named values (intermediate ones too) for every feed, one feed at a time."""

    def outputs(self, model: Model, feeds: Iterable[Feed]) -> list[dict[str, NDArray[np.generic]]]:
        """The graph outputs of every feed; of a large model only a part is in memory at a time."""

    def load(self, model: Model) -> Callable[[Feed], dict[str, NDArray[np.generic]]]:
        """A model that is run by calling it, on one thread; it lives as long as the caller."""

    def run(self, model: Model, feed: Feed) -> dict[str, NDArray[np.generic]]:
        """The graph outputs of one feed, by output name."""


class CostModel(Protocol):
    """Seconds and multiply-accumulates of one option on one node."""

    @property
    def source(self) -> str:
        """ "measured on …" or "analytic"; shown wherever a decision rests on it."""

    def seconds(self, node: onnx_ir.Node, method: Method) -> float | None:
        """Seconds of a node under a method, `None` where nothing is known."""

    def option_seconds(self, node: onnx_ir.Node, option: Option) -> float | None:
        """Seconds of a node under an option, `None` where the target has no kernel for it."""

    def macs(self, node: onnx_ir.Node) -> int:
        """Multiply-accumulates of a node; 0 where nothing is multiplied by a weight."""

    def elements(self, value: onnx_ir.Value) -> int:
        """Elements of a value; a dimension that nothing tells counts as 1."""

    def boundary_seconds(self, value: onnx_ir.Value) -> float:
        """Seconds to move a value between float and integer compute (one Q or DQ)."""
