"""Binary coding of weights: every row has levels Σ ±α_i + z, found by alternation.

UniQuanF ("Unifying Uniform and Binary-coding Quantization", arXiv 2506.03781): a uniform grid is
the case α_i = 2^(k-2-i)·Δ, so that the search may begin there and only gain. Rows are `[n, K]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.levels import binary_levels
from octavo.passes.gptq import Factor, RowGrid, gptq, row_errors, table_codes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from octavo.ir.quant import QuantSpec
    from octavo.passes.weight_matrix import Cells

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

_ROUNDS = 15
_NORM = 2.4
_RATIOS = (1.0, 0.8, 0.6)
_RIDGE = 1e-6
_TINY = float(np.finfo(np.float32).tiny)
# Signs of so many weights are in memory at once.
_ELEMENTS_AT_ONCE = 1 << 20


@final
@dataclass(frozen=True)
class Coding:
    """`alpha` `[n, k]`, not negative and falling, and `offset` `[n]` of every row."""

    alpha: Float32
    offset: Float32

    @property
    def levels(self) -> Float32:
        """All `Σ ±α + z`, rising: `[n, 2^k]`."""
        return np.sort(binary_levels(self.alpha, self.offset), axis=1)

    @property
    def stored(self) -> Coding:
        """The nearest float16 numbers."""
        with np.errstate(over="ignore"):
            alpha, offset = (a.astype(np.float16) for a in (self.alpha, self.offset))
        return Coding(alpha.astype(np.float32), offset.astype(np.float32))

    def nearest(self, rows: Float32) -> Float32:
        """The levels nearest to `[n, K]`."""
        one = np.ones((1, 1), np.float32)
        return table_codes(rows, one, 0 * one, self.levels[:, None])

    def signs(self, rows: Float32) -> Float32:
        """`[n, K, k]` of ±1: which signs make the levels nearest to `rows`."""
        levels = binary_levels(self.alpha, self.offset)
        order = np.argsort(levels, axis=1, kind="stable")
        rank = np.zeros(rows.shape, np.int64)
        rising = np.take_along_axis(levels, order, axis=1)
        for at in range(1, levels.shape[1]):
            rank += rows > (rising[:, at - 1 : at] + rising[:, at : at + 1]) / 2
        number = np.take_along_axis(order, rank, axis=1)
        places = np.arange(self.alpha.shape[1])[::-1]
        return (2 * (number[..., None] >> places & 1) - 1).astype(np.float32)

    def moved(self, change: Float64) -> Coding:
        """Numbers that differ by `change` `[n, k + 1]`, the offset last; levels stay a set."""
        alpha = np.abs(self.alpha + change[:, :-1]).astype(np.float32)
        offset = (self.offset + change[:, -1]).astype(np.float32)
        return Coding(-np.sort(-alpha, axis=1), offset)

    def where(self, wins: NDArray[np.bool_], other: Coding) -> Coding:
        """This one in the rows that win, `other` in the others."""
        alpha = np.where(wins[:, None], self.alpha, other.alpha)
        return Coding(alpha, np.where(wins, self.offset, other.offset))


def uniform_coding(scale: Float32, zero: Float32, bits: int) -> Coding:
    """The coding whose levels are `(q - zero)·scale` for the 2^bits signed codes q."""
    powers = 2.0 ** (bits - 2 - np.arange(bits))
    alpha = (scale[:, None] * powers).astype(np.float32)
    return Coding(alpha, ((-0.5 - zero) * scale).astype(np.float32))


def greedy_coding(rows: Float32, bits: int) -> Coding:
    """`α_i = mean |r|` of what is left, one after another, around the middle of a row."""
    middle = (rows.max(axis=1) + rows.min(axis=1)) / 2
    rest = rows - middle[:, None]
    alphas = []
    for _ in range(bits):
        alphas.append(np.abs(rest).mean(axis=1))
        rest = rest - np.where(rest < 0, -1, 1) * alphas[-1][:, None]
    return Coding(-np.sort(-np.stack(alphas, axis=1), axis=1), middle.astype(np.float32))


def alternated(
    rows: Float32, start: Coding, importance: Float32 | None = None, rounds: int = _ROUNDS
) -> Coding:
    """Nearest signs and least-squares α and z in turn; the squared error never rises.

    `importance` `[n, K]` weighs the squared errors.
    """
    found = start
    for _ in range(rounds):
        signs = found.signs(rows)
        error = rows - _values(signs, found)
        weighed = error if importance is None else error * importance
        features = _features(signs)
        pulled = np.matmul(features.transpose(0, 2, 1), weighed[..., None])[..., 0]
        scaled = features if importance is None else features * importance[..., None]
        normal = np.matmul(features.transpose(0, 2, 1), scaled)
        found = found.moved(_solved(normal, pulled))
    return found


def initial_coding(rows: Float32, bits: int, importance: Float32 | None = None) -> Coding:
    """The unified initialisation: the best of grids over shares of a row's range, and greedy.

    Every start is alternated; the coding of least `Σ |w - ŵ|^2.4` per row is kept, the starts
    themselves among them.
    """
    parts = [
        _initial(rows[at], bits, None if importance is None else importance[at])
        for at in _slices(len(rows), rows.shape[1] * (bits + 1))
    ]
    return Coding(
        np.concatenate([part.alpha for part in parts]),
        np.concatenate([part.offset for part in parts]),
    )


def _initial(rows: Float32, bits: int, importance: Float32 | None) -> Coding:
    low, high = rows.min(axis=1), rows.max(axis=1)
    step, middle = (high - low) / ((1 << bits) - 1), (high + low) / 2
    even = Coding(uniform_coding(step, np.zeros_like(step), bits).alpha, middle)
    shrunk = [Coding((even.alpha * r).astype(np.float32), middle) for r in _RATIOS]
    starts = [*shrunk, greedy_coding(rows, bits)]
    unit = np.maximum(np.abs(rows).max(axis=1, keepdims=True), _TINY)
    best, least = even, np.full(len(rows), np.inf)
    for tried in [*starts, *(alternated(rows, start, importance) for start in starts)]:
        error = np.abs((rows - tried.nearest(rows)) / unit) ** np.float32(_NORM)
        total = (error if importance is None else error * importance).sum(axis=1, dtype=np.float64)
        best, least = tried.where(total < least, best), np.minimum(total, least)
    return best


@final
@dataclass(frozen=True)
class Coded:
    """Rows `[n, K]` that are levels of a coding of float16 numbers, with their errors `δCδᵀ`."""

    rows: Float32
    coding: Coding
    errors: Float64


def coded_rows(
    rows: Float32, start: Coding, second: Float32, cells: Cells, spec: QuantSpec, rounds: int = 3
) -> Coded:
    """Rows of one group by GPTQ on their levels, and levels by least squares in the metric C.

    `second` is `[K, K]`. Both alternate for `rounds`; the best of every row is kept, the nearest
    levels of the start among them.
    """
    factor = Factor.of(second[None], 0.01, act_order=True)
    coding = start.stored
    best = _coded(rows, coding.nearest(rows), coding, second)
    for _ in range(rounds):
        ones = np.ones((1, len(rows), 1), np.float32)
        grid = RowGrid(spec, ones, 0 * ones, cells, coding.levels[None])
        values = gptq(rows[None], factor, grid)[0]
        best = _better(best, _coded(rows, values, coding, second))
        refitted = _refitted(rows, values, coding, second).stored
        # The same signs with other numbers.
        moved = _values(coding.signs(values), refitted)
        best = _better(best, _coded(rows, refitted.nearest(moved), refitted, second))
        coding = refitted
    return best


def _coded(rows: Float32, values: Float32, coding: Coding, second: Float32) -> Coded:
    return Coded(values, coding, row_errors((rows - values)[None], second[None])[0])


def _better(old: Coded, new: Coded) -> Coded:
    wins = new.errors < old.errors
    rows = np.where(wins[:, None], new.rows, old.rows)
    errors = np.where(wins, new.errors, old.errors)
    return Coded(rows, new.coding.where(wins, old.coding), errors)


def _refitted(rows: Float32, values: Float32, coding: Coding, second: Float32) -> Coding:
    """α and z by least squares in the metric C, for signs that stay; unsorted."""
    alpha, offset = np.empty_like(coding.alpha), np.empty_like(coding.offset)
    width = rows.shape[1] * (coding.alpha.shape[1] + 1)
    for at in _slices(len(rows), width):
        own = Coding(coding.alpha[at], coding.offset[at])
        features = _features(own.signs(values[at]))
        metric = np.matmul(features.transpose(0, 2, 1), second)
        normal = np.matmul(metric, features)
        pulled = np.matmul(metric, (rows[at] - values[at])[..., None])[..., 0]
        change = _solved(normal, pulled)
        alpha[at] = own.alpha + change[:, :-1]
        offset[at] = own.offset + change[:, -1]
    return Coding(alpha, offset)


def _features(signs: Float32) -> Float32:
    return np.concatenate([signs, np.ones((*signs.shape[:2], 1), np.float32)], axis=2)


def _values(signs: Float32, coding: Coding) -> Float32:
    values: Float32 = np.matmul(signs, coding.alpha[..., None])[..., 0]
    return values + coding.offset[:, None]


def _solved(normal: Float32, pulled: Float32) -> Float64:
    """Changes `[n, k + 1]` with a small ridge towards none, so that no error rises."""
    matrix = normal.astype(np.float64)
    mean = np.einsum("nii->n", matrix) / matrix.shape[1]
    ridge = np.where(mean > 0, _RIDGE * mean, 1.0)[:, None, None] * np.eye(matrix.shape[1])
    found = np.linalg.solve(matrix + ridge, pulled.astype(np.float64)[..., None])[..., 0]
    return np.asarray(found, np.float64)


def _slices(rows: int, elements_per_row: int) -> Iterator[slice]:
    count = max(1, _ELEMENTS_AT_ONCE // max(1, elements_per_row))
    for start in range(0, rows, count):
        yield slice(start, start + count)
