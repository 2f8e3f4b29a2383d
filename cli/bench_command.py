"""`octavo bench`: latency of artifacts and model files against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from octavo.cli.render import (
    AsJson,
    format_bytes,
    format_seconds,
    print_json,
    print_message,
    print_table,
    print_warning,
)
from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.artifact import Bench
    from octavo.ir.backend import Backend, Session
    from octavo.ir.calibration import Feed


def bench(
    models: Annotated[
        list[Path], typer.Argument(help="Artifact folders or .onnx files; the first is the 1.00x.")
    ],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    shape: Annotated[
        list[str] | None, typer.Option(help="Shape of an input, as NAME=1x3x224x224; repeatable.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="An .npz with every input by name; else random numbers.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds at most; each runs every file.")] = 200,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds at most, all rounds.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Time models against each other.

    Warm-up, then rounds that run every file once; medians are shown. Stops early when every
    speed is known to 1 %. An artifact alone is compared with its source, where that lies in this
    folder or beside the artifact.
    """
    from octavo.backends.bench import bench as measure

    runs = _runs(models if len(models) > 1 else _with_source(models[0]))
    files = list(runs)
    feed = _feed(files[0], data, parse_shapes(shape or ()))
    described = dict.fromkeys(run.backend.environment(threads) for run in runs.values())
    result = measure(
        files,
        feed,
        threads=threads,
        rounds=rounds,
        seconds_limit=seconds,
        sessions=lambda file: runs[file].session(threads),
        described="; ".join(described),
    )
    if as_json:
        print_json({**result.to_json(), "feed": str(data) if data else "random"})
    else:
        _print(result, str(data) if data else "random numbers")


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`x=1x3x224x224` → `{"x": (1, 3, 224, 224)}`; a scalar is `x=`."""
    shapes = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        parts = sizes.split("x") if sizes else []
        if not equals or not all(part.isdecimal() for part in parts):
            message = f"'{text}' is not a shape"
            raise UsageError(message, hint="write NAME=1x3x224x224")
        shapes[name] = tuple(map(int, parts))
    return shapes


def _with_source(path: Path) -> list[Path]:
    """An artifact after the file it was compiled from, found by name and hash; else alone."""
    import hashlib

    from octavo.ir.artifact_io import is_artifact, read_artifact

    if not is_artifact(path):
        return [path]
    source = read_artifact(path).manifest.source
    for folder in (Path(), path.parent):
        file = folder / source.name
        if file.is_file() and file.stat().st_size == source.bytes:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == source.sha256:
                    return [file, path]
    print_warning(f"the source {source.name} is not here; give its file first to compare")
    return [path]


@final
@dataclass(frozen=True)
class _Run:
    """A file, what runs it, and the session options it relies on."""

    path: Path
    backend: Backend
    config: Mapping[str, str]

    def session(self, threads: int) -> Session:
        return self.backend.open(self.path, threads=threads, config=self.config)


def _runs(models: Sequence[Path]) -> dict[Path, _Run]:
    """An artifact by its target's runtime; other files by that of the first artifact."""
    from octavo.cli.target import DEFAULT, backend_of
    from octavo.ir.artifact_io import is_artifact, read_artifact

    artifacts = {path: read_artifact(path).artifact for path in models if is_artifact(path)}
    first = next(iter(artifacts.values()), None)
    backend = backend_of(first.target if first else DEFAULT)
    runs = {}
    for path in models:
        if path in artifacts:
            own = artifacts[path]
            runs[own.path] = _Run(own.path, backend_of(own.target), own.session_options)
        elif path.is_file():
            runs[path] = _Run(path, backend, {})
        else:
            raise UsageError(f"{path} is neither a model file nor an artifact folder")
    return runs


def _feed(first: Path, data: Path | None, shapes: Mapping[str, Sequence[int]]) -> Feed:
    from octavo.backends.bench import random_feed
    from octavo.cli.run_command import read_feed
    from octavo.ir.read import read

    if data is None:
        return random_feed(read(first), shapes)
    if shapes:
        message = "--shape and --data exclude each other"
        raise UsageError(message, why="data has its own shapes")
    return read_feed(data)


def _print(result: Bench, feed: str) -> None:
    rows = [
        (
            row.file,
            format_bytes(row.bytes),
            *map(format_seconds, (row.median_seconds, row.low_seconds, row.high_seconds)),
            f"{row.speed:.2f}x",
        )
        for row in result.rows
    ]
    print_table(("file", "size", "median", "10 %", "90 %", "speed"), rows)
    shapes = ", ".join(f"{name} {shape}" for name, shape in result.shapes.items())
    print_message(f"{result.rounds} rounds; {feed}: {shapes}; {result.environment}")
