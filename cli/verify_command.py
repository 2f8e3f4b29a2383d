"""`octavo verify`: does an artifact still hold what its files promise?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.render import AsJson, print_json, print_message, print_table
from octavo.ir.errors import VerificationFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.cli.verification import ProbeRow
    from octavo.ir.artifact import Audit
    from octavo.ir.artifact_io import SavedArtifact


def verify(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="Share of an output's largest magnitude it may differ by."),
    ] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Check that an artifact still holds what it promises.

    Compares hashes, replays the probes and audits the kernels again; exit code 4 on failure.
    Outputs on an integer grid may differ by two steps, other floats by --tolerance, integers
    not at all.
    """
    from octavo.cli.target import backend_of
    from octavo.cli.verification import replay_probes
    from octavo.ir.artifact_io import read_artifact

    saved = read_artifact(artifact)
    if damaged := saved.damaged_files():
        # Files that somebody changed are not run.
        hint = "compile again, or fetch the artifact again"
        raise VerificationFailed(
            damaged[0], where=str(artifact), why="; ".join(damaged[1:]), hint=hint
        )
    rows = replay_probes(saved, threads=threads, tolerance=tolerance)
    backend = backend_of(saved.artifact.target)
    proof = backend.audit(saved.artifact, saved.probes().feeds[0], threads=threads)
    _show(saved, rows, proof, as_json)
    _fail(rows, proof, artifact)


def _show(saved: SavedArtifact, rows: Sequence[ProbeRow], proof: Audit, as_json: bool) -> None:
    if as_json:
        probes = [{**asdict(row), "ok": row.ok} for row in rows]
        ok = proof.ok and all(row.ok for row in rows)
        files = {name: asdict(entry) for name, entry in saved.manifest.files.items()}
        print_json({"ok": ok, "files": files, "probes": probes, "audit": proof.to_json()})
        return
    print_message(f"{len(saved.manifest.files)} files as written")
    cells = [
        (r.probe, r.output, f"{r.difference:.3g}", f"{r.allowed:.3g}", r.rule, _verdict(r.ok))
        for r in rows
    ]
    print_table(("probe", "output", "difference", "allowed", "rule", ""), cells)
    kept = sum(row.ok for row in proof.rows)
    verb = "run as planned on" if proof.seen else "conform;"
    print_message(f"{kept} of {len(proof.rows)} nodes {verb} {proof.environment}")


def _fail(rows: Sequence[ProbeRow], proof: Audit, artifact: Path) -> None:
    """Raise VerificationFailed that names the first thing that does not hold."""
    where = str(artifact)
    if wrong := [row for row in rows if not row.ok]:
        first = wrong[0]
        message = f"{len(wrong)} of {len(rows)} probe outputs differ from the stored ones"
        why = f"'{first.output}' of probe {first.probe} by {first.difference:.3g}, {first.rule}"
        raise VerificationFailed(message, where=where, why=why)
    missed = [row for row in proof.rows if not row.ok]
    if missed or proof.findings:
        message = f"{len(missed)} of {len(proof.rows)} nodes do not run as planned"
        why = f"{missed[0].node}: {missed[0].reason}" if missed else proof.findings[0]
        raise VerificationFailed(message, where=where, why=why)


def _verdict(ok: bool) -> str:
    return "ok" if ok else "differs"
