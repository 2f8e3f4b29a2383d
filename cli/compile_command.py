"""`octavo compile`: a model file in, an artifact folder out, and a table that says what it is."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from octavo.cli import plan_options as options
from octavo.cli.render import AsJson
from octavo.ir.errors import GoalNotMet, VerificationFailed

if TYPE_CHECKING:
    from octavo.cli.compilation import Compiled
    from octavo.cli.progress import Progress
    from octavo.cli.request import Request
    from octavo.ir import model as ir_model
    from octavo.ir.artifact_io import Manifest
    from octavo.ir.calibration import Batches
    from octavo.passes.instruments import Instrument

_REPRODUCERS = Path("octavo-reproducers")

Model = Annotated[Path, typer.Argument(help="An .onnx or .pt2 file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        help="An .npz by input name, a folder of .npy, .npz or images, or module:function; "
        "without it no static int8.",
    ),
]
Preprocess = Annotated[
    str, typer.Option(help="How images become an input, as size=224,mean=…,std=…,layout=nchw.")
]
Target = Annotated[str, typer.Option(help="What to compile for; see octavo targets list.")]
Pipeline = Annotated[
    str,
    typer.Option(
        "--pipeline",
        "-p",
        help="A preset or passes; the default is int8 with calibration data, else int8-dynamic.",
    ),
]
KeepFloat = Annotated[
    list[str] | None,
    typer.Option(help="Nodes to leave alone: a name, a glob, re:… or type:Conv; repeatable."),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(help="Input shape to measure with, as NAME=1x3x224x224; repeatable."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that latency is measured with.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Measure = Annotated[
    bool, typer.Option("--measure/--no-measure", help="Decide by measured or estimated latency.")
]
RecurrentError = Annotated[
    float, typer.Option(min=0.0, help="Output error that dynamic LSTM kernels may add.")
]
Agreement = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Share of rows whose arg-max dynamic kernels must keep without data."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the artifact in the folder.")]
DumpIr = Annotated[
    Path | None, typer.Option(help="Write the model after every pass there, as ONNX text.")
]
UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep measurements in ~/.cache/octavo.")
]


def compile_(
    model: Model,
    output: Output,
    calibration: Calibration = "",
    preprocess: Preprocess = "",
    target: Target = "ort-cpu",
    pipeline: Pipeline = "",
    keep_float: KeepFloat = None,
    shape: Shape = None,
    threads: Threads = 1,
    seed: Seed = 0,
    measure: Measure = True,
    max_recurrent_error: RecurrentError = 0.02,
    min_agreement: Agreement = 0.6,
    size: options.Size = "",
    latency: options.Latency = "",
    memory: options.Memory = "",
    bops: options.Bops = "",
    max_damage: options.MaxDamage = None,
    minimise: options.Minimise = options.Objective.DAMAGE,
    max_drop: options.MaxDrop = "",
    metric: options.Eval = "",
    goal: options.GoalOption = options.Goal.SMALLEST,
    profile: options.ProfileOption = None,
    refine_seconds: options.RefineSeconds = 20.0,
    estimator: options.Estimator = "measured",
    top_k: options.TopK = 1,
    pareto: options.Pareto = 0,
    force: Force = False,
    dump_ir: DumpIr = None,
    cache: UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Compile a model, with the evidence beside it. A budget or goal compiles by one plan.

    Writes model.onnx, manifest.json, plan.json, passes.jsonl, audit.json, probes.npz and
    report.html.
    """
    from octavo.cli.bench_command import parse_shapes
    from octavo.cli.compile_report import show
    from octavo.cli.request import Request
    from octavo.ir.output_folder import open_output

    request = Request(
        target=target,
        pipeline=pipeline,
        keep_float=tuple(keep_float or ()),
        shapes=parse_shapes(shape or ()) or None,
        threads=threads,
        seed=seed,
        measure=measure,
        max_recurrent_error=max_recurrent_error,
        min_agreement=min_agreement,
        objective=minimise.value,
        size=size,
        latency=latency,
        memory=memory,
        bops=bops,
        max_damage=max_damage,
        max_drop=max_drop,
        metric=metric,
        goal=goal.value,
        profile=str(profile or ""),
        refine_seconds=refine_seconds,
        estimator=estimator,
        top_k=top_k,
        pareto=pareto,
    )
    work = _Work(model, calibration, preprocess, request, dump_ir, cache)
    with open_output(output, force=force, source=model) as folder:
        compiled, manifest = work.run(folder)
    show(compiled, manifest, output, as_json)
    _require_audit(compiled, output)
    if compiled.missed:
        message = "a goal was not met; the artifact is written"
        raise GoalNotMet(message, where=str(output), why="; ".join(compiled.missed))


@final
@dataclass(frozen=True)
class _Work:
    """The inputs of one compilation, still as they were typed."""

    model: Path
    calibration: str
    preprocess: str
    request: Request
    dump_ir: Path | None
    cache: bool

    def run(self, folder: Path) -> tuple[Compiled, Manifest]:
        """Compile into a folder that exists."""
        from octavo.cli.compilation import compile_model
        from octavo.cli.progress import progress_bars
        from octavo.ir.cache import Cache, default_folder
        from octavo.ir.read import read

        # On the disk of the output: a system's temporary folder may be memory.
        scratch = tempfile.TemporaryDirectory(prefix=".work-", dir=folder)
        with progress_bars() as progress, scratch as workdir:
            source = read(self.model)
            compiled = compile_model(
                source,
                calibration=batches_of(self.calibration, self.preprocess, source),
                request=self.request,
                cache=Cache(default_folder()) if self.cache else None,
                workdir=Path(workdir),
                instruments=_instruments(self.dump_ir, progress),
                progress=progress,
            )
            return compiled, compiled.write(folder)


def batches_of(calibration: str, preprocess: str, source: ir_model.Model) -> Batches | None:
    """The calibration data that was named, checked against the model; `None` for none."""
    from octavo.cli.calibration_data import load_calibration
    from octavo.cli.preprocess import Preprocess

    if not calibration:
        return None
    how = Preprocess.parse(preprocess) if preprocess else None
    return load_calibration(calibration, source, how)


def _require_audit(compiled: Compiled, output: Path) -> None:
    if not compiled.audit.ok:
        message = "the audit found nodes that do not run as planned; the artifact is written"
        hint = f"octavo inspect {output} names them"
        raise VerificationFailed(message, where=str(output), hint=hint)


def _instruments(dump_ir: Path | None, progress: Progress) -> list[Instrument]:
    from octavo.passes.instruments import DumpText, PeakMemory, ShowProgress
    from octavo.passes.reproducer import Reproducer

    dumps = [DumpText(dump_ir)] if dump_ir is not None else []
    return [PeakMemory(), ShowProgress(progress), Reproducer(_REPRODUCERS), *dumps]
