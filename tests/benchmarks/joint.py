"""What structure adds to int8: `python tests/benchmarks/joint.py`.

Every model is compiled to int8, and then by one plan that also chooses widths, within a latency
that is `--faster` times shorter; a `--pipeline` that does not allocate prunes as it says. All files
are timed in the same rounds, one thread; scores are those of data that no compilation has seen.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, final

import typer
from calibration import photo_stamps, sentences_of_articles
from cases import CASES, Case
from rich.console import Console
from rich.table import Table
from task import score

import octavo
from octavo.backends.bench import bench, random_feed
from octavo.ir.cache import Cache, default_folder
from octavo.ir.read import read
from octavo.passes.allocate import Allocate

# Models, and how much faster than int8 the joint plan has to be.
_MODELS = {"fashion-resnet": 1.5, "fashion-vit": 1.5, "minilm": 1.4}
_SECONDS = 6.0
# Repair needs more data than ranges do.
_DATA = {
    "efficientnet-lite0": partial(photo_stamps, count=256),
    "minilm": partial(sentences_of_articles, count=512),
}


@final
@dataclass(frozen=True)
class Row:
    """One file: its bytes, score, speed relative to float, and seconds of compiling it."""

    model: str
    name: str
    bytes: int
    score: float
    speed: float
    seconds: float


def rows(case: Case, folder: Path, faster: float, pipeline: str, size: str) -> list[Row]:
    """The float model, its int8 artifact, and the joint one."""
    path, task = case.model(), case.task(case.model())
    write = _DATA.get(case.name) or case.calibration or case.texts
    assert write is not None
    (own := folder / "data").mkdir()
    data, cache = str(write(path, own)), Cache(default_folder())
    shapes = case.speeds[0].shapes
    begin = time.perf_counter()
    plain = octavo.compile(path, calibration=data, shapes=shapes, cache=cache)
    plain.save(folder / "int8")
    middle = time.perf_counter()
    files = [path, folder / "int8/model.onnx", folder / "joint/model.onnx"]
    feed = random_feed(read(path), shapes, 0)
    whole = bench(files[:2], feed, seconds_limit=_SECONDS, rounds=10**4)
    share = 1 / (whole.rows[-1].speed * faster)
    planned = not pipeline or Allocate.name in pipeline
    joint = octavo.compile(
        path, calibration=data, shapes=shapes, pipeline=pipeline, cache=cache, size=size,
        latency=f"{share:.4f}x" if planned else "", structure=planned,
    )  # fmt: skip
    joint.save(folder / "joint")
    seconds = (0.0, middle - begin, time.perf_counter() - middle)
    timed = bench(files, feed, seconds_limit=_SECONDS, rounds=10**4)
    return [
        Row(
            case.name, name, file.stat().st_size, score(task, file)[task.headline],
            timing.speed, spent,
        )
        for name, file, timing, spent in zip(
            ("float", "int8", "joint"), files, timed.rows, seconds, strict=True
        )
    ]  # fmt: skip


def show(console: Console, found: list[Row], faster: float) -> None:
    """One table per model; the last column is relative to int8."""
    table = Table("file", "bytes", "score", "speed", "of int8", "compile s", title=found[0].model)
    for row in found:
        relative = row.speed / found[1].speed
        table.add_row(
            row.name, str(row.bytes), f"{row.score:.4f}", f"{row.speed:.2f}x",
            f"{relative:.2f}x", f"{row.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"wanted: {faster:g}x of int8")


def main(
    models: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    faster: Annotated[float, typer.Option(help="Speed wanted of int8's; 0: the goal.")] = 0.0,
    pipeline: Annotated[str, typer.Option(help="Passes of the joint plan.")] = "",
    size: Annotated[str, typer.Option(help="Bytes of the joint plan, as octavo takes them.")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print bytes, score and speed of float, int8 and the joint plan."""
    console, everything = Console(width=100), []
    cases: Mapping[str, Case] = {case.name: case for case in CASES}
    for name in models or _MODELS:
        wanted = faster or _MODELS.get(name, 1.25)
        with tempfile.TemporaryDirectory() as folder:
            found = rows(cases[name], Path(folder), wanted, pipeline, size)
        show(console, found, wanted)
        everything += found
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in everything], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
