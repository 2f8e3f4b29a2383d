"""The cache: content-addressed, bounded, and harmless when it breaks."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from octavo.ir.cache import Cache, cache_key, default_folder


def entry(cache: Cache, key: str) -> Path:
    (path,) = cache.folder.rglob(f"{key}*")
    return path


def test_what_was_put_is_read(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), cache_key("ranges", "a")
    assert cache.get(key) is None
    assert cache.put(key, b"payload")
    assert Cache(tmp_path).get(key) == b"payload"
    assert cache.put(key, b"")
    assert cache.get(key) == b""


def test_keys_differ_in_kind_parts_and_their_borders() -> None:
    keys = [("a", "b"), ("ab",), ("a", "b", ""), ("", "ab"), ("b", "a"), ("a",)]
    assert len({cache_key(*key) for key in keys}) == len(keys)
    assert len(cache_key("a")) == 64


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 100])
def test_a_damaged_entry_is_absent_and_replaced(tmp_path: Path, damage: bytes) -> None:
    cache, key = Cache(tmp_path), cache_key("k")
    cache.put(key, b"payload")
    entry(cache, key).write_bytes(damage)
    assert cache.get(key) is None
    cache.put(key, b"again")
    assert cache.get(key) == b"again"


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), cache_key("k")
    cache.put(key, b"payload")
    data = bytearray(entry(cache, key).read_bytes())
    data[-1] ^= 1
    entry(cache, key).write_bytes(data)
    assert cache.get(key) is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=3 * 1032)
    keys = [cache_key(str(k)) for k in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.put(key, bytes(1000))
        os.utime(entry(cache, key), (age, age))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], bytes(1000))
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    cache = Cache(blocked / "inside")
    assert not cache.put(cache_key("k"), b"payload")
    assert cache.get(cache_key("k")) is None


def put_many(folder: Path, worker: int) -> int:
    cache = Cache(folder, max_bytes=20_000)
    written = 0
    for k in range(40):
        written += cache.put(cache_key(str(k % 10)), bytes([k % 10]) * 1000)
        read = cache.get(cache_key(str((k + worker) % 10)))
        assert read is None or read == bytes([(k + worker) % 10]) * 1000
    return written


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(partial(put_many, tmp_path), range(2))) == [40, 40]
    assert not list(tmp_path.rglob(".partial-*"))


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", "elsewhere")
    assert default_folder() == Path("elsewhere")
    monkeypatch.delenv("OCTAVO_CACHE")
    assert default_folder() == Path.home() / ".cache" / "octavo"
