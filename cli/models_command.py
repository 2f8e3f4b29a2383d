"""`octavo models`: the networks that ship with octavo and the public ones it can fetch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import AsJson, format_bytes, print_json, print_message, print_table

if TYPE_CHECKING:
    from octavo.models.public import PublicModel

models_app = typer.Typer(help="Models to try octavo with.", no_args_is_help=True)

Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of fetched models; default $OCTAVO_CACHE or ~/.cache/octavo."),
]
_SHIPPED = ("28x28 grey image classification, Fashion-MNIST", "Apache-2.0")


@models_app.command("list")
def list_(as_json: AsJson = False, cache: Cache = None) -> None:
    """List the shipped models and those that can be fetched."""
    from octavo.models.fetch import cache_folder
    from octavo.models.public import PUBLIC

    folder = cache_folder(cache)
    rows = [*_shipped_rows(), *(_public_row(model, folder) for model in PUBLIC.values())]
    columns = ("model", "kind", "bytes", "licence", "state", "how")
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    print_table(columns, [(*row[:2], format_bytes(row[2]), *row[3:]) for row in rows])
    print_message(f"fetched models are kept in {folder}")


@models_app.command()
def get(
    name: Annotated[str, typer.Argument(help="A model of `octavo models list`.")],
    cache: Cache = None,
) -> None:
    """Fetch a model unless it is there, and print the paths of its files, the ONNX file first."""
    from octavo.cli.progress import progress_bars
    from octavo.ir.errors import UnknownName
    from octavo.models import fetch, names, shipped
    from octavo.models.public import PUBLIC

    if name in names():
        print_message(str(shipped(name)))
        return
    if name not in PUBLIC:
        raise UnknownName("model", name, (*names(), *PUBLIC))
    with progress_bars() as progress:
        files = fetch.get(PUBLIC[name], fetch.cache_folder(cache), progress)
    print_message("\n".join(map(str, files)))


Row = tuple[str, str, int, str, str, str]


def _shipped_rows() -> list[Row]:
    from octavo.models import names, shipped

    kind, licence = _SHIPPED
    return [
        (name, kind, shipped(name).stat().st_size, licence, "shipped", str(shipped(name)))
        for name in names()
    ]


def _public_row(model: PublicModel, folder: Path) -> Row:
    from octavo.models.fetch import fetched

    files = fetched(model, folder)
    state, how = "available", f"pip: {model.package}"
    if files:
        state, how = "fetched", str(files[0])
    return model.name, model.kind, model.bytes, model.licence, state, how
