"""FakeQuant nodes as two runtimes execute them, against the numpy reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from octavo.backends.ort_session import make_session
from octavo.ir.fake_quant import (
    DOMAIN,
    constant,
    declare_functions,
    fake_quant_node,
    fold_quantized_constants,
    params_of,
    parse_spec,
    set_rounded,
    spec_text,
)
from octavo.ir.float4 import stored_parts
from octavo.ir.quant import (
    Granularity,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    QuantType,
    dequantize,
    params_for_weight,
    quantize,
)
from octavo.ir.read import read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model

Run = Callable[[onnx.ModelProto, "NDArray[np.float32]"], "NDArray[Any]"]
SHAPE = (4, 6, 2)
GRANULARITIES: tuple[Granularity, ...] = (
    PerTensor(),
    PerAxis(0),
    PerAxis(1),
    PerAxis(2),
    PerBlock(0, 2),
    PerBlock(1, 3),
    PerBlock(2, 2),
    # The last block is shorter.
    PerBlock(1, 4),
)
DTYPES = get_args(QuantType)
# One float32 rounding of (q - zero) · scale.
RELATIVE = 1.2e-7


def _onnxruntime(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[Any]:
    session = make_session(model.SerializeToString(), threads=1, optimization="none")
    return session.run({"x": x})["y"]


def _reference(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[Any]:
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(found)


RUNTIMES = pytest.mark.parametrize("run", [_onnxruntime, _reference])


def _model(
    insert: Callable[[onnx_ir.Value, onnx_ir.Graph], onnx_ir.Node],
) -> tuple[onnx.ModelProto, onnx_ir.Node]:
    float32 = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(SHAPE), type=float32)
    graph = onnx_ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 21})
    node = insert(x, graph)
    node.outputs[0].name = "y"
    node.outputs[0].shape, node.outputs[0].type = x.shape, float32
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = onnx_ir.Model(graph, ir_version=10)
    declare_functions(model)
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto, node


def _fake(params: QuantParams) -> tuple[onnx.ModelProto, onnx_ir.Node]:
    return _model(lambda x, graph: fake_quant_node(x, params, "fake", graph))


def _drawn() -> NDArray[np.float32]:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    # Ties of a power-of-two scale, and values outside of every grid.
    x[0, 0], x[0, 1] = (0.25, -0.75), (1e5, -1e5)
    return x


@RUNTIMES
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runtimes_round_as_the_reference_does(
    dtype: QuantType, granularity: Granularity, run: Run
) -> None:
    spec = QuantSpec(dtype, granularity)
    shape = params_for_weight(np.ones(SHAPE, np.float32), spec).scale.shape
    rng = np.random.default_rng(1)
    scale = np.array(rng.choice([0.5, 0.37, 0.05], shape), np.float32)
    zero = np.array(rng.integers(spec.qmin, spec.qmax + 1, shape))
    params = QuantParams(spec, scale, (zero * (dtype not in ("s1", "f8", "f4"))).astype(np.int32))
    proto, _ = _fake(params)
    expected = dequantize(quantize(_drawn(), params), params)
    np.testing.assert_allclose(run(proto, _drawn()), expected, rtol=RELATIVE, atol=0)
    assert len(np.unique(expected)) > 1


def test_float8_codes_are_the_nearest_of_all_that_the_bits_mean() -> None:
    sizes = [
        (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
        for e, m in itertools.product(range(16), range(8))
    ]
    # All ones are no number: 448 is the largest.
    numbers = np.array(sizes[:-1])
    ties = (numbers[1:] + numbers[:-1]) / 2
    params = QuantParams(QuantSpec("f8"), np.array(0.5, np.float32), np.array(0, np.int32))
    even = np.where(np.arange(ties.size) % 2, numbers[1:], numbers[:-1])
    past = np.nextafter(ties.astype(np.float32), np.float32(np.inf))
    real = np.concatenate((numbers, ties, past, -numbers, [1e6, -np.inf])) / 2
    expected = np.concatenate((numbers, even, numbers[1:], -numbers, [448, -448])) / 2
    found = dequantize(quantize(real.astype(np.float32), params), params)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_float4_codes_are_the_nearest_of_all_that_the_bits_mean() -> None:
    """Two bits of exponent with a bias of 1, one bit of mantissa (OCP Microscaling 1.0, 5.3.3)."""
    numbers = np.array([
        (1 + m / 2) * 2.0 ** (e - 1) if e else m / 2 for e, m in itertools.product(range(4), (0, 1))
    ])  # fmt: skip
    ties = (numbers[1:] + numbers[:-1]) / 2
    params = QuantParams(QuantSpec("f4"), np.array(0.5, np.float32), np.array(0, np.int32))
    even = np.where(np.arange(ties.size) % 2, numbers[1:], numbers[:-1])
    past = np.nextafter(ties.astype(np.float32), np.float32(np.inf))
    real = np.concatenate((numbers, ties, past, -numbers, [1e6, -np.inf])) / 2
    expected = np.concatenate((numbers, even, numbers[1:], -numbers, [6, -6])) / 2
    found = dequantize(quantize(real.astype(np.float32), params), params)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_scales_of_float4_blocks_are_float8_numbers_times_one_power_of_two() -> None:
    rng = np.random.default_rng(3)
    given = np.exp2(rng.uniform(-12, 0, (8, 5))).astype(np.float32) * np.float32(0.0123)
    spec = QuantSpec("f4", PerBlock(0, 16), symmetric=True)
    scale = QuantParams(spec, given, np.zeros(given.shape, np.int32)).scale
    codes, unit = stored_parts(scale)
    assert float(unit).hex().startswith("0x1.0000000000000p")
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(codes.astype(np.float32) * unit, scale)
    # Four significant bits, where float8 is not at its end.
    np.testing.assert_allclose(scale, given, rtol=2**-4)
    again = QuantParams(spec, scale, np.zeros(given.shape, np.int32)).scale
    np.testing.assert_array_equal(again, scale)


def test_half_scales_are_float16_numbers_and_positive() -> None:
    spec = QuantSpec("s4", PerAxis(0), symmetric=True, half_scales=True)
    given = np.array([0.1, 1e-12, 7e4, 0.25], np.float32)
    scale = QuantParams(spec, given, np.zeros(4, np.int32)).scale
    nearest = np.array([0.1, 2**-24, 65504, 0.25], np.float16)
    np.testing.assert_array_equal(scale, nearest.astype(np.float32))
    assert scale.dtype == np.float32


@RUNTIMES
def test_the_dynamic_form_finds_its_parameters(run: Run) -> None:
    proto, _ = _model(
        lambda x, graph: onnx_ir.node("FakeQuantDynamic", [x], domain=DOMAIN, name="fake")
    )
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    low, high = float(x.min()), float(x.max())
    # DynamicQuantizeLinear: 8 bits over the observed range with zero, all in float32.
    scale = np.float32((np.float32(high) - np.float32(low)) / 255)
    zero = np.clip(np.rint(-np.float32(low) / scale), 0, 255).astype(np.int32)
    params = QuantParams(QuantSpec("u8"), np.array(scale), np.array(zero))
    expected = dequantize(quantize(x, params), params)
    np.testing.assert_allclose(run(proto, x), expected, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("dtype", ["s8", "s3", "s1", "f8", "f4"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_a_node_gives_its_parameters_back(granularity: Granularity, dtype: QuantType) -> None:
    spec = QuantSpec(dtype, granularity, symmetric=True)
    params = params_for_weight(_drawn(), spec)
    found = params_of(_fake(params)[1])
    assert found.spec == spec
    np.testing.assert_array_equal(found.scale, params.scale)
    np.testing.assert_array_equal(found.zero_point, params.zero_point)


def test_only_a_split_axis_needs_the_blocked_form() -> None:
    for granularity, op_type in (
        (PerBlock(1, 3), "FakeQuantBlocks"),
        (PerBlock(1, 6), "FakeQuant"),
        (PerBlock(1, 4), "FakeQuant"),
    ):
        params = params_for_weight(_drawn(), QuantSpec("s4", granularity, symmetric=True))
        proto, node = _fake(params)
        assert node.op_type == op_type
        assert [function.name for function in proto.functions] == [op_type]


def test_functions_go_with_their_last_node() -> None:
    proto, _ = _fake(params_for_weight(_drawn(), QuantSpec("s8", symmetric=True)))
    model = onnx_ir.from_proto(proto)
    model.graph.outputs[0] = model.graph.inputs[0]
    model.graph.remove(model.graph[0])
    declare_functions(model)
    assert (len(model.functions), DOMAIN in model.opset_imports) == (0, False)


def test_a_constant_is_made_once() -> None:
    graph = onnx_ir.Graph([], [], nodes=[], name="g")
    first = constant(graph, "one", np.ones(3, np.float32))
    assert constant(graph, "one", np.ones(3, np.float32)) is first
    assert first.is_initializer()


@given(
    st.sampled_from(DTYPES),
    st.one_of(
        st.just(PerTensor()),
        st.builds(PerAxis, st.integers(0, 9)),
        st.builds(PerBlock, st.integers(0, 9), st.integers(1, 1024)),
    ),
    st.booleans(),
    st.sampled_from([None, 5, 7]),
    st.booleans(),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
)
def test_the_text_of_a_spec_reads_back(
    dtype: QuantType,
    granularity: Granularity,
    symmetric: bool,
    used_bits: int | None,
    half_scales: bool,
    index_bits: int | None,
    multiples: bool,
) -> None:
    multiples &= isinstance(granularity, PerBlock)
    spec = QuantSpec(dtype, granularity, symmetric, used_bits, half_scales, index_bits, multiples)
    assert parse_spec(spec_text(spec)) == spec


@pytest.mark.parametrize("text", ["", "s8", "s8/axis", "f8/tensor/x", "s8/block32", "s8/tensor*"])
def test_what_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantization spec"):
        parse_spec(text)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("s4", PerAxis(1), symmetric=True),
        QuantSpec("u4", PerBlock(0, 8), half_scales=True),
        QuantSpec("s3", PerBlock(0, 8), multiples=True, half_scales=True),
        QuantSpec("s1", PerAxis(1), symmetric=True),
        QuantSpec("f8", PerAxis(1), symmetric=True),
        QuantSpec("f4", PerBlock(0, 16), symmetric=True),
        QuantSpec("s8", symmetric=True),
    ],
    ids=str,
)
def test_folded_constants_are_what_a_runtime_computes(spec: QuantSpec) -> None:
    model = _weighted(np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32), spec)
    (expected,) = ReferenceEvaluator(onnx_ir.to_proto(model.ir)).run(None, {})
    own = model.ir.clone()
    fold_quantized_constants(own)
    assert not [node for node in own.graph if node.domain == "octavo"]
    assert not own.functions
    (found,) = own.graph.outputs
    assert found.name == "y"
    assert found.const_value is not None
    np.testing.assert_array_equal(found.const_value.numpy(), expected)
    # The model itself keeps its quantizer.
    assert next(node.op_type for node in model.graph).startswith("FakeQuant")


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("s4", PerAxis(1), symmetric=True), QuantSpec("f4", PerBlock(0, 16), symmetric=True)],
    ids=str,
)
def test_rounded_numbers_are_kept_as_codes_and_others_as_they_are(spec: QuantSpec) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    model = _weighted(weight, spec)
    (fake,) = model.graph
    value = fake.inputs[0]
    assert value is not None
    params = params_of(fake)
    for array, kept in ((dequantize(quantize(weight, params), params), True), (weight, False)):
        set_rounded(model.graph, fake, array)
        assert isinstance(value.const_value, onnx_ir.LazyTensor) == kept
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), array)


def _weighted(weight: NDArray[np.float32], spec: QuantSpec) -> Model:
    """A graph that only quantizes a constant, to the output `y`."""
    text = '<ir_version: 10, opset_import: ["" : 21]> g () => (float[32, 6] y) { y = Identity(w) }'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = read(proto)
    (node,) = model.graph
    value = model.graph.initializers["w"]
    fake = fake_quant_node(value, params_for_weight(weight, spec), "fq", model.graph)
    model.graph.insert_before(node, fake)
    onnx_ir.convenience.replace_all_uses_with(
        node.outputs[0], fake.outputs[0], replace_graph_outputs=True
    )
    model.graph.remove(node, safe=True)
    fake.outputs[0].name = "y"
    declare_functions(model.ir)
    return model
