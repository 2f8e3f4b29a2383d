"""The contract of a pass, and what a pass may ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from octavo.ir.cache import Cache
    from octavo.ir.calibration import Batches
    from octavo.ir.evaluate import CostModel, Evaluator
    from octavo.ir.facts import Fact
    from octavo.ir.model import Model
    from octavo.ir.target import Target

RemarkKind = Literal["applied", "missed", "note"]
Scalar = int | float | str | bool | None


@final
@dataclass(frozen=True)
class Remark:
    """One thing a pass did, could not do, or wants known, attached to a node or value."""

    kind: RemarkKind
    where: str
    text: str
    values: dict[str, Scalar] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Statistic:
    """What a pass wants measured on a value while calibration data streams by.

    `kind` is "range" (a histogram and the interval chosen from it); later kinds, second
    moments for one, are collected in the same sweep.
    """

    kind: Literal["range"]
    value: str


@final
@dataclass
class Recorder:
    """What one pass reports; the runner owns it and reads it when the pass returns."""

    remarks: list[Remark] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)


@final
@dataclass(frozen=True)
class PassContext:
    """The services of one run. Explicit, never ambient; only `recorder` and `progress` act.

    `stand_in` are feeds of random numbers, for what needs inputs where there is no `calibration`.
    `cost_of` gives the costs of a model with other shapes than the one that `cost` knows.
    """

    target: Target
    cost: CostModel
    evaluator: Evaluator
    executor: Executor
    workdir: Path
    calibration: Batches | None = None
    stand_in: Batches | None = None
    cache: Cache | None = None
    seed: int = 0
    statistics: tuple[Statistic, ...] = ()
    recorder: Recorder = field(default_factory=Recorder)
    cost_of: Callable[[Model], CostModel] | None = None
    progress: Callable[[str, int, int], None] = lambda label, done, total: None

    def remark(self, kind: RemarkKind, where: str, text: str, **values: Scalar) -> None:
        self.recorder.remarks.append(Remark(kind, where, text, values))

    def count(self, name: str, times: int = 1) -> None:
        self.recorder.counters[name] += times

    def rng(self, label: str) -> np.random.Generator:
        """A generator derived from the seed and a label, so that passes do not disturb others."""
        return np.random.default_rng([self.seed, *label.encode()])


class Pass(ABC):
    """A frozen value with a name and typed options; concrete passes are final dataclasses.

    `run` is pure given (model, options, ctx.seed). It owns the clone it is given and returns
    it, or a Model with other facts. Facts that are not in `preserves` or `produces` are
    dropped when the graph changed. "Does not apply here" is a remark, never an exception.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type[Fact], ...]] = ()
    produces: ClassVar[tuple[type[Fact], ...]] = ()
    preserves: ClassVar[tuple[type[Fact], ...]] = ()

    @abstractmethod
    def run(self, model: Model, ctx: PassContext) -> Model:
        """The changed model."""

    def statistics(self, model: Model, ctx: PassContext) -> tuple[Statistic, ...]:
        """What this pass wants calibration to measure, given the model calibration will see."""
        return ()
