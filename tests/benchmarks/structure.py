"""What fewer channels, heads, ranks and blocks cost: `python tests/benchmarks/structure.py`.

Every pipeline runs on the float model, without training, on the calibration data of its case;
multiply-accumulates of one sample and parameters are relative to the canonical model. Agreement of
the largest class and the task's score are measured on data that no pass has seen.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, final

import numpy as np
import typer
from allocation import HeldOut, held_out_data
from cases import CASES, Case
from rich.console import Console
from rich.table import Table

from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.cost import AnalyticCost
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.prune_allocation import Work
from octavo.passes.sample_macs import sample_macs

_MODELS = ("fashion-resnet", "fashion-vit", "fashion-mobile")
_PIPELINES = (
    "prune-channels{ratio=0.5,of=macs,heads=true}",
    "prune-channels{ratio=0.5,of=macs,heads=true,repair=none}",
    "factor-low-rank{rank=0.5}",
    "factor-low-rank{rank=0.5,method=svd}",
    "factor-low-rank{energy=0.99}",
    "drop-blocks{count=1}",
)


@final
@dataclass(frozen=True)
class Row:
    """One pipeline on one model."""

    model: str
    pipeline: str
    macs: float
    parameters: float
    agreement: float
    score: float | None
    seconds: float


def rows(case: Case, pipelines: Sequence[str], folder: Path) -> Iterator[Row]:
    """The canonical model, then every pipeline behind `canonicalize`."""
    path = case.model()
    source = read(path)
    data, feeds, task = held_out_data(case, path, source, folder)
    with ThreadPoolExecutor(2) as executor:
        ctx = PassContext(
            ORT_CPU, AnalyticCost(ORT_CPU), OrtEvaluator(threads=2), executor, folder,
            calibration=data,
        )  # fmt: skip
        held_out = HeldOut.of(source, ctx, feeds, task)
        canonical = Pipeline.parse("canonicalize").run(source, ctx).model
        whole = sample_macs(canonical, ctx, data), Work.parameters(canonical, {}).total
        for text in ("", *pipelines):
            begin = time.perf_counter()
            made = Pipeline.parse(f"canonicalize,{text}".rstrip(",")).run(source, ctx).model
            seconds = time.perf_counter() - begin
            agreement, score = measured(made, ctx, held_out)
            macs = sample_macs(made, ctx, data) / whole[0]
            left = Work.parameters(made, {}).total / whole[1]
            name = text or "canonicalize"
            yield Row(case.name, name, macs, left, agreement, score, seconds)


def measured(model: Model, ctx: PassContext, held_out: HeldOut) -> tuple[float, float | None]:
    """Agreement of the largest class with the source, and the task's score."""
    run = ctx.evaluator.load(model)
    answers = [run(feed)[held_out.output] for feed in held_out.feeds]
    same = [
        (ours.argmax(-1) == theirs[held_out.output].argmax(-1)).reshape(-1)
        for ours, theirs in zip(answers, held_out.references, strict=True)
    ]
    task = held_out.task
    score = task.score(answers)[task.headline] if task is not None else None
    return float(np.concatenate(same).mean()), score


def main(
    models: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    pipeline: Annotated[list[str] | None, typer.Option(help="Passes; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print, for every pipeline, what is left of the work and of the score."""
    console, found = Console(width=110), []
    cases = {case.name: case for case in CASES}
    for name in models or _MODELS:
        columns = "passes", "MACs", "parameters", "same class", "score", "seconds"
        table = Table(*columns, title=name)
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(cases[name], pipeline or _PIPELINES, Path(folder)):
                found.append(row)
                score = "" if row.score is None else f"{row.score:.4f}"
                shares = (f"{x:.3f}" for x in (row.macs, row.parameters, row.agreement))
                table.add_row(row.pipeline, *shares, score, f"{row.seconds:.1f}")
        console.print(table)
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
