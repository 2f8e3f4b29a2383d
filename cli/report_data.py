"""What `report.html` shows, as plain data: filled from a compilation, later from the planner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

from octavo.ir.artifact import with_absorbed
from octavo.ir.facts import FLOAT, Plan
from octavo.ir.menu import Menu, Sensitivity, Solution

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.cli.compilation import Compiled
    from octavo.ir.artifact import AuditRow, BenchRow, PlannedNode
    from octavo.ir.artifact_io import Manifest
    from octavo.ir.menu import Damage, Group, Offer
    from octavo.passes.record import PassRecord

_FLOAT_BITS = 32
_SAME = 1e-9


@final
@dataclass(frozen=True)
class LayerRow:
    """One planned node: the option it got and why, its weight in bytes, and what ran.

    `kernel` is empty and `ok` is None where nothing was audited; `source_seconds` are those of
    the float node that the plan was decided by, `seconds` those of the kernel that ran.
    """

    name: str
    op_type: str
    option: str
    reason: str
    weight_bytes: int
    source_bytes: int
    kernel: str = ""
    ok: bool | None = None
    source_seconds: float | None = None
    seconds: float | None = None


@final
@dataclass(frozen=True)
class GroupRow:
    """One decision group: the option it got, bits per weight, and the damage this option does.

    `bits` is None where no weight is stored, `damage` where it was not estimated.
    """

    name: str
    nodes: int
    option: str
    reason: str = ""
    bits: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    damage: float | None = None
    standard_error: float = 0.0


@final
@dataclass(frozen=True)
class CurvePoint:
    """One plan of the Pareto curve, in predicted bytes, seconds and damage."""

    bytes: float | None
    seconds: float | None
    damage: float | None
    chosen: bool = False


@final
@dataclass(frozen=True)
class Prediction:
    """Seconds that were predicted for a model or variant, and those that were measured."""

    name: str
    predicted_seconds: float
    measured_seconds: float


@final
@dataclass(frozen=True)
class Ranking:
    """How one estimator orders the groups: the damage of each, by group name.

    `rank_correlation` is Spearman's, with the measured damage of the same options.
    """

    estimator: str
    metric: str
    damage: Mapping[str, float]
    rank_correlation: float | None = None
    seconds: float | None = None


@final
@dataclass(frozen=True)
class ReportData:
    """Everything on the page. The fields from `groups` on are empty where no planner ran.

    `files` starts with the source and ends with the artifact; `facts` are short results
    (name → text), `config` is the request with its defaults. `metric` says what damage is;
    `activations` is the damage of quantizing a value, by value name.
    """

    title: str
    files: tuple[BenchRow, ...]
    facts: Mapping[str, str]
    notes: tuple[str, ...]
    config: Mapping[str, str]
    layers: tuple[LayerRow, ...]
    passes: tuple[PassRecord, ...]
    cost_source: str = ""
    groups: tuple[GroupRow, ...] = ()
    metric: str = "damage"
    solution: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    activations: Mapping[str, Damage] = field(default_factory=dict)


def report_data(compiled: Compiled, manifest: Manifest) -> ReportData:
    """What a compilation knows; planner facts on its model are added where there are any."""
    audited = {row.node: row for row in compiled.audit.rows}
    planned = with_absorbed(compiled.artifact.planned)
    plan = compiled.model.find(Plan)
    sizes = (manifest.source.name, compiled.artifact.path.name)
    rows = (compiled.bench.rows[0], compiled.bench.rows[-1])
    data = ReportData(
        title=manifest.source.name,
        files=tuple(replace(r, file=n) for r, n in zip(rows, sizes, strict=True)),
        facts=_facts(compiled),
        notes=(*compiled.audit.findings, *compiled.notes),
        config=_config(compiled, manifest),
        layers=tuple(_layer(node, audited.get(node.node)) for node in planned),
        passes=compiled.records,
        cost_source="" if plan is None else plan.source,
    )
    menu, solution = compiled.model.find(Menu), compiled.model.find(Solution)
    if menu is None or solution is None:
        return data
    found = compiled.model.find(Sensitivity)
    seconds = (solution.float_seconds, solution.totals["seconds"])
    predictions = [
        Prediction(name, predicted, row.median_seconds)
        for name, predicted, row in zip(sizes, seconds, rows, strict=True)
        if row.speed
    ]
    return with_planner(data, menu, solution, () if found is None else (found,), predictions)


def with_planner(
    data: ReportData,
    menu: Menu,
    solution: Solution,
    sensitivities: Sequence[Sensitivity] = (),
    predictions: Sequence[Prediction] = (),
) -> ReportData:
    """The page with what the planner decided, on what grounds, and among which other plans.

    The first of `sensitivities` is the one that was decided by. Where one is called "measured",
    every other gets its rank correlation with it.
    """
    first = sensitivities[0] if sensitivities else None
    return replace(
        data,
        groups=tuple(_group(g, menu, solution, first) for g in menu.groups.values()),
        metric=first.metric if first else data.metric,
        solution=_solution(solution),
        curve=_curve(solution),
        predictions=tuple(predictions),
        rankings=_rankings(sensitivities) if len(sensitivities) > 1 else (),
        activations=first.by_value if first else {},
    )


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's ρ: Pearson's correlation of the ranks, ties sharing their mean rank.

    None where it is undefined: fewer than two pairs, one side constant, or NaN.
    """
    import numpy as np

    if len(left) < 2 or not np.isfinite([*left, *right]).all():
        return None
    a, b = _ranks(left), _ranks(right)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    import numpy as np

    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _facts(compiled: Compiled) -> dict[str, str]:
    fidelity, rows = compiled.fidelity, compiled.audit.rows
    facts = {
        "relative output error": f"{fidelity.relative_error:.4f}",
        "cosine": f"{fidelity.cosine:.5f}",
    }
    if fidelity.agreement is not None:
        facts["same arg-max"] = f"{100 * fidelity.agreement:.1f} %"
    facts["nodes as planned"] = f"{sum(row.ok for row in rows)} of {len(rows)}"
    return facts


def _config(compiled: Compiled, manifest: Manifest) -> dict[str, str]:
    samples = manifest.calibration_samples
    request = {name.replace("_", " "): str(value) for name, value in manifest.config.items()}
    return {
        "target": manifest.target,
        "pipeline": manifest.pipeline,
        "calibration": f"{samples} samples" if samples else "none",
        "seed": str(manifest.seed),
        **{name: value or "none" for name, value in request.items()},
        "measured": f"{compiled.bench.rounds} rounds; {compiled.bench.environment}",
        "compared": f"{compiled.fidelity.samples} feed(s)",
        "source sha256": manifest.source.sha256,
        "versions": ", ".join(f"{name} {text}" for name, text in manifest.versions.items()),
    }


def _layer(node: PlannedNode, row: AuditRow | None) -> LayerRow:
    kernel = f"in {node.absorbed_by}" if node.absorbed_by else ""
    return LayerRow(
        name=node.node,
        op_type=node.op_type,
        option=node.option,
        reason=(row.reason if row else "") or node.reason,
        weight_bytes=node.weight_bytes,
        source_bytes=node.source_bytes,
        kernel=(row.kernel if row else "") or kernel,
        ok=row.ok if row else None,
        source_seconds=node.seconds.get("float"),
        seconds=row.seconds if row else None,
    )


def _group(group: Group, menu: Menu, solution: Solution, found: Sensitivity | None) -> GroupRow:
    name = solution.options.get(group.name, "float")
    row = GroupRow(group.name, len(group.nodes), name, group.reason)
    offer = next((o for o in menu.offers[group.name] if o.name == name), None)
    if offer is not None:
        row = replace(row, bits=_bits(offer), bytes=offer.bytes, seconds=offer.seconds)
    damage = None if found is None else found.by_group.get(group.name, {}).get(name)
    if damage is None:
        return row
    return replace(row, damage=damage.mean, standard_error=damage.standard_error)


def _bits(offer: Offer) -> float | None:
    """Bits per weight, the mean over the nodes that store one; None where none does."""
    options = offer.options.values()
    bits = [o.weight.bits if o.weight else _FLOAT_BITS for o in options if o.weight or o == FLOAT]
    return sum(bits) / len(bits) if bits else None


def _solution(solution: Solution) -> dict[str, str]:
    limits = ", ".join(f"{name} ≤ {value:.6g}" for name, value in solution.limits.items())
    totals = ", ".join(f"{name} {value:.6g}" for name, value in solution.totals.items())
    return {
        "status": f"{solution.status}, gap {solution.gap:.2g}",
        "solver": f"{solution.solver}, {solution.seconds:.2f} s",
        "objective": solution.objective,
        "limits": limits or "none",
        "totals": totals,
        "dominated options": str(solution.dominated),
        "further plans": str(len(solution.alternatives)),
    }


def _curve(solution: Solution) -> tuple[CurvePoint, ...]:
    """The curve with the chosen plan on it, added where the curve lacks it."""
    chosen = replace(_point(solution.totals), chosen=True)
    points = [_point(totals) for totals in solution.curve]
    same = [_close(point, chosen) for point in points]
    if points and not any(same):
        return (*points, chosen)
    return tuple(chosen if here else point for point, here in zip(points, same, strict=True))


def _point(totals: Mapping[str, float]) -> CurvePoint:
    return CurvePoint(totals.get("bytes"), totals.get("seconds"), totals.get("damage"))


def _close(left: CurvePoint, right: CurvePoint) -> bool:
    # Totals are sums of floats: those of equal plans differ by the order of addition.
    pairs = (
        (left.bytes, right.bytes),
        (left.seconds, right.seconds),
        (left.damage, right.damage),
    )
    return all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=_SAME))
        for a, b in pairs
    )


def _rankings(sensitivities: Sequence[Sensitivity]) -> tuple[Ranking, ...]:
    """One ranking an estimator: a group counts with the worst of its options."""
    truth = next((s for s in sensitivities if s.estimator == "measured"), None)
    return tuple(
        Ranking(
            estimator=s.estimator,
            metric=s.metric,
            damage={g: max(d.mean for d in o.values()) for g, o in s.by_group.items() if o},
            rank_correlation=None if truth is None or s is truth else _agreement(s, truth),
            seconds=s.seconds,
        )
        for s in sensitivities
    )


def _agreement(estimate: Sensitivity, truth: Sensitivity) -> float | None:
    """Rank correlation over all options of all groups that both know."""
    pairs = [
        (damage.mean, truth.by_group[group][option].mean)
        for group, options in estimate.by_group.items()
        for option, damage in options.items()
        if option in truth.by_group.get(group, {})
    ]
    return rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
