"""What calibration without data is worth: `python tests/benchmarks/data_free.py`.

Every model is quantized with ranges and moments of real data, of data made from the model alone,
of noise, and with ranges that rest on no data. Scores are those of `run.py`, on data that no row
has seen. `--ablation` leaves out or adds one term of the optimisation at a time, `--trust` compares
trust with what was lost. `--source` names rows, `--models` models.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import typer
from cases import CASES, Case
from low_bits import METHODS, Bench
from rich.console import Console
from rich.table import Table

from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.ort_target import ORT_CPU
from octavo.cli.synthetic_options import SyntheticOptions
from octavo.ir.calibration import Batches, Feed, first_samples
from octavo.ir.cost import AnalyticCost
from octavo.ir.errors import OctavoError
from octavo.ir.model import Model
from octavo.ir.synthetic import Synthetic
from octavo.passes.base import PassContext
from octavo.passes.input_laws import InputLaw
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import PRESETS
from octavo.passes.synthesis import Synthesis
from octavo.passes.trust import Truster

Change = Callable[[Synthesis, Model], Synthesis]
_REAL, _ANALYTIC = "real", "analytic"


def _noise(law: str) -> Change:
    """No optimisation: inputs drawn from a law."""

    def changed(how: Synthesis, model: Model) -> Synthesis:
        laws = {value.name or "": InputLaw.parse(law) for value in model.graph.inputs}
        return replace(how, statistics=0.0, entropy=0.0, laws=laws)

    return changed


def _with(**options: Any) -> Change:
    return lambda how, model: replace(how, **options)


SOURCES: Mapping[str, Change] = {"synthetic": _with(), "noise": _noise("normal(0,1)")}
TEXT_SOURCES: Mapping[str, Change] = {
    "ranked": _with(prior="ranked"),
    "uniform": _with(prior="uniform"),
    "norm": _with(prior="norm"),
    "no tokenizer": _with(vocabulary=None, prior="uniform"),
}
WRITTEN: Mapping[str, Change] = {"own text": _with()}
ABLATION: Mapping[str, Change] = {
    "default": _with(),
    "from noise": _with(start="noise"),
    "leaves alone": _with(steps=1, rate=1e-9),
    "no statistics": _with(statistics=0.0),
    "nor entropy": _with(statistics=0.0, entropy=1e-9),
    "no labels": _with(labels=0.0),
    "all samples alike": _with(focus=0.0),
    "no variation": _with(variation=0.0),
    "low-pass 0.3": _with(low_pass=0.3),
    "low-pass 0.5": _with(low_pass=0.5),
    "rolled": _with(roll=0.1),
}
DOUBTFUL: Mapping[str, Change] = {
    "default": _with(),
    "10 steps": _with(steps=10),
    "no labels": _with(labels=0.0),
    "low-pass 0.2": _with(low_pass=0.2),
    "noise": _noise("normal(0,1)"),
    "loud noise": _noise("normal(0,4)"),
    "faint noise": _noise("normal(0,0.2)"),
    "thunder": _noise("normal(0,16)"),
    "next to nothing": _noise("normal(0,0.05)"),
    "bright noise": _noise("normal(3,1)"),
    "half noise": _noise("normal(0,0.5)"),
}
# Most that a score may lose against real data, by model and bits of the weights.
GOALS: Mapping[tuple[str, int], float] = {
    **{(f"fashion-{kind}", 8): 0.003 for kind in ("resnet", "mobile", "vit")},
    **{(f"fashion-{kind}", 4): 0.02 for kind in ("resnet", "mobile", "vit")},
    ("efficientnet-lite0", 8): 0.01,
    ("efficientnet-lite0", 4): 0.03,
}
# Everything static would put the residual stream of an encoder into 8 bits, whose few large
# channels leave the others few steps; choose-kernels does not.
_CHOSEN = ("minilm",)
# All weights in blocks of 64, float activations; as many tokens of real text as are written.
_BLOCKS: Mapping[str, int] = {"smollm2-135m": 64}
_REAL_WINDOWS: Mapping[str, int] = {"smollm2-135m": 8}
# Most that perplexity may grow by, as a share of what real text gives.
GROWTH: Mapping[tuple[str, int], float] = {("smollm2-135m", 4): 0.03}
# Least score whatever real data gives.
LEAST: Mapping[tuple[str, int], float] = {("minilm", 8): 0.325}
_METHODS = {8: "nearest", 4: "gptq+moments"}
_DEFAULT = ("fashion-resnet", "fashion-mobile", "fashion-vit")


@final
@dataclass(frozen=True)
class Row:
    """One source of calibration at one width, measured on held-out data."""

    model: str
    source: str
    bits: int
    damage: float
    agreement: float
    score: float
    loss: float
    trust: float | None
    parts: Mapping[str, float]
    seconds: float
    why: str = ""


@final
@dataclass(frozen=True)
class DataFree:
    """One model that is calibrated in several ways."""

    bench: Bench
    how: Synthesis
    seed: int
    ranges: str = "calibrate"
    before: str = ""

    def rows(self, sources: Mapping[str, Change], widths: Sequence[int]) -> Iterator[Row]:
        """Real data, every source, and ranges without data, at every width."""
        scores: dict[int, float] = {}
        analytic = () if self.bench.block else (_ANALYTIC,)
        for name in (_REAL, *sources, *analytic):
            try:
                data, seconds = self._data(name, sources)
            except OctavoError as error:
                why = str(error).splitlines()[0]
                yield Row(self._name, name, 0, np.inf, 0.0, 0.0, np.inf, None, {}, 0.0, why)
                continue
            for bits in widths:
                if name == _ANALYTIC and bits < 8:
                    continue
                row = self._row(name, data, bits, seconds, scores)
                scores.setdefault(bits, row.score)
                yield row

    @property
    def _name(self) -> str:
        return self.bench.case.name

    def _data(self, name: str, sources: Mapping[str, Change]) -> tuple[Batches | None, float]:
        if name in (_REAL, _ANALYTIC):
            return (self.bench.ctx.calibration if name == _REAL else None), 0.0
        ctx = replace(self.bench.ctx, calibration=None, seed=self.seed)
        model = Pipeline.parse("canonicalize").run(self.bench.source, ctx).model
        how = sources[name](self.how, model)
        begin = time.perf_counter()
        made = how.run(model, ctx)
        seconds = time.perf_counter() - begin
        return replace(made, trust=Truster(model, ctx, how.laws).of(made)), seconds

    def _row(
        self,
        name: str,
        data: Batches | None,
        bits: int,
        seconds: float,
        scores: Mapping[int, float],
    ) -> Row:
        ranges = self.ranges if data is not None else "bound-ranges"
        ctx = replace(self.bench.ctx, calibration=data)
        bench = replace(self.bench, ctx=ctx, ranges=ranges, dynamic=False)
        damage, agreement, found = self._measured(bench, bits)
        score = float(found) if found is not None else 0.0
        trust = data.trust if isinstance(data, Synthetic) else None
        task = self.bench.held_out.task
        sign = -1.0 if task is not None and task.lower_is_better else 1.0
        return Row(
            self._name, name, bits, damage, agreement, score,
            sign * (scores.get(bits, score) - score),
            None if trust is None else trust.value, {} if trust is None else trust.parts, seconds,
        )  # fmt: skip

    def _measured(self, bench: Bench, bits: int) -> tuple[float, float, float | None]:
        """Damage, agreement and score of all weights at that many bits."""
        if self._name in _CHOSEN and bits == 8:
            text = PRESETS["int8"].replace("calibrate", bench.ranges)
            return bench.measured(Pipeline.parse(text).run(bench.source, bench.ctx).model)
        method = "gptq" if bench.block else _METHODS[bits]
        (row,) = bench.rows((bits,), {method: METHODS[method]}, self.before)
        return row.damage, row.agreement, row.score


@final
@dataclass(frozen=True)
class Few:
    """The first samples of other data."""

    source: Batches
    samples: int
    labels: None = None

    @property
    def sha256(self) -> str:
        return f"{self.samples} of {self.source.sha256}"

    def __iter__(self) -> Iterator[Feed]:
        return first_samples(self.source, self.samples)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = [_ranks(np.asarray(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Any) -> Any:
    order = np.sort(values)
    low, high = np.searchsorted(order, values), np.searchsorted(order, values, "right")
    return (low + high - 1) / 2


def _show(console: Console, title: str, rows: Sequence[Row]) -> None:
    columns = ("source", "bits", "damage", "agreement", "score", "loss", "trust", "seconds", "goal")
    table = Table(*columns, title=title)
    for row in rows:
        if row.why:
            table.add_row(row.source, "", row.why)
            continue
        met = _met(row)
        trust = "" if row.trust is None else f"{row.trust:.3f}"
        numbers = (
            f"{row.damage:.3e}",
            f"{row.agreement:.4f}",
            f"{row.score:.4f}",
            f"{row.loss:+.4f}",
        )
        table.add_row(row.source, str(row.bits), *numbers, trust, f"{row.seconds:.0f}", met)
    console.print(table)
    parts = [row for row in rows if row.parts and row.bits == rows[0].bits]
    if parts:
        names = list(dict.fromkeys(name for row in parts for name in row.parts))
        split = Table("parts of trust", *names)
        for row in parts:
            split.add_row(row.source, *(f"{row.parts.get(n, np.nan):.3f}" for n in names))
        console.print(split)


def _met(row: Row) -> str:
    """Whether a row reaches the goal of its model, and which that is."""
    key = row.model, row.bits
    if row.source in ("real", "analytic", "noise"):
        return ""
    if key in LEAST:
        return f"{'met' if row.score >= LEAST[key] else 'missed'} (≥ {LEAST[key]})"
    if key in GROWTH:
        share = row.loss / (row.score - row.loss)
        return f"{'met' if share <= GROWTH[key] else 'missed'} (+{share:.1%}, {GROWTH[key]:.0%})"
    if key not in GOALS or row.source != "synthetic":
        return ""
    return f"{'met' if row.loss <= GOALS[key] else 'missed'} ({GOALS[key]})"


def _effects(console: Console, rows: Sequence[Row]) -> None:
    """Damage of every variant at every width, a column per model, as a table of Markdown."""
    models = list(dict.fromkeys(row.model for row in rows))
    damage = {(row.model, row.source, row.bits): f"{row.damage:.5f}" for row in rows if not row.why}
    widths = sorted({row.bits for row in rows if not row.why}, reverse=True)
    console.print(f"| damage at {' and '.join(map(str, widths))} bits | {' | '.join(models)} |")
    console.print("|--" * (len(models) + 1) + "|")
    for source in dict.fromkeys(row.source for row in rows):
        cells = [" ".join(damage.get((m, source, bits), "–") for bits in widths) for m in models]
        console.print(f"| {source} | {' | '.join(cells)} |")


def _correlation(console: Console, rows: Sequence[Row]) -> None:
    """Trust against damage beyond that of real data, and against the lost score."""
    real = {(row.model, row.bits): row for row in rows if row.source == _REAL}
    cells = [row for row in rows if row.trust is not None and not row.why]
    trust = [-row.trust for row in cells if row.trust is not None]
    damage = [row.damage / real[row.model, row.bits].damage for row in cells]
    loss = [row.loss for row in cells]
    console.print(
        f"{len(cells)} cells: Spearman of distrust with damage over real data's "
        f"{spearman(trust, damage):.3f}, with the lost score {spearman(trust, loss):.3f}"
    )


def _bench(case: Case, folder: Path, executor: ThreadPoolExecutor) -> Bench:
    ctx = PassContext(ORT_CPU, AnalyticCost(ORT_CPU), OrtEvaluator(threads=1), executor, folder)
    block, few = _BLOCKS.get(case.name, 0), _REAL_WINDOWS.get(case.name)
    bench = Bench.of(case, ctx, activations=not block, block=block)
    if few is None or bench.ctx.calibration is None:
        return bench
    return replace(bench, ctx=replace(bench.ctx, calibration=Few(bench.ctx.calibration, few)))


def main(
    models: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="8 or 4; repeatable.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    ablation: Annotated[bool, typer.Option(help="One term more or less at a time.")] = False,
    trust: Annotated[bool, typer.Option(help="Good and bad data, and trust in them.")] = False,
    samples: Annotated[int, typer.Option(help="Samples to make.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps of the optimisation.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of what is made.")] = 0,
    ranges: Annotated[str, typer.Option(help="The pass that finds ranges.")] = "calibrate",
    before: Annotated[str, typer.Option(help="Passes between canonicalize and it.")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Print damage, score and trust of every source at every width."""
    cases = {case.name: case for case in CASES}
    console = Console(width=None if Console().is_terminal else 140)
    found: list[Row] = []
    for name in models or _DEFAULT:
        case = cases[name]
        plain = WRITTEN if name in _BLOCKS else TEXT_SOURCES if case.texts is not None else SOURCES
        sources = ABLATION if ablation else DOUBTFUL if trust else plain
        sources = {k: v for k, v in sources.items() if not source or k in source}
        how = SyntheticOptions().synthesis(case.model())
        how = replace(how, samples=samples, steps=steps)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as executor:
            bench = _bench(case, Path(folder), executor)
            study = DataFree(bench, how, seed, ranges, before)
            rows = []
            for row in study.rows(sources, bits or (8, 4)):
                rows.append(row)
                console.print(f"{row.source} {row.bits} {row.damage:.3g} {row.score}", style="dim")
        _show(console, name, rows)
        found += rows
        if output is not None:
            output.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    if ablation:
        _effects(console, found)
    if trust:
        _correlation(console, found)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
