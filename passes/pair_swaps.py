"""A good choice near the linear relaxation, by exchanging candidates of two groups at a time."""

from __future__ import annotations

import numpy as np

from octavo.passes.linear_model import Floats, Integers, LinearModel
from octavo.passes.programme import ROUNDING

# Moves that are combined in pairs, and exchanges that are made.
_MOVES, _EXCHANGES = 500, 60
# With more rows than this a table of pairs costs more than the proof gains by it.
_ROWS = 16


def exchange(model: LinearModel, reduced: Floats, columns: Integers) -> Integers:
    """A choice that no exchange improves; the columns themselves where exchanges cannot help.

    Moves are the columns that add least to the bound. As long as a row is exceeded, the exchange
    that exceeds least is made; then the one that keeps all rows and saves most.
    """
    if len(model.upper) or len(model.rows) > _ROWS:
        return columns
    usage = np.zeros((len(model.rows), len(model.cost)))
    for index, row in enumerate(model.rows):
        usage[index, row.columns] = row.coefficients
    limits = np.array([row.limit + ROUNDING * abs(row.limit) for row in model.rows])
    size = np.maximum(np.abs(usage).max(axis=1, initial=0.0), 1e-300)
    usage, limits = usage / size[:, None], limits / size
    columns = columns.copy()
    for _ in range(_EXCHANGES):
        pair = _best_pair(model, reduced, columns, usage, limits)
        if pair is None:
            break
        columns[model.group[pair]] = pair
    return columns


def _best_pair(
    model: LinearModel, reduced: Floats, columns: Integers, usage: Floats, limits: Floats
) -> Integers | None:
    """The columns of the best exchange of one or two groups; None if none is better."""
    open_ = reduced.copy()
    open_[columns] = np.inf
    moves = np.argsort(open_, kind="stable")[: min(_MOVES, len(reduced) - len(columns))]
    now = columns[model.group[moves]]
    saved = np.append(model.cost[moves] - model.cost[now], 0.0)
    change = np.pad(usage[:, moves] - usage[:, now], ((0, 0), (0, 1)))
    slack = limits - usage[:, columns].sum(axis=1)
    excess = np.zeros((len(saved), len(saved)))
    for row, left in zip(change, slack.tolist(), strict=True):
        excess += np.maximum(row[:, None] + row - left, 0.0)
    group = np.append(model.group[moves], -1)
    excess[(group[:, None] == group) & ~np.eye(len(group), dtype=bool)] = np.inf
    np.fill_diagonal(excess[:-1, :-1], np.inf)
    value = saved[:, None] + saved
    feasible = excess <= 0.0
    goal = np.where(feasible, value, np.inf) if feasible.any() else excess
    first, second = divmod(int(goal.argmin()), len(saved))
    picked = [k for k in (first, second) if k < len(moves)]
    kept = slack.min(initial=0.0) >= 0.0
    if not picked or (kept and not goal[first, second] < 0.0):
        return None
    best: Integers = moves[picked]
    return best
