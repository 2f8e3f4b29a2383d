"""Each rule of TensorRT on a file that breaks it, and the verdict of its own parser and builder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper
import pytest
from numpy.typing import NDArray

from octavo.backends import trt_rtx
from octavo.backends.trt_commands import profiles
from octavo.backends.trt_operators import REFUSED
from octavo.backends.trt_rules import broken_rules
from octavo.backends.trt_target import PART_OF, TARGETS
from octavo.ir.read_onnx import read_verbatim
from octavo.models import shipped

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
Array = NDArray[np.generic]
needs_wheels = pytest.mark.skipif(
    trt_rtx.version() is None, reason="the wheels of TensorRT for RTX are not installed"
)


class Net:
    """A graph under construction; every node is called like its output."""

    def __init__(self, rows: int = 4, columns: int = 128, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape, self.opset = (rows, columns), opset
        self.output, self.extra = "y", list[onnx.OperatorSetIdProto]()

    def const(self, name: str, array: Array) -> str:
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op: str, inputs: list[str], out: str, domain: str = "", **attributes: int) -> str:
        self.nodes.append(oh.make_node(op, inputs, [out], out, domain=domain, **attributes))
        return out

    def quantized(self, value: str, *, zero: object = np.int8(0), scale: object = 0.1) -> str:
        """`value → Q → DQ` with float16 scales."""
        half = np.asarray(scale, np.float16)
        numbers = [self.const(f"{value}_s", half)]
        zeros = np.broadcast_to(np.asarray(zero), half.shape)
        numbers.append(self.const(f"{value}_z", np.ascontiguousarray(zeros)))
        codes = self.add("QuantizeLinear", [value, *numbers], f"{value}_q")
        return self.add("DequantizeLinear", [codes, *numbers], f"{value}_dq")

    def weight(self, codes: Array, scale: object, **attributes: int) -> str:
        """Codes of a weight in front of a DQ."""
        inputs = [self.const("w", codes), self.const("w_s", np.asarray(scale, np.float16))]
        return self.add("DequantizeLinear", inputs, "w_dq", **attributes)

    def proto(self) -> onnx.ModelProto:
        inputs = [oh.make_tensor_value_info("x", HALF, self.shape)]
        outputs = [oh.make_tensor_value_info(self.output, HALF, None)]
        graph = oh.make_graph(self.nodes, "net", inputs, outputs, self.constants)
        opsets = [oh.make_opsetid("", self.opset), *self.extra]
        return oh.make_model(graph, opset_imports=opsets, ir_version=10)


def _s8(*shape: int) -> Array:
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


def _s4(*shape: int) -> Array:
    return np.random.default_rng(0).integers(-7, 8, shape).astype(ml_dtypes.int4)


def _columns(size: int = 32) -> Array:
    return np.full(size, 0.01, np.float16)


def _linear(net: Net, activation: str, weight: str) -> Net:
    net.add("MatMul", [activation, weight], "y")
    return net


def good() -> Net:
    net = Net()
    return _linear(net, net.quantized("x"), net.weight(_s8(128, 32), _columns(), axis=1))


def weight_only_int4() -> Net:
    net = Net()
    scales = np.full((2, 32), 0.1, np.float16)
    return _linear(net, "x", net.weight(_s4(128, 32), scales, axis=0, block_size=64))


def unsigned() -> Net:
    net = Net()
    activation = net.quantized("x", zero=np.uint8(0))
    return _linear(net, activation, net.weight(_s8(128, 32), _columns(), axis=1))


def shifted() -> Net:
    net = Net()
    activation = net.quantized("x", zero=np.int8(3))
    return _linear(net, activation, net.weight(_s8(128, 32), _columns(), axis=1))


def zero_scale() -> Net:
    net = Net()
    activation = net.quantized("x", scale=0.0)
    return _linear(net, activation, net.weight(_s8(128, 32), _columns(), axis=1))


def int32_bias() -> Net:
    net = good()
    net.nodes[-1].output[0] = "m"
    bias = np.arange(32, dtype=np.int32)
    inputs = [net.const("b", bias), net.const("b_s", np.asarray(0.001, np.float16))]
    net.add("Add", ["m", net.add("DequantizeLinear", inputs, "b_dq")], "y")
    return net


def int4_with_int8() -> Net:
    net = Net()
    scales = np.full((2, 32), 0.1, np.float16)
    weight = net.weight(_s4(128, 32), scales, axis=0, block_size=64)
    return _linear(net, net.quantized("x"), weight)


def unsigned_int4() -> Net:
    net = Net()
    codes = np.abs(_s4(128, 32).astype(np.int8)).astype(ml_dtypes.uint4)
    scales = np.full((2, 32), 0.1, np.float16)
    return _linear(net, "x", net.weight(codes, scales, axis=0, block_size=64))


def sixteen_bits() -> Net:
    net = Net()
    activation = net.quantized("x", zero=np.int16(0))
    return _linear(net, activation, net.weight(_s8(128, 32), _columns(), axis=1))


def unpacked() -> Net:
    net = Net()
    cast = net.add("Cast", [net.const("c", _s4(128, 32))], "w8", to=onnx.TensorProto.INT8)
    inputs = [cast, net.const("w_s", _columns())]
    return _linear(net, "x", net.add("DequantizeLinear", inputs, "w_dq", axis=1))


def run_time_ranges() -> Net:
    net = Net()
    wide = net.add("Cast", ["x"], "wide", to=FLOAT)
    net.nodes.append(
        oh.make_node("DynamicQuantizeLinear", [wide], ["codes", "scale", "zero"], "dynamic")
    )
    inputs = ["codes", net.const("w", _s8(128, 32)), "zero"]
    net.add("MatMulInteger", inputs, "sums")
    net.add("Cast", ["sums"], "y", to=HALF)
    return net


def contrib() -> Net:
    net = Net()
    net.extra.append(oh.make_opsetid("com.microsoft", 1))
    net.add("QuickGelu", ["x"], "y", domain="com.microsoft")
    return net


def fp8() -> Net:
    net = Net()
    zero = np.asarray(0, ml_dtypes.float8_e4m3fn)
    codes = (_s8(128, 32).astype(np.float32) / 16).astype(ml_dtypes.float8_e4m3fn)
    return _linear(net, net.quantized("x", zero=zero), net.weight(codes, 0.1))


def float8_with_int8() -> Net:
    net = Net()
    codes = (_s8(128, 32).astype(np.float32) / 16).astype(ml_dtypes.float8_e4m3fn)
    return _linear(net, net.quantized("x"), net.weight(codes, 0.1))


def float4_weight(net: Net, block: int = 16, axis: int = 0) -> str:
    """Codes with float8 scales, which one float32 number multiplies; a Cast to float16 behind."""
    codes = (_s8(128, 32).astype(np.float32) / 32).astype(ml_dtypes.float4_e2m1fn)
    shape = tuple(-(-n // block) if k == axis else n for k, n in enumerate(codes.shape))
    scales = net.const("w_scales", np.ones(shape, ml_dtypes.float8_e4m3fn))
    unit = net.const("w_unit", np.float32(0.01))
    inputs = [net.const("w", codes), net.add("DequantizeLinear", [scales, unit], "w_s")]
    made = net.add("DequantizeLinear", inputs, "w_dq", axis=axis, block_size=block)
    return net.add("Cast", [made], "w_f16", to=HALF)


def nvfp4() -> Net:
    net = Net(opset=23)
    return _linear(net, "x", float4_weight(net))


def nvfp4_in_blocks_of_32() -> Net:
    net = Net(opset=23)
    return _linear(net, "x", float4_weight(net, block=32))


def nvfp4_along_columns() -> Net:
    net = Net(opset=23)
    return _linear(net, "x", float4_weight(net, axis=1))


def nvfp4_with_int8() -> Net:
    net = Net(opset=23)
    return _linear(net, net.quantized("x"), float4_weight(net))


def nvfp4_with_float8() -> Net:
    net = Net(opset=23)
    activation = net.quantized("x", zero=np.asarray(0, ml_dtypes.float8_e4m3fn))
    return _linear(net, activation, float4_weight(net))


def new_opset() -> Net:
    net = good()
    net.opset = 26
    return net


def per_channel_activation() -> Net:
    net = Net()
    activation = net.quantized("x", scale=np.full(128, 0.1))
    return _linear(net, activation, net.weight(_s8(128, 32), _columns(), axis=1))


def wrong_axis() -> Net:
    net = Net()
    return _linear(net, net.quantized("x"), net.weight(_s8(128, 32), _columns(128), axis=0))


def blocks_along_columns() -> Net:
    net = Net()
    scales = np.full((128, 1), 0.1, np.float16)
    return _linear(net, "x", net.weight(_s4(128, 64), scales, axis=1, block_size=64))


# What breaks which rules of sm86, and whether TensorRT for RTX refuses it as well.
BROKEN: dict[Callable[[], Net], tuple[set[str], bool]] = {
    good: (set(), False),
    weight_only_int4: (set(), False),
    # The parser warns and computes with signed codes: a finding, not a refusal.
    unsigned: ({"uint8"}, True),
    shifted: ({"zero-point"}, True),
    zero_scale: ({"scale"}, True),
    int32_bias: ({"bias"}, True),
    unsigned_int4: ({"type"}, True),
    sixteen_bits: ({"type"}, True),
    unpacked: ({"unpacked"}, True),
    run_time_ranges: ({"operator"}, True),
    contrib: ({"operator"}, True),
    fp8: ({"part"}, True),
    float8_with_int8: ({"part", "formats"}, True),
    # The documents forbid what RTX builds.
    int4_with_int8: ({"w4a8"}, False),
    new_opset: ({"opset"}, False),
    per_channel_activation: ({"activation-scales"}, False),
    wrong_axis: ({"weight-axis"}, False),
    blocks_along_columns: ({"blocks"}, False),
}
# The same for sm120, whose builder takes blocks that the documents do not allow.
FLOAT4: dict[Callable[[], Net], tuple[set[str], bool]] = {
    nvfp4: (set(), False),
    nvfp4_in_blocks_of_32: ({"blocks"}, False),
    nvfp4_along_columns: ({"blocks"}, False),
    nvfp4_with_int8: ({"formats"}, True),
    nvfp4_with_float8: ({"formats"}, True),
}
_SM86, _SM120 = TARGETS["tensorrt-sm86"], TARGETS["tensorrt-sm120"]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Net], Path]:
    def write(net: Net) -> Path:
        onnx.save(net.proto(), tmp_path / "net.onnx")
        return tmp_path / "net.onnx"

    return write


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_a_broken_rule_is_found_and_named(
    make: Callable[[], Net], written: Callable[[Net], Path]
) -> None:
    found = broken_rules(written(make()), _SM86)
    assert {f.rule for f in found if f.error} == BROKEN[make][0]
    for finding in found:
        assert finding.reason
        assert finding.fix


@needs_wheels
@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_the_rules_find_what_the_builder_refuses(
    make: Callable[[], Net], written: Callable[[Net], Path]
) -> None:
    path = written(make())
    found = trt_rtx.build(path, PART_OF["tensorrt-sm86"], profiles(read_verbatim(path)))
    assert bool(found) == BROKEN[make][1], found


@pytest.mark.parametrize("make", FLOAT4, ids=lambda make: make.__name__)
def test_float4_has_rules_of_its_own(
    make: Callable[[], Net], written: Callable[[Net], Path]
) -> None:
    path = written(make())
    assert {f.rule for f in broken_rules(path, _SM120) if f.error} == FLOAT4[make][0]
    if trt_rtx.version() is not None:
        for name, refused in (("tensorrt-sm120", FLOAT4[make][1]), ("tensorrt-sm89", True)):
            found = trt_rtx.build(path, PART_OF[name], profiles(read_verbatim(path)))
            assert bool(found) == refused, found


def foreign() -> Net:
    net = Net()
    net.extra.append(oh.make_opsetid("my.ops", 1))
    net.add("Magic", ["x"], "y", domain="my.ops")
    return net


def without_importer() -> Net:
    net = Net()
    net.add("Unique", ["x"], "y")
    return net


@needs_wheels
@pytest.mark.parametrize(
    ("make", "reason", "fix"),
    [
        (foreign, "takes Magic for a plugin", "export it as standard operators"),
        (without_importer, "has no importer for Unique", "replace Unique"),
    ],
)
def test_the_parser_names_the_operator_it_refuses(
    make: Callable[[], Net], reason: str, fix: str, written: Callable[[Net], Path]
) -> None:
    path = written(make())
    (found,) = trt_rtx.build(path, PART_OF["tensorrt-sm86"], profiles(read_verbatim(path)))
    assert (found.rule, found.node) == ("parser", "y")
    assert reason in found.reason
    assert fix in found.fix
    (own,) = (f for f in broken_rules(path, _SM86) if f.error)
    assert own.rule == "operator"


@needs_wheels
def test_a_file_that_the_compiler_crashes_on_is_a_finding(written: Callable[[Net], Path]) -> None:
    path = written(nvfp4_with_int8())
    (found,) = trt_rtx.build(path, PART_OF["tensorrt-sm120"], profiles(read_verbatim(path)))
    assert found.rule == "builder"
    assert "crashes (SIG" in found.reason


@pytest.mark.parametrize(
    ("make", "count", "lacking", "words"),
    [
        # Q and DQ of the activation, DQ of the weight.
        (fp8, 3, {"", "-sm80", "-sm86"}, "use INT8 here, or check for a part that has it: sm89"),
        # One word on a weight: its scales are part of it.
        (nvfp4, 1, {"", "-sm80", "-sm86", "-sm89", "-sm90"}, "use INT4 in blocks of 64 or 128"),
    ],
)
def test_a_part_decides_about_its_formats(
    make: Callable[[], Net],
    count: int,
    lacking: set[str],
    words: str,
    written: Callable[[Net], Path],
) -> None:
    path = written(make())
    found = {name: broken_rules(path, TARGETS[name]) for name in TARGETS}
    rules = {name: {f.rule: f for f in own} for name, own in found.items()}
    assert {sum(f.rule == "part" for f in own) for own in found.values()} == {0, count}
    without = {name for name, found in rules.items() if "part" in found}
    assert without == {f"tensorrt{part}" for part in lacking}
    assert all(words in rules[name]["part"].fix for name in without)


@needs_wheels
def test_operators_without_an_importer_are_those_of_the_table() -> None:
    trt = importlib.import_module("tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    parser = trt.OnnxParser(trt.Builder(logger).create_network(0), logger)
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    without = {name for name in standard if not parser.supports_operator(name)}
    assert without == set(REFUSED) & standard


def test_float32_is_advice_with_the_number_of_nodes() -> None:
    path = shipped("fashion-mobile")
    (found,) = broken_rules(path, _SM86)
    weighted = sum(node.op_type in ("Conv", "Gemm") for node in onnx.load(path).graph.node)
    assert (found.rule, found.error) == ("float32", False)
    assert f"so are {weighted - 1} more" in found.reason


def test_a_sparse_initializer_is_found(tmp_path: Path) -> None:
    proto = good().proto()
    values = oh.make_tensor("sparse", FLOAT, [1], [2.0])
    indices = oh.make_tensor("at", onnx.TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.append(oh.make_sparse_tensor(values, indices, [4]))
    onnx.save(proto, tmp_path / "net.onnx")
    found = broken_rules(tmp_path / "net.onnx", _SM86)
    assert [(f.rule, f.node) for f in found] == [("sparse-initializer", "sparse")]


def test_unequal_scales_of_a_concat_are_advice(written: Callable[[Net], Path]) -> None:
    net = Net()
    net.add("Relu", ["x"], "r")
    parts = [net.quantized("x", scale=0.1), net.quantized("r", scale=0.2)]
    net.add("Concat", parts, "c", axis=0)
    net.add("Relu", ["c"], "y")
    found = broken_rules(written(net), _SM86)
    assert [(f.rule, f.node, f.error) for f in found] == [("concat", "c", False)]


def test_a_quantizer_between_operator_and_relu_is_advice(written: Callable[[Net], Path]) -> None:
    net = Net()
    weight = net.weight(_s8(128, 32), _columns(), axis=1)
    net.add("MatMul", [net.quantized("x"), weight], "m")
    net.add("Relu", [net.quantized("m")], "y")
    found = broken_rules(written(net), _SM86)
    assert [(f.rule, f.node, f.error) for f in found] == [("output", "m", False)]
