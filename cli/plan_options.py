"""The options of every command that plans: budgets, goals, and how a plan is found."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Objective(StrEnum):
    """What a plan makes least."""

    DAMAGE = "damage"
    SIZE = "size"
    LATENCY = "latency"


class Goal(StrEnum):
    """Which artifact an accuracy goal asks for."""

    SMALLEST = "smallest"
    FASTEST = "fastest"


Size = Annotated[str, typer.Option(help="Most bytes of all files: 4.9MB, or 25% of source.")]
Latency = Annotated[
    str,
    typer.Option(
        help="Most time of one run: 3ms, or 0.5x of the source; none lifts the default, "
        "which is 1.1x the fastest plan."
    ),
]
Memory = Annotated[str, typer.Option(help="Most activation memory: 8MB, or 50% of float.")]
Bops = Annotated[str, typer.Option(help="Most bit operations (MACs x bits x bits): 12G, or 10%.")]
MaxDamage = Annotated[
    float | None, typer.Option(min=0.0, help="Most predicted output damage of the plan.")
]
Minimise = Annotated[
    Objective, typer.Option("--minimise", help="What is made least within the budgets.")
]
MaxDrop = Annotated[
    str, typer.Option(help="Most that the metric may fall on held-out samples: 1%, or 0.01.")
]
Eval = Annotated[
    str,
    typer.Option(
        "--eval", help="The metric, module:function(run) -> number; else labels of the data."
    ),
]
GoalOption = Annotated[Goal, typer.Option("--goal", help="What --max-drop searches for.")]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="A table that octavo profile recorded.")
]
RefineSeconds = Annotated[
    float, typer.Option(min=0.0, help="Time for the search around the plan; 0 leaves it out.")
]
Estimator = Annotated[str, typer.Option(help="How damage is found; see octavo sensitivity.")]
TopK = Annotated[int, typer.Option(min=1, help="Further plans to list, best first.")]
Pareto = Annotated[int, typer.Option(min=0, help="Points of the curve of damage against size.")]
