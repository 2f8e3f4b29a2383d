"""Channels-last data movement: the same codes as the operators it replaces, fewer slow kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import onnx_ir.passes.common as onnx_passes
import pytest

from octavo.backends.ort_layout import move_pixels
from octavo.backends.ort_session import make_session
from octavo.ir.model import Model
from octavo.ir.read import read

_RESIZE = (
    'Resize <mode: string = "nearest", coordinate_transformation_mode: string = "{mode}", '
    'nearest_mode: string = "floor"> (xd, none, scales)'
)
_SPACE = 'DepthToSpace <blocksize: int = {block}, mode: string = "{mode}"> (xd)'


def _model(body: str, channels: int, factor: float = 2.0) -> Model:
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N,{channels},H,W] x) => (float[N,C,P,Q] y)
    <float scale = {{0.05}}, uint8 zero = {{7}}, float[4] scales = {{1, 1, {factor}, {factor}}},
     float[0] none = {{}}> {{
        xq = QuantizeLinear (x, scale, zero)
        xd = DequantizeLinear (xq, scale, zero)
        [move] r = {body}
        rq = QuantizeLinear (r, scale, zero)
        y = DequantizeLinear (rq, scale, zero)
    }}
    """
    return read(onnx.parser.parse_model(text))


def _bytes(model: Model) -> bytes:
    data: bytes = onnx_ir.to_proto(model.ir).SerializeToString()
    return data


@pytest.mark.parametrize(
    ("body", "channels", "factor"),
    [
        (_RESIZE.format(mode="asymmetric"), 6, 2.0),
        (_RESIZE.format(mode="asymmetric"), 3, 4.0),
        (_SPACE.format(block=2, mode="DCR"), 12, 1.0),
        (_SPACE.format(block=3, mode="DCR"), 9, 1.0),
    ],
)
def test_pixels_move_as_the_operator_moves_them(body: str, channels: int, factor: float) -> None:
    model = _model(body, channels, factor)
    moved = model.clone()
    node = next(n for n in moved.graph if n.op_type in ("Resize", "DepthToSpace"))
    assert move_pixels(moved.graph, node) is not None
    onnx_passes.RemoveUnusedNodesPass()(moved.ir)
    rng = np.random.default_rng(0)
    for shape in ((1, channels, 5, 7), (3, channels, 1, 4)):
        feed = {"x": rng.standard_normal(shape).astype(np.float32)}
        expected = make_session(_bytes(model), threads=1, optimization="none").run(feed)["y"]
        actual = make_session(_bytes(moved), threads=1).run(feed)["y"]
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "body", [_RESIZE.format(mode="half_pixel"), _SPACE.format(block=2, mode="CRD")]
)
def test_other_forms_stay(body: str, tmp_path: Path) -> None:
    model = _model(body, 8)
    node = next(n for n in model.graph if n.op_type in ("Resize", "DepthToSpace"))
    before = model.fingerprint
    assert move_pixels(model.graph, node) is None
    assert Model(model.ir, model.source).fingerprint == before
