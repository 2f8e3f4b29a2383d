"""A content-addressed cache on disk, shared by processes.

An entry is a file named by the sha256 of what it was computed from; it starts with the sha256 of
its own bytes, so an entry that was cut short or altered reads as absent. Losing the cache, or
being unable to write it, costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

ENVIRONMENT = "OCTAVO_CACHE"
_DIGEST_BYTES = hashlib.sha256().digest_size
_SUFFIX = ".entry"


def cache_key(kind: str, *parts: str) -> str:
    """sha256 over a kind and all inputs, options and versions a result depends on."""
    digest = hashlib.sha256()
    for part in (kind, *parts):
        encoded = part.encode()
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def default_folder() -> Path:
    """`$OCTAVO_CACHE`, else `~/.cache/octavo`."""
    named = os.environ.get(ENVIRONMENT)
    return Path(named) if named else Path.home() / ".cache" / "octavo"


@final
@dataclass(frozen=True)
class Cache:
    """Bytes by key in `folder`; the least recently used go when `max_bytes` is exceeded."""

    folder: Path
    max_bytes: int = 2 << 30

    def get(self, key: str) -> bytes | None:
        """The stored bytes, None where there are none or they are damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        with suppress(OSError):
            os.utime(path)
        return payload

    def put(self, key: str, payload: bytes) -> bool:
        """Store bytes whole or not at all; False where the folder cannot be written."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, hashlib.sha256(payload).digest() + payload)
            self._evict(keep=path)
        except OSError:
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _evict(self, keep: Path) -> None:
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            # Another process may evict at the same time.
            with suppress(FileNotFoundError):
                found = path.stat()
                entries.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                excess -= size


def _write_whole(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
