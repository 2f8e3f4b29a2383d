"""Errors of layers from the moments of what their weights multiply: nothing runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        layers = [_Layer(node, k, v.name or "", moments) for node, k, v in rounding.inputs]
        constants = rounding.constants
        return {
            key: Damage(sum(layer.error(constants, trial.weights()) for layer in layers))
            for key, trial in rounding.trials.items()
            if trial.rounds_weights
        }

    found: dict[str, Damage] = {}
    for done, some in enumerate(ctx.executor.map(errors, roundings.values()), start=1):
        found |= some
        ctx.progress("moment errors", done, len(roundings))
    return found


class _Layer:
    """One weight of a group with C, `None` where nobody knows it."""

    def __init__(self, node: onnx_ir.Node, index: int, name: str, moments: Moments) -> None:
        moment = moments.of(node.name or "", index)
        self.name = name
        self.matrix = WeightMatrix.of(node, index) if moment is not None else None
        self.second = moment.measured() if moment is not None else None

    def error(
        self, wanted: Mapping[str, NDArray[np.generic]], given: Mapping[str, object]
    ) -> float:
        real = np.asarray(wanted[self.name], np.float32)
        rounded = np.asarray(given.get(self.name, real), np.float32)
        if self.matrix is None or self.second is None:
            power = float(np.vdot(real, real))
            return float(np.vdot(real - rounded, real - rounded)) / power if power else 0.0
        rows, left = self._some(real), self._some(rounded)
        power = output_error(rows, None, self.second)
        return output_error(rows, left, self.second) / power if power else 0.0

    def _some(self, weight: Float32) -> Float32:
        assert self.matrix is not None
        rows = self.matrix.rows(weight)
        return rows[:, :: -(-rows.shape[1] // _ROWS)]
