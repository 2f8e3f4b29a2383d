"""How weights are rounded where a plan is still sought: the quantizer that damage is measured with.

A rounder takes the reader of a weight, the index of its input, the weight as it is read and a
spec, and gives the weight that is left.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.ir.arrays_io import StoredArray
from octavo.ir.calibration import Part
from octavo.ir.menu import Menu
from octavo.ir.moments import Moment, Moments, WeightRounding
from octavo.ir.quant import QuantParams, dequantize, fitted, quantize, round_weight
from octavo.passes.clip_search import clipped_params
from octavo.passes.collect_moments import collected, quantizable
from octavo.passes.gptq import Factor
from octavo.passes.gptq_weight import GptqOptions, gptq_weight
from octavo.passes.weight_matrix import WeightMatrix, why_no_matrix

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.ir.moments import RoundingMethod
    from octavo.ir.quant import QuantSpec
    from octavo.passes.base import PassContext
    from octavo.passes.gptq_weight import Rounding

Rounder = Callable[
    ["onnx_ir.Node", int, "NDArray[np.floating[Any]]", "QuantSpec"], "NDArray[np.float32]"
]

# Ranges that are tried while a plan is sought; `clip-weights` tries more of them in the end.
_STEPS = 12
_OPTIONS = GptqOptions(ranges=1, refit=False)


def with_rounding(model: Model, ctx: PassContext, method: RoundingMethod) -> Model:
    """The model with the fact that says how offers are rounded, and the moments that needs.

    Without calibration data GPTQ has nothing to go by: ranges are clipped, and a note says so.
    """
    if method == "gptq" and ctx.calibration is None:
        ctx.remark("note", "", "no calibration data: weights are clipped instead of GPTQ")
        method = "clip"
    if method != "gptq" or ctx.calibration is None:
        return model.with_fact(WeightRounding(method))
    seen = Part(ctx.calibration, 0)
    moments = collected(model, ctx, quantizable(model, ctx), seen)
    return model.with_fact(WeightRounding(method, moments))


def gptq_macs(model: Model, ctx: PassContext) -> float:
    """Multiply-accumulates of GPTQ for every offer of the menu: N·K² of each weight and offer."""
    menu, nodes = model.fact(Menu), {node.name or "": node for node in model.graph}
    offers = {n: len(menu.offers[g.name]) - 1 for g in menu.groups.values() for n in g.nodes}
    total = 0.0
    for name, index in quantizable(model, ctx):
        if name in offers and not why_no_matrix(nodes[name], index):
            matrix = WeightMatrix.of(nodes[name], index)
            total += math.prod(matrix.shape) * matrix.width * offers[name]
    return total


def unseen(model: Model, batches: Batches) -> Batches:
    """The data that offers were not rounded with; only on it is their damage what it will be."""
    return Part(batches, 1) if rounding_of(model) == "gptq" else batches


def rounder_of(model: Model) -> Rounder:
    """The rounder that a model's fact names; to nearest where it has none."""
    found = model.find(WeightRounding)
    match rounding_of(model):
        case "gptq" if found is not None:
            return _Gptq(found.moments)
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
    if spec.half:
        return round_weight(weight, spec)
    params = clipped_params(weight, spec, steps=_STEPS)
    return dequantize(quantize(weight, params), params)


@dataclass(frozen=True)
class _Gptq:
    """GPTQ where the moments of the operand are known, else clipped.

    The last factor of every thread is kept: offers of one weight are asked for in a row.
    """

    moments: Moments
    last: threading.local = field(default_factory=threading.local)

    def __call__(
        self, node: onnx_ir.Node, index: int, weight: NDArray[np.floating], spec: QuantSpec
    ) -> NDArray[np.float32]:
        moment = self.moments.of(node.name or "", index)
        if moment is None or spec.half or spec.index_bits:
            return _clipped(node, index, weight, spec)
        own = np.asarray(weight, np.float32)
        if not isinstance(moment.second, StoredArray):
            return self._rounded(own, WeightMatrix.of(node, index), moment, spec).rounded
        # A plan asks for the same rounding when it is measured, estimated and refined.
        known = moment.second.path.with_suffix(f".{_digest(own, node, index, spec)}.npz")
        if not known.exists():
            _store(known, self._rounded(own, WeightMatrix.of(node, index), moment, spec))
        with np.load(known) as stored:
            params = QuantParams(fitted(spec, own.shape), stored["scale"], stored["zero_point"])
            return dequantize(stored["codes"], params)

    def _rounded(
        self, weight: NDArray[np.float32], matrix: WeightMatrix, moment: Moment, spec: QuantSpec
    ) -> Rounding:
        """GPTQ on the clipped range alone; `round-gptq` does more once the plan is made."""
        if getattr(self.last, "moment", None) is not moment:
            self.last.second = moment.matrix()
            self.last.factor = Factor.of(self.last.second, _OPTIONS.damping, _OPTIONS.act_order)
            self.last.moment = moment
        params = clipped_params(weight, fitted(spec, weight.shape), steps=_STEPS)
        second, factor = self.last.second, self.last.factor
        return gptq_weight(weight, params, matrix, second, _OPTIONS, factor=factor)


def _store(path: Path, found: Rounding) -> None:
    """Codes, scales and zero points; whole or not at all, as threads may look for the same."""
    params = found.params
    partial = path.with_suffix(f".{threading.get_ident()}.npz")
    codes = quantize(found.rounded, params)
    np.savez(partial, codes=codes, scale=params.scale, zero_point=params.zero_point)
    partial.replace(path)


def _digest(weight: NDArray[np.float32], node: onnx_ir.Node, index: int, spec: QuantSpec) -> str:
    digest = hashlib.sha256(f"{node.name} {index} {spec!r}".encode())
    digest.update(np.ascontiguousarray(weight).data)
    return digest.hexdigest()[:16]
