"""Linear models through PuLP and HiGHS: the multipliers of a relaxation, the optimum of a core.

Searches with one thread and a fixed seed, so that the same model gets the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, final

import highspy
import numpy as np
import pulp

from octavo.passes.linear_model import Floats, Integers, LinearModel, Mask
from octavo.passes.programme import ROUNDING

SOLVER = f"HiGHS {version('highspy')} through PuLP {version('pulp')}"
# Objectives are scaled to about this size, rows to coefficients of at most this size, so that
# tolerances of 1e-9 are far below one unit of any number that can be told from another.
_SIZE = 2.0**10
_TOLERANCE = 1e-9
# Nothing is unbounded here: columns lie in [0, 1], or below the memory of all values.
_INFEASIBLE = (
    highspy.HighsModelStatus.kInfeasible,
    highspy.HighsModelStatus.kUnboundedOrInfeasible,
)
_ENDS = (
    *_INFEASIBLE,
    highspy.HighsModelStatus.kOptimal,
    highspy.HighsModelStatus.kTimeLimit,
    highspy.HighsModelStatus.kObjectiveBound,
    # A relaxation that is not solved to the end still has multipliers, and any multipliers bound.
    highspy.HighsModelStatus.kUnknown,
)


@final
@dataclass(frozen=True)
class Found:
    """The best columns of a core (`None`: none found), and a bound on all of its choices.

    `bound` is the cutoff where the core is proven to hold no choice below it.
    """

    columns: Integers | None
    bound: float


@final
class _QuietHighs(highspy.Highs):
    """HiGHS prints a banner where callbacks are enabled, unless it was silenced before."""

    def enableCallbacks(self) -> None:  # noqa: N802
        self.silent()
        super().enableCallbacks()  # type: ignore[no-untyped-call]


@final
class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS with options only, created without a word on the console."""

    def createAndConfigureSolver(self, lp: Any) -> None:  # noqa: N802
        lp.solverModel = _QuietHighs()  # type: ignore[no-untyped-call]
        for name, value in self.optionsDict.items():
            lp.solverModel.setOptionValue(name, value)


def multipliers(model: LinearModel, seconds: float) -> Floats | None:
    """Multipliers >= 0 of the rows at the optimum of the linear relaxation; None if infeasible."""
    problem, count = pulp.LpProblem("relaxation", pulp.LpMinimize), len(model.group)
    scale = _scale(model.cost)
    columns = [problem.add_variable(f"x{i:06}", 0) for i in range(count)]
    columns += [problem.add_variable(f"y{i:06}", 0, bound) for i, bound in enumerate(model.upper)]
    problem += _sum(columns, model.cost * scale)
    ends = [*model.starts[1:].tolist(), count]
    for start, end in zip(model.starts.tolist(), ends, strict=True):
        problem += pulp.LpAffineExpression((x, 1.0) for x in columns[start:end]) == 1
    scales, rows = [_scale(row.coefficients) for row in model.rows], []
    for row, factor in zip(model.rows, scales, strict=True):
        read = [columns[i] for i in row.columns.tolist()]
        rows.append(_sum(read, row.coefficients * factor) <= row.limit * factor)
        problem += rows[-1]
    highs = _run(problem, seconds, mip=False, solver="ipm")
    if highs.getModelStatus() in _INFEASIBLE:
        return None
    duals = [-(row.pi or 0.0) * f / scale for row, f in zip(rows, scales, strict=True)]
    return np.maximum(np.array(duals, dtype=np.float64), 0.0, dtype=np.float64)


def core_optimum(
    model: LinearModel,
    kept: Mask,
    order: Floats,
    *,
    size: float,
    gap: float,
    cutoff: float,
    seconds: float,
) -> Found:
    """The best choice of kept columns below `cutoff`, proven to `gap` (absolute) if time allows.

    `size` is about that of the optimum; `order` sorts the candidates of a group. No choice may be
    found where none is below the cutoff; the bound never exceeds it.
    """
    problem = pulp.LpProblem("core", pulp.LpMinimize)
    core = _Core(model, kept, order, problem)
    cost, constant = core.terms(np.arange(len(model.cost)), model.cost)
    constant += model.constant
    scale = _SIZE / max(size, float(np.abs(cost).max(initial=0.0)) * 1e-6, 1e-300)
    problem += _sum(core.variables, cost * scale)
    if not core.add_rows(problem):
        return Found(None, cutoff)
    if not core.variables:
        return Found(core.columns, constant)
    highs = _run(
        problem,
        seconds,
        mip_abs_gap=max(gap * scale, _TOLERANCE),
        mip_rel_gap=0.0,
        # Without borders the relaxation is nearly exact; starting over saves nothing.
        mip_allow_restart=bool(len(model.upper)),
        objective_bound=(cutoff - constant) * scale,
    )
    if highs.getModelStatus() in _INFEASIBLE:
        return Found(None, cutoff)
    info = highs.getInfo()
    bound = info.mip_dual_bound if core.steps else info.objective_function_value
    feasible = highspy.SolutionStatus.kSolutionStatusFeasible
    found = core.chosen() if info.primal_solution_status == feasible else None
    return Found(found, min(constant + bound / scale, cutoff))


@final
class _Core:
    """Kept columns as steps: a step of a group says "a candidate after this one".

    Branching on a step halves the candidates, where a column per candidate excludes one at a time.
    """

    def __init__(self, model: LinearModel, kept: Mask, order: Floats, problem: Any) -> None:
        self._model = model
        columns = np.flatnonzero(kept)
        keys = (order[columns], model.group[columns])
        self.columns: Integers = columns[np.lexsort(keys)]
        self.group = model.group[self.columns]
        self.first = np.searchsorted(self.group, np.arange(len(model.names)))
        self.later = np.setdiff1d(np.arange(len(columns)), self.first)
        self.steps = [problem.add_variable(f"x{k:06}", 0, 1, pulp.LpInteger) for k in self.later]
        rest = [problem.add_variable(f"y{i:06}", 0, bound) for i, bound in enumerate(model.upper)]
        self.variables = [*self.steps, *rest]
        self._dense = np.zeros(len(model.cost))

    def terms(self, columns: Integers, coefficients: Floats) -> tuple[Floats, float]:
        """Coefficients of the variables, and a constant, that equal those of the columns."""
        self._dense[:] = 0.0
        self._dense[columns] = coefficients
        chosen, rest = self._dense[self.columns], self._dense[len(self._dense) - self._rest :]
        steps = np.diff(chosen, prepend=0.0)[self.later]
        return np.concatenate([steps, rest]), math.fsum(chosen[self.first])

    @property
    def _rest(self) -> int:
        return len(self.variables) - len(self.steps)

    def add_rows(self, problem: Any) -> bool:
        """Adds the model's rows and the order of steps; False where a row cannot be kept."""
        for row in self._model.rows:
            coefficients, constant = self.terms(row.columns, row.coefficients)
            limit = row.limit - constant + ROUNDING * abs(row.limit)
            if coefficients.any():
                factor = _scale(coefficients)
                problem += _sum(self.variables, coefficients * factor) <= limit * factor
            elif limit < 0:
                return False
        for k in np.flatnonzero(np.diff(self.later) == 1).tolist():
            problem += self.steps[k + 1] - self.steps[k] <= 0
        return True

    def chosen(self) -> Integers:
        """The columns that the solved steps stand for, one per group."""
        taken = np.array([(step.varValue or 0.0) > 0.5 for step in self.steps], dtype=np.float64)
        passed = np.bincount(self.group[self.later], taken, len(self.first)).astype(np.int64)
        chosen: Integers = self.columns[self.first + passed]
        return chosen


def _sum(columns: Iterable[Any], coefficients: Floats) -> Any:
    pairs = zip(columns, coefficients.tolist(), strict=True)
    return pulp.LpAffineExpression((x, c) for x, c in pairs if c)


def _scale(values: Floats) -> float:
    """The power of two that brings the largest value near _SIZE: it rounds nothing."""
    largest = float(np.abs(values).max(initial=0.0))
    return 2.0 ** round(math.log2(_SIZE / largest)) if largest else 1.0


def _run(problem: Any, seconds: float, mip: bool = True, **options: Any) -> Any:
    # Not "threads": HiGHS refuses to run with another number than the process has used before.
    options |= {"parallel": "off", "random_seed": 0, "primal_feasibility_tolerance": _TOLERANCE}
    options |= {"mip_feasibility_tolerance": _TOLERANCE}
    if math.isfinite(seconds):
        options["time_limit"] = max(seconds, 0.0)
    # What presolve rewrites may miss the tolerance by a rounding once it is written back.
    for presolve in ("choose", "off"):
        problem.solve(_Highs(mip=mip, msg=False, presolve=presolve, **options))
        if (status := problem.solverModel.getModelStatus()) in _ENDS:
            return problem.solverModel
    raise RuntimeError(f"HiGHS ended with {status.name}")
