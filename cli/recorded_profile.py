"""What a model costs by a table that `octavo profile` recorded, here or on another device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.cli.target import backend_of
from octavo.ir.errors import UsageError
from octavo.ir.latency_table import read_table
from octavo.ir.table_cost import TableCost

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.ir.target import Target


def cost_of_profile(
    path: Path, model: Model, target: Target, feed: Feed, threads: int
) -> tuple[TableCost, tuple[str, ...]]:
    """Costs by a recorded profile, and how its device differs from this one, as warnings.

    `model` is canonicalized, `feed` gives the shapes. Raises UsageError for a file that is no
    profile, is of another runtime, or knows no node of the model.
    """
    table = read_table(path)
    here = backend_of(target.name).environment(threads)
    record = f"octavo profile {model.source.name} -o {path.name} --target {target.name}"
    hint = f"on the device, with the shapes given here: {record}"
    recorded = table.environment.partition(", ")[0]
    if recorded.partition(" ")[0] != here.partition(" ")[0]:
        message = f"{path.name} was recorded with {recorded}, which {target.name} does not run on"
        raise UsageError(message, hint=hint)
    cost = TableCost.of(model, table, target, feed)
    if not cost.known:
        message = f"{path.name} holds no node of the model"
        raise UsageError(message, why="it is of another model, or of other shapes", hint=hint)
    warnings = [f"{path.name} was recorded elsewhere: {t}" for t in table.differences(here)]
    if missing := cost.total - cost.known:
        warnings.append(
            f"{missing} of {cost.total} nodes are not in {path.name}: their seconds are estimated"
        )
    return cost, tuple(warnings)
