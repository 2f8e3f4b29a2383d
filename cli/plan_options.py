"""The options of every command that plans: budgets, goals, and how a plan is found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, final

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


@final
@dataclass(frozen=True)
class PlanOptions:
    """Budgets, goals, and how a plan is found; one option of the command line each."""

    size: Annotated[str, typer.Option(help="Most bytes of all files: 4.9MB, or 25% of source.")] = (
        ""
    )
    latency: Annotated[
        str,
        typer.Option(
            help="Most time of one run: 3ms, or 0.5x of the source; none lifts the default, "
            "which is 1.1x the fastest plan."
        ),
    ] = ""
    memory: Annotated[str, typer.Option(help="Most activation memory: 8MB, or 50% of float.")] = ""
    bops: Annotated[
        str, typer.Option(help="Most bit operations (MACs x bits x bits): 12G, or 10%.")
    ] = ""
    max_damage: Annotated[
        float | None, typer.Option(min=0.0, help="Most predicted output damage of the plan.")
    ] = None
    minimise: Annotated[Objective, typer.Option(help="What is made least within the budgets.")] = (
        Objective.DAMAGE
    )
    max_drop: Annotated[
        str,
        typer.Option(help="Most that the metric may fall on held-out samples: 1%, or 0.01."),
    ] = ""
    metric: Annotated[
        str,
        typer.Option(
            "--eval", help="The metric, module:function(run) -> number; else labels of the data."
        ),
    ] = ""
    goal: Annotated[Goal, typer.Option(help="What --max-drop searches for.")] = Goal.SMALLEST
    profile: Annotated[
        Path | None, typer.Option(help="A table of latencies that octavo profile recorded.")
    ] = None
    structure: Annotated[
        bool,
        typer.Option(
            "--structure", help="Budgets choose fewer channels, heads and ranks as well as bits."
        ),
    ] = False
    refine_seconds: Annotated[
        float,
        typer.Option(min=0.0, help="Time for the search around the plan; 0 leaves it out."),
    ] = 20.0
    estimator: Annotated[
        str, typer.Option(help="How damage is found: auto or one of octavo sensitivity.")
    ] = "auto"
    top_k: Annotated[int, typer.Option(min=1, help="Plans to list in plan.json, best first.")] = 1
    pareto: Annotated[
        int, typer.Option(min=0, help="Points of the curve of damage against size.")
    ] = 0

    @property
    def request(self) -> dict[str, object]:
        """The options by the names that a Request has for them."""
        return {
            "objective": self.minimise.value,
            "size": self.size,
            "latency": self.latency,
            "memory": self.memory,
            "bops": self.bops,
            "max_damage": self.max_damage,
            "max_drop": self.max_drop,
            "metric": self.metric,
            "goal": self.goal.value,
            "profile": str(self.profile or ""),
            "structure": self.structure,
            "refine_seconds": self.refine_seconds,
            "estimator": self.estimator,
            "top_k": self.top_k,
            "pareto": self.pareto,
        }
