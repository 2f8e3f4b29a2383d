"""An output folder is complete or as it was, whatever goes wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from octavo.ir.errors import UsageError
from octavo.ir.output_folder import MANIFEST, open_output


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """An artifact that is there already."""
    with open_output(tmp_path / "out") as folder:
        (folder / MANIFEST).write_text("earlier", encoding="utf-8")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["out", "new/parents/out"])
def test_the_folder_appears_when_it_is_complete(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with open_output(out) as folder:
        (folder / "model.onnx").write_text("whole", encoding="utf-8")
        assert not out.exists()
    assert _names(out.parent) == [out.name]
    assert (out / "model.onnx").read_text(encoding="utf-8") == "whole"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open_output(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert _names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SystemExit(143)])
def test_after_any_failure_everything_is_as_it_was(earlier: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with open_output(earlier, force=True) as folder:
            (folder / MANIFEST).write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert _names(earlier.parent) == ["out"]
    assert (earlier / MANIFEST).read_text(encoding="utf-8") == "earlier"


def test_an_artifact_is_replaced_only_by_force(earlier: Path) -> None:
    with pytest.raises(UsageError, match="not empty") as caught, open_output(earlier):
        pass
    assert "--force" in caught.value.hint
    with open_output(earlier, force=True) as folder:
        (folder / "other").touch()
    assert _names(earlier) == ["other"]
    assert _names(earlier.parent) == ["out"]


def test_force_never_removes_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with (
        pytest.raises(UsageError, match="no octavo artifact"),
        open_output(tmp_path / "out", force=True),
    ):
        pass
    assert _names(tmp_path / "out") == ["thesis.txt"]


def test_the_source_is_never_replaced(earlier: Path) -> None:
    source = earlier / "model.onnx"
    source.touch()
    with (
        pytest.raises(UsageError, match="replace the source model"),
        open_output(earlier, force=True, source=source),
    ):
        pass
    assert source.exists()


def test_the_folder_of_the_command_is_never_replaced(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(earlier)
    with pytest.raises(UsageError, match="this command runs in"), open_output(Path(), force=True):
        pass


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file"), open_output(tmp_path / "out", force=True):
        pass
    with pytest.raises(UsageError, match="cannot be written"), open_output(tmp_path / "out" / "in"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"), open_output(tmp_path / "out"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_so(earlier: Path, code: int) -> None:
    def full() -> None:
        with open_output(earlier, force=True):
            raise OSError(code, os.strerror(code))

    with pytest.raises(UsageError, match="no space left"):
        full()
    assert _names(earlier.parent) == ["out"]
    assert (earlier / MANIFEST).read_text(encoding="utf-8") == "earlier"


def test_a_failing_rename_brings_the_old_folder_back(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError), open_output(earlier, force=True):
        pass
    assert _names(earlier.parent) == ["out"]
    assert (earlier / MANIFEST).read_text(encoding="utf-8") == "earlier"
