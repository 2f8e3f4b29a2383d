"""`octavo run`: one feed through a model or artifact, as a deployed program would do it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import AsJson, format_seconds, print_json, print_message, print_table
from octavo.ir.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo.ir.arrays_io import Array
    from octavo.ir.backend import Session


def run(
    model: Annotated[Path, typer.Argument(help="An artifact folder or an .onnx file.")],
    feed: Annotated[Path, typer.Option("--input", "-i", help="An .npz with every input by name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a model or artifact on one feed."""
    arrays = read_feed(feed)
    session = open_session(model, threads)
    _check_names(session, arrays, feed)
    begin = time.perf_counter()
    results = session.run(arrays)
    seconds = time.perf_counter() - begin
    _write(output, results)
    shown = [
        {"output": name, "dtype": str(a.dtype), "shape": list(a.shape)}
        for name, a in results.items()
    ]
    if as_json:
        print_json({"seconds": seconds, "threads": threads, "outputs": shown})
        return
    print_table(("output", "dtype", "shape"), [tuple(row.values()) for row in shown])
    print_message(f"{format_seconds(seconds)} on {threads} thread(s), first run; wrote {output}")


def open_session(path: Path, threads: int) -> Session:
    """The runtime's session of a model file, or of an artifact with its own session options."""
    from octavo.cli.target import DEFAULT, backend_of
    from octavo.ir.artifact_io import is_artifact, read_artifact

    if is_artifact(path):
        artifact = read_artifact(path).artifact
        config, backend = artifact.session_options, backend_of(artifact.target)
        return backend.open(artifact.path, threads=threads, config=config)
    if not path.is_file():
        raise UsageError(f"{path} is neither a model file nor an artifact folder")
    return backend_of(DEFAULT).open(path, threads=threads)


def read_feed(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name; UsageError where it is none."""
    from octavo.ir.arrays_io import read_arrays

    try:
        return read_arrays(path)
    except (OSError, ValueError) as error:
        message = f"{path} is not an .npz file of arrays"
        hint = "write it with numpy.savez(path, **{input name: array})"
        raise UsageError(message, why=str(error), hint=hint) from None


def _check_names(session: Session, arrays: Mapping[str, Array], feed: Path) -> None:
    for name in arrays:
        if name not in session.inputs:
            raise UnknownName("input", name, session.inputs, where=str(feed))
    if missing := [name for name in session.inputs if name not in arrays]:
        message = f"input '{missing[0]}' has no array"
        raise UsageError(
            message, where=str(feed), hint=f"the model reads {', '.join(session.inputs)}"
        )


def _write(path: Path, arrays: Mapping[str, Array]) -> None:
    from octavo.ir.arrays_io import write_arrays

    try:
        write_arrays(path, arrays)
    except OSError as error:
        raise UsageError(f"{path} cannot be written", why=str(error)) from None
