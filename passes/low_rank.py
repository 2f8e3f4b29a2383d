"""Products of two thin matrices that stand for one, by what they cost the layer's output.

Weights are `[N, K]` with output = weight @ columns; `second` is C = X·Xᵀ/n of these columns,
`[K, K]`, or `None` where nothing is known of them, which means the identity. Where a bias takes
up what the `mean` `[K]` of the columns loses, C is that of the columns less their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]
    Matrix = NDArray[np.floating]

# Directions weaker than the strongest one by this factor are not scaled up any further.
_WEAKEST = 1e-6


@final
@dataclass(frozen=True)
class Factors:
    """`left @ right` `[N, r] @ [r, K]` stands for a weight.

    `error` is ‖(W - left·right)·X‖² / ‖W·X‖², 0 for a weight that gives only zeros.
    """

    left: Float64
    right: Float64
    error: float

    @property
    def product(self) -> Float64:
        """What the two compute together, `[N, K]`."""
        return self.left @ self.right


@final
@dataclass(frozen=True)
class Spectrum:
    """The directions U of a layer's output, the strongest first, and the power of each.

    `directions` has shape `[N, min(N, K)]`; `whole` is ‖W·X‖²/n, the sum of `power` unless a
    bias takes up a mean.
    """

    weight: Float64
    directions: Float64
    power: Float64
    whole: float

    @staticmethod
    def of(
        weight: Matrix, second: Matrix | None = None, mean: NDArray[np.floating] | None = None
    ) -> Spectrum:
        """Decompose W·X without X: of W·C·Wᵀ = U·Λ·Uᵀ where rows are fewer, else by an SVD.

        The best W' of rank r in ‖(W - W')·X‖ is U_r·U_rᵀ·W (whitened SVD, Eckart and Young),
        which needs no inverse of C and leaves directions that no column has as they are.
        """
        wide = np.asarray(weight, np.float64)
        moment = None if second is None else np.asarray(second, np.float64)
        whole = _whole(wide, moment, mean)
        rows, width = wide.shape
        if rows <= width:
            product = wide @ wide.T if moment is None else wide @ moment @ wide.T
            power, directions = np.linalg.eigh((product + product.T) / 2)
            power, directions = power[::-1], directions[:, ::-1]
        else:
            seen = wide if moment is None else wide @ _root(moment)
            directions, singular, _ = np.linalg.svd(seen, full_matrices=False)
            power = np.square(singular)
        return Spectrum(wide, with_sign(directions), np.maximum(power, 0.0), whole)

    @property
    def full(self) -> int:
        """The largest rank."""
        return int(self.power.size)

    def error(self, rank: int) -> float:
        """The share of ‖W·X‖² that is lost at a rank."""
        return float(self.power[rank:].sum()) / self.whole if self.whole > 0 else 0.0

    def rank_for(self, energy: float) -> int:
        """The least rank, at least 1, that keeps the share `energy` of ‖W·X‖²."""
        lost = np.array([self.error(rank) for rank in range(1, self.full + 1)])
        enough = np.flatnonzero(lost <= 1 - energy)
        return int(enough[0]) + 1 if enough.size else self.full

    def factors(self, rank: int) -> Factors:
        """The best factors of a rank.

        The square root of each direction's magnitude is on either side, so that rounding the
        weights and rounding what is between them cost alike.
        """
        kept = self.directions[:, :rank]
        strength = np.sqrt(self.power[:rank])
        strength = np.maximum(strength, _WEAKEST * strength.max(initial=0.0))
        split = np.sqrt(np.where(strength > 0, strength, 1.0))
        return Factors(kept * split, kept.T @ self.weight / split[:, None], self.error(rank))


def factored(weight: Matrix, second: Matrix | None, rank: int) -> Factors:
    """The factors of a rank that lose least of ‖W·X‖² (or of ‖W‖², where `second` is `None`)."""
    return Spectrum.of(weight, second).factors(rank)


def relative_error(
    weight: Matrix,
    other: Matrix,
    second: Matrix | None,
    mean: NDArray[np.floating] | None = None,
) -> float:
    """‖(W - W')·X‖² / ‖W·X‖², 0 where W·X is zero."""
    wide = np.asarray(weight, np.float64)
    whole = _whole(wide, second, mean)
    return _power(wide - other, second) / whole if whole > 0 else 0.0


def _whole(weight: Float64, second: Matrix | None, mean: NDArray[np.floating] | None) -> float:
    """‖W·X‖²/n, with what the mean gives."""
    constant = 0.0 if mean is None else float(np.square(weight @ mean).sum())
    return _power(weight, second) + constant


def _power(weight: Float64, second: Matrix | None) -> float:
    seen = weight if second is None else weight @ second
    return max(float(np.einsum("nk,nk->", seen, weight)), 0.0)


def with_sign(directions: Float64) -> Float64:
    """Directions whose largest entry is positive: a solver may return either."""
    largest = np.abs(directions).argmax(axis=0, keepdims=True)
    found: Float64 = directions * np.where(np.take_along_axis(directions, largest, 0) < 0, -1, 1)
    return found


def _root(second: Float64) -> Float64:
    """The symmetric square root of C; eigenvalues below zero are rounding errors."""
    values, vectors = np.linalg.eigh((second + second.T) / 2)
    root: Float64 = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
