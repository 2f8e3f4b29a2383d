"""What rounding, ranges and repair are worth: `python tests/benchmarks/low_bits.py`.

Every weight gets the same bits, one scale per output channel (`--block` for blocks), and each
method chooses codes, scales and biases. Bytes are those of the emitted file; KL or normalised
error, agreement of the largest class and the task's score are measured on data that no method
has seen. `--activations` adds int8 activations where the runtime has kernels for them, with ranges
found at run time for models whose int8 needs no data.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, final

import numpy as np
import typer
from allocation import HeldOut, held_out_data
from cases import CASES, Case
from rich.console import Console
from rich.table import Table

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.calibration import samples_of
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import OctavoError
from octavo.ir.facts import FLOAT, Plan
from octavo.ir.facts import Choice as PlanChoice
from octavo.ir.menu import Menu, Offer
from octavo.ir.model import Model
from octavo.ir.quant import PerBlock
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.record import PassRecord

METHODS: Mapping[str, str] = {
    "nearest": "",
    "clip": "clip-weights",
    "squant": "round-squant",
    "gptq": "clip-weights,round-gptq",
    "gptq+moments": "clip-weights,round-gptq,match-moments",
    "powers": "clip-weights,round-gptq,round-nupes{table=power}",
    "centres": "clip-weights,round-gptq,round-nupes",
    "binary": "clip-weights,round-gptq,round-uniquanf{steps=0}",
    "uniquanf": "clip-weights,round-gptq,round-uniquanf",
    "learned": "clip-weights,round-gptq,round-learned",
    "recovered": "clip-weights,round-gptq,recover",
}
_BITS = (8, 6, 5, 4, 3, 2)


@final
@dataclass(frozen=True)
class Row:
    """One method at one width, measured on held-out data.

    Of the `layers` that GPTQ tried, `improved` have less output error than with nearest codes;
    the others keep those.
    """

    model: str
    bits: int
    method: str
    bytes: int
    damage: float
    agreement: float
    score: float | None
    seconds: float
    why: str = ""
    layers: int = 0
    improved: int = 0


@final
@dataclass(frozen=True)
class Bench:
    """One model whose weights are rounded in several ways.

    `ranges` finds those of activations; without `dynamic` all integer kernels are static.
    """

    case: Case
    source: Model
    ctx: PassContext
    held_out: HeldOut
    activations: bool
    block: int
    ranges: str = "calibrate"
    keep_float: str = ""
    dynamic: bool = True

    @staticmethod
    def of(case: Case, ctx: PassContext, activations: bool, block: int) -> Bench:
        path = case.model()
        source = read(path)
        calibration, feeds, task = held_out_data(case, path, source, ctx.workdir)
        ctx = replace(ctx, calibration=calibration)
        return Bench(case, source, ctx, HeldOut.of(source, ctx, feeds, task), activations, block)

    def rows(self, widths: Sequence[int], methods: Mapping[str, str], before: str) -> Iterator[Row]:
        """Every method at every width."""
        for bits in widths:
            planned = self._planned(bits, before)
            for name, text in methods.items():
                yield self._row(planned, bits, name, text)

    def _planned(self, bits: int, before: str) -> Model:
        """The model with all weights at that many bits, up to its FakeQuants."""
        blocks = "weight-only=false,integer-blocks=,"
        if self.block:
            blocks = f"blocks={self.block},integer-blocks={self.block},"
        calibrated = self.activations and self.case.calibration is not None
        static = "true" if calibrated else "false"
        dynamic = "true" if self.activations and self.dynamic else "false"
        kinds = f"static={static},dynamic={dynamic},float16=false,float8=false"
        kinds += f",keep-float={self.keep_float}" if self.keep_float else ""
        offered = f"offer-options{{bits={bits},{blocks}{kinds}}}"
        ranges = f"{self.ranges}," if calibrated else ""
        text = f"canonicalize,{before + ',' if before else ''}{ranges}{offered}"
        model = Pipeline.parse(text).run(self.source, self.ctx).model
        menu = model.fact(Menu)
        by_node = {
            node: PlanChoice(option, "uniform")
            for offers in menu.offers.values()
            for node, option in self._chosen(offers).options.items()
            if option != FLOAT
        }
        planned = model.with_fact(Plan(by_node, "uniform"))
        return Pipeline.parse("place-quantizers,insert-fake-quant").run(planned, self.ctx).model

    def _chosen(self, offers: Sequence[Offer]) -> Offer:
        """The offer that fits best what was asked for; float where there is no other."""
        return max(offers, key=self._preference)

    def _preference(self, offer: Offer) -> tuple[bool, bool, bool]:
        methods = {option.method for option in offer.options.values()}
        specs = [o.weight for o in offer.options.values() if o.weight is not None]
        blocked = any(isinstance(s.granularity, PerBlock) and s.granularity.size for s in specs)
        integer = bool(methods & {"static", "dynamic"})
        return (blocked == bool(self.block), integer == self.activations, methods != {"float"})

    def _row(self, planned: Model, bits: int, name: str, text: str) -> Row:
        begin = time.perf_counter()
        try:
            done = Pipeline.parse(text).run(planned, self.ctx) if text else None
        except OctavoError as error:
            why = str(error).splitlines()[0]
            return Row(self.case.name, bits, name, 0, float("inf"), 0.0, None, 0.0, why)
        seconds = time.perf_counter() - begin
        model = planned if done is None else done.model
        layers = _rounded_layers(() if done is None else done.records)
        artifact = lower(model, self.ctx.workdir / "lowered.onnx")
        damage, agreement, score = self.measured(model)
        return Row(
            self.case.name, bits, name, artifact.bytes, damage, agreement, score, seconds,
            layers=len(layers), improved=sum(layers),
        )  # fmt: skip

    def measured(self, model: Model) -> tuple[float, float, float | None]:
        """Damage, agreement of the largest class and score on held-out data."""
        held_out, run = self.held_out, self.ctx.evaluator.load(model)
        damages, same, answers = [], [], []
        for feed, reference in zip(held_out.feeds, held_out.references, strict=True):
            outputs = run(feed)
            damages.append(held_out.damage.per_sample(reference, outputs, samples_of(feed)))
            ours, theirs = outputs[held_out.output], reference[held_out.output]
            same.append((ours.argmax(-1) == theirs.argmax(-1)).reshape(-1))
            answers.append(ours)
        task = held_out.task
        score = task.score(answers)[task.headline] if task is not None else None
        return float(np.concatenate(damages).mean()), float(np.concatenate(same).mean()), score


def _rounded_layers(records: Sequence[PassRecord]) -> list[bool]:
    """Of every layer that GPTQ tried, whether less output error is left; it stays otherwise."""
    remarks = (
        r for record in records if record.spec.startswith("round-gptq") for r in record.remarks
    )
    errors = (r.values for r in remarks if {"before", "after"} <= r.values.keys())
    return [float(e["after"]) < float(e["before"]) for e in errors]


def _show(console: Console, name: str, rows: Sequence[Row], metric: str, score: str) -> None:
    columns = "bits", "method", "bytes", metric, "agreement", score, "seconds", "layers improved"
    table = Table(*columns, title=name)
    for row in rows:
        scored = row.why or ("" if row.score is None else f"{row.score:.4f}")
        numbers = f"{row.damage:.4g}", f"{row.agreement:.3f}", scored, f"{row.seconds:.1f}"
        layers = f"{row.improved}/{row.layers}" if row.layers else ""
        table.add_row(str(row.bits), row.method, f"{row.bytes}", *numbers, layers)
    console.print(table)


def _markdown(rows: Sequence[Row]) -> str:
    """A line per width with bytes, damage and score of every method."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [f"| model, bits | {' | '.join(methods)} |", "|--" * (len(methods) + 1) + "|"]
    for bits in dict.fromkeys(row.bits for row in rows):
        cells = {row.method: _cell(row) for row in rows if row.bits == bits}
        lines.append(f"| {rows[0].model} {bits} | {' | '.join(cells[m] for m in methods)} |")
    return "\n".join(lines) + "\n\n"


def _cell(row: Row) -> str:
    if row.why:
        return "–"
    size = f"{row.bytes / 1e3:.0f} kB" if row.bytes < 1e6 else f"{row.bytes / 1e6:.2f} MB"
    return f"{size} {row.damage:.2g} {'' if row.score is None else f'{row.score:.3f}'}".strip()


def main(
    models: Annotated[list[str], typer.Option(help="A model; repeatable.")],
    bits: Annotated[list[int] | None, typer.Option(help="A width; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    sequence: Annotated[list[str] | None, typer.Option(help="Passes to try instead.")] = None,
    before: Annotated[str, typer.Option(help="Passes between canonicalize and planning.")] = "",
    activations: Annotated[bool, typer.Option(help="int8 activations too.")] = False,
    block: Annotated[int, typer.Option(help="Weight-only kernels with blocks.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Add a table of methods there.")] = None,
) -> None:
    """Print bytes, damage and score of every method at every width."""
    chosen = {name: METHODS[name] for name in method or METHODS}
    if sequence:
        chosen = {text or "nearest": text for text in sequence}
    cases = {case.name: case for case in CASES}
    if unknown := set(models) - set(cases):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known are {', '.join(cases)}")
    console = Console(width=None if Console().is_terminal else 140)
    found: list[Row] = []
    for name in models:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as executor:
            ctx = PassContext(
                ORT_CPU, AnalyticCost(ORT_CPU), OrtEvaluator(threads=1), executor, Path(folder)
            )
            bench = Bench.of(cases[name], ctx, activations, block)
            rows = []
            for row in bench.rows(bits or _BITS, chosen, before):
                rows.append(row)
                console.print(f"{row.bits} {row.method} {row.damage:.4g} {row.score}", style="dim")
        task = bench.held_out.task
        headline = task.headline if task is not None else "score"
        _show(console, name, rows, bench.held_out.damage.text, headline)
        found += rows
        if markdown is not None:
            with markdown.open("a") as file:
                file.write(_markdown(rows))
        if output is not None:
            output.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
