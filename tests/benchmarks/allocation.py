"""Which allocator spends bytes best: `python tests/benchmarks/allocation.py`.

Weights alone are rounded, plainly, symmetric per channel; every row has the same quantizer and
keeps to the bytes of the uniform plan, whose groups all have that many bits. What a plan does to
the outputs is measured on data that no row has seen; so is the score.

    uniform        every group at the same bits
    size-greedy    the group with most bytes loses a bit until the plan fits; no data
    Hessian trace  estimator `hessian`, allocate
    LampQ          estimator `lampq`, allocate, refine{method=swap}
    octavo         estimator `measured`, allocate, refine

Exit code 3 where octavo loses a cell by more than one standard error of the difference, or leaves
more than half of the damage of 4 uniform bits.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import typer
from cases import CASES, Case
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from task import Array, Feed, Task

from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.cli.calibration_data import load_calibration
from octavo.ir.cache import Cache
from octavo.ir.calibration import Batches, samples_of
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import OctavoError
from octavo.ir.facts import Choice as PlanChoice
from octavo.ir.facts import Plan
from octavo.ir.menu import Menu, Offer, Solution
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.allocate import Allocate, choice_of
from octavo.passes.base import PassContext
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.offer_options import OfferOptions
from octavo.passes.output_damage import OutputDamage
from octavo.passes.pipeline import Pipeline
from octavo.passes.refine import Refine
from octavo.passes.rounded_model import RoundedModel
from octavo.passes.sensitivity import AnalyseSensitivity

_MODELS = (
    "fashion-vit", "fashion-resnet", "fashion-mobile", "efficientnet-lite0", "minilm", "ppocr-rec"
)  # fmt: skip
_BITS = (6, 5, 4, 3)
_GOAL_BITS, _GOAL = 4, 0.5
_WIDTHS = (8, 7, 6, 5, 4, 3, 2)
_KNOWN_BITS = set(map(str, _WIDTHS))
_OURS = "octavo"
_ESTIMATED = {
    "Hessian trace": ("hessian", ()),
    "LampQ": ("lampq", (Refine(method="swap"),)),
    _OURS: ("measured", (Refine(),)),
}

Choice = Mapping[str, int]


@final
@dataclass(frozen=True)
class Cell:
    """One plan: bytes, damage of every held-out sample, the task's score and seconds of choosing.

    A row that found no plan has no samples, and says why.
    """

    row: str
    bits: int
    bytes: int
    samples: Array
    score: float | None
    seconds: float
    why: str = ""

    @property
    def damage(self) -> float:
        """Mean over the held-out samples."""
        return float(self.samples.mean()) if self.samples.size else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        found = {"row": self.row, "bits": self.bits, "bytes": self.bytes, "damage": self.damage}
        return {**found, "score": self.score, "seconds": self.seconds, "why": self.why}


@final
@dataclass(frozen=True)
class HeldOut:
    """Data that no row has seen, with the source's outputs; `task` scores it where it is whole."""

    feeds: Sequence[Feed]
    references: Sequence[Mapping[str, Array]]
    damage: OutputDamage
    task: Task | None
    output: str

    @staticmethod
    def of(model: Model, ctx: PassContext, feeds: Sequence[Feed], task: Task | None) -> HeldOut:
        run = ctx.evaluator.load(model)
        names = [value.name or "" for value in model.graph.inputs]
        fed = [{name: feed[name] for name in names} for feed in feeds]
        output = model.graph.outputs[0].name or ""
        references = [run(feed) for feed in fed]
        return HeldOut(fed, references, OutputDamage.of(model), task, output)

    def measure(self, rounded: RoundedModel, choice: Choice) -> tuple[Array, float | None]:
        """Damage per sample, and the score."""
        weights = rounded.weights(choice)
        damages, answers = [], []
        for feed, reference in zip(self.feeds, self.references, strict=True):
            outputs = rounded.run({**feed, **weights})
            damages.append(self.damage.per_sample(reference, outputs, samples_of(feed)))
            answers.append(outputs[self.output])
        score = self.task.score(answers)[self.task.headline] if self.task is not None else None
        return np.concatenate(damages), score


@final
@dataclass(frozen=True)
class Comparison:
    """One model, with what every row shares."""

    model: Model
    ctx: PassContext
    held_out: HeldOut

    @staticmethod
    def of(case: Case, ctx: PassContext) -> Comparison:
        path = case.model()
        source = read(path)
        calibration, feeds, task = held_out_data(case, path, source, ctx.workdir)
        offers = OfferOptions(
            bits=_WIDTHS, static=False, dynamic=False, weight_only=False,
            float16=False, half_scales=False,
        )  # fmt: skip
        ctx = replace(ctx, calibration=calibration)
        model = Pipeline((Canonicalize(), offers)).run(source, ctx).model
        return Comparison(model, ctx, HeldOut.of(source, ctx, feeds, task))

    def cells(self, widths: Sequence[int], rows: Sequence[str]) -> Iterator[Cell]:
        """Uniform, size-greedy and the named rows, of all widths."""
        estimated = {row: self._estimated(_ESTIMATED[row][0]) for row in rows}
        menu = _rounded_only(self.model.fact(Menu))
        rounded = self._rounded(menu)
        for bits in widths:
            uniform = _uniform(menu, bits)
            limit = _bytes(menu, uniform)
            yield self._cell(menu, rounded, "uniform", bits, uniform, 0.0)
            begin = time.perf_counter()
            plan: Choice | str = _greedy(menu, limit)
            yield self._cell(menu, rounded, "size-greedy", bits, plan, time.perf_counter() - begin)
            for row in rows:
                begin = time.perf_counter()
                plan = self._planned(menu, estimated[row], limit, _ESTIMATED[row][1])
                yield self._cell(menu, rounded, row, bits, plan, time.perf_counter() - begin)

    def _cell(
        self,
        menu: Menu,
        rounded: RoundedModel,
        row: str,
        bits: int,
        plan: Choice | str,
        spent: float,
    ) -> Cell:
        if isinstance(plan, str):
            return Cell(row, bits, 0, np.zeros(0), None, spent, plan)
        samples, score = self.held_out.measure(rounded, plan)
        return Cell(row, bits, _bytes(menu, plan), samples, score, spent)

    def _estimated(self, name: str) -> Model | str:
        """The model with damages, or why there are none."""
        try:
            return Pipeline((AnalyseSensitivity(name),)).run(self.model, self.ctx).model
        except OctavoError as error:
            return str(error).splitlines()[0]

    def _planned(
        self, menu: Menu, estimated: Model | str, limit: int, passes: tuple[Refine, ...]
    ) -> Choice | str:
        if isinstance(estimated, str):
            return estimated
        allocate = Allocate(size=str(limit), latency="none")
        model = estimated.with_fact(menu)
        found = Pipeline((allocate, *passes)).run(model, self.ctx).model
        return choice_of(menu, found.fact(Solution).options)

    def _rounded(self, menu: Menu) -> RoundedModel:
        """Runs any plan of the menu: none rounds activations."""
        options = {
            node: chosen
            for name, index in _uniform(menu, _WIDTHS[0]).items()
            for node, chosen in menu.offers[name][index].options.items()
        }
        plan = Plan({node: PlanChoice(option, "") for node, option in options.items()}, "")
        model = self.model.with_fact(menu).with_fact(plan)
        return RoundedModel.of(model, self.ctx, list(menu.groups))


def held_out_data(
    case: Case, path: Path, source: Model, folder: Path
) -> tuple[Batches, Sequence[Feed], Task]:
    """Data to choose by, held-out feeds and the task that scores them."""
    task = case.task(path)
    write = case.calibration or case.texts
    assert write is not None
    return load_calibration(str(write(path, folder)), source), task.feeds, task


def _rounded_only(menu: Menu) -> Menu:
    """The menu without the float offers of groups that can be rounded."""
    offers = {n: tuple(o for o in of if _bits(o)) or of for n, of in menu.offers.items()}
    return replace(menu, offers=offers)


def _bits(offer: Offer) -> int:
    """Bits of the weights; 0 where they stay float."""
    return max(o.weight.bits if o.weight is not None else 0 for o in offer.options.values())


def _uniform(menu: Menu, bits: int) -> Choice:
    """Every group at the same bits; what cannot be rounded stays float."""
    return {n: [_bits(o) in (0, bits) for o in of].index(True) for n, of in menu.offers.items()}


def _bytes(menu: Menu, choice: Choice) -> int:
    """Of the emitted file, all weights included."""
    return menu.fixed_bytes + sum(menu.offers[n][index].bytes for n, index in choice.items())


def _greedy(menu: Menu, limit: int) -> Choice:
    """From 8 bits down: the group that has the most bytes gets a bit less, until all fits."""
    choice = dict(_uniform(menu, _WIDTHS[0]))
    while _bytes(menu, choice) > limit:
        sizes = {
            name: menu.offers[name][index].bytes
            for name, index in choice.items()
            if index + 1 < len(menu.offers[name])
        }
        choice[max(sizes, key=sizes.__getitem__)] += 1
    return choice


def verdict(cells: Sequence[Cell]) -> str:
    """How octavo's damage compares with the best of the other rows of the same width."""
    own = next(cell for cell in cells if cell.row == _OURS)
    best = min((c for c in cells if c.row != _OURS), key=lambda cell: cell.damage)
    if own.damage < best.damage:
        return "best"
    difference = own.samples - best.samples
    error = float(difference.std(ddof=1)) / difference.size**0.5
    return "equal" if difference.mean() <= error else f"loses to {best.row}"


def removed(cells: Sequence[Cell]) -> float:
    """Share of the uniform plan's damage that octavo removes."""
    damages = {cell.row: cell.damage for cell in cells}
    return 1 - damages[_OURS] / damages["uniform"]


def _show(console: Console, name: str, cells: Sequence[Cell], metric: str, score: str) -> bool:
    """Print the table of a model; whether octavo meets its goals."""
    table = Table("bits", "row", "bytes", metric, score, "choosing", "octavo", title=name)
    met = True
    for bits in dict.fromkeys(cell.bits for cell in cells):
        level = [cell for cell in cells if cell.bits == bits]
        found, share = verdict(level), removed(level)
        met &= found in ("best", "equal") and (bits != _GOAL_BITS or share >= _GOAL)
        for cell in level:
            own = f"{found}, removes {share:.0%}" if cell.row == _OURS else escape(cell.why)
            scored = "" if cell.score is None else f"{cell.score:.4f}"
            numbers = f"{cell.bytes}", f"{cell.damage:.4g}", scored, f"{cell.seconds:.1f} s"
            table.add_row(str(bits), cell.row, *numbers, own, end_section=cell is level[-1])
    console.print(table)
    return met


def _save(output: Path | None, results: Mapping[str, Sequence[Cell]]) -> None:
    """What is known so far."""
    if output is not None:
        content = {name: [cell.to_json() for cell in cells] for name, cells in results.items()}
        output.write_text(json.dumps(content, indent=2) + "\n")


def main(
    models: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="A width; repeatable.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A row to leave out.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep measured damages there.")] = None,
) -> None:
    """Print every row of every model: bytes, damage and score on held-out data."""
    chosen, widths = models or list(_MODELS), bits or list(_BITS)
    if unknown := sorted(set(chosen) - set(_MODELS)) + sorted(set(map(str, widths)) - _KNOWN_BITS):
        raise typer.BadParameter(f"{', '.join(unknown)}; known are {', '.join(_MODELS)}, 2 to 8")
    rows = [row for row in _ESTIMATED if row == _OURS or row not in (without or ())]
    console = Console(width=None if Console().is_terminal else 140)
    cases = {case.name: case for case in CASES}
    results: dict[str, list[Cell]] = {}
    met = True
    for name in chosen:
        with (
            tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder,
            ThreadPoolExecutor(2) as executor,
        ):
            ctx = PassContext(
                ORT_CPU, AnalyticCost(ORT_CPU), OrtEvaluator(threads=1), executor, Path(folder),
                cache=Cache(cache) if cache is not None else None,
            )  # fmt: skip
            comparison = Comparison.of(cases[name], ctx)
            cells: list[Cell] = []
            for cell in comparison.cells(widths, rows):
                cells.append(cell)
                _save(output, {**results, name: cells})
        held_out = comparison.held_out
        score = held_out.task.headline if held_out.task is not None else "score"
        met &= _show(console, name, cells, held_out.damage.text, score)
        results[name] = cells
    raise typer.Exit(0 if met else 3)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
