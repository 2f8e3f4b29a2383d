"""Which constants become float16, and that the emitted file holds exactly them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.ir.facts import HalfConstants, Plan
from octavo.ir.read import read
from octavo.ir.write import serialize
from octavo.passes.fixed_bytes import fixed_bytes
from octavo.passes.halve_constants import HalveConstants

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[1,40] x) => (float[1,2000] y) {
    [product] h = MatMul (x, w) [shift] s = Add (h, bias) [scale] y = Mul (s, table) }"""


def _model(table: NDArray[np.float32]) -> Model:
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((40, 2000)), "bias": rng.standard_normal(2000)}
    for name, array in {**arrays, "table": table}.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return read(proto)


def _halved(model: Model, ctx: PassContext, elements: int = 1024) -> tuple[str, ...]:
    return HalveConstants(elements).run(model, ctx).fact(HalfConstants).names


def test_a_file_holds_what_was_rounded(tmp_path: Path, pass_context: PassContext) -> None:
    table = np.linspace(-1, 1, 2000, dtype=np.float32)
    model = HalveConstants().run(_model(table), pass_context)
    assert model.fact(HalfConstants).names == ("bias", "table")
    nearest = table.astype(np.float16).astype(np.float32)
    value = model.graph.initializers["table"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), nearest)
    artifact = lower(model.with_fact(Plan({}, "")), tmp_path / "m.onnx")
    stored = {t.name: t.data_type for t in onnx.load(artifact.path).graph.initializer}
    assert stored == {
        "w": onnx.TensorProto.FLOAT,
        "bias_f16": onnx.TensorProto.FLOAT16,
        "table_f16": onnx.TensorProto.FLOAT16,
    }
    predicted = fixed_bytes(model, (), pass_context.target)
    # Header and names of the file itself.
    assert abs(artifact.bytes - predicted) <= 80
    feed = {"x": np.ones((1, 40), np.float32)}
    found = make_session(artifact.path, threads=1).run(feed)["y"]
    truth = make_session(serialize(model), threads=1).run(feed)["y"]
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize(
    ("table", "stays"),
    [
        (np.full(2000, 65504.0), False),
        (np.full(2000, 70000.0), True),
        (np.arange(2000.0), False),
        # 2049 is the first whole number that float16 does not have.
        (np.arange(100.0, 2100.0), True),
        (np.full(2000, 1e-6), True),
    ],
    ids=["largest", "beyond", "whole", "whole beyond", "tiny"],
)
def test_what_float16_would_spoil_stays(
    table: NDArray[np.float32], stays: bool, pass_context: PassContext
) -> None:
    names = _halved(_model(table.astype(np.float32)), pass_context)
    assert ("table" not in names) == stays
    missed = [r.where for r in pass_context.recorder.remarks if r.kind == "missed"]
    assert missed == (["table"] if stays else [])


def test_small_constants_and_weights_of_groups_stay(pass_context: PassContext) -> None:
    assert _halved(_model(np.ones(2000, np.float32)), pass_context, 2001) == ()


def test_a_constant_that_was_changed_since_is_stored_as_it_is(
    tmp_path: Path, pass_context: PassContext
) -> None:
    """A repaired bias need not be a float16 number."""
    model = HalveConstants().run(_model(np.ones(2000, np.float32)), pass_context)
    changed = np.full(2000, 1 / 3, np.float32)
    value = model.graph.initializers["bias"]
    value.const_value = onnx_ir.Tensor(changed, name="bias")
    artifact = lower(model.with_fact(Plan({}, "")), tmp_path / "m.onnx")
    stored = {t.name: t for t in onnx.load(artifact.path).graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(stored["bias"]), changed)
    assert "table_f16" in stored
