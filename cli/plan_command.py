"""`octavo plan`: decide without building, and show what was decided between."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli import compile_options as options
from octavo.cli.compile_command import batches_of
from octavo.cli.option_groups import spelled_out
from octavo.cli.plan_options import PlanOptions
from octavo.cli.render import (
    AsJson,
    format_bytes,
    format_seconds,
    print_json,
    print_message,
    print_table,
)
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from octavo.cli.request import Request
    from octavo.ir.menu import Menu, Sensitivity, Solution
    from octavo.ir.model import Model

_RESOURCES = ("bytes", "seconds", "memory", "bops", "damage")


@spelled_out
def plan(
    model: options.ModelFile,
    compiling: options.CompileOptions,
    planning: PlanOptions,
    calibration: options.Calibration = "",
    preprocess: options.Preprocess = "",
    cache: options.UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Decide what each group of nodes gets under budgets, without building the artifact.

    Prints every group with the option it gets, the totals beside the budgets, and the curve of
    damage against size. Without a budget, at most 20 % of the source's bytes.
    """
    if planning.max_drop:
        message = "an accuracy goal needs built artifacts"
        raise UsageError(message, hint="give --max-drop to octavo compile")
    request = compiling.request(planning)
    _show(*_planned(model, calibration, preprocess, request, cache), as_json)


def _planned(
    path: Path, calibration: str, preprocess: str, request: Request, use_cache: bool
) -> tuple[Model, tuple[str, ...]]:
    from octavo.cli.compilation import plan_model
    from octavo.cli.progress import progress_bars
    from octavo.ir.cache import Cache, default_folder
    from octavo.ir.read import read

    scratch = tempfile.TemporaryDirectory(prefix="octavo-plan-")
    with progress_bars() as progress, scratch as workdir:
        source = read(path)
        return plan_model(
            source,
            calibration=batches_of(calibration, preprocess, source),
            request=request,
            cache=Cache(default_folder()) if use_cache else None,
            workdir=Path(workdir),
            progress=progress,
        )


def _show(model: Model, notes: tuple[str, ...], as_json: bool) -> None:
    from octavo.ir.menu import Menu, Sensitivity, Solution
    from octavo.ir.plan_json import planning_json

    menu, found = model.fact(Menu), model.fact(Sensitivity)
    solution = model.fact(Solution)
    if as_json:
        print_json({**planning_json(menu, found, solution), "notes": notes})
        return
    columns = ("group", "nodes", "option", "bytes", "of float", "damage", "± error")
    print_table(columns, _group_rows(menu, found, solution))
    print_table(("", "plan", "budget"), _total_rows(solution))
    if solution.curve:
        rows = (_point(point) for point in solution.curve)
        print_table(("size", "time", "damage"), rows, title="least damage by size")
    for number, (totals, chosen) in enumerate(solution.alternatives, start=2):
        moved = [f"{g}: {o}" for g, o in chosen.items() if o != solution.options[g]]
        print_message(f"plan {number}:      damage {totals['damage']:.3e}, " + ", ".join(moved))
    for line in _lines(menu, found, solution, notes):
        print_message(line)


def _group_rows(menu: Menu, found: Sensitivity, solution: Solution) -> Iterator[tuple[object, ...]]:
    """Groups with weights, in topological order."""
    for name, group in menu.groups.items():
        offers = {offer.name: offer for offer in menu.offers[name]}
        offer, whole = offers[solution.options[name]], menu.offers[name][0]
        if not whole.bytes:
            continue
        damage = found.damage(name, offer.name)
        share = f"{100 * offer.bytes / whole.bytes:.0f} %"
        yield (
            name, len(group.nodes), offer.name, offer.bytes, share,
            f"{damage.mean:.2e}", f"{damage.standard_error:.0e}",
        )  # fmt: skip


def _total_rows(solution: Solution) -> Iterator[tuple[object, ...]]:
    for name in _RESOURCES:
        if name in solution.totals:
            limit = solution.limits.get(name)
            yield name, _quantity(name, solution.totals[name]), _quantity(name, limit)


def _quantity(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("bytes", "memory"):
        return format_bytes(round(value))
    return format_seconds(value) if name == "seconds" else f"{value:.4g}"


def _point(totals: Mapping[str, float]) -> tuple[object, ...]:
    return (
        _quantity("bytes", totals["bytes"]),
        _quantity("seconds", totals["seconds"]),
        f"{totals['damage']:.3e}",
    )


def _lines(
    menu: Menu, found: Sensitivity, solution: Solution, notes: tuple[str, ...]
) -> Iterator[str]:
    connective = sum(1 for offers in menu.offers.values() if not offers[0].bytes)
    yield (
        f"solved:      {solution.status} to a gap of {solution.gap:.1e} in "
        f"{solution.seconds:.2f} s by {solution.solver}; {solution.dominated} offers dominated"
    )
    yield f"damage:      {found.metric}, {found.estimator} on {found.samples} samples"
    yield f"seconds:     {menu.cost_source}"
    yield f"groups:      {len(menu.groups)}, {connective} of them without weights (not listed)"
    yield from (f"note:        {note}" for note in notes)
