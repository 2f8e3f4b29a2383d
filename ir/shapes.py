"""Concrete shapes of every value for one feed, where a model has symbolic dimensions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir

from octavo.ir.infer import infer_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model


def concrete_elements(model: Model, feed: Feed) -> Mapping[str, int]:
    """Elements of every top-level value, by name, when the model runs `feed`.

    A dimension that stays unknown (it depends on data) counts as 1.
    """
    own = model.clone()
    for value in own.graph.inputs:
        array = feed.get(value.name or "")
        if array is not None:
            value.shape = onnx_ir.Shape(array.shape)
    for node in own.graph:
        for value in node.outputs:
            value.shape = None
    infer_shapes(own.ir)
    values = [*own.graph.inputs, *own.graph.initializers.values()]
    values += [v for node in own.graph for v in node.outputs]
    return {v.name or "": _elements(v) for v in values}


def _elements(value: onnx_ir.Value) -> int:
    if value.shape is None:
        return 1
    return math.prod(d if isinstance(d, int) else 1 for d in value.shape)
