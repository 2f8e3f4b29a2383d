"""Every error a user can meet.

OctavoError
├── UsageError (exit 2)           a command, option, pipeline or calibration that cannot work
│   ├── UnknownName               with near misses
│   ├── NotDifferentiable         an operator that gradients cannot pass
│   ├── BudgetInfeasible          with the nearest budgets that can be kept
│   └── CalibrationError
├── GoalNotMet (exit 3)           the artifact is written, the goal is not reached
├── VerificationFailed (exit 4)   a graph, artifact or audit does not hold what it promises
├── ModelError (exit 5)           the model file is invalid, unsupported or unsafe
│   └── UnsafeModel
└── PassFailed (exit 1)           a bug, wrapped with the folder that reproduces it
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar, final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class OctavoError(Exception):
    """One sentence that says what happened, and where, why and what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.hint = what, where, why, hint

    def __str__(self) -> str:
        parts = (("where", self.where), ("why", self.why), ("hint", self.hint))
        lines = [f"  {label + ':':<7}{_indented(text)}" for label, text in parts if text]
        return "\n".join([self.what, *lines])


def _indented(text: str) -> str:
    """Later lines below the first, so that a caret stays under its character."""
    return text.strip().replace("\n", f"\n{' ' * 9}")


class UsageError(OctavoError):
    """The request cannot work as it was given."""

    exit_code = 2


@final
class UnknownName(UsageError):
    """A name that does not exist, with the names that look like it."""

    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, where: str = "", why: str = ""
    ) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {shown or 'none'}"
        super().__init__(f"unknown {kind} '{name}'", where=where, why=why, hint=hint)


@final
class BudgetInfeasible(UsageError):
    """Budgets that no plan keeps together; without any one of `limits`, some plan keeps the rest.

    `nearest` is, for each of them, the least that is feasible while all others are kept (`None`:
    they cannot be kept), `alone` the least without any other budget.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        nearest: Mapping[str, float | None],
        alone: Mapping[str, float | None],
    ) -> None:
        self.limits, self.nearest, self.alone = dict(limits), dict(nearest), dict(alone)
        budgets = " and ".join(_budget(name, f"{limit:.6g}") for name, limit in limits.items())
        known = ((n, _rounded_up(v)) for n, v in alone.items() if v is not None)
        least = (_budget(name, value) for name, value in known)
        offers = (_budget(n, _rounded_up(v)) for n, v in nearest.items() if v is not None)
        super().__init__(
            f"no plan keeps {budgets}" + (" together" if len(limits) > 1 else ""),
            why="the least alone: " + ", ".join(least),
            hint="give " + ", or ".join(offers),
        )


# The option that sets the budget of a resource, and the unit it is counted in.
_BUDGETS = {
    "bytes": ("--size", "B"),
    "seconds": ("--latency", "s"),
    "memory": ("--memory", "B"),
    "bops": ("--bops", ""),
    "damage": ("--max-damage", ""),
}


def _budget(name: str, value: str) -> str:
    """A budget as it is typed, or as a resource that no option sets."""
    option, unit = _BUDGETS.get(name, (name, ""))
    return f"{option} {value}{unit}"


def _rounded_up(value: float) -> str:
    """Six digits or all digits of a whole number, never less than the value."""
    if value == round(value) and value < 1e15:
        return str(round(value))
    digits = f"{value:.6g}"
    return digits if float(digits) >= value else f"{value * (1 + 1e-5):.6g}"


@final
class NotDifferentiable(UsageError):
    """An operator that has no form with gradients, and what can do without them."""

    def __init__(self, operator: str, node: str, where: str) -> None:
        super().__init__(
            f"{operator} of node '{node}' has no torch form, so the model has no gradients",
            where=where,
            hint="the estimators measured, layer-error and weight-error need none",
        )


@final
class CalibrationError(UsageError):
    """Calibration data that does not fit the model."""


@final
class GoalNotMet(OctavoError):
    """The artifact was written, but a goal the user set is not reached."""

    exit_code = 3


@final
class VerificationFailed(OctavoError):
    """A graph, an artifact or an audit does not hold what it promises."""

    exit_code = 4


class ModelError(OctavoError):
    """The model cannot be read: invalid or unsupported."""

    exit_code = 5


@final
class UnsafeModel(ModelError):
    """The model asks for something a model file must not do."""


@final
class PassFailed(OctavoError):
    """A pass raised an error nobody expected; `reproducer` holds what replays it."""
