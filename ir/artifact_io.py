"""The files of an artifact folder: written after lowering, read by inspect, verify and bench.

`manifest.json` and the files it hashes are the same bytes whenever the same inputs are compiled
again. `plan.json`, `audit.json`, `passes.jsonl` and `report.html` also hold measured seconds, so
they are not hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from octavo.ir.arrays_io import Array, read_arrays, write_arrays
from octavo.ir.artifact import Artifact, Audit, AuditRow, PlannedNode, Probes
from octavo.ir.errors import UsageError, VerificationFailed
from octavo.ir.model import Source
from octavo.ir.output_folder import MANIFEST
from octavo.ir.versions import versions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from octavo.ir.calibration import Feed
    from octavo.ir.facts import Plan

MODEL, PLAN, AUDIT, PROBES = "model.onnx", "plan.json", "audit.json", "probes.npz"
PASS_LOG = "passes.jsonl"
FORMAT = 1
Scalar = str | int | float | bool | None
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@final
@dataclass(frozen=True)
class FileEntry:
    """What a file must be: its sha256 and size."""

    sha256: str
    bytes: int


@final
@dataclass(frozen=True)
class Manifest:
    """What was compiled from what and how, without times, dates, paths or host names.

    `calibration_source` is `real`, the name of data made from the model, or `analytic`.
    `config` is the request (option → value), `results` what came out (name → number or text),
    both as far as compiling again gives the same; `files` is filled when the manifest is written.
    """

    source: Source
    target: str
    pipeline: str
    seed: int
    calibration_sha256: str = ""
    calibration_samples: int = 0
    calibration_source: str = ""
    config: Mapping[str, Scalar] = field(default_factory=dict)
    results: Mapping[str, Scalar] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    format: int = FORMAT

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@final
@dataclass(frozen=True)
class SavedArtifact:
    """An artifact folder as it was written."""

    folder: Path
    manifest: Manifest
    artifact: Artifact
    plan_source: str
    audit: Audit

    def probes(self) -> Probes:
        """The stored inputs and outputs; VerificationFailed where they cannot be read."""
        path = self.folder / PROBES
        try:
            return read_probes(path)
        except _UNREADABLE as error:
            raise _damaged(path, error) from None

    def damaged_files(self) -> tuple[str, ...]:
        """One sentence for every file that is not what the manifest says."""
        entries = self.manifest.files.items()
        return tuple(p for name, entry in entries if (p := _problem(self.folder / name, entry)))


def write_artifact(
    artifact: Artifact,
    manifest: Manifest,
    *,
    plan: Plan | None,
    audit: Audit,
    probes: Probes,
    planning: Mapping[str, object] | None = None,
) -> Manifest:
    """Write all files but the model and the pass log beside the model; the manifest comes last.

    `planning` is what plan.json holds beside the options (`octavo.ir.plan_json`).
    Returns the manifest with the session options and the hash of every reproducible file.
    """
    folder = artifact.path.parent
    _write_json(folder / PLAN, {**_plan_json(artifact.planned, plan), **(planning or {})})
    _write_json(folder / AUDIT, audit.to_json())
    write_probes(probes, folder / PROBES)
    for name, text in artifact.beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    names = {MODEL, PROBES, *artifact.beside, *(p.name for p in folder.glob(f"{MODEL}*"))}
    files = {name: FileEntry(*_digest(folder / name)) for name in sorted(names)}
    name = Path(manifest.source.name).name
    written = replace(
        manifest,
        source=replace(manifest.source, name=name),
        session_options=dict(artifact.session_options),
        files=files,
    )
    _write_json(folder / MANIFEST, written.to_json())
    return written


def is_artifact(path: Path) -> bool:
    """Whether a path is a folder that `write_artifact` filled."""
    return (path / MANIFEST).is_file()


def read_artifact(folder: Path) -> SavedArtifact:
    """An artifact folder.

    Raises UsageError where it is none, VerificationFailed where one of its files is damaged.
    """
    if not is_artifact(folder):
        message = f"{folder} is not an octavo artifact"
        hint = f"give the folder that octavo compile wrote; it holds {MANIFEST}"
        raise UsageError(message, hint=hint)
    manifest = _read(folder / MANIFEST, _manifest)
    source, planned = _read(folder / PLAN, _planned)
    audit = _read(folder / AUDIT, _audit)
    artifact = Artifact(folder / MODEL, manifest.target, planned, manifest.session_options)
    return SavedArtifact(folder, manifest, artifact, source, audit)


def write_probes(probes: Probes, path: Path) -> None:
    """Arrays `0.in.NAME` and `0.out.NAME` of every probe, in an .npz file."""
    arrays = {
        f"{index}.{role}.{name}": array
        for role, feeds in (("in", probes.feeds), ("out", probes.outputs))
        for index, feed in enumerate(feeds)
        for name, array in feed.items()
    }
    write_arrays(path, arrays)


def read_probes(path: Path) -> Probes:
    """What `write_probes` wrote."""
    roles: dict[str, dict[int, dict[str, Array]]] = {"in": {}, "out": {}}
    for key, array in read_arrays(path).items():
        index, role, name = key.split(".", 2)
        roles[role].setdefault(int(index), {})[name] = array
    return Probes(_in_order(roles["in"]), _in_order(roles["out"]))


def _in_order(feeds: Mapping[int, Feed]) -> tuple[Feed, ...]:
    return tuple(feeds[index] for index in sorted(feeds))


def _plan_json(planned: Iterable[PlannedNode], plan: Plan | None) -> dict[str, object]:
    choices = {} if plan is None else plan.by_node
    return {
        "source": "" if plan is None else plan.source,
        "planned": [asdict(node) for node in planned],
        "choices": {
            name: {
                "option": str(choice.option),
                "reason": choice.reason,
                "seconds": dict(choice.seconds),
            }
            for name, choice in choices.items()
        },
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(path: Path, build: Any) -> Any:
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except _UNREADABLE as error:
        raise _damaged(path, error) from None


def _manifest(content: Any) -> Manifest:
    if content["format"] != FORMAT:
        message = f"format {content['format']}, this octavo reads {FORMAT}"
        raise ValueError(message)
    files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    if outside := [name for name in files if Path(name).name != name]:
        message = f"the file name {outside[0]!r} points out of the folder"
        raise ValueError(message)
    return Manifest(**{**content, "source": Source(**content["source"]), "files": files})


def _planned(content: Any) -> tuple[str, tuple[PlannedNode, ...]]:
    rows = content["planned"]
    nodes = tuple(PlannedNode(**{**row, "kernels": tuple(row["kernels"])}) for row in rows)
    return content["source"], nodes


def _audit(content: Any) -> Audit:
    rows = tuple(AuditRow(**row) for row in content["rows"])
    return Audit(rows, tuple(content["findings"]), content["kernels"], content["environment"])


def _damaged(path: Path, error: Exception) -> VerificationFailed:
    why = f"{type(error).__name__}: {error}"
    return VerificationFailed(f"{path.name} is damaged", where=str(path), why=why)


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def _problem(path: Path, entry: FileEntry) -> str:
    try:
        sha256, size = _digest(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if size != entry.bytes:
        return f"{path.name} has {size} bytes, the manifest says {entry.bytes}"
    return "" if sha256 == entry.sha256 else f"{path.name} is not the file that was written"
