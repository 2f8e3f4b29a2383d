"""Layers whose output channels can be scaled and shifted without touching a code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.fake_quant import DOMAIN, params_of, set_rounded
from octavo.ir.mapped import reading
from octavo.ir.quant import PerAxis, PerBlock, dequantize, quantize
from octavo.passes.linear import linear_after, per_channel
from octavo.passes.rewrite import constant, is_op

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import Granularity
    from octavo.passes.rewrite import Rewrite

    Float64 = NDArray[np.float64]


@final
@dataclass(frozen=True)
class AffineLayer:
    """`y = op(x, weight) + bias`; `last` computes y: `node`, or the Add that is its bias.

    `weight` is the constant, `fake` the quantizer between it and the node, if any.
    """

    node: onnx_ir.Node
    last: onnx_ir.Node
    weight: onnx_ir.Value
    fake: onnx_ir.Node | None

    @staticmethod
    def of(node: onnx_ir.Node) -> AffineLayer | None:
        """The layer that a linear node with a constant weight begins."""
        if not is_op(node, "Conv", "ConvTranspose", "MatMul", "Gemm") or len(node.inputs) < 2:
            return None
        linear = linear_after(node)
        read = node.inputs[1]
        made = read.producer() if read is not None else None
        fake = made if made is not None and made.domain == DOMAIN else None
        weight = fake.inputs[0] if fake is not None else read
        if weight is None or weight.const_value is None or weight.is_graph_input():
            return None
        return AffineLayer(node, linear.last if linear is not None else node, weight, fake)

    @property
    def axis(self) -> int:
        """The channel axis of y."""
        return -1 if is_op(self.node, "MatMul", "Gemm") else 1

    @property
    def channels(self) -> int:
        size = int(self._shape[self._weight_axis])
        return size * self._groups if is_op(self.node, "ConvTranspose") else size

    @property
    def bias_value(self) -> onnx_ir.Value | None:
        """What the bias is read from, `None` where nothing is."""
        index = self._bias_index
        return self.last.inputs[index] if 0 <= index < len(self.last.inputs) else None

    def bias(self) -> Float64 | None:
        """The bias, shape `[channels]`; `None` where it is not one constant per channel."""
        value = self.bias_value
        if self._bias_index < 0:
            return None
        if value is None:
            return np.zeros(self.channels)
        if is_op(self.node, "MatMul"):
            known = self.node.outputs[0].shape
            rank, axis = len(known) if known is not None else None, -1
        else:
            rank, axis = (2, -1) if is_op(self.node, "Gemm") else (1, 0)
        vector = per_channel(constant(value), rank, axis, self.channels)
        beta = self.node.attributes.get_float("beta", 1.0)
        return None if vector is None else vector * beta

    @property
    def scalable(self) -> bool:
        """Whether every output channel has weight scales of its own."""
        if self.fake is None or len(self.fake.outputs[0].uses()) != 1:
            return False
        grouped = is_op(self.node, "ConvTranspose") and self._groups > 1
        spec = params_of(self.fake).spec
        return not grouped and self._scale_axis(spec.granularity) is not None

    def transform(self, rewrite: Rewrite, ratio: Float64, shift: Float64) -> None:
        """Let the layer give `y·ratio + shift`; a ratio other than 1 needs it to be scalable.

        Codes stay: the ratio goes into the scales of the weight and into the bias.
        """
        bias = self.bias()
        assert bias is not None
        if np.any(ratio != 1):
            self._scale(rewrite.model, ratio)
        moved = (bias * ratio + shift).astype(np.float32)
        rewrite.set_constant(self.last, self._bias_index, moved, "bias")
        self.node.attributes.pop("beta", None)

    def _scale(self, model: Model, ratio: Float64) -> None:
        assert self.fake is not None
        assert self.weight.const_value is not None
        old = params_of(self.fake)
        axis = self._scale_axis(old.spec.granularity)
        along = [-1 if k == axis else 1 for k in range(old.scale.ndim)]
        scale = np.maximum(old.scale * ratio.reshape(along), np.finfo(np.float32).tiny)
        new = replace(old, scale=scale.astype(np.float32))
        codes = reading(self.weight.const_value, lambda array: quantize(array, old))
        set_rounded(model.graph, self.fake, dequantize(codes, new), new)

    def _scale_axis(self, granularity: Granularity) -> int | None:
        """The axis of the scale that counts output channels."""
        match granularity:
            case PerAxis(axis):
                return 0 if axis % len(self._shape) == self._weight_axis else None
            case PerBlock(axis, _):
                return self._weight_axis if axis % len(self._shape) != self._weight_axis else None
        return None

    @property
    def _bias_index(self) -> int:
        """Where `last` takes the bias, -1 where nothing can."""
        if self.last is self.node:
            return -1 if is_op(self.node, "MatMul") else 2
        return 1 - next(k for k, v in enumerate(self.last.inputs) if v is self.node.outputs[0])

    @property
    def _groups(self) -> int:
        return self.node.attributes.get_int("group", 1)

    @property
    def _weight_axis(self) -> int:
        """The axis of the weight that counts output channels."""
        if is_op(self.node, "MatMul"):
            return len(self._shape) - 1
        if is_op(self.node, "Gemm"):
            return 1 - self.node.attributes.get_int("transB", 0)
        return int(is_op(self.node, "ConvTranspose"))

    @property
    def _shape(self) -> tuple[int, ...]:
        assert self.weight.const_value is not None
        return tuple(self.weight.const_value.shape.numpy())


def affine_layers(model: Model) -> Iterator[AffineLayer]:
    """The layers of the top-level graph, in its order."""
    for node in model.graph:
        layer = AffineLayer.of(node)
        if layer is not None:
            yield layer
