"""Errors of layers from the moments of what their weights multiply: nothing runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.menu import Damage
from octavo.ir.moments import Moments
from octavo.passes.gptq import output_error
from octavo.passes.weight_matrix import WeightMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.offered_rounding import OfferedRounding

    Array = NDArray[np.generic]
    Float32 = NDArray[np.float32]

# So many rows of a weight tell its error.
_ROWS = 512


def moment_errors(
    model: Model, ctx: PassContext, roundings: Mapping[str, OfferedRounding]
) -> dict[str, Damage]:
    """`tr(ΔW·C·ΔWᵀ) / tr(W·C·Wᵀ)` of every trial that rounds weights, by its name.

    That is ‖ΔW·X‖² / ‖W·X‖², the layer error on the data of the moments. Several weights of a
    group count their sum; a weight without moments counts as if its inputs were white. Nothing
    is found where a model has no moments.
    """
    moments = model.find(Moments)
    if moments is None or not moments.by_weight:
        return {}

    def errors(rounding: OfferedRounding) -> dict[str, Damage]:
        constants = rounding.constants
        layers = [
            _Layer.of(node, index, value.name or "", constants, moments)
            for node, index, value in rounding.inputs
        ]
        return {
            key: Damage(sum(layer.error(trial.weights()) for layer in layers))
            for key, trial in rounding.trials.items()
            if trial.rounds_weights
        }

    found: dict[str, Damage] = {}
    for done, some in enumerate(ctx.executor.map(errors, roundings.values()), start=1):
        found |= some
        ctx.progress("moment errors", done, len(roundings))
    return found


@final
@dataclass(frozen=True)
class _Layer:
    """Rows `[groups, n, K]` of a weight of a group with C, or the weight where no C is known."""

    name: str
    rows: Float32
    matrix: WeightMatrix | None = None
    second: Float32 | None = None

    @staticmethod
    def of(
        node: onnx_ir.Node, index: int, name: str, constants: Mapping[str, Array], moments: Moments
    ) -> _Layer:
        weight, moment = constants[name], moments.of(node.name or "", index)
        if moment is None:
            return _Layer(name, np.asarray(weight, np.float32))
        matrix = WeightMatrix.of(node, index)
        return _Layer(name, matrix.some_rows(weight, _ROWS), matrix, moment.measured())

    def error(self, weights: Mapping[str, Array]) -> float:
        """The relative error of what is left of the weight."""
        if self.name not in weights:
            return 0.0
        left = weights[self.name]
        if self.matrix is None or self.second is None:
            moved = self.rows - np.asarray(left, np.float32)
            return _ratio(float(np.vdot(moved, moved)), float(np.vdot(self.rows, self.rows)))
        rows = self.matrix.some_rows(left, _ROWS)
        error = output_error(self.rows, rows, self.second)
        return _ratio(error, output_error(self.rows, None, self.second))


def _ratio(error: float, power: float) -> float:
    return error / power if power > 0 else 0.0
