"""The FakeQuants of a model's weights, with who reads them and what they rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.constants import constant_behind
from octavo.ir.fake_quant import DOMAIN, params_of
from octavo.ir.mapped import reading
from octavo.ir.quant import dequantize, quantize
from octavo.ir.reference import Reference

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantParams

    Float32 = NDArray[np.float32]


@final
@dataclass(frozen=True)
class WeightQuantizer:
    """A FakeQuant of a constant; `readers` are nodes with the index of the input it feeds.

    `original` is the weight before anything was rounded, in the shape of the constant.
    """

    fake: onnx_ir.Node
    readers: tuple[tuple[onnx_ir.Node, int], ...]
    source: onnx_ir.Value | None

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


def weight_quantizers(model: Model) -> Iterator[WeightQuantizer]:
    """Every FakeQuant of a constant that somebody reads, in topological order."""
    reference = model.find(Reference)
    nodes = {n.name: n for n in reference.model.graph} if reference is not None else {}
    for fake in model.graph:
        value = fake.inputs[0] if fake.domain == DOMAIN and fake.inputs else None
        if value is None or value.const_value is None or fake.op_type == "FakeQuantDynamic":
            continue
        readers = tuple((use.node, use.idx) for use in fake.outputs[0].uses())
        if readers:
            node, index = readers[0]
            before = nodes.get(node.name)
            source = before.inputs[index] if before is not None else None
            yield WeightQuantizer(fake, readers, source)
