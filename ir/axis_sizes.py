"""Sizes of every axis at two settings of the free dimensions, to tell fixed from free sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import onnx_ir

from octavo.ir.shapes import concrete_shapes

if TYPE_CHECKING:
    from octavo.ir.model import Model

    Shape = tuple[int, ...]

# Free sizes of the two settings: primes, so that no product of them equals another, and multiples
# of 32 for height and width, which networks halve up to five times.
_PRIMES = ((5, 7, 11, 17, 23, 31), (13, 19, 29, 37, 41, 43))
_SPATIAL = ((160, 224, 352, 416), (544, 608, 736, 928))


@final
@dataclass(frozen=True)
class AxisSizes:
    """Shapes by name of value at two settings; a value that is missing has no known shape."""

    first: Mapping[str, Shape]
    second: Mapping[str, Shape]

    @staticmethod
    def of(model: Model) -> AxisSizes:
        """Infer all shapes of the top-level graph twice."""
        first, second = (_at(model, setting) for setting in (0, 1))
        return AxisSizes(first, second)

    def known(self, value: onnx_ir.Value) -> bool:
        name = value.name or ""
        return name in self.first and len(self.second.get(name, ())) == len(self.first[name])

    def shape(self, value: onnx_ir.Value) -> Shape:
        """The sizes at the first setting."""
        return self.first[value.name or ""]

    def fixed(self, name: str, axis: int) -> bool:
        """Whether the size of an axis does not depend on the free dimensions."""
        return self.first[name][axis] == self.second[name][axis]

    def cuts(self, left: str, right: str) -> list[tuple[range, range]]:
        """Runs of axes of two values that hold the same elements, each as short as possible."""
        pair = [(self.first[left], self.first[right]), (self.second[left], self.second[right])]
        found, start_left, start_right = [], 0, 0
        for i in range(len(pair[0][0]) + 1):
            for j in range(start_right, len(pair[0][1]) + 1):
                if (i, j) <= (start_left, start_right) or i == start_left or j == start_right:
                    continue
                if all(np.prod(a[:i]) == np.prod(b[:j]) for a, b in pair):
                    found.append((range(start_left, i), range(start_right, j)))
                    start_left, start_right = i, j
                    break
        rest = range(start_left, len(pair[0][0])), range(start_right, len(pair[0][1]))
        if found and (len(rest[0]) or len(rest[1])):
            last = found.pop()
            found.append((range(last[0].start, rest[0].stop), range(last[1].start, rest[1].stop)))
        return found


def _at(model: Model, setting: int) -> dict[str, Shape]:
    sizes: dict[str, int] = {}
    primes, spatial = iter(_PRIMES[setting]), iter(_SPATIAL[setting])
    feed = {}
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        shape = []
        for at, dim in enumerate(value.shape):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            name = str(dim.value) if dim.value else f"{value.name}.{at}"
            if name not in sizes:
                image = len(value.shape) == 4 and at >= 2
                sizes[name] = next(spatial if image else primes, 47 + 6 * len(sizes))
            shape.append(sizes[name])
        dtype = value.dtype.numpy() if value.dtype is not None else np.float32
        # A broadcast scalar has the shape without the memory.
        feed[value.name or ""] = np.broadcast_to(np.zeros((), dtype), shape)
    found = {k: shape for k, shape in concrete_shapes(model, feed).items() if None not in shape}
    declared = (value for node in model.graph for value in node.outputs if value.shape is not None)
    named = {v.name or "": tuple(_size(dim, sizes) for dim in v.shape or ()) for v in declared}
    complete = {**{k: s for k, s in named.items() if None not in s}, **found}
    return {name: tuple(d for d in shape if d is not None) for name, shape in complete.items()}


def _size(dim: int | onnx_ir.SymbolicDim, sizes: Mapping[str, int]) -> int | None:
    """The size of a declared dimension, by the name it has in the graph inputs."""
    return dim if isinstance(dim, int) else sizes.get(str(dim.value))
