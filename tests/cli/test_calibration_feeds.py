"""How many samples a feed of calibration data holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest

from octavo.cli import calibration_data
from octavo.ir.read_onnx import from_proto

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.ir.model import Model

_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,3,8,6] image) => (float[N,3,8,6] out) { out = Relu (image) }"""
_IMAGES = np.random.default_rng(0).standard_normal((20, 3, 8, 6)).astype(np.float32)


def sizes(spec: Path, model: Model) -> list[int]:
    """Samples per feed; together they are the images, in order."""
    feeds = [feed["image"] for feed in calibration_data.load_calibration(str(spec), model)]
    assert np.array_equal(np.concatenate(feeds), _IMAGES)
    return [len(feed) for feed in feeds]


def test_a_feed_larger_than_feeds_are_made_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an archive of the samples is; one that is small stays what the user made it."""
    model = from_proto(onnx.parser.parse_model(_TEXT))
    np.savez(tmp_path / "feed.npz", image=_IMAGES)
    assert sizes(tmp_path, model) == [20]
    monkeypatch.setattr(calibration_data, "_FEED_BYTES", 3 * _IMAGES[0].nbytes)
    assert sizes(tmp_path, model) == sizes(tmp_path / "feed.npz", model) == [3] * 6 + [2]
