"""The package that is built holds every module, its data, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    folders = project["tool"]["setuptools"]["package-dir"]
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders)
    present = {
        str(path.parent.relative_to(ROOT))
        for path in (*ROOT.glob("*/__init__.py"), *ROOT.glob("*/*/__init__.py"))
        if not path.relative_to(ROOT).parts[0].startswith((".", "build", "tests"))
    }
    assert present == set(folders.values())


def test_no_module_hides_one_of_the_standard_library(project: dict[str, Any]) -> None:
    folders = project["tool"]["setuptools"]["package-dir"].values()
    names = {path.stem for folder in folders for path in (ROOT / folder).glob("[!_]*.py")}
    assert names & (sys.stdlib_module_names - {"queue"}) == set()


def test_the_command_and_the_version_are_where_the_metadata_says(project: dict[str, Any]) -> None:
    from octavo import __version__
    from octavo.cli.main import command

    assert project["project"]["scripts"] == {"octavo": f"{command.__module__}:{command.__name__}"}
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "octavo.__version__"
    assert __version__.count(".") == 2


def test_torch_is_optional_and_bounded(project: dict[str, Any]) -> None:
    required = project["project"]["dependencies"]
    assert not [name for name in required if name.startswith("torch")]
    (torch,) = project["project"]["optional-dependencies"]["torch"]
    # The next torch would pull a CUDA build.
    assert torch.endswith("<=2.13.0")


def test_the_wheel_holds_the_package_and_nothing_else(
    tmp_path: Path, project: dict[str, Any]
) -> None:
    pytest.importorskip("setuptools", minversion="77")
    wheel = _build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"octavo"}
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        inside = package.replace(".", "/")
        expected = {f"{inside}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert {
            n for n in names if n.rpartition("/")[0] == inside and n.endswith(".py")
        } == expected
    assert "octavo/py.typed" in names
    assert {n for n in names if n.endswith(".onnx")} == {
        f"octavo/models/{path.name}" for path in (ROOT / "models").glob("*.onnx")
    }


def _build_wheel(tmp_path: Path) -> Path:
    """A wheel of a copy: building in place would pack what an older build left."""
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "tests", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = "import setuptools.build_meta as b; b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel
