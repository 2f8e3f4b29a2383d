"""`octavo passes`: what a pipeline can be made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.render import AsJson, print_json, print_message, print_table
from octavo.ir.errors import UsageError, VerificationFailed


def passes(
    presets: Annotated[
        bool, typer.Option("--presets", help="List the named pipelines instead.")
    ] = False,
    write_docs: Annotated[
        Path | None, typer.Option(help="Write one documentation page per pass into this folder.")
    ] = None,
    goldens: Annotated[
        Path, typer.Option(help="Folder of golden cases, for the examples of the pages.")
    ] = Path("tests/golden"),
    check: Annotated[
        bool, typer.Option("--check", help="Only check that the pages are up to date.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the passes with their options and defaults."""
    if write_docs is not None:
        _write_docs(write_docs, goldens, check)
    elif check:
        message = "--check belongs to --write-docs"
        raise UsageError(message, hint="octavo passes --write-docs passes/docs --check")
    elif presets:
        _list_presets(as_json)
    else:
        _list_passes(as_json)


def _list_passes(as_json: bool) -> None:
    from octavo.cli.pass_docs import summary
    from octavo.passes.registry import PASSES
    from octavo.passes.spec import options_of

    if as_json:
        print_json(
            {
                name: {
                    "summary": summary(pass_),
                    "options": {
                        option: {"type": kind, "default": default}
                        for option, (kind, default) in options_of(pass_).items()
                    },
                    "requires": [fact.__name__ for fact in pass_.requires],
                    "produces": [fact.__name__ for fact in pass_.produces],
                }
                for name, pass_ in PASSES.items()
            }
        )
        return
    for name, pass_ in PASSES.items():
        print_message(f"{name}: {summary(pass_)}")
        options = options_of(pass_).items()
        if options:
            rows = [(option, kind, default) for option, (kind, default) in options]
            print_table(("option", "type", "default"), rows)


def _list_presets(as_json: bool) -> None:
    from octavo.passes.presets import PRESETS

    if as_json:
        print_json(dict(PRESETS))
    else:
        print_table(("preset", "pipeline"), list(PRESETS.items()))


def _write_docs(folder: Path, goldens: Path, check: bool) -> None:
    from octavo.cli.pass_docs import differing, pages, write_pages

    expected = pages(goldens)
    if not check:
        write_pages(folder, expected)
        print_message(f"wrote {len(expected)} pages to {folder}")
    elif stale := differing(folder, expected):
        message = f"{len(stale)} documentation pages are not up to date"
        hint = f"octavo passes --write-docs {folder} writes them"
        raise VerificationFailed(message, where=str(folder), why=", ".join(stale), hint=hint)
    else:
        print_message(f"{len(expected)} pages are up to date")
