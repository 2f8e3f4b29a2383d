"""How the numbers of an input are distributed, as a user says it or the graph suggests."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.errors import UnknownName, UsageError
from octavo.passes.rewrite import scalar

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model

_TEXT = re.compile(r"(\w+)\(([^,()]+),([^,()]+)\)")
_KINDS = ("normal", "uniform", "ids")
_EXAMPLE = "for instance --input 'x=normal(0,1)', 'x=uniform(0,255)' or 'x=ids(0,30521)'"


@final
@dataclass(frozen=True)
class InputLaw:
    """A distribution: normal (mean, deviation), uniform (low, high), or ids: whole low … high."""

    kind: Literal["normal", "uniform", "ids"]
    first: float
    second: float

    @staticmethod
    def parse(text: str) -> InputLaw:
        """`normal(0,1)`, `uniform(a,b)` or `ids(0,30521)`; UsageError for anything else."""
        found = _TEXT.fullmatch(text.replace(" ", ""))
        if found is None or found[1] not in _KINDS:
            raise UsageError(f"'{text}' is no distribution", hint=_EXAMPLE)
        try:
            first, second = float(found[2]), float(found[3])
        except ValueError:
            raise UsageError(f"'{text}' holds something that is no number", hint=_EXAMPLE) from None
        finite = math.isfinite(first) and math.isfinite(second)
        whole = found[1] != "ids" or (first.is_integer() and second.is_integer() and first >= 0)
        ordered = second > 0 if found[1] == "normal" else first < second
        if not (finite and whole and ordered):
            message = f"'{text}' is an empty distribution"
            raise UsageError(message, why="a deviation is positive, and low lies below high")
        return InputLaw(found[1], first, second)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}({self.first:g},{self.second:g})"

    @property
    def mean(self) -> float:
        """Of one number."""
        return self.first if self.kind == "normal" else (self.first + self.second) / 2

    @property
    def deviation(self) -> float:
        """Of one number."""
        if self.kind == "normal":
            return self.second
        return (self.second - self.first) / math.sqrt(12)

    @property
    def low(self) -> float:
        """What no number lies below."""
        return -math.inf if self.kind == "normal" else self.first

    @property
    def high(self) -> float:
        """What no number lies above."""
        return math.inf if self.kind == "normal" else self.second

    def sample(
        self, shape: Sequence[int], dtype: np.dtype[np.generic], rng: np.random.Generator
    ) -> NDArray[np.generic]:
        """Numbers of that distribution."""
        if self.kind == "ids":
            return rng.integers(int(self.first), int(self.second) + 1, shape).astype(dtype)
        if self.kind == "normal":
            drawn = rng.standard_normal(shape) * self.second + self.first
        else:
            drawn = rng.uniform(self.first, self.second, shape)
        found: NDArray[np.generic] = drawn.astype(dtype)
        return found


def parse_laws(texts: Sequence[str]) -> dict[str, InputLaw]:
    """`NAME=LAW` texts by input name; UsageError for one that is none."""
    found: dict[str, InputLaw] = {}
    for text in texts:
        name, equals, law = text.rpartition("=")
        if not equals or not name:
            raise UsageError(f"'{text}' names no input", hint=_EXAMPLE)
        found[name] = InputLaw.parse(law)
    return found


def laws_of(model: Model, given: Mapping[str, InputLaw]) -> dict[str, InputLaw]:
    """The law of every input that has one: as given, or for floats as the graph suggests.

    Raises UnknownName for an input that the model lacks.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    for name in given:
        if name not in inputs:
            raise UnknownName("input", name, inputs)
    floats = {n: v for n, v in inputs.items() if v.dtype is None or v.dtype.is_floating_point()}
    return {n: standard(v) for n, v in floats.items()} | dict(given)


def standard(value: onnx_ir.Value) -> InputLaw:
    """The normal law that leaves the scalings behind an input with mean 0 and deviation 1.

    Networks are trained on inputs of that scale; where the graph subtracts a mean and divides by
    a deviation itself, the law is of what comes before.
    """
    scale, shift = 1.0, 0.0
    while (uses := tuple(value.uses())) and len(uses) == 1:
        node, index = uses[0].node, uses[0].idx
        other = node.inputs[1 - index] if len(node.inputs) == 2 and index < 2 else None
        number = scalar(other) if other is not None else None
        if node.op_type == "Mul" and number:
            scale, shift = scale * number, shift * number
        elif node.op_type == "Div" and number and index == 0:
            scale, shift = scale / number, shift / number
        elif node.op_type == "Add" and number is not None:
            shift += number
        elif node.op_type == "Sub" and number is not None and index == 0:
            shift -= number
        elif node.op_type not in ("Cast", "Identity"):
            break
        value = node.outputs[0]
    # A sum with zero, as -0.0 is no number to show.
    return InputLaw("normal", 0.0 - shift / scale, abs(1 / scale))
