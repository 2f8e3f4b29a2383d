"""`octavo profile`: what every node of a model costs on this device, as a file to decide by."""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from octavo.cli.render import (
    AsJson,
    format_seconds,
    print_json,
    print_message,
    print_table,
)
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from octavo.cli.profiling import Kind, Profiled
    from octavo.ir.backend import Backend
    from octavo.ir.calibration import Feed
    from octavo.ir.latency_table import LatencyTable
    from octavo.ir.model import Model

_SHOWN_NAME = 90
_ATTRIBUTES = re.compile(r"\{.*?\}(?=\()")
_AXIS = re.compile(r"@\d+$")


Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="The profile to write; one of this device is extended."),
]
KindNames = Annotated[
    list[str] | None,
    typer.Option(
        help="static, dynamic or weight-only:s4/block32; repeatable. Default: these and "
        "weight-only s8/block32, s4/block128, s2/block128."
    ),
]
Shapes = Annotated[
    list[str] | None, typer.Option(help="Shape of an input, as NAME=1x3x224x224; repeatable.")
]
Seconds = Annotated[float, typer.Option(min=0.0, help="Seconds at most for each kind.")]
UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep measurements in ~/.cache/octavo.")
]


def profile(
    model: Annotated[Path, typer.Argument(help="An .onnx or .pt2 file.")],
    output: Output,
    target: Annotated[
        str, typer.Option(help="What to compile for; see octavo targets list.")
    ] = "ort-cpu",
    shape: Shapes = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration", "-c", help="Data whose first sample is run; --shape decides before it."
        ),
    ] = "",
    kind: KindNames = None,
    seconds: Seconds = 0.5,
    cache: UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Measure every node of a model in every way the target computes it.

    Equal nodes are measured once, side by side with float; what an earlier profile of any model
    has measured on this device is not measured again.
    """
    from octavo.cli.bench_command import parse_shapes
    from octavo.cli.profiling import DEFAULT_KINDS, Kind
    from octavo.cli.target import backend_of
    from octavo.ir.read import read

    backend = _timing(backend_of(target))
    kinds = tuple(map(Kind.parse, kind)) if kind else DEFAULT_KINDS
    before = _existing(output, backend.environment(threads))
    shapes = parse_shapes(shape or ())
    work = _Work(read(model), backend, shapes, threads, calibration, cache)
    profiled = work.run(kinds, seconds)
    table = before.merge(profiled.table) if before else profiled.table
    table.write(output)
    if as_json:
        print_json({"environment": table.environment, **_json(profiled)})
    else:
        _print(profiled, output)


@final
@dataclass(frozen=True)
class _Work:
    """What is profiled, and how."""

    source: Model
    backend: Backend
    shapes: Mapping[str, Sequence[int]]
    threads: int
    calibration: str
    cache: bool

    def run(self, kinds: Sequence[Kind], seconds: float) -> Profiled:
        """Canonicalize the model and profile it."""
        from octavo.cli.profiling import profile_model
        from octavo.cli.progress import progress_bars
        from octavo.ir.cache import Cache, default_folder
        from octavo.ir.cost import AnalyticCost
        from octavo.ir.shapes import concrete_elements
        from octavo.passes.base import PassContext
        from octavo.passes.pipeline import Pipeline

        feed, target = self._feed(), self.backend.target
        scratch = tempfile.TemporaryDirectory(prefix="octavo-")
        with progress_bars() as progress, scratch as folder, ThreadPoolExecutor(1) as executor:
            ctx = PassContext(
                target=target,
                cost=AnalyticCost(target, concrete_elements(self.source, feed)),
                evaluator=self.backend.evaluator(self.threads),
                executor=executor,
                workdir=Path(folder),
                cache=Cache(default_folder()) if self.cache else None,
                progress=progress,
            )
            model = Pipeline.parse("canonicalize").run(self.source, ctx).model
            return profile_model(
                model, feed, ctx, kinds=kinds, threads=self.threads, seconds_limit=seconds
            )

    def _feed(self) -> Feed:
        """What `octavo compile` measures with, so that its nodes are found in the profile."""
        from octavo.cli.calibration_data import load_calibration
        from octavo.cli.compilation import bench_feed
        from octavo.cli.request import Request

        batches = load_calibration(self.calibration, self.source) if self.calibration else None
        return bench_feed(self.source, batches, Request(shapes=self.shapes or None))


def _timing(backend: Backend) -> Backend:
    """The backend if it can time here; refuses others, early."""
    if not backend.times:
        message = f"nothing here tells the seconds of {backend.target.name}"
        raise UsageError(message, hint="profile on the device")
    return backend


def _existing(path: Path, environment: str) -> LatencyTable | None:
    """The profile that is extended, if there is one; refuses what cannot be written, early."""
    from octavo.ir.latency_table import read_table

    message = f"the profile cannot be written to {path}"
    if not path.exists():
        folder = path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(message, why=f"{folder} is not a folder that can be written")
        return None
    if not path.is_file():
        raise UsageError(message, why="it is not a file")
    table = read_table(path)
    different = table.differences(environment)
    if different:
        hint = "choose another file"
        raise UsageError(message, why=f"it is of another device: {different[0]}", hint=hint)
    return table


def _json(profiled: Profiled) -> dict[str, object]:
    return {
        "rows": [
            {"signature": text, "nodes": profiled.counts[text], "seconds": dict(row)}
            for text, row in profiled.table.rows.items()
        ],
        "source": profiled.cost.source,
        "checks": [{**asdict(check), "error": check.error} for check in profiled.checks],
    }


def _print(profiled: Profiled, output: Path) -> None:
    rows = profiled.table.rows
    keys = dict.fromkeys(key for row in rows.values() for key in row if key != "float")
    options = list(dict.fromkeys(_AXIS.sub("", key) for key in keys))
    by_seconds = sorted(rows, key=lambda text: -profiled.counts[text] * rows[text].get("float", 0))
    cells = []
    for text in by_seconds:
        row = {_AXIS.sub("", key): seconds for key, seconds in rows[text].items()}
        ratios = (_ratio(row, option) for option in options)
        name = _ATTRIBUTES.sub("", text)
        shown = name if len(name) <= _SHOWN_NAME else f"{name[:_SHOWN_NAME]}…"
        cells.append((profiled.counts[text], shown, format_seconds(row.get("float")), *ratios))
    print_table(("nodes", "signature", "float", *options), cells)
    checks = [
        (
            check.kind,
            format_seconds(check.predicted_seconds),
            format_seconds(check.measured_seconds),
            f"{check.error:+.1%}",
        )
        for check in profiled.checks
    ]
    if checks:
        print_table(("all nodes", "predicted", "measured", "error"), checks)
    else:
        print_message("nothing was run: every signature was measured before")
    print_message(f"{output}: {len(rows)} signatures, {profiled.cost.source}")


def _ratio(row: Mapping[str, float], key: str) -> str:
    """Seconds of an option against float's; nothing where either is unknown or takes no time."""
    seconds, whole = row.get(key), row.get("float")
    return f"{seconds / whole:.2f}" if seconds is not None and whole else ""
