"""`octavo check`: what keeps a target from building a model, or makes it slow there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import AsJson, print_json, print_message, print_table
from octavo.ir.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from octavo.ir.conformance import Conformance

_SHOWN = 40


def check(
    model: Annotated[Path, typer.Argument(help="A model file, of any tool, or an artifact.")],
    target: Annotated[str, typer.Option(help="What it shall run on; see octavo targets list.")],
    as_json: AsJson = False,
) -> None:
    """Hold a model file against the rules of a target, whoever made it.

    Every finding names the node, the reason and what mends it; exit code 4 where one keeps the
    target from building the model or changes what it computes.
    """
    from octavo.cli.target import checker_of
    from octavo.ir.artifact_io import MODEL, is_artifact

    checker = checker_of(target)
    path = model / MODEL if is_artifact(model) else model
    if path.is_dir():
        raise UsageError(f"{model} is neither a model file nor an artifact folder")
    found = checker.check(path)
    if as_json:
        print_json({"model": str(model), "target": target, **found.to_json()})
    else:
        _print(found, path, target)
    if not found.ok:
        first = next(finding for finding in found.findings if finding.error)
        message = f"the model does not conform to {target}"
        raise VerificationFailed(message, where=str(model), why=str(first))


def _print(found: Conformance, path: Path, target: str) -> None:
    rows = [
        ("error" if f.error else "advice", f.rule, f.node, f.reason, f.fix) for f in found.findings
    ]
    if rows:
        print_table(("", "rule", "node", "reason", "what mends it"), rows[:_SHOWN])
    if len(rows) > _SHOWN:
        left = Counter(rule for _, rule, *_ in rows[_SHOWN:])
        counted = ", ".join(f"{count} {rule}" for rule, count in left.most_common())
        print_message(f"and {len(rows) - _SHOWN} more: {counted}; --json lists all")
    verdict = "conforms to" if found.ok else "does not conform to"
    print_message(f"{path} {verdict} {target}")
    for text in (f"checked: {', '.join(found.checked)}", *found.unverified):
        print_message(text)
