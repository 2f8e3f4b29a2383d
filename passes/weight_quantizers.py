"""The FakeQuants of a model's weights, with who reads them and what they rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.constants import constant_behind
from octavo.ir.fake_quant import DOMAIN, params_of
from octavo.ir.levels import OP_TYPE as LEVELS
from octavo.ir.mapped import reading
from octavo.ir.quant import dequantize, quantize, turned_params
from octavo.ir.reference import Reference

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams
    from octavo.passes.base import PassContext

    Float32 = NDArray[np.float32]


@final
@dataclass(frozen=True)
class WeightQuantizer:
    """A FakeQuant of a constant; `readers` are nodes with the index of the input it feeds.

    `original` is the weight before anything was rounded, in the shape of the constant. The first
    reader of a table that is also tied to a head is the head, which reads it `turned`.
    """

    fake: onnx_ir.Node
    readers: tuple[tuple[onnx_ir.Node, int], ...]
    source: onnx_ir.Value | None
    turned: bool = False

    def as_read(self, array: Float32) -> Float32:
        """A constant as the first reader reads it, and the other way round."""
        return np.ascontiguousarray(array.T) if self.turned else array

    @property
    def params_as_read(self) -> QuantParams:
        """The parameters as the first reader reads them."""
        return turned_params(self.params) if self.turned else self.params

    @property
    def params(self) -> QuantParams:
        return params_of(self.fake)

    def original(self) -> Float32:
        """The float weight, a copy."""
        if self.source is None or constant_behind(self.source) is None:
            return self.stored()
        tensor = constant_behind(self.source)
        assert tensor is not None
        turned = self.source.const_value is None
        return reading(tensor, lambda a: np.array(a.T if turned else a, np.float32, order="C"))

    def stored(self) -> Float32:
        """What the FakeQuant reads, a copy."""
        value = self.fake.inputs[0]
        assert value is not None
        assert value.const_value is not None
        return reading(value.const_value, lambda array: np.array(array, np.float32))

    def rounded(self) -> Float32:
        """What the FakeQuant gives."""
        params, value = self.params, self.fake.inputs[0]
        assert value is not None
        assert value.const_value is not None
        return reading(value.const_value, lambda a: dequantize(quantize(a, params), params))


def kept_on_grid(ctx: PassContext, name: str) -> None:
    """Report a weight that was quantized before and loses nothing as it is."""
    ctx.remark("note", name, "the weight is on a grid already and stays as it is")
    ctx.count("weights on a grid")


def weight_quantizers(model: Model) -> Iterator[WeightQuantizer]:
    """Every FakeQuant of a constant that somebody reads, in topological order.

    Weights of levels are left out: they have no parameters.
    """
    return (found for found in _quantizers(model) if found.fake.op_type != LEVELS)


def level_quantizers(model: Model) -> Iterator[WeightQuantizer]:
    """Every weight of levels (`ir/levels.py`) that somebody reads, in topological order."""
    return (found for found in _quantizers(model) if found.fake.op_type == LEVELS)


def _quantizers(model: Model) -> Iterator[WeightQuantizer]:
    reference = model.find(Reference)
    nodes = {n.name: n for n in reference.model.graph} if reference is not None else {}
    for fake in model.graph:
        value = fake.inputs[0] if fake.domain == DOMAIN and fake.inputs else None
        if value is None or value.const_value is None or fake.op_type == "FakeQuantDynamic":
            continue
        uses = [(use.node, use.idx) for use in fake.outputs[0].uses()]
        direct = [(node, index) for node, index in uses if node.op_type != "Transpose"]
        tied = [
            (u.node, u.idx) for n, i in uses if (n, i) not in direct for u in n.outputs[0].uses()
        ]
        if direct or tied:
            node, index = (*direct, *tied)[0]
            before = nodes.get(node.name)
            source = before.inputs[index] if before is not None else None
            yield WeightQuantizer(fake, (*tied, *direct), source, bool(tied))
