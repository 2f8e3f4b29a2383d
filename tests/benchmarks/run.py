"""Measure octavo on real models against its goals: `python tests/benchmarks/run.py`.

Exit code 0 when every goal is met, 3 when one is not, 1 when a model could not be measured.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from cases import CASES, LOW_BIT_CASES
from measure import startup_seconds
from measure_case import measure_case
from report import Goal, Row, show
from rich.console import Console
from rich.markup import escape

from octavo.ir.errors import OctavoError

_STARTUP = "startup"


def main(
    models: Annotated[
        list[str] | None, typer.Option(help="A model to measure; repeatable.")
    ] = None,
    low_bits: Annotated[bool, typer.Option(help="The cases of fewer than 8 bits.")] = False,
    peers: Annotated[bool, typer.Option(help="Measure other tools in the same run.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
) -> None:
    """Print, for every model, size, score, fidelity, speed and compile cost beside the goals."""
    known = [*(case.name for case in (*CASES, *LOW_BIT_CASES)), _STARTUP]
    usual = LOW_BIT_CASES if low_bits else CASES
    chosen = models or [*(case.name for case in usual), *([] if low_bits else [_STARTUP])]
    if unknown := sorted(set(chosen) - set(known)):
        raise typer.BadParameter(f"{', '.join(unknown)}; known are {', '.join(known)}")
    console = Console(width=None if Console().is_terminal else 160)
    results: dict[str, list[Row]] = {}
    failed = False
    for case in (case for case in (*CASES, *LOW_BIT_CASES) if case.name in chosen):
        with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
            try:
                results[case.name] = measure_case(case, Path(folder), peers, threads)
            except (OctavoError, RuntimeError, OSError) as error:
                console.print(f"[red]{case.name}[/red]: {escape(str(error))}")
                failed = True
                continue
        show(console, case.name, results[case.name])
    if _STARTUP in chosen:
        results[_STARTUP] = _startup()
        show(console, _STARTUP, results[_STARTUP])
    met = [row.met for rows in results.values() for row in rows if row.met is not None]
    console.print(f"{sum(met)} of {len(met)} goals met")
    if output is not None:
        content = {name: [row.to_json() for row in rows] for name, rows in results.items()}
        output.write_text(json.dumps(content, indent=2) + "\n")
    raise typer.Exit(1 if failed else 0 if all(met) else 3)


def _startup() -> list[Row]:
    commands = {"import octavo": (["-c", "import octavo"], 0.3)}
    commands["octavo --help"] = (["-m", "octavo", "--help"], 0.5)
    return [
        Row(name, "seconds", {"octavo": startup_seconds(arguments)}, Goal(limit, at_least=False))
        for name, (arguments, limit) in commands.items()
    ]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
