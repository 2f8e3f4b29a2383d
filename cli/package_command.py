"""`octavo package`: an artifact as a device gets it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import (
    AsJson,
    format_bytes,
    format_seconds,
    print_json,
    print_message,
    print_table,
)

if TYPE_CHECKING:
    from octavo.cli.packaging import Packaged


def package(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write; default: package/ in it."),
    ] = None,
    any_processor: Annotated[
        bool,
        typer.Option("--any-processor", help="Leave out layouts that fit only the processor here."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier package.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an artifact in ONNX Runtime's own format, with what a reduced runtime must hold.

    The folder gets model.ort, the kernels of the optimised graph for a reduced build, and programs
    in C++ and Python that load it and check its outputs.
    """
    from octavo.cli.packaging import package_artifact

    packaged = package_artifact(artifact, output, any_processor=any_processor, force=force)
    if as_json:
        files = [asdict(file) for file in packaged.files]
        print_json({**asdict(packaged.package), "files": files, "folder": str(packaged.folder)})
    else:
        _print(packaged)


def _print(packaged: Packaged) -> None:
    rows = [(f.name, format_bytes(f.bytes), format_seconds(f.load_seconds)) for f in packaged.files]
    print_table(("file", "size", "load"), rows)
    whole, own = packaged.files
    if own.bytes > 2 * whole.bytes:
        print_message(
            "model.ort holds the weights unpacked; deploy model.onnx where size counts more than "
            "load time"
        )
    options = packaged.package.session_options
    print_message(f"wrote:         {packaged.folder}")
    print_message(f"runs on:       {packaged.package.processor}, {packaged.package.runtime}")
    print_message(
        "options:       " + (", ".join(f"{k}={v}" for k, v in options.items()) or "none needed")
    )
    print_message(f"reduced build: {packaged.package.reduced_build}")
