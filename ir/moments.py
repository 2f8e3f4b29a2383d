"""Second moments of what weights multiply, measured once and shared by whoever repairs weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.arrays_io import StoredArray
from octavo.ir.facts import Fact

if TYPE_CHECKING:
    from numpy.typing import NDArray

RoundingMethod = Literal["nearest", "clip", "gptq"]


@final
@dataclass(frozen=True)
class Moment:
    """C = X·Xᵀ/n of the columns X `[groups, K, n]` that a weight multiplies, and their mean.

    `second` has shape `[groups, K, K]`, on disk where there are many; `mean` has `[groups, K]`.
    """

    second: StoredArray | NDArray[np.float32]
    mean: NDArray[np.float32]
    samples: int

    def matrix(self) -> NDArray[np.float32]:
        """C, read from disk at every call so that only one is in memory."""
        read = self.second.load() if isinstance(self.second, StoredArray) else self.second
        return np.asarray(read, np.float32)

    def __str__(self) -> str:
        groups, width = self.mean.shape
        return f"groups={groups} inputs={width} samples={self.samples}"


@final
@dataclass(frozen=True)
class Moments(Fact):
    """Moments by `weight_key`; weights that multiply the same columns share them."""

    by_weight: Mapping[str, Moment]

    def of(self, node: str, index: int) -> Moment | None:
        """The moment of what the weight in input `index` of a node multiplies."""
        return self.by_weight.get(weight_key(node, index))


@final
@dataclass(frozen=True)
class WeightRounding(Fact):
    """How weights are rounded while a plan is sought, so that damage is that of the final ones.

    `moments` are those GPTQ rounds with here: of half of the data, as damage is measured on the
    other half. A weight with more inputs than samples would fit all of them.
    """

    method: RoundingMethod
    moments: Moments = Moments({})


def weight_key(node: str, index: int) -> str:
    """A name for the weight that a node reads as input `index`."""
    return f"{node}:{index}"
