"""Weights with zeros that cost the layer's output little.

Weights are `[N, K]`, `second` is C = X·Xᵀ/n `[K, K]` of what they multiply; errors are δ C δᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.passes.gptq import upper_factor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]
    Mask = NDArray[np.bool_]

# Columns whose zeros are chosen together (SparseGPT's mask block).
_BLOCK = 128


@final
@dataclass(frozen=True)
class Sparsity:
    """A share of zeros; where `of` is set, `zeros` of every `of` neighbours in a row instead."""

    share: float
    zeros: int = 0
    of: int = 0


def magnitude_pruned(weight: Float64, sparsity: Sparsity) -> Float64:
    """The smallest weights set to zero, of the whole matrix or of every group of neighbours."""
    score = np.square(weight)
    return np.where(_lowest(score.T, sparsity).T, 0.0, weight)


def obs_pruned(
    weight: Float64, second: Float64, sparsity: Sparsity, damping: float = 0.01
) -> Float64:
    """Zeros that the columns behind them make up for.

    SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) in the form of `passes/gptq.py`: with
    C + λ = U·Uᵀ, U upper triangular, a zero in column c costs (U_cc · t_c)² for its target
    `t_c = w_c + sum_{r<c} δ_r U_rc / U_cc`, and everything else takes its target. Zeros are chosen
    by that cost, in blocks of 128 columns of all rows, or in every group of neighbours.
    """
    upper = upper_factor(second, damping)
    diagonal = np.diagonal(upper)
    unit, real = upper / diagonal, np.ascontiguousarray(weight.T, np.float64)
    error, made = np.zeros_like(real), np.empty_like(real)
    step = _BLOCK - _BLOCK % (sparsity.of or 1)
    for start in range(0, len(real), step):
        stop = min(start + step, len(real))
        target = real[start:stop] + unit[:start, start:stop].T @ error[:start]
        cost = diagonal[start:stop, None] * target
        zero = _lowest(np.square(cost), sparsity) if not sparsity.of else None
        for at in range(start, stop):
            own = target[at - start] + unit[start:at, at] @ error[start:at]
            if zero is not None:
                mask = zero[at - start]
            else:
                if (at - start) % sparsity.of == 0:
                    group = slice(at, at + sparsity.of)
                    ahead = target[at - start : at - start + sparsity.of]
                    ahead = ahead + unit[start:at, group].T @ error[start:at]
                    chosen = _lowest(np.square(diagonal[group, None] * ahead), sparsity)
                mask = chosen[(at - start) % sparsity.of]
            made[at] = np.where(mask, 0.0, own)
            error[at] = real[at] - made[at]
    return np.ascontiguousarray(made.T)


def _lowest(score: Float64, sparsity: Sparsity) -> Mask:
    """Where `[K, N]` scores are lowest: a share of all, or some of every group of rows of it."""
    if not sparsity.of:
        count = round(sparsity.share * score.size)
        mask = np.zeros(score.size, np.bool_)
        mask[np.argsort(score, axis=None, kind="stable")[:count]] = True
        return mask.reshape(score.shape)
    grouped = score.reshape(-1, sparsity.of, score.shape[1])
    rank = grouped.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    found: Mask = (rank < sparsity.zeros).reshape(score.shape)
    return found
