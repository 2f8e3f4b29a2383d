"""The options of every command that decides how a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from octavo.cli.plan_options import PlanOptions

if TYPE_CHECKING:
    from octavo.cli.request import Request

ModelFile = Annotated[Path, typer.Argument(help="An .onnx or .pt2 file.")]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        help="An .npz by input name, a folder of .npy, .npz or images, or module:function; "
        "synthetic or analytic without data, none for no static int8; without it synthetic "
        "where the model says enough of its inputs.",
    ),
]
Preprocess = Annotated[
    str, typer.Option(help="How images become an input, as size=224,mean=…,std=…,layout=nchw.")
]
UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep measurements in ~/.cache/octavo.")
]


@final
@dataclass(frozen=True)
class CompileOptions:
    """What a compilation is asked for, budgets apart; one option of the command line each."""

    target: Annotated[str, typer.Option(help="What to compile for; see octavo targets list.")] = (
        "ort-cpu"
    )
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline",
            "-p",
            help="A preset or passes; the default is mixed with a budget, else int8 with "
            "calibration data, else int8-dynamic.",
        ),
    ] = ""
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="Nodes to leave alone: a name, a glob, re:… or type:Conv; repeatable."),
    ] = None
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Input shape to measure with, as NAME=1x3x224x224; repeatable."),
    ] = None
    threads: Annotated[int, typer.Option(min=1, help="Threads that latency is measured with.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Decide by measured or estimated latency."),
    ] = True
    max_recurrent_error: Annotated[
        float, typer.Option(min=0.0, help="Output error that dynamic LSTM kernels may add.")
    ] = 0.02
    min_agreement: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of rows whose arg-max dynamic kernels must keep without data.",
        ),
    ] = 0.6
    portable: Annotated[
        bool,
        typer.Option(
            "--portable", help="Only weights that OpenVINO and TensorRT execute too; plans."
        ),
    ] = False

    def request(self, planning: PlanOptions) -> Request:
        """The request that these options and the budgets make."""
        from octavo.cli.bench_command import parse_shapes
        from octavo.cli.request import Request

        request = Request(
            target=self.target,
            pipeline=self.pipeline,
            keep_float=tuple(self.keep_float or ()),
            shapes=parse_shapes(self.shape or ()) or None,
            threads=self.threads,
            seed=self.seed,
            measure=self.measure,
            max_recurrent_error=self.max_recurrent_error,
            min_agreement=self.min_agreement,
            portable=self.portable,
        )
        budgets: dict[str, Any] = planning.request
        return replace(request, **budgets)
