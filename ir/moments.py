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

    def measured(self) -> NDArray[np.float32]:
        """C of the samples, read from disk at every call so that only one is in memory."""
        read = self.second.load() if isinstance(self.second, StoredArray) else self.second
        return np.asarray(read, np.float32)

    def matrix(self) -> NDArray[np.float32]:
        """C as far as it can be told from the samples: `shrunk`."""
        return shrunk(self.measured(), self.samples)

    def __str__(self) -> str:
        groups, width = self.mean.shape
        return f"groups={groups} inputs={width} samples={self.samples}"


def shrunk(second: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """C `[groups, K, K]` with its off-diagonal entries shortened as few samples demand.

    The oracle approximating shrinkage of Chen et al. 2010 (arXiv 0907.4698, equation 23) towards
    the diagonal: C of fewer samples than K is singular, and rounding to it would fit the samples.
    """
    trace = np.einsum("gkk->g", second, dtype=np.float64)
    squares = np.einsum("gij,gij->g", second, second, dtype=np.float64)
    width = second.shape[-1]
    spread = squares - trace**2 / width
    wanted = (1 - 2 / width) * squares + trace**2
    possible = (samples + 1 - 2 / width) * spread
    share = np.clip(wanted / np.where(possible > 0, possible, 1.0), 0.0, 1.0)
    share = np.where(possible > 0, share, 1.0).astype(np.float32)
    found: NDArray[np.float32] = second * (1 - share)[:, None, None]
    diagonal = np.einsum("gkk->gk", found)
    diagonal += share[:, None] * np.einsum("gkk->gk", second)
    return found


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
