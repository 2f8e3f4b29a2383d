"""What a compilation is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

# The budget of the preset mixed where none is given.
DEFAULT_SIZE = "20%"


@final
@dataclass(frozen=True)
class Request:
    """What a compilation was asked for; the defaults are part of every output.

    `pipeline` is a preset name or a pipeline text, empty for the preset the data allows.
    `shapes` and `threads` say what latency is measured with. `max_recurrent_error` bounds the
    relative output error that a dynamic LSTM kernel may add; below `min_agreement`, the share of
    rows with the same arg-max, dynamic kernels without data give way to weight-only ones.
    `portable` leaves only weights that OpenVINO and TensorRT execute too. `structure` lets budgets
    choose fewer channels, heads and ranks as well.

    `size`, `latency`, `memory` and `bops` are budgets as text, `max_damage` bounds the predicted
    output damage and makes `objective` (size or latency) what is minimised. `max_drop` asks for
    the smallest or fastest artifact (`goal`) whose metric falls by no more: `metric` names
    `module:function`, empty for labels in the data. `profile` is a recorded table of latencies;
    `refine_seconds` bounds the search around the plan; `estimator` says how damage is found.
    """

    target: str = "ort-cpu"
    pipeline: str = ""
    keep_float: tuple[str, ...] = ()
    shapes: Mapping[str, Sequence[int]] | None = None
    threads: int = 1
    seed: int = 0
    measure: bool = True
    max_recurrent_error: float = 0.02
    min_agreement: float = 0.6
    portable: bool = False
    objective: str = "damage"
    size: str = ""
    latency: str = ""
    memory: str = ""
    bops: str = ""
    max_damage: float | None = None
    max_drop: str = ""
    metric: str = ""
    goal: str = "smallest"
    profile: str = ""
    structure: bool = False
    refine_seconds: float = 20.0
    estimator: str = "auto"
    top_k: int = 1
    pareto: int = 0

    @property
    def planned(self) -> bool:
        """Whether something is asked for that only a plan answers."""
        budgets = (self.size, self.latency, self.memory, self.bops, self.max_drop)
        numbers = self.max_damage is not None or self.pareto > 0 or self.top_k > 1
        return any(budgets) or numbers or self.objective != "damage" or self.portable

    @property
    def budgets(self) -> dict[str, str | float]:
        """The budgets and goals that were given, by option."""
        named = {
            "size": self.size, "latency": self.latency, "memory": self.memory, "bops": self.bops,
            "max_damage": self.max_damage, "max_drop": self.max_drop, "metric": self.metric,
        }  # fmt: skip
        given: dict[str, str | float] = {name: value for name, value in named.items() if value}
        if self.planned:
            given |= {
                "objective": self.objective,
                "goal": self.goal,
                "refine_seconds": self.refine_seconds,
                "estimator": self.estimator,
            }
            given |= {"structure": "yes"} if self.structure else {}
        return given
