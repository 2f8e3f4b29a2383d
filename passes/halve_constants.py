"""Round the constants that no decision concerns to float16, which is how they are then stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.facts import Fact, HalfConstants
from octavo.ir.mapped import reading
from octavo.passes.base import Pass
from octavo.passes.groups import find_groups, weight_row, weight_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from onnx_ir import TensorProtocol

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_LARGEST = float(np.finfo(np.float16).max)
# Below, float16 is subnormal: it has fewer than 11 bits.
_LEAST_NORMAL = 2.0**-14


@final
@dataclass(frozen=True)
class HalveConstants(Pass):
    """Store large float constants that the planner does not decide about in half the bytes.

    **What it does.** Rounds position embeddings, norms, tables and biases of at least `elements`
    numbers to float16; lowering stores them as such, with a Cast that folds at load.
    **Why.** In a low-bit model they are a visible part of the file: 0.4 of 12 MB in MiniLM.
    **When it does not apply.** Weights of decision groups; numbers that float16 does not reach,
    or whose largest is among its smallest; whole numbers that it rounds, which may be positions.
    **Cost and accuracy.** A relative error of at most 2^-11 per number, less than 8-bit codes.
    """

    name = "halve-constants"
    produces = (HalfConstants,)
    preserves = (Fact,)

    elements: int = 1024

    def run(self, model: Model, ctx: PassContext) -> Model:
        weights = set(_weights(model, ctx))
        halved: list[str] = []
        saved = 0
        for value in model.graph.initializers.values():
            tensor, name = value.const_value, value.name or ""
            if tensor is None or name in weights or not self._is_large_float(value):
                continue
            half, reason = reading(tensor, _halved)
            if half is None:
                ctx.remark("missed", name, reason, elements=tensor.size)
                continue
            value.const_value = onnx_ir.Tensor(half, name=name)
            halved.append(name)
            saved += tensor.nbytes // 2
        ctx.count("constants", len(halved))
        ctx.remark("note", "", f"{len(halved)} constants as float16", bytes_saved=saved)
        return model.with_fact(HalfConstants(tuple(sorted(halved))))

    def _is_large_float(self, value: onnx_ir.Value) -> bool:
        tensor: TensorProtocol | None = value.const_value
        if tensor is None or value.is_graph_output() or value.is_graph_input():
            return False
        return tensor.dtype == onnx_ir.DataType.FLOAT and tensor.size >= self.elements


def _weights(model: Model, ctx: PassContext) -> Iterator[str]:
    """Names of the constants that decision groups concern."""
    nodes = {node.name or "": node for node in model.graph}
    for group in find_groups(model, ctx.target).values():
        for node in (nodes[name] for name in group.nodes):
            row = weight_row(node, ctx.target)
            for index in row.weights if row is not None else ():
                source = weight_source(node.inputs[index])
                yield source.name or "" if source is not None else ""


def _halved(array: NDArray[np.float32]) -> tuple[NDArray[np.float32] | None, str]:
    """The numbers rounded to float16, or the reason why they are not."""
    largest = float(np.abs(array).max())
    if not largest <= _LARGEST:
        return None, "float16 does not reach its numbers"
    half = array.astype(np.float16).astype(np.float32)
    if np.array_equal(half, array):
        return half, ""
    if largest < _LEAST_NORMAL:
        return None, "its numbers are too small for float16"
    if np.array_equal(np.rint(array), array):
        return None, "float16 rounds its whole numbers"
    return half, ""
