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

# Sizes; None for one that nothing tells, because it depends on data.
Shape = tuple[int | None, ...]


def concrete_shapes(model: Model, feed: Feed) -> Mapping[str, Shape]:
    """Shapes of top-level values, by name, when the model runs `feed`; unknown ranks left out."""
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
    return {
        v.name or "": tuple(d if isinstance(d, int) else None for d in v.shape)
        for v in values
        if v.shape is not None
    }


def concrete_elements(model: Model, feed: Feed) -> Mapping[str, int]:
    """Elements of every top-level value, by name, when the model runs `feed`.

    A dimension that stays unknown (it depends on data) counts as 1.
    """
    shapes = concrete_shapes(model, feed)
    return {name: elements(shape) for name, shape in shapes.items()}


def elements(shape: Shape) -> int:
    """Elements of a shape; a size that nothing tells counts as 1."""
    return math.prod(1 if d is None else d for d in shape)
