"""Plans to search from: the same budgets, other ideas of what each group's rounding does.

Damages of single groups do not add: large ones saturate, and errors of one kind reinforce each
other. Roots of the measured damages and estimates from gradients err in other ways, so that the
best of their plans, by its measured damage, is a better place to begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.ir.errors import OctavoError
from octavo.passes.estimators import estimator
from octavo.passes.planning import Planning

if TYPE_CHECKING:
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.evolve import Choice
    from octavo.passes.output_damage import Metric
    from octavo.passes.programme import Candidate, Programme

_POWERS = (0.75, 0.5)
_SAMPLES = 64
_SOLVE_SECONDS = 10.0


def starts(
    model: Model,
    ctx: PassContext,
    batches: Batches,
    estimators: Sequence[str],
    metric: Metric,
    levels: Mapping[str, Sequence[int]],
    limits: Mapping[str, float],
    choice: Choice,
) -> Iterator[tuple[str, Choice]]:
    """Names and choices within `levels`, all others as in `choice`; what cannot be is a remark.

    Groups without levels keep their offer, so that all plans round the same activations.
    """
    open_levels = {n: levels.get(n, (choice[n],)) for n in choice}
    planned = Planning(model, ctx).programme
    for power in _POWERS:
        found = _solved(_raised(planned, power), open_levels, limits)
        if found is not None:
            yield f"damage ** {power}", found
    for name in estimators:
        find = estimator(name)
        try:
            estimate = find(model, ctx, batches, _SAMPLES, metric)
        except OctavoError as error:
            ctx.remark("note", "", f"no plan by {name} to begin with: {str(error).splitlines()[0]}")
            continue
        programme = Planning(model.with_fact(estimate), ctx).programme
        found = _solved(programme, open_levels, limits)
        if found is not None:
            yield name, found


def _raised(programme: Programme, power: float) -> Programme:
    def raised(candidate: Candidate) -> Candidate:
        return replace(candidate, damage=max(candidate.damage, 0.0) ** power)

    groups = {name: tuple(map(raised, of)) for name, of in programme.groups.items()}
    return replace(programme, groups=groups)


def _solved(
    programme: Programme, levels: Mapping[str, Sequence[int]], limits: Mapping[str, float]
) -> Choice | None:
    """The best choice among the levels, `None` where none was found in time."""
    from octavo.passes.solve import solve

    # Of what others need there is one level.
    groups = {
        name: tuple(replace(of[k], needs={}) for k in levels[name])
        for name, of in programme.groups.items()
    }
    rows = programme.memory_rows if "memory" in limits else ()
    try:
        answer = solve(
            replace(programme, groups=groups, memory_rows=rows), "damage", limits,
            gap=1e-3, time_limit_seconds=_SOLVE_SECONDS,
        )  # fmt: skip
    except OctavoError:
        return None
    return {name: levels[name][index] for name, index in answer.choice.items()}
