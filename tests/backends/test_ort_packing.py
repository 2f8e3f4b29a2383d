"""Lowered files of every width, method and operator, against numpy and against plain int8 codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray

from octavo.backends import ort_packing
from octavo.backends.ort_audit import audit
from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.ir.errors import UsageError
from octavo.ir.facts import Choice, Method, Option, Plan, Portable, Range, Ranges
from octavo.ir.model import Model
from octavo.ir.quant import (
    Granularity,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantSpec,
    QuantType,
    round_weight,
)
from octavo.ir.read import read
from octavo.ir.write import serialize
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.place_quantizers import PlaceQuantizers

if TYPE_CHECKING:
    from octavo.ir.artifact import Artifact
    from octavo.passes.base import PassContext

SIGNED = sorted(d for d in get_args(QuantType) if d[0] == "s")
WITH_ZEROS: tuple[QuantType, ...] = ("u4", "u2")
_HEADER = '<ir_version: 10, opset_import: ["" : 21]> g'


@dataclass(frozen=True)
class Case:
    """One node; `weights` are its constants by name, `axis` the one with a scale per index."""

    body: str
    signature: str
    weights: Mapping[str, tuple[int, ...]]
    axis: int
    block_axis: int = 0
    other: tuple[str, ...] = ()


CASES = {
    "Conv": Case(
        "[n] y = Conv <pads: ints = [1,1,1,1]> (x, w, b)",
        "(float[1,5,6,6] x) => (float[1,7,6,6] y)", {"w": (7, 5, 3, 3), "b": (7,)}, 0, other=("b",),
    ),
    "ConvTranspose": Case(
        "[n] y = ConvTranspose (x, w)", "(float[1,5,4,4] x) => (float[1,7,6,6] y)",
        {"w": (5, 7, 3, 3)}, 1,
    ),
    "MatMul": Case(
        "[n] h = MatMul (x, w)  [bias] y = Add (h, b)", "(float[3,41] x) => (float[3,23] y)",
        {"w": (41, 23), "b": (23,)}, 1, other=("b",),
    ),
    "Gemm": Case(
        "[n] y = Gemm (x, w, b)", "(float[3,41] x) => (float[3,23] y)",
        {"w": (41, 23), "b": (23,)}, 1, other=("b",),
    ),
    "GemmT": Case(
        "[n] y = Gemm <transB: int = 1> (x, w, b)", "(float[3,41] x) => (float[3,23] y)",
        {"w": (23, 41), "b": (1, 23)}, 0, 1, other=("b",),
    ),
    "Gather": Case(
        "[n] y = Gather (w, x)", "(int64[2,3] x) => (float[2,3,13] y)", {"w": (29, 13)}, 0
    ),
    "LSTM": Case(
        '[n] y = LSTM <hidden_size: int = 9, direction: string = "bidirectional"> (x, w, r)',
        "(float[5,2,7] x) => (float[5,2,2,9] y)", {"w": (2, 36, 7), "r": (2, 36, 9)}, 1,
    ),
    "GRU": Case(
        "[n] y = GRU <hidden_size: int = 9> (x, w, r)",
        "(float[5,2,7] x) => (float[5,1,2,9] y)", {"w": (1, 27, 7), "r": (1, 27, 9)}, 1,
    ),
}  # fmt: skip
METHODS: Mapping[Method, tuple[str, ...]] = {
    "static": ("Conv", "MatMul", "Gemm", "GemmT"),
    "dynamic": ("MatMul", "Gemm", "GemmT", "LSTM"),
    "storage": tuple(CASES),
    "weight-only": ("MatMul", "Gemm", "GemmT"),
}
WITHOUT_BLOCKS = [(m, name) for m, names in METHODS.items() if m != "weight-only" for name in names]


def _arrays(case: Case) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(2)
    return {
        name: (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
        for name, shape in case.weights.items()
    }


def _proto(case: Case, arrays: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{_HEADER} {case.signature} {{ {case.body} }}")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def _feed(name: str, case: Case) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(3)
    shape = [d.dim_value for d in _proto(case, {}).graph.input[0].type.tensor_type.shape.dim]
    if name == "Gather":
        return {"x": rng.integers(0, case.weights["w"][0], shape)}
    return {"x": rng.standard_normal(shape).astype(np.float32)}


def _planned(model: Model, option: Option, ctx: PassContext) -> Model:
    """The model with that option for its node, and ranges wide enough for all its values."""
    values = [v for node in model.graph for v in node.outputs] + list(model.graph.inputs)
    ranges = Ranges({v.name or "": Range(-4.0, 4.0, -4.0, 4.0) for v in values}, "", 1, "")
    model = model.with_fact(Plan({"n": Choice(option, "")}, "")).with_fact(ranges)
    for pass_ in (PlaceQuantizers(), InsertFakeQuant()):
        model = pass_.run(model.clone(), ctx)
    return model


def _lowered(name: str, option: Option, path: Path, ctx: PassContext) -> tuple[Model, Artifact]:
    case = CASES[name]
    planned = _planned(read(_proto(case, _arrays(case))), option, ctx)
    return planned, lower(planned, path)


def _run(
    model: bytes | Path,
    feed: Mapping[str, NDArray[Any]],
    optimization: Literal["all", "none"] = "all",
) -> NDArray[np.float64]:
    outputs = make_session(model, threads=1, optimization=optimization).run(feed)
    return outputs["y"].astype(np.float64)


def _truth(name: str, spec: QuantSpec) -> NDArray[np.float64]:
    """The float graph with its weights rounded by numpy, run without optimization."""
    case = CASES[name]
    rounded = {k: a if k in case.other else round_weight(a, spec) for k, a in _arrays(case).items()}
    content = _proto(case, rounded).SerializeToString()
    return _run(content, _feed(name, case), "none")


def _granularity(name: str) -> Granularity:
    return PerBlock(2, 0) if name in ("LSTM", "GRU") else PerAxis(CASES[name].axis)


def _distance(actual: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(actual - truth) / np.linalg.norm(truth))


# Rounding of activations to 8 bits: once per value, in every step of an LSTM.
_LIMITS: Mapping[Method, float] = {"storage": 1e-6, "dynamic": 0.012}
_LSTM_LIMIT = 0.04
# One step of the output quantizer, over the range that `_planned` gives every value.
_STEP = 8 / 255


@pytest.mark.parametrize("per_tensor", [False, True], ids=["", "tensor"])
@pytest.mark.parametrize("dtype", SIGNED)
@pytest.mark.parametrize(("method", "name"), WITHOUT_BLOCKS)
def test_every_width_computes_with_the_rounded_weight(
    method: Method, name: str, dtype: QuantType, per_tensor: bool, tmp_path: Path,
    pass_context: PassContext,
) -> None:  # fmt: skip
    granularity = PerTensor() if per_tensor else _granularity(name)
    spec = QuantSpec(dtype, granularity, symmetric=True)
    planned, artifact = _lowered(name, Option(method, spec), tmp_path / "m.onnx", pass_context)
    feed = _feed(name, CASES[name])
    actual = _run(artifact.path, feed)
    if method == "static":
        literal = _run(serialize(planned), feed, "none")
        np.testing.assert_allclose(actual, literal, rtol=0, atol=1.01 * _STEP)
        assert np.abs(literal).max() > 20 * _STEP
        return
    limit = _LSTM_LIMIT if (method, name) == ("dynamic", "LSTM") else _LIMITS[method]
    assert _distance(actual, _truth(name, spec)) <= limit


@pytest.mark.parametrize("dtype", [dtype for dtype in SIGNED if dtype != "s8"])
@pytest.mark.parametrize(("method", "name"), WITHOUT_BLOCKS)
def test_packed_codes_compute_exactly_what_plain_ones_do(
    method: Method, name: str, dtype: QuantType, tmp_path: Path, pass_context: PassContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    option = Option(method, QuantSpec(dtype, _granularity(name), symmetric=True))
    planned, packed = _lowered(name, option, tmp_path / "packed.onnx", pass_context)
    monkeypatch.setattr(ort_packing, "kernel_steps", lambda *_: ())
    monkeypatch.setattr(ort_packing, "pack", lambda codes, _: (codes,))
    plain = lower(planned, tmp_path / "plain.onnx")
    assert len(onnx.load(packed.path).graph.node) > len(onnx.load(plain.path).graph.node)
    feed = _feed(name, CASES[name])
    np.testing.assert_array_equal(_run(packed.path, feed), _run(plain.path, feed))


@pytest.mark.parametrize("dtype", ["s1", "s2", "s4", "s7"])
@pytest.mark.parametrize(("method", "name"), WITHOUT_BLOCKS)
def test_the_audit_finds_the_kernel_and_no_work_on_constants(
    method: Method, name: str, dtype: QuantType, tmp_path: Path, pass_context: PassContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("octavo.backends.ort_audit._SMALL_ELEMENTS", 2)
    option = Option(method, QuantSpec(dtype, _granularity(name), symmetric=True))
    _, artifact = _lowered(name, option, tmp_path / "m.onnx", pass_context)
    found = audit(artifact, _feed(name, CASES[name]))
    assert found.ok, (found.findings, found.rows)
    assert not {"BitwiseOr", "Slice"} & set(found.kernels)


@pytest.mark.parametrize("half_scales", [False, True], ids=["", "half"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [*SIGNED, *WITH_ZEROS])
@pytest.mark.parametrize("name", METHODS["weight-only"])
def test_blocks_of_low_bit_weights(
    name: str, dtype: QuantType, size: int, half_scales: bool, tmp_path: Path,
    pass_context: PassContext,
) -> None:  # fmt: skip
    blocks = PerBlock(CASES[name].block_axis, size)
    spec = QuantSpec(dtype, blocks, symmetric=dtype[0] == "s", half_scales=half_scales)
    option = Option("weight-only", spec)
    _, artifact = _lowered(name, option, tmp_path / "m.onnx", pass_context)
    feed = _feed(name, CASES[name])
    assert _distance(_run(artifact.path, feed), _truth(name, spec)) <= _LIMITS["dynamic"]
    found = audit(artifact, feed)
    assert found.ok, (found.findings, found.rows)
    # The bias is the kernel's own.
    assert set(found.kernels) == {"com.microsoft::MatMulNBits"}


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [*SIGNED, *WITH_ZEROS])
def test_rows_of_blocks_are_looked_up_exactly(
    dtype: QuantType, size: int, tmp_path: Path, pass_context: PassContext
) -> None:
    """Blocks of 32 are longer than a row."""
    spec = QuantSpec(dtype, PerBlock(1, size), symmetric=dtype[0] == "s", half_scales=True)
    option = Option("weight-only", spec)
    _, artifact = _lowered("Gather", option, tmp_path / "m.onnx", pass_context)
    feed = _feed("Gather", CASES["Gather"])
    np.testing.assert_array_equal(_run(artifact.path, feed), _truth("Gather", spec))
    found = audit(artifact, feed)
    assert found.ok, (found.findings, found.rows)
    assert found.kernels["com.microsoft::GatherBlockQuantized"] == 1


TIED = f"""{_HEADER} (int64[2] k, float[3,64] x) => (float[2,64] e, float[3,40] y) {{
    [embed] e = Gather (w, k)  [turn] t = Transpose <perm = [1, 0]> (w)
    [head] y = MatMul (x, t) }}"""


@pytest.mark.parametrize("half_scales", [False, True], ids=["", "half"])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *itertools.product(
            ["weight-only", "dynamic", "static", "storage"], ["s8", "s4", "s3", "s2"]
        ),
        *(("weight-only", dtype) for dtype in WITH_ZEROS),
    ],
)
def test_a_tied_weight_is_stored_once(
    method: Method, dtype: QuantType, half_scales: bool, tmp_path: Path, pass_context: PassContext
) -> None:
    """The rows that are looked up are exactly those that are multiplied."""
    proto = onnx.parser.parse_model(TIED)
    array = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    blocks = method == "weight-only"
    rows, columns = (PerBlock(1, 32), PerBlock(0, 32)) if blocks else (PerAxis(0), PerAxis(1))
    own = QuantSpec(dtype, rows, symmetric=dtype[0] == "s", half_scales=half_scales)
    options = {
        "embed": Option("weight-only" if blocks else "storage", own),
        "head": Option(method, replace(own, granularity=columns)),
    }
    model = read(proto)
    ranges = Ranges({n: Range(-4.0, 4.0, -4.0, 4.0) for n in "xey"}, "", 1, "")
    plan = Plan({n: Choice(option, "") for n, option in options.items()}, "")
    model = model.with_fact(plan).with_fact(ranges)
    for pass_ in (PlaceQuantizers(), InsertFakeQuant()):
        model = pass_.run(model.clone(), pass_context)
    artifact = lower(model, tmp_path / "m.onnx")
    rng = np.random.default_rng(1)
    feed = {"k": np.array([3, 39]), "x": rng.standard_normal((3, 64)).astype(np.float32)}
    found = make_session(artifact.path, threads=1).run(feed)
    rounded = round_weight(array, own)
    np.testing.assert_allclose(found["e"], rounded[feed["k"]], rtol=1e-6)
    truth = (feed["x"] @ rounded.T).astype(np.float64)
    assert _distance(found["y"].astype(np.float64), truth) <= 2 * _LIMITS["dynamic"]
    held = {t.name: t for t in onnx.load(artifact.path).graph.initializer}
    kept = [n for n in held if n.startswith("w") and "scale" not in n and "zeros" not in n]
    assert len(kept) == (2 if dtype == "s3" else 1)
    found_audit = audit(artifact, feed)
    assert found_audit.ok, (found_audit.findings, found_audit.rows)


@pytest.mark.parametrize("half_scales", [False, True], ids=["", "half"])
@pytest.mark.parametrize("dtype", ["s8", "s4"])
def test_portable_blocks_are_a_standard_operator_that_fuses(
    dtype: QuantType, half_scales: bool, tmp_path: Path, pass_context: PassContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(CASES, "MatMul", BLOCKED["MatMul"][0])
    spec = QuantSpec(dtype, PerBlock(0, 32), symmetric=True, half_scales=half_scales)
    case = CASES["MatMul"]
    model = read(_proto(case, _arrays(case))).with_fact(Portable())
    planned = _planned(model, Option("weight-only", spec), pass_context)
    artifact = lower(planned, tmp_path / "m.onnx")
    assert artifact.session_options == {"session.qdq_matmulnbits_accuracy_level": "4"}
    graph = onnx.load(artifact.path).graph
    assert {node.domain for node in graph.node} == {""}
    stored = {t.name: t.data_type for t in graph.initializer}
    assert stored["w_q"] == (onnx.TensorProto.INT8 if dtype == "s8" else onnx.TensorProto.INT4)
    feed = _feed("MatMul", case)
    assert _distance(_run(artifact.path, feed), _truth("MatMul", spec)) <= _LIMITS["dynamic"]
    found = audit(artifact, feed)
    assert found.ok, (found.findings, found.rows)
    assert set(found.kernels) == {"com.microsoft::MatMulNBits"}


@pytest.mark.parametrize("name", ["MatMul", "Gemm", "GemmT"])
def test_portable_integers_fuse_in_front_of_a_float_output(
    name: str, tmp_path: Path, pass_context: PassContext
) -> None:
    case = CASES[name]
    option = Option("static", QuantSpec("s8", _granularity(name), symmetric=True))
    tail = " [exp] z = Exp (y)"
    proto = onnx.parser.parse_model(
        f"{_HEADER} {case.signature.replace(' y)', ' z)')} {{ {case.body}{tail} }}"
    )
    for key, array in _arrays(case).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    planned = _planned(read(proto).with_fact(Portable()), option, pass_context)
    artifact = lower(planned, tmp_path / "m.onnx")
    assert {node.domain for node in onnx.load(artifact.path).graph.node} == {""}
    feed = _feed(name, case)
    found = make_session(artifact.path, threads=1).run(feed)["z"]
    literal = make_session(serialize(planned), threads=1, optimization="none").run(feed)["z"]
    np.testing.assert_allclose(np.log(found), np.log(literal), rtol=0, atol=1e-4)
    kernels = audit(artifact, feed)
    assert kernels.ok, (kernels.findings, kernels.rows)


def test_float16_storage_folds(tmp_path: Path, pass_context: PassContext) -> None:
    spec = QuantSpec("f16")
    for name in ("Conv", "MatMul", "LSTM", "Gather"):
        path = tmp_path / f"{name}.onnx"
        _, artifact = _lowered(name, Option("storage", spec), path, pass_context)
        feed = _feed(name, CASES[name])
        assert _distance(_run(artifact.path, feed), _truth(name, spec)) <= _LIMITS["storage"]
        assert all(t.data_type != onnx.TensorProto.FLOAT or "b" in t.name
                   for t in onnx.load(path).graph.initializer)  # fmt: skip
        assert audit(artifact, feed).ok


BLOCKED = {
    "MatMul": (Case("[n] y = MatMul (x, w)", "(float[3,64] x) => (float[3,23] y)",
                    {"w": (64, 23)}, 1), PerBlock(0, 32)),
    "GRU": (CASES["GRU"], PerBlock(2, 0)),
    "ConvTranspose": (CASES["ConvTranspose"], PerBlock(0, 32)),
    "Gemm": (CASES["Gemm"], PerBlock(0, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKED)
def test_stored_blocks(
    name: str, tmp_path: Path, pass_context: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, blocks = BLOCKED[name]
    monkeypatch.setitem(CASES, name, case)
    spec = QuantSpec("s3", blocks, symmetric=True)
    _, artifact = _lowered(name, Option("storage", spec), tmp_path / "m.onnx", pass_context)
    actual = _run(artifact.path, _feed(name, case))
    assert _distance(actual, _truth(name, spec)) <= _LIMITS["storage"]


def test_readers_of_one_weight_share_its_codes_and_all_weights_the_tables(
    tmp_path: Path, pass_context: PassContext
) -> None:
    text = f"""{_HEADER} (float[3,40] x, float[2,40] z) => (float[3,40] y, float[2,40] u)
        {{ [a] h = MatMul (x, w)  [b] y = MatMul (h, v)  [c] u = MatMul (z, w) }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name in "wv":
        array = rng.standard_normal((40, 40)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    option = Option("storage", QuantSpec("s3", PerAxis(1), symmetric=True))
    plan = Plan(dict.fromkeys("abc", Choice(option, "")), "")
    planned = InsertFakeQuant().run(read(proto).with_fact(plan), pass_context)
    artifact = lower(planned, tmp_path / "m.onnx")
    graph = onnx.load(artifact.path).graph
    names = [t.name for t in graph.initializer]
    assert sorted(n for n in names if n.startswith("table")) == ["table_0_1_2_3", "table_0_m4"]
    assert [n.op_type for n in graph.node].count("BitwiseOr") == 2
    again = lower(planned, tmp_path / "again.onnx")
    assert again.path.read_bytes() == artifact.path.read_bytes()
    stored = {row.node: row.weight_bytes for row in artifact.planned}
    # 1,600 codes of 3 bits, 40 scales and the shape (two int64), without the tables.
    assert stored == dict.fromkeys("abc", 600 + 160 + 16)


@pytest.mark.parametrize(
    ("name", "spec", "why"),
    [
        ("MatMul", QuantSpec("f16"), "reads codes"),
        ("MatMul", QuantSpec("s4", PerBlock(0, 48), symmetric=True), "blocks of 16, 32, 64, 128"),
        ("Gemm", QuantSpec("s4", PerAxis(1), symmetric=True), "blocks of 16, 32, 64, 128"),
        ("Gemm", QuantSpec("u8", PerBlock(0, 32)), "signed"),
    ],
)
def test_a_weight_that_no_kernel_reads_is_refused(
    name: str, spec: QuantSpec, why: str, tmp_path: Path, pass_context: PassContext
) -> None:
    with pytest.raises(UsageError, match=f"(?s)node 'n'.*{why}"):
        _lowered(name, Option("weight-only", spec), tmp_path / "m.onnx", pass_context)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_integer_kernels_take_no_blocks_with_scales_of_their_own(
    method: Method, tmp_path: Path, pass_context: PassContext
) -> None:
    option = Option(method, QuantSpec("s4", PerBlock(0, 32), symmetric=True))
    with pytest.raises(UsageError, match="reads blocks with multiples of a channel's scale"):
        _lowered("MatMul", option, tmp_path / "m.onnx", pass_context)
