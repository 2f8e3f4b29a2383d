"""Round activations as kernels would: by calibrated, run-time or per-block parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import numpy as np

from octavo.ir.quant import PerBlock, QuantSpec, params_for_range, round_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.evaluate import Evaluator
    from octavo.ir.facts import Range

    Array = NDArray[np.generic]
    Runner = Callable[[Feed], dict[str, Array]]

# The runtime rounds an activation many times faster than numpy.
_STATIC = """
<ir_version: 10, opset_import: ["" : 21]>
rounding (float x, float scale, {zero} zero) => (float y) {{
    codes = QuantizeLinear (x, scale, zero)
    y = DequantizeLinear (codes, scale, zero)
}}"""
_DYNAMIC = """
<ir_version: 10, opset_import: ["" : 21]>
rounding (float x) => (float y) {
    codes, scale, zero = DynamicQuantizeLinear (x)
    y = DequantizeLinear (codes, scale, zero)
}"""


@final
@dataclass(frozen=True)
class ActivationRounding:
    """Rounds float32 arrays of any shape to 8-bit grids and back."""

    evaluator: Evaluator

    def static(self, array: Array, found: Range, grid: QuantSpec) -> Array:
        """On the 8-bit grid of a calibrated range."""
        params = params_for_range(grid, found.low, found.high)
        run, dtype = (self._signed, np.int8) if grid.signed else (self._unsigned, np.uint8)
        zero = params.zero_point.astype(dtype)
        return run({"x": array, "scale": np.asarray(params.scale), "zero": zero})["y"]

    def dynamic(self, array: Array) -> Array:
        """On the u8 grid of the array's own extremes (ONNX DynamicQuantizeLinear)."""
        return self._dynamic({"x": array})["y"]

    def float8(self, array: NDArray[Any]) -> Array:
        """On the float8 grid that ends at the array's own largest magnitude."""
        return round_weight(array, QuantSpec("f8", symmetric=True))

    def blocks(self, array: NDArray[Any], size: int) -> Array:
        """On a symmetric s8 grid per `size` entries of the last axis, as MatMulNBits does."""
        if array.size == 0:
            return array
        spec = QuantSpec("s8", PerBlock(array.ndim - 1, size), symmetric=True)
        return round_weight(array, spec)

    @cached_property
    def _unsigned(self) -> Runner:
        return _loaded(self.evaluator, _STATIC.format(zero="uint8"))

    @cached_property
    def _signed(self) -> Runner:
        return _loaded(self.evaluator, _STATIC.format(zero="int8"))

    @cached_property
    def _dynamic(self) -> Runner:
        return _loaded(self.evaluator, _DYNAMIC)


def _loaded(evaluator: Evaluator, text: str) -> Runner:
    import onnx.parser

    from octavo.ir.read import read

    return evaluator.load(read(onnx.parser.parse_model(text)))
