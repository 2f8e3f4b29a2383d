"""How weights are rounded where a plan is still sought: the quantizer that damage is measured with.

A rounder takes the reader of a weight, the index of its input, the weight as it is read and a
spec, and gives the weight that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.ir.moments import Moments, WeightRounding
from octavo.ir.quant import dequantize, fitted, params_for_weight, quantize, round_weight
from octavo.passes.clip_search import clipped_params
from octavo.passes.collect_moments import collected, quantizable
from octavo.passes.gptq_weight import gptq_weight
from octavo.passes.weight_matrix import WeightMatrix

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.moments import RoundingMethod
    from octavo.ir.quant import QuantSpec
    from octavo.passes.base import PassContext

Rounder = Callable[
    ["onnx_ir.Node", int, "NDArray[np.floating[Any]]", "QuantSpec"], "NDArray[np.float32]"
]


def with_rounding(model: Model, ctx: PassContext, method: RoundingMethod) -> Model:
    """The model with the fact that says how offers are rounded, and the moments that needs.

    Without calibration data GPTQ has nothing to go by: ranges are clipped, and a note says so.
    """
    if method == "gptq" and model.find(Moments) is None:
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: weights are clipped instead of GPTQ")
            method = "clip"
        else:
            found = collected(model, ctx, quantizable(model, ctx), ctx.calibration)
            model = model.with_fact(found)
    return model.with_fact(WeightRounding(method))


def rounder_of(model: Model) -> Rounder:
    """The rounder that a model's fact names; to nearest where it has none."""
    match rounding_of(model):
        case "gptq":
            return partial(_gptq, model.find(Moments) or Moments({}))
        case "clip":
            return _clipped
    return nearest


def rounding_of(model: Model) -> RoundingMethod:
    """How offers of a model are rounded."""
    found = model.find(WeightRounding)
    return found.method if found is not None else "nearest"


def nearest(
    node: onnx_ir.Node, index: int, weight: NDArray[np.floating], spec: QuantSpec
) -> NDArray[np.float32]:
    """The nearest codes on the grid of the whole range."""
    return round_weight(weight, spec)


def _clipped(
    node: onnx_ir.Node, index: int, weight: NDArray[np.floating], spec: QuantSpec
) -> NDArray[np.float32]:
    params = clipped_params(weight, spec)
    return dequantize(quantize(weight, params), params)


def _gptq(
    moments: Moments,
    node: onnx_ir.Node,
    index: int,
    weight: NDArray[np.floating],
    spec: QuantSpec,
) -> NDArray[np.float32]:
    """GPTQ where the moments of the operand are known, else clipped."""
    moment = moments.of(node.name or "", index)
    if moment is None or spec.half or spec.index_bits:
        return _clipped(node, index, weight, spec)
    own = np.asarray(weight, np.float32)
    params = params_for_weight(own, fitted(spec, own.shape))
    return gptq_weight(own, params, WeightMatrix.of(node, index), moment.matrix()).rounded
