"""The nine light architectures of the ONNX package through the compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from numpy.typing import NDArray

import octavo as api
from octavo.backends.ort_session import make_session
from octavo.cli.compilation import Compiled
from octavo.ir.calibration import Feed
from octavo.ir.read import read

Agrees = Callable[[Feed, Feed, float], None]
FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("*.onnx"))
SLOW = {"vgg19", "zfnet512", "densenet121"}
# Weights are constants of one value, so integers hold them without error; the rest is float32.
RELATIVE = 1e-3


def _named(names: set[str], slow: set[str]) -> list[object]:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(name, marks=marks[name in slow]) for name in sorted(names)]


def _inputs(name: str, seed: int) -> dict[str, NDArray[np.float32]]:
    (value,) = (v for v in read(FOLDER / f"light_{name}.onnx").graph.inputs)
    assert value.shape is not None
    drawn = np.random.default_rng(seed).standard_normal(tuple(value.shape.numpy()))
    return {value.name or "": drawn.astype(np.float32)}


def _assert_close(name: str, found: Compiled, agrees: Agrees) -> None:
    assert found.audit.ok, [row for row in found.audit.rows if not row.ok]
    feed = _inputs(name, 100)
    expected = make_session(FOLDER / f"light_{name}.onnx", threads=1).run(feed)
    agrees(make_session(found.artifact.path, threads=1).run(feed), expected, RELATIVE)


def test_all_nine_are_there() -> None:
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", _named(set(NAMES), SLOW))
def test_without_data(name: str, agrees: Agrees) -> None:
    _assert_close(name, api.compile(FOLDER / f"light_{name}.onnx", measure=False), agrees)


@pytest.mark.parametrize("name", ["shufflenet", "squeezenet"])
def test_with_data(name: str, agrees: Agrees) -> None:
    feeds = [_inputs(name, seed) for seed in range(8)]
    found = api.compile(FOLDER / f"light_{name}.onnx", calibration=feeds, measure=False)
    assert any(row.option.startswith("static") for row in found.audit.rows)
    _assert_close(name, found, agrees)


def test_an_initializer_that_nobody_reads_needs_no_input() -> None:
    """IR version 3 knows initializers only as inputs, which reading takes away."""
    ir = read(FOLDER / "light_resnet50.onnx").ir
    unread = [v for v in ir.graph.initializers.values() if not v.uses()]
    assert unread
    content = onnx_ir.to_proto(ir).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options)
    assert [value.name for value in session.get_inputs()] == ["gpu_0/data_0"]
