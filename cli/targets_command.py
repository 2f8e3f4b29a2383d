"""`octavo targets`: what each target can run, from the table that the passes read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import AsJson, print_json, print_message, print_table

if TYPE_CHECKING:
    from octavo.ir.target import KernelRow, Target

targets_app = typer.Typer(help="The targets and the kernels they have.", no_args_is_help=True)


@targets_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the targets."""
    from octavo.backends.registry import TARGETS

    rows = [(t.name, t.runtime, len(t.rows), t.opset) for t in TARGETS.values()]
    columns = ("target", "runtime", "kernels", "opset")
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)


@targets_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A target, for instance ort-cpu.")],
    as_json: AsJson = False,
) -> None:
    """Show every kernel of a target, and the operators that stay float."""
    from octavo.cli.target import target_of

    target = target_of(name)
    if as_json:
        print_json(_to_json(target))
        return
    print_message(
        f"{target.name}: {target.runtime}, activations {target.activation_dtype}, weights "
        f"{target.weight_bits} bits, opset {target.opset}; a kernel absorbs a following "
        f"{' or '.join(target.fused_activations)}"
    )
    columns = ("operator", "method", "kernels", "output", "needs", "time / float", "note")
    print_table(columns, [_cells(row) for row in target.rows])
    print_table(("stays float", "why"), target.never)


def _cells(row: KernelRow) -> tuple[object, ...]:
    needs = "; ".join(condition.text for condition in row.conditions)
    kernels = " or ".join(row.kernels) or "float"
    return row.op_type, row.method, kernels, row.output, needs, row.speed, row.note


def _to_json(target: Target) -> dict[str, object]:
    rows = [
        {**asdict(row), "conditions": [condition.text for condition in row.conditions]}
        for row in target.rows
    ]
    return {**vars(target), "rows": rows, "never": dict(target.never)}
