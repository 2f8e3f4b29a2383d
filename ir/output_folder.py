"""The folder a command writes: complete or not there, and never something else's."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.ir.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def open_output(
    path: Path, *, force: bool = False, source: Path | None = None, marker: str = MANIFEST
) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well.

    After any failure, Ctrl-C included, the temporary folder is gone and `path` is as it was.
    `force` replaces an earlier artifact, known by its file `marker`, and nothing else; `source`
    must not lie in `path`.
    Raises UsageError where `path` cannot be written.
    """
    path = path.resolve()
    _check(path, force, source, marker)
    partial = _create(path)
    try:
        yield partial
        _replace(partial, path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = f"there is no space left to write {path.name}"
        hint = "free some space or choose another place with -o"
        raise UsageError(message, where=str(path), why=str(error), hint=hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(path: Path, force: bool, source: Path | None, marker: str) -> None:
    if not path.exists():
        return
    where = str(path)
    if not path.is_dir():
        raise UsageError(
            "the output is a file, not a folder", where=where, hint="choose another -o"
        )
    if path in (cwd := Path.cwd(), *cwd.parents):
        message = "the output would replace the folder this command runs in"
        raise UsageError(message, where=where, hint="name a new folder with -o")
    if source is not None and path in source.resolve().parents:
        message = "the output would replace the source model"
        raise UsageError(message, where=where, hint="choose another folder with -o")
    if not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        message = "the output folder holds files that are no octavo artifact"
        raise UsageError(message, where=where, hint="choose an empty or new folder with -o")
    if not force:
        message = "the output folder is not empty"
        raise UsageError(message, where=where, hint="--force replaces the artifact in it")


def _create(path: Path) -> Path:
    partial = _beside(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        message = f"the folder {path.parent} cannot be written"
        hint = "choose another place with -o"
        raise UsageError(message, where=str(path), why=error.strerror or "", hint=hint) from error
    return partial


def _replace(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = _beside(path, "old")
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.{kind}")
