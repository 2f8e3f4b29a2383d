"""Weights in blocks on integer kernels: scales are multiples of a channel's, multiplied out."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

from octavo.backends.ort_audit import audit
from octavo.backends.ort_lowering import lower
from octavo.backends.ort_session import make_session
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.facts import Choice, Method, Option, Plan, Range, Ranges
from octavo.ir.kernel_codes import block_arrays, kernel_params, kernel_steps
from octavo.ir.multiples import most_multiple, whole_multiples
from octavo.ir.option_bytes import table_bytes, weight_bytes
from octavo.ir.packing import pack, parts
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    QuantParams,
    QuantSpec,
    dequantize,
    quantize,
    signed_type,
)
from octavo.ir.read import read
from octavo.passes.clip_search import clipped_params
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.place_quantizers import PlaceQuantizers
from octavo.passes.scale_refit import stored_scale

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

WIDTHS = (5, 4, 3, 2)
# Kernels may round an output to either neighbour: 1 % more than one step of u8.
OUTPUT_RANGE = Range(-90.0, 90.0, -90.0, 90.0)
OUTPUT_STEP = 1.01 * 180 / 255
FORMS = {
    "MatMul": ("float[7,128] x", (128, 24), 0, "y = MatMul (x, w)"),
    "Gemm": ("float[7,128] x", (128, 24), 0, "y = Gemm (x, w, b)"),
    "GemmT": ("float[7,128] x", (24, 128), 1, "y = Gemm <transB = 1> (x, w, b)"),
    "Conv": ("float[1,128,5,5] x", (24, 128, 1, 1), 1, "y = Conv (x, w, b)"),
    "Conv3": ("float[1,128,5,5] x", (24, 128, 3, 3), 1, "y = Conv <pads = [1,1,1,1]> (x, w, b)"),
}


def spec_of(bits: int, axis: int, size: int = 32) -> QuantSpec:
    even = bits == 5
    blocks = PerBlock(axis, size)
    return QuantSpec(signed_type(bits), blocks, even, half_scales=True, multiples=True)


def uneven(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """Numbers whose size differs from place to place, as those of a network do."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.lognormal(0, 0.5, shape)).astype(np.float32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_multiples_are_nearest_exact_and_stay(bits: int) -> None:
    scale = np.random.default_rng(0).lognormal(0, 1, (6, 50)).astype(np.float32)
    most = most_multiple(bits, symmetric=bits == 5)
    found = whole_multiples(scale, (0,), most)
    np.testing.assert_array_equal(whole_multiples(found, (0,), most), found)
    unit = found.max(axis=0) / most
    np.testing.assert_array_equal(unit.astype(np.float16), unit)
    counts = found / unit
    np.testing.assert_array_equal(counts, np.rint(counts))
    assert counts.min() >= 1
    assert counts.max() <= most
    inside = scale >= unit
    assert np.all(
        np.abs(found - scale)[inside] <= 0.51 * np.broadcast_to(unit, scale.shape)[inside]
    )
    # Every product of a multiple with a code, or the difference of two, is an int8 code.
    spec = spec_of(bits, 0)
    reach = spec.qmax if spec.symmetric else spec.qmax - spec.qmin
    assert most * reach <= np.iinfo(np.int8).max


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_a_file_stores_becomes_the_codes_of_one_scale_per_channel(
    name: str, bits: int
) -> None:
    """The unpacking graph against numpy, in the reference evaluator."""
    _, shape, axis, _ = FORMS[name]
    weight, spec = uneven(shape), spec_of(bits, axis)
    params = clipped_params(weight, spec)
    codes, kernel = quantize(weight, params), kernel_params(params)
    values = {f"part{k}": array for k, array in enumerate(pack(codes, spec))}
    values |= {f"table{k}": p.table for k, p in enumerate(parts(spec)) if p.native is None}
    made = _computed(values | dict(block_arrays(params)), kernel_steps(shape, spec))
    assert made.dtype == np.int8
    np.testing.assert_array_equal(dequantize(made, kernel), dequantize(codes, params))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_search_for_blocks_loses_less_than_one_scale_and_hardly_more_than_any(
    bits: int,
) -> None:
    weight = uneven((256, 40))
    spec = spec_of(bits, 0, 64)
    whole = QuantSpec(spec.dtype, PerAxis(1), symmetric=True)
    free = QuantSpec(spec.dtype, PerBlock(0, 64), spec.symmetric)
    losses = {
        name: np.square(weight - dequantize(quantize(weight, found), found)).sum()
        for name, own in (("own", spec), ("whole", whole), ("free", free))
        for found in [clipped_params(weight, own, 2.0)]
    }
    assert losses["own"] < 0.7 * losses["whole"]
    assert losses["own"] < 1.1 * losses["free"]
    snapped = clipped_params(weight, free, 2.0)
    plain = QuantParams(spec, snapped.scale, snapped.zero_point)
    assert losses["own"] <= np.square(weight - dequantize(quantize(weight, plain), plain)).sum()


def test_refitted_scales_stay_multiples() -> None:
    from octavo.passes.gptq import RowGrid
    from octavo.passes.weight_matrix import WeightMatrix

    weight, spec = uneven((24, 128)), spec_of(4, 1)
    params = clipped_params(weight, spec)
    matrix = WeightMatrix("Gemm", weight.shape, 1, (0,), (1,))
    scale, zero, cells = matrix.scales(params)
    grid = RowGrid(spec, scale, zero.astype(np.float32), cells)
    wanted = scale * np.random.default_rng(0).lognormal(0, 0.2, scale.shape).astype(np.float32)
    found = stored_scale(wanted, grid)
    np.testing.assert_array_equal(
        matrix.params(spec, found, zero).scale.reshape(found.shape), found
    )
    assert not np.array_equal(found, scale)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "static") for name in FORMS),
        *((name, "dynamic") for name in ("MatMul", "Gemm", "GemmT")),
    ],
)
def test_integer_kernels_multiply_blocks(
    name: str, method: Method, bits: int, tmp_path: Path, pass_context: PassContext
) -> None:
    _, shape, axis, _ = FORMS[name]
    model, weight = _built(name)
    option = Option(method, spec_of(bits, axis))
    planned = _planned(model, option, pass_context)
    artifact = lower(planned, tmp_path / "m.onnx")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 128) if shape[-1] != 3 and len(shape) == 2 else (1, 128, 5, 5))
    feed = {"x": np.clip(x, -4, 4).astype(np.float32)}
    found = make_session(artifact.path, threads=1).run(feed)["z"]
    expected = pass_context.evaluator.run(planned, feed)["z"]
    step = OUTPUT_STEP if method == "static" else 1e-5 * float(np.abs(expected).max())
    assert np.abs(found - expected).max() <= step
    assert np.abs(expected).max() > 10 * step
    proof = audit(artifact, feed)
    assert proof.ok, (proof.findings, proof.rows)
    # A fraction of the int8 codes is in the file, and the kernel reads int8.
    codes = bits * weight.size / 8
    size = sum(t.ByteSize() for t in onnx.load(artifact.path).graph.initializer)
    tables = sum(
        t.ByteSize()
        for t in onnx.load(artifact.path).graph.initializer
        if t.name.startswith("table")
    )
    assert size - tables < codes + weight.size / 32 + 900


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", FORMS)
def test_bytes_are_predicted(
    name: str, bits: int, tmp_path: Path, pass_context: PassContext
) -> None:
    _, _, axis, _ = FORMS[name]
    model, _ = _built(name)
    node = next(node for node in model.graph if node.name == "linear")
    sizes = {}
    for label, spec in (("blocks", spec_of(bits, axis)), ("one", _whole(bits, axis))):
        option = Option("static", spec)
        path = tmp_path / f"{label}.onnx"
        actual = lower(_planned(model, option, pass_context), path).bytes
        sizes[label] = actual - weight_bytes(node, (1,), option) - table_bytes([option])
    # What is left are the nodes around, whose names do not depend on the option.
    assert abs(sizes["blocks"] - sizes["one"]) <= 24


@pytest.mark.parametrize("method", [m for m in get_args(Method) if m != "float"])
def test_only_integer_kernels_read_them(method: Method) -> None:
    model, _ = _built("MatMul")
    node = next(node for node in model.graph if node.name == "linear")
    row = ORT_CPU.support(node, method).row
    if row is None:
        return
    blocks = spec_of(4, 0)
    free = QuantSpec("s4", PerBlock(0, 32), symmetric=True)
    integer = method in ("static", "dynamic")
    assert bool(row.refusal(blocks)) != integer
    assert bool(row.refusal(free)) == integer


def _whole(bits: int, axis: int) -> QuantSpec:
    # Three levels of two bits have a packing of their own.
    return QuantSpec(spec_of(bits, axis).dtype, PerAxis(1 - axis), symmetric=bits > 2)


def _built(name: str) -> tuple[Model, NDArray[np.float32]]:
    signature, shape, _, body = FORMS[name]
    rank = 2 if len(shape) == 2 else 4
    output = ",".join("abcd"[:rank])
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({signature}) => (float[{output}] z) '
        f"{{ [linear] {body} [tail] z = Neg (y) }}"
    )
    weight = uneven(shape)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    if "b)" in body:
        bias = uneven((24,), 3)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(bias, "b"))
    return read(proto), weight


def _planned(model: Model, option: Option, ctx: PassContext) -> Model:
    ranges = Ranges(
        {"x": Range(-4.0, 4.0, -4.0, 4.0), "y": OUTPUT_RANGE, "z": OUTPUT_RANGE}, "", 1, ""
    )
    model = model.with_fact(Plan({"linear": Choice(option, "")}, "")).with_fact(ranges)
    for pass_ in (PlaceQuantizers(), InsertFakeQuant()):
        model = pass_.run(model.clone(), ctx)
    return model


def _computed(values: dict[str, NDArray[np.generic]], made: tuple[object, ...]) -> NDArray[np.int8]:
    """What the steps make of named arrays."""
    from octavo.ir.packing import Step

    initializers, nodes, output = [], [], ""
    for name, array in values.items():
        initializers.append(onnx.numpy_helper.from_array(array, name))
    for step in made:
        assert isinstance(step, Step)
        inputs = []
        for given in step.inputs:
            if not isinstance(given, str):
                name = f"s{len(initializers)}"
                initializers.append(onnx.numpy_helper.from_array(np.array(given, np.int64), name))
                given = name
            inputs.append(given)
        attributes = {} if step.to is None else {"to": int(step.to)}
        nodes.append(onnx.helper.make_node(step.op_type, inputs, [step.output], **attributes))
        output = step.output
    graph = onnx.helper.make_graph(
        nodes, "g", [], [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.INT8, None)],
        initializers,
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (found,) = ReferenceEvaluator(model).run(None, {})
    return np.asarray(found)
