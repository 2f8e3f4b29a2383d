"""Non-uniform codes in a file: codebooks of int8 codes, and levels of every channel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.backends.ort_audit import audit
from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.ir.errors import UsageError
from octavo.ir.facts import Choice, Method, Option, Plan, Range, Ranges
from octavo.ir.fake_quant import DOMAIN, params_of, set_rounded
from octavo.ir.levels import binary_levels, level_bytes, level_weight, levels_of, set_levels
from octavo.ir.option_bytes import option_bytes, table_bytes
from octavo.ir.quant import PerAxis, QuantParams, QuantSpec, dequantize
from octavo.ir.read import read
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.place_quantizers import PlaceQuantizers

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_HEADER = '<ir_version: 10, opset_import: ["" : 21]> g'
_CASES = {
    "MatMul": ("(float[4,96] x) => (float[4,50] y)", "y = MatMul (x, w)", (96, 50), 1),
    "Conv": ("(float[1,5,6,6] x) => (float[1,7,4,4] y)", "y = Conv (x, w)", (7, 5, 3, 3), 0),
}
_WIDTHS = (1, 2, 3, 4, 6)
_ONE_ROUNDING = 0.012
# What the names and nodes of one weight vary by.
_NAMES = 200


def _inserted(name: str, option: Option, ctx: PassContext) -> Model:
    signature, call, shape, _ = _CASES[name]
    proto = onnx.parser.parse_model(f"{_HEADER} {signature} {{ [n] {call} }}")
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(array, "w"))
    model = read(proto)
    ranges = Ranges({n: Range(-9.0, 9.0, -9.0, 9.0) for n in "xy"}, "", 1, "")
    model = model.with_fact(Plan({"n": Choice(option, "")}, "")).with_fact(ranges)
    for pass_ in (PlaceQuantizers(), InsertFakeQuant()):
        model = pass_.run(model.clone(), ctx)
    return model


def _fake(model: Model) -> onnx_ir.Node:
    node = next(n for n in model.graph if n.name == "n")
    assert node.inputs[1] is not None
    fake = node.inputs[1].producer()
    assert fake is not None
    assert fake.domain == DOMAIN
    return fake


def _feed(name: str) -> dict[str, NDArray[Any]]:
    shape = (4, 96) if name == "MatMul" else (1, 5, 6, 6)
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def _truth(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    signature, call, _, _ = _CASES[name]
    proto = onnx.parser.parse_model(f"{_HEADER} {signature} {{ {call} }}")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return make_session(proto.SerializeToString(), threads=1).run(_feed(name))["y"]


def _with_codes(model: Model, count: int) -> NDArray[np.float32]:
    """Let the weight take `count` codes that lie anywhere; returns what it then is."""
    rng = np.random.default_rng(count)
    fake = _fake(model)
    value = fake.inputs[0]
    assert value is not None
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    chosen = rng.choice(np.arange(-127, 128), count, replace=False).astype(np.int8)
    spec = QuantSpec("s8", PerAxis(_CASES[_kind(shape)][3]), symmetric=True)
    channels = shape[_CASES[_kind(shape)][3]]
    scale = (0.5 + rng.random(channels).astype(np.float32)) / 400
    params = QuantParams(spec, scale, np.zeros(channels, np.int32))
    weight = dequantize(rng.choice(chosen, shape), params)
    own = QuantParams(params_of(fake).spec, scale, np.zeros(channels, np.int32))
    set_rounded(model.graph, fake, weight, own)
    return weight


def _kind(shape: tuple[int, ...]) -> str:
    return "MatMul" if len(shape) == 2 else "Conv"


@pytest.mark.parametrize("bits", _WIDTHS)
@pytest.mark.parametrize(
    ("method", "name"),
    [("static", "Conv"), ("static", "MatMul"), ("dynamic", "MatMul"), ("storage", "Conv")],
)
def test_integer_kernels_run_on_a_codebook(
    method: Method, name: str, bits: int, tmp_path: Path, pass_context: PassContext
) -> None:
    *_, shape, axis = _CASES[name]
    spec = QuantSpec("s8", PerAxis(axis), symmetric=True, index_bits=bits)
    option = Option(method, spec)
    model = _inserted(name, option, pass_context)
    weight = _with_codes(model, 2**bits)
    artifact = lower(model, tmp_path / "m.onnx")
    found = make_session(artifact.path, threads=1).run(_feed(name))["y"]
    truth = _truth(name, weight)
    if method == "static":
        plain = _inserted(
            name, replace(option, weight=replace(spec, index_bits=None)), pass_context
        )
        _with_codes(plain, 2**bits)
        unpacked = lower(plain, tmp_path / "plain.onnx")
        same = make_session(unpacked.path, threads=1).run(_feed(name))["y"]
        np.testing.assert_array_equal(found, same)
        # Steps of the two quantizers, and that of the input multiplied by a row of weights.
        np.testing.assert_allclose(found, truth, rtol=0, atol=0.1 * np.abs(truth).max() + 18 / 255)
    else:
        limit = _ONE_ROUNDING if method == "dynamic" else 1e-6
        assert np.linalg.norm(found - truth) <= limit * np.linalg.norm(truth)
    assert audit(artifact, _feed(name)).ok
    stored = {t.name: t for t in onnx.load(artifact.path).graph.initializer}
    indices = sum(t.ByteSize() for n, t in stored.items() if n.startswith("w_q"))
    assert indices <= math.prod(shape) * bits / 8 + 2**bits + _NAMES
    if method == "storage":
        predicted = option_bytes(shape, option, name_bytes=1).total + table_bytes([option])
        own = sum(t.ByteSize() + 2 for t in stored.values())
        # And the nodes.
        assert 0 <= predicted - own <= 5 * _NAMES


def test_more_codes_than_indices_are_refused(tmp_path: Path, pass_context: PassContext) -> None:
    spec = QuantSpec("s8", PerAxis(1), symmetric=True, index_bits=3)
    model = _inserted("MatMul", Option("dynamic", spec), pass_context)
    with pytest.raises(UsageError, match=r"(?s)'w_q'.*different codes, 3 bits tell 8 apart"):
        lower(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("half", [False, True], ids=["", "half"])
@pytest.mark.parametrize("bits", _WIDTHS)
@pytest.mark.parametrize("name", _CASES)
def test_levels_of_a_channel_fold_to_the_weight(
    name: str, bits: int, half: bool, tmp_path: Path, pass_context: PassContext
) -> None:
    *_, shape, axis = _CASES[name]
    option = Option("storage", QuantSpec("s4", PerAxis(axis), symmetric=True))
    model = _inserted(name, option, pass_context)
    rng = np.random.default_rng(bits)
    levels = rng.standard_normal((shape[axis], 2**bits)).astype(np.float32)
    levels = levels.astype(np.float16).astype(np.float32) if half else levels
    node = set_levels(model, _fake(model), levels, axis)
    given = node.inputs[0]
    assert given is not None
    assert given.const_value is not None
    weight = given.const_value.numpy()
    artifact = lower(model, tmp_path / "m.onnx")
    found = make_session(artifact.path, threads=1).run(_feed(name))["y"]
    truth = _truth(name, weight)
    assert np.linalg.norm(found - truth) <= 1e-6 * np.linalg.norm(truth)
    # No number that is not a level of its channel.
    rows = np.moveaxis(weight, axis, 0).reshape(shape[axis], -1)
    assert all(np.isin(row, own).all() for row, own in zip(rows, levels, strict=True))
    assert level_weight(np.zeros(shape, np.int64), levels, axis).shape == shape
    kernels = {kernel.split("::")[-1] for kernel in audit(artifact, _feed(name)).kernels}
    assert kernels <= {name, "ReorderOutput", "ReorderInput"}
    graph = onnx.load(artifact.path).graph
    own = sum(t.ByteSize() + 2 for t in graph.initializer if not t.name.startswith("table"))
    assert 0 <= level_bytes(shape, axis, bits, half=half) - own <= 800


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("name", _CASES)
def test_binary_coding_stores_its_parts(
    name: str, bits: int, tmp_path: Path, pass_context: PassContext
) -> None:
    """k bits a weight, k + 1 float16 numbers a channel, and one small table of signs."""
    *_, shape, axis = _CASES[name]
    option = Option("storage", QuantSpec("s4", PerAxis(axis), symmetric=True))
    model = _inserted(name, option, pass_context)
    rng = np.random.default_rng(bits)
    both = rng.uniform(-0.1, 0.1, (shape[axis], bits + 1)).astype(np.float16).astype(np.float32)
    node = set_levels(model, _fake(model), binary_levels(both[:, :bits], both[:, bits]), axis)
    weight, _ = levels_of(node)
    artifact = lower(model, tmp_path / "m.onnx")
    found = make_session(artifact.path, threads=1).run(_feed(name))["y"]
    # Folded at load to exactly the float weight, which the same kernel multiplies.
    np.testing.assert_array_equal(found, _truth(name, weight))
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer}
    halves = [array for array in stored.values() if array.dtype == np.float16]
    assert sum(array.nbytes for array in halves) == shape[axis] * (bits + 1) * 2
    entries = sum(array.size for array in stored.values() if array.dtype == np.float32)
    assert entries == (bits + 1) * 2**bits
