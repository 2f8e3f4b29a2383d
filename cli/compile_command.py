"""`octavo compile`: a model file in, an artifact folder out, and a table that says what it is."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from octavo.cli import compile_options as options
from octavo.cli.option_groups import spelled_out
from octavo.cli.plan_options import PlanOptions
from octavo.cli.render import AsJson
from octavo.cli.synthetic_options import SyntheticOptions
from octavo.ir.errors import GoalNotMet, VerificationFailed

if TYPE_CHECKING:
    from octavo.cli.compilation import Compiled
    from octavo.cli.progress import Progress
    from octavo.cli.request import Request
    from octavo.cli.synthetic_data import Chosen
    from octavo.ir import model as ir_model
    from octavo.ir.artifact_io import Manifest
    from octavo.ir.cache import Cache
    from octavo.ir.calibration import Batches
    from octavo.passes.instruments import Instrument

_REPRODUCERS = Path("octavo-reproducers")

Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the artifact in the folder.")]
DumpIr = Annotated[
    Path | None, typer.Option(help="Write the model after every pass there, as ONNX text.")
]


@spelled_out
def compile_(
    model: options.ModelFile,
    output: Output,
    compiling: options.CompileOptions,
    planning: PlanOptions,
    making: SyntheticOptions,
    calibration: options.Calibration = "",
    preprocess: options.Preprocess = "",
    force: Force = False,
    dump_ir: DumpIr = None,
    cache: options.UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Compile a model, with the evidence beside it. A budget or goal compiles by one plan.

    Writes model.onnx, manifest.json, plan.json, passes.jsonl, audit.json, probes.npz and
    report.html.
    """
    from octavo.cli.compile_report import show
    from octavo.ir.output_folder import open_output

    request = compiling.request(planning)
    work = _Work(model, calibration, preprocess, making, request, dump_ir, cache)
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
    making: SyntheticOptions
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
            cache = Cache(default_folder()) if self.cache else None
            data = self._data(source, cache, progress)
            compiled = compile_model(
                source,
                calibration=data.batches,
                request=data.request,
                cache=cache,
                workdir=Path(workdir),
                instruments=_instruments(self.dump_ir, progress),
                progress=progress,
            )
            compiled = replace(compiled, notes=(*compiled.notes, *data.notes))
            return compiled, compiled.write(folder)

    def _data(self, source: ir_model.Model, cache: Cache | None, progress: Progress) -> Chosen:
        """The calibration that was named, or data made from the model."""
        from octavo.cli.synthetic_data import ANALYTIC, NONE, SYNTHETIC, Chosen, Maker, chosen

        if self.calibration not in ("", ANALYTIC, NONE, SYNTHETIC):
            return Chosen(batches_of(self.calibration, self.preprocess, source), self.request)
        maker = Maker(source, self.request.target, self.request.seed, cache, progress)
        how = replace(self.making.synthesis(self.model), shapes=self.request.shapes or {})
        return chosen(self.calibration, maker, how, self.request)


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
