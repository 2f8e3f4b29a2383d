"""Metrics of an accuracy goal: what they score, and how bad ones are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from octavo.cli.metric import labelled, named
from octavo.ir.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed

    Outputs = dict[str, NDArray[np.generic]]

WEIGHT = np.random.default_rng(1).standard_normal((4, 5))


@dataclass(frozen=True)
class Data:
    """Three feeds of five rows each."""

    labels: NDArray[np.generic] | None
    samples: int = 15
    sha256: str = ""

    def __iter__(self) -> Iterator[Feed]:
        for seed in range(3):
            yield {"x": np.random.default_rng(seed).standard_normal((5, 4))}


def model(feed: Feed) -> Outputs:
    """Five classes first, and a second output that must not count."""
    logits = cast("NDArray[np.float64]", feed["x"]) @ WEIGHT
    return {"logits": logits, "other": -logits}


def test_accuracy_is_the_share_of_right_classes() -> None:
    labels = np.random.default_rng(9).integers(0, 5, 15)
    rows = np.concatenate([np.random.default_rng(s).standard_normal((5, 4)) for s in range(3)])
    labels[:6] = (rows @ WEIGHT).argmax(1)[:6]
    expected = sum(int((r @ WEIGHT).argmax()) == k for r, k in zip(rows, labels, strict=True)) / 15
    assert 0.4 <= expected < 1.0
    metric = labelled(Data(labels))
    assert metric.score(model) == pytest.approx(expected, abs=1e-12)
    assert metric.samples == 15
    assert "15" in metric.text


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (None, "labels"),
        (np.zeros(15), "float64"),
        (np.zeros((15, 2), np.int64), r"15, 2"),
        (np.array(["a"] * 15), "whole number"),
    ],
)
def test_labels_that_are_none(labels: NDArray[np.generic] | None, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        labelled(Data(labels))
    if labels is None:
        assert "--eval" in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3, 4)])
def test_outputs_that_are_no_classes(shape: tuple[int, ...]) -> None:
    metric = labelled(Data(np.zeros(15, np.int64)))
    with pytest.raises(UsageError, match="classes"):
        metric.score(lambda feed: {"y": np.zeros(shape)})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of metrics in the current folder."""
    name = f"own_metric_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n"
        "def good(run): return run({'x': np.ones((1, 4))})['logits'].sum()\n"
        "def whole(run): return 3\n"
        "def fails(run): raise KeyError('absent')\n"
        "def nan(run): return float('nan')\n"
        "def infinite(run): return float('inf')\n"
        "def array(run): return np.ones(3)\n"
        "def one(run): return np.ones(1)\n"
        "def text(run): return '0.9'\n"
        "def flag(run): return True\n"
        "def numpy_flag(run): return np.bool_(True)\n"
        "def complex_one(run): return 1j\n"
        "def numpy_complex(run): return np.complex64(1j)\n"
        "def nothing(run): pass\n"
        "def ragged(run): return [[1], [2, 3]]\n"
        "def arguments(): return 1.0\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_of_the_current_folder(module: str) -> None:
    metric = named(f"{module}:good")
    assert metric.text == f"{module}:good"
    assert metric.samples is None
    assert metric.score(model) == pytest.approx(float(WEIGHT.sum()), rel=1e-12)
    assert named(f"{module}:whole").score(model) == 3.0


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("fails", "KeyError.*absent"),
        ("arguments", "TypeError"),
        ("nan", "nan"),
        ("infinite", "inf"),
        ("array", r"ndarray of shape \[3\]"),
        ("one", r"ndarray of shape \[1\]"),
        ("text", "str"),
        ("flag", "bool"),
        ("numpy_flag", "bool"),
        ("complex_one", "complex"),
        ("numpy_complex", "complex"),
        ("nothing", "NoneType"),
        ("ragged", "list"),
    ],
)
def test_a_function_that_gives_no_number(module: str, function: str, text: str) -> None:
    metric = named(f"{module}:{function}")
    with pytest.raises(UsageError, match=text) as caught:
        metric.score(model)
    assert f"{module}:{function}" in str(caught.value)
    assert "one number" in str(caught.value)


@pytest.mark.parametrize("text", ["", "module", "module:", ":function"])
def test_what_names_no_function(text: str) -> None:
    with pytest.raises(UsageError, match="module:function"):
        named(text)


def test_modules_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="ModuleNotFoundError"):
        named("no_such_module_of_metrics:score")
    (tmp_path / "broken_metric.py").write_text("def score(run: return 1\n")
    (tmp_path / "raising_metric.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="SyntaxError"):
        named("broken_metric:score")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        named("raising_metric:score")
    with pytest.raises(UsageError):
        named("..relative:score")


@pytest.mark.parametrize(("name", "near"), [("goood", "good"), ("wole", "whole")])
def test_near_misses_are_named(module: str, name: str, near: str) -> None:
    with pytest.raises(UnknownName) as caught:
        named(f"{module}:{name}")
    assert near in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_a_constant_is_no_function(module: str) -> None:
    with pytest.raises(UsageError):
        named(f"{module}:constant")
