"""Models at the edges of what compiles, planned: each computes what its source does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.calibration_data import load_calibration
from octavo.cli.compilation import Compiled, compile_model
from octavo.cli.request import Request
from octavo.ir.read import read


def _unusual() -> Any:
    """The models and the comparison of the test beside this one."""
    path = Path(__file__).with_name("test_unusual_models.py")
    spec = importlib.util.spec_from_file_location("unusual_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


UNUSUAL = _unusual()
PIPELINE = (
    "canonicalize,calibrate,offer-options,sensitivity{samples=8},allocate{latency=none},"
    "refine{seconds=1,generations=2},place-quantizers,insert-fake-quant"
)


def planned(name: str, calibrated: bool) -> Compiled:
    model = read(UNUSUAL.source(name))
    feeds = [UNUSUAL.feed_of(name, seed) for seed in range(4)]
    shapes = {k: array.shape for k, array in UNUSUAL.feed_of(name, 0).items() if array.ndim}
    calibration = load_calibration(feeds, model) if calibrated else None
    request = Request(pipeline=PIPELINE, shapes=shapes, measure=False)
    return compile_model(model, calibration=calibration, request=request)


@pytest.mark.parametrize("name", UNUSUAL.MODELS)
def test_without_data(name: str) -> None:
    UNUSUAL.assert_computes_its_source(name, planned(name, calibrated=False))


@pytest.mark.parametrize("name", [name for name in UNUSUAL.MODELS if name != "empty_batch"])
def test_with_data(name: str) -> None:
    UNUSUAL.assert_computes_its_source(name, planned(name, calibrated=True))
