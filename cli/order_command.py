"""`octavo order`: in which order compressions of a model should run, measured."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.compile_options import ModelFile, Preprocess
from octavo.cli.render import AsJson, print_json, print_message, print_table

if TYPE_CHECKING:
    from octavo.passes.order_study import OrderStudy

_STEPS = ("prune-weights{sparsity=0.3,allocation=uniform}", "bits=4")

Calibration = Annotated[
    str, typer.Option("--calibration", "-c", help="Inputs, as octavo compile takes them.")
]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--step", help="A pass with its options, or bits=4 for rounded weights; repeatable."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples of each half of the data, at most.")]
TargetName = Annotated[str, typer.Option(help="What to compile for; see octavo targets list.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def order(
    model: ModelFile,
    calibration: Calibration,
    step: Steps = None,
    preprocess: Preprocess = "",
    samples: Samples = 256,
    target: TargetName = "ort-cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure compressions alone, propose their order, and try every adjacent swap.

    One half of the data proposes, the other judges. A positive advantage says that the proposed
    order damages the outputs less than the swapped one, which is taken only where it saves more
    than one standard error.
    """
    from octavo.cli.target import target_of

    target_of(target)
    found = _study(model, calibration, preprocess, step or list(_STEPS), samples, target, seed)
    if as_json:
        pairs = [{**asdict(pair), "advantage": pair.advantage} for pair in found.pairs]
        print_json({**asdict(found), "pairs": pairs, "agrees": found.agrees})
    else:
        _print(found)


def _study(
    path: Path,
    calibration: str,
    preprocess: str,
    steps: list[str],
    samples: int,
    target: str,
    seed: int,
) -> OrderStudy:
    from octavo.cli.calibration_data import load_calibration
    from octavo.cli.preprocess import Preprocess
    from octavo.cli.progress import progress_bars
    from octavo.cli.target import backend_of
    from octavo.ir.cost import AnalyticCost
    from octavo.ir.read import read
    from octavo.passes.base import PassContext
    from octavo.passes.order_study import order_study
    from octavo.passes.pipeline import Pipeline

    backend = backend_of(target)
    source = read(path)
    how = Preprocess.parse(preprocess) if preprocess else None
    data = load_calibration(calibration, source, how)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2) as executor,
        progress_bars() as progress,
    ):
        ctx = PassContext(
            target=backend.target,
            cost=AnalyticCost(backend.target),
            evaluator=backend.evaluator(),
            executor=executor,
            workdir=Path(folder),
            calibration=data,
            seed=seed,
            progress=progress,
        )
        prepared = Pipeline.parse("canonicalize").run(source, ctx).model
        return order_study(prepared, ctx, steps, samples)


def _print(found: OrderStudy) -> None:
    print_table(
        ("compression", "intensity", "equivalent ratio"),
        [(c.text, f"{c.intensity:.3e}", f"{c.ratio:.2f}") for c in found.compressions],
        title=f"proposed order; {found.metric}",
    )
    print_table(
        ("first", "then", "damage", "swapped", "gap", "advantage", "± error"),
        [
            (
                p.first,
                p.second,
                f"{p.proposed:.3e}",
                f"{p.swapped:.3e}",
                f"{p.gap:.3e}",
                f"{p.advantage:.3e}",
                f"{p.standard_error:.1e}",
            )
            for p in found.pairs
        ],
        title=f"both orders on {found.samples} held-out samples",
    )
    verdict = "as proposed" if found.agrees else "a swap is better than what was proposed"
    print_message(f"best: {' → '.join(found.best)} ({verdict})")
