"""Both orders of two compressions, and what the advisor says: `python tests/benchmarks/order.py`.

The advisor sees calibration data only; both orders are then judged on data that it has not seen,
by the KL of the outputs, sample by sample, and by the task's score.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
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
from structure import measured

from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.calibration import Part, samples_of
from octavo.ir.cost import AnalyticCost
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.base import PassContext
from octavo.passes.order_study import compressed, order_study
from octavo.passes.output_damage import OutputDamage, summary
from octavo.passes.pipeline import Pipeline

_MODELS = ("fashion-resnet", "fashion-vit", "fashion-mobile")
_PASSES = ("prune-weights{sparsity=0.3,allocation=uniform}", "factor-low-rank{rank=0.5}")
_ROUNDING = "bits=4"


@final
@dataclass(frozen=True)
class Row:
    """Two compressions of one model: the pass first, and rounding first.

    `advantage` is the held-out damage that the order of the advisor saves.
    """

    model: str
    text: str
    pass_first: tuple[float, float | None]
    rounding_first: tuple[float, float | None]
    proposed: str
    advised: str
    advantage: float
    standard_error: float

    @property
    def right(self) -> bool:
        return self.advantage >= 0


def rows(case: Case, texts: Sequence[str], samples: int, folder: Path) -> Iterator[Row]:
    """Every pass with rounding, in both orders."""
    path = case.model()
    source = read(path)
    data, feeds, task = held_out_data(case, path, source, folder)
    with ThreadPoolExecutor(2) as executor:
        ctx = PassContext(
            ORT_CPU, AnalyticCost(ORT_CPU), OrtEvaluator(threads=2), executor, folder,
            calibration=data,
        )  # fmt: skip
        model = Pipeline.parse("canonicalize").run(source, ctx).model
        held_out = HeldOut.of(model, ctx, feeds, task)
        fit = replace(ctx, calibration=Part(data, 0))
        for text in texts:
            study = order_study(model, ctx, [text, _ROUNDING], samples)
            orders = ([text, _ROUNDING], [_ROUNDING, text])
            made = [compressed(model, fit, order) for order in orders]
            lost = [_lost(each, model, ctx, held_out) for each in made]
            scores = [measured(each, ctx, held_out)[1] for each in made]
            advised = list(study.best) == orders[1]
            saved = summary(lost[1 - advised] - lost[advised])
            both = [(float(each.mean()), score) for each, score in zip(lost, scores, strict=True)]
            proposed = study.compressions[0].text
            yield Row(
                case.name, text, both[0], both[1], proposed, study.best[0], saved.mean,
                saved.standard_error,
            )  # fmt: skip


def _lost(made: Model, model: Model, ctx: PassContext, held_out: HeldOut) -> np.ndarray:
    """Damage per held-out sample."""
    damage, run = OutputDamage.of(model), ctx.evaluator.load(made)
    pairs = zip(held_out.references, held_out.feeds, strict=True)
    return np.concatenate([damage.per_sample(y, run(f), samples_of(f)) for y, f in pairs])


def main(
    models: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", help="Repeatable.")] = None,
    samples: Annotated[int, typer.Option(help="The advisor's, of each half at most.")] = 256,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print damage and score of both orders, and how often the advisor is right."""
    console, found = Console(width=150), []
    cases = {case.name: case for case in CASES}
    titles = ("model", "pass", "pass first", "bits first", "proposed", "advised", "saves", "right")
    table = Table(*titles, title="held-out damage and score")
    for name in models or _MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(cases[name], passes or _PASSES, samples, Path(folder)):
                found.append(row)
                saves = f"{row.advantage:+.4f} ± {row.standard_error:.4f}"
                table.add_row(
                    name, row.text, _cell(row.pass_first), _cell(row.rounding_first),
                    _first(row.proposed), _first(row.advised), saves, "yes" if row.right else "no",
                )  # fmt: skip
    console.print(table)
    console.print(f"the advisor is right in {sum(r.right for r in found)} of {len(found)}")
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


def _cell(found: tuple[float, float | None]) -> str:
    damage, score = found
    return f"{damage:.4f}" if score is None else f"{damage:.4f} {score:.4f}"


def _first(text: str) -> str:
    return text if text == _ROUNDING else "the pass"


if __name__ == "__main__":
    typer.run(main)
