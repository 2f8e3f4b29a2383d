"""Files lowered for TensorRT against the float and fake-quantized graphs, and its rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx.reference
import pytest

from octavo.backends import trt_rtx
from octavo.backends.ort_lowering import lower as lower_for_ort
from octavo.backends.ort_session import OrtEvaluator, make_session
from octavo.backends.trt_backend import TensorRtBackend
from octavo.backends.trt_check import check
from octavo.backends.trt_lowering import lower
from octavo.backends.trt_rules import broken_rules
from octavo.backends.trt_target import TARGETS
from octavo.cli.stand_in import stand_in
from octavo.ir.calibration import Feed
from octavo.ir.errors import UsageError
from octavo.ir.facts import Plan
from octavo.ir.menu import Menu, Solution
from octavo.ir.model import Model
from octavo.ir.option_bytes import weight_bytes
from octavo.ir.read import read
from octavo.ir.target import Target
from octavo.models import fetch, shipped
from octavo.passes.base import PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import preset

_SM86 = TARGETS["tensorrt-sm86"]
_INT8 = "canonicalize,calibrate{method=minmax},choose-kernels,place-quantizers,insert-fake-quant"
_INT4 = "canonicalize,choose-kernels{weight-only=true,bits=4,block-size=64},insert-fake-quant"
_OFFERED = "canonicalize,calibrate,offer-options,sensitivity{estimator=weight-error}"
# A recurrent network has no integer kernel: float16 is the least it takes.
_LEAST = {"fashion-lstm": 0.5}
# Largest relative error that one code more or less may leave, on noise as inputs.
_NETWORKS = {"fashion-resnet": 0.02, "fashion-mobile": 0.08, "fashion-vit": 0.02,
             "fashion-lstm": 0.004}  # fmt: skip
Calibrated = Callable[..., PassContext]
Feeds = Callable[..., Feed]


@pytest.fixture
def context(calibrated: Calibrated) -> Callable[[Model], PassContext]:
    return partial(calibrated, target=_SM86)


def _random(text: str) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for tensor in proto.graph.initializer:
        if len(tensor.dims) > 1:
            array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32) * 0.2
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


def _error(actual: Feed, expected: Feed) -> float:
    """The largest relative error of an output, in the norm."""
    pairs = [(actual[name].astype(np.float64), truth) for name, truth in expected.items()]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize("name", _NETWORKS)
def test_a_file_computes_what_the_planned_graph_does(
    name: str, tmp_path: Path, context: Callable[[Model], PassContext], feed_of: Feeds
) -> None:
    source = read(shipped(name))
    ctx = context(source)
    planned = Pipeline.parse(_INT8).run(source, ctx).model
    artifact = lower(planned, tmp_path / "model.onnx", _SM86)
    feed = feed_of(source, 9)
    expected = OrtEvaluator(threads=1).run(planned, feed)
    actual = make_session(artifact.path, threads=1).run(feed)
    # Float16 has 11 bits; a few codes of the integer layers move by one step.
    assert _error(actual, expected) < _NETWORKS[name]
    assert [a.dtype for a in actual.values()] == [e.dtype for e in expected.values()]
    assert broken_rules(artifact.path, _SM86) == []


def _quantizers(path: Path) -> list[tuple[str, str, onnx.TensorProto | None, Any]]:
    """Operator, type of the codes, constant data and scale of every Q and DQ."""
    graph = onnx.load(path).graph
    held = {t.name: t for t in graph.initializer}
    found = []
    for node in (n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")):
        codes = held.get(node.input[0]) or held[node.input[2]]
        kind = onnx.TensorProto.DataType.Name(codes.data_type)
        scale = onnx.numpy_helper.to_array(held[node.input[1]])
        found.append((node.op_type, kind, held.get(node.input[0]), scale))
    return found


def test_float8_is_written_on_both_sides_of_a_product(
    tmp_path: Path, calibrated: Calibrated, feed_of: Feeds
) -> None:
    source = _random("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,32,6,6] x) => (float[N,20,6,6] y)
        <float[48,32,3,3] a = {0}, float[20,48,1,1] b = {0}> {
            [first] h = Conv <pads: ints = [1, 1, 1, 1]> (x, a) [relu] r = Relu (h)
            [narrow] y = Conv (r, b)
        }""")
    target = TARGETS["tensorrt-sm89"]
    ctx = calibrated(source, target=target)
    planned = Pipeline.parse(preset("fp8")).run(source, ctx).model
    artifact = lower(planned, tmp_path / "model.onnx", target)
    assert {n.node: n.option for n in artifact.planned} == {
        "first": "float8:f8/axis0", "narrow": "float",
    }  # fmt: skip
    # 20 channels are no multiple of 16.
    assert "multiples of 16" in next(n.reason for n in artifact.planned if n.node == "narrow")
    found = _quantizers(artifact.path)
    assert {kind for _, kind, *_ in found} == {"FLOAT8E4M3FN"}
    (quantize,) = (scale for op_type, *_, scale in found if op_type == "QuantizeLinear")
    seen = max(float(np.abs(feed["x"]).max()) for feed in ctx.calibration or ())
    np.testing.assert_allclose(quantize, seen / 448, rtol=2**-11)
    weight = next(iter(source.graph.initializers.values())).const_value
    assert weight is not None
    (scale,) = (scale for _, _, codes, scale in found if codes is not None)
    largest = np.abs(weight.numpy()).max(axis=(1, 2, 3))
    # A float16 scale has 11 bits, and fewer below 2^-14.
    np.testing.assert_allclose(scale, largest / 448, rtol=2**-11, atol=2**-25)
    feed = feed_of(source, 3)
    expected = OrtEvaluator(threads=1).run(planned, feed)
    # One number in 2^8 moves by a step of 2^-3 where float16 rounds it across a border.
    assert _error(make_session(artifact.path, threads=1).run(feed), expected) < 0.01
    assert broken_rules(artifact.path, target) == []
    assert {f.rule for f in broken_rules(artifact.path, _SM86) if f.error} == {"part"}


_TWO_PRODUCTS = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,128] x) => (float[N,60] y)
    <float[128,192] a = {0}, float[60,192] b = {0}> {
        [first] h = MatMul (x, a) [relu] r = Relu (h)
        [second] y = Gemm <transB: int = 1> (r, b)
    }"""
_SM120 = TARGETS["tensorrt-sm120"]


def _nearest_float4(weight: Any, axis: int) -> Any:
    """NVFP4 by its definition, in Python: 16 weights share a scale of four significant bits."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    rows = np.moveaxis(weight.astype(np.float64), axis, -1)
    blocks = rows.reshape(*rows.shape[:-1], -1, 16)
    mantissa, exponent = np.frexp(np.abs(blocks).max(axis=-1, keepdims=True) / 6)
    scale = np.ldexp(np.rint(mantissa * 16) / 16, exponent)
    nearest = values[np.abs(np.abs(blocks)[..., None] / scale[..., None] - values).argmin(axis=-1)]
    return np.moveaxis((np.sign(blocks) * nearest * scale).reshape(rows.shape), -1, axis)


def test_float4_weights_are_written_as_nvfp4(
    tmp_path: Path, calibrated: Calibrated, feed_of: Feeds
) -> None:
    source = _random(_TWO_PRODUCTS)
    ctx = calibrated(source, target=_SM120)
    text = "canonicalize,choose-kernels{static=false,float4=true},insert-fake-quant"
    planned = Pipeline.parse(text).run(source, ctx).model
    artifact = lower(planned, tmp_path / "model.onnx", _SM120)
    assert {n.node: n.option for n in artifact.planned} == {
        "first": "float4:f4/block16@0", "second": "float4:f4/block16@1",
    }  # fmt: skip
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto, full_check=True)
    held = {t.name: t for t in proto.graph.initializer}
    made = {n.output[0]: n for n in proto.graph.node}
    for node in (n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm")):
        cast = made[node.input[1]]
        dequantize = made[cast.input[0]]
        assert (cast.op_type, dequantize.op_type) == ("Cast", "DequantizeLinear")
        codes, scales = held[dequantize.input[0]], made[dequantize.input[1]]
        scale_codes, unit = (held[name] for name in scales.input)
        kinds = [onnx.TensorProto.DataType.Name(t.data_type) for t in (codes, scale_codes, unit)]
        assert kinds == ["FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT"]
        assert (len(codes.raw_data) * 2, len(scale_codes.raw_data) * 16, len(unit.dims)) == (
            np.prod(codes.dims), np.prod(codes.dims), 0,
        )  # fmt: skip
        weight = source.graph.initializers["a" if node.name == "first" else "b"].const_value
        assert weight is not None
        axis = 0 if node.name == "first" else 1
        truth = _nearest_float4(weight.numpy(), axis)
        found = _reference_output(proto, dequantize.output[0])
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-9)
    feed = feed_of(source, 3)
    expected = OrtEvaluator(threads=1).run(planned, feed)
    session = TensorRtBackend(_SM120).open(artifact.path, threads=1)
    assert _error(session.run(feed), expected) < 0.002
    assert broken_rules(artifact.path, _SM120) == []
    assert {f.rule for f in broken_rules(artifact.path, _SM86) if f.error} == {"part"}


def _reference_output(proto: onnx.ModelProto, name: str) -> Any:
    """A constant value of a file as onnx.reference computes it."""
    own = onnx.ModelProto()
    own.CopyFrom(proto)
    made = {n.output[0]: n for n in proto.graph.node}
    nodes = [made[made[name].input[1]], made[name]]
    del own.graph.node[:], own.graph.output[:], own.graph.input[:]
    own.graph.node.extend(nodes)
    own.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    (found,) = onnx.reference.ReferenceEvaluator(own).run(None, {})
    return found


def test_bytes_of_float4_weights_are_those_of_the_file(
    tmp_path: Path, calibrated: Calibrated
) -> None:
    """What an option is said to take is what the file grows by, to the byte."""
    source = _random(_TWO_PRODUCTS)
    ctx = calibrated(source, target=_SM120)
    text = "canonicalize,choose-kernels{static=false,float4=true},insert-fake-quant"
    planned = Pipeline.parse(text).run(source, ctx).model
    graph = onnx.load(lower(planned, tmp_path / "model.onnx", _SM120).path).graph
    nodes = {node.name or "": node for node in source.graph}
    for weight, name in (("a", "first"), ("b", "second")):
        option = planned.fact(Plan).by_node[name].option
        own = [t for t in graph.initializer if t.name.startswith(f"{weight}_float4")]
        read = [n for n in graph.node if n.name.startswith(f"{weight}_float4")]
        written = sum(1 + _varint(m.ByteSize()) + m.ByteSize() for m in (*own, *read))
        (reader,) = (n for n in graph.node if n.name == name)
        written += len(reader.input[1]) - len(weight)
        assert weight_bytes(nodes[name], (1,), option) == written


def test_gptq_knows_what_float4_weights_multiply(calibrated: Calibrated, feed_of: Feeds) -> None:
    source = read(shipped("fashion-vit"))
    feed = feed_of(source, 16)
    run = OrtEvaluator(threads=1).run
    errors = {}
    for name, text in (
        ("nearest", "canonicalize,choose-kernels{static=false,float4=true},insert-fake-quant"),
        ("gptq", preset("nvfp4")),
    ):
        ctx = calibrated(source, target=_SM120)
        errors[name] = _error(
            run(Pipeline.parse(text).run(source, ctx).model, feed), run(source, feed)
        )
    assert errors["gptq"] < 0.75 * errors["nearest"]


def _varint(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("fp8", _SM86, "tensorrt-sm86 has no float8 kernels"),
        ("nvfp4", TARGETS["tensorrt-sm90"], "tensorrt-sm90 has no float4 kernels"),
    ],
)
def test_parts_without_a_format_refuse_it(
    name: str, target: Target, words: str, calibrated: Calibrated
) -> None:
    source = read(shipped("fashion-vit"))
    with pytest.raises(UsageError, match=words):
        Pipeline.parse(preset(name)).run(source, calibrated(source, target=target))


def test_a_plan_chooses_among_the_formats_of_a_part(calibrated: Calibrated) -> None:
    source = read(shipped("fashion-vit"))
    offered = {}
    for name in ("tensorrt-sm86", "tensorrt-sm120"):
        ctx = calibrated(source, target=TARGETS[name])
        text = "canonicalize,calibrate,offer-options"
        menu = Pipeline.parse(text).run(source, ctx).model.fact(Menu)
        options = (o for offers in menu.offers.values() for offer in offers for o in
                   offer.options.values())  # fmt: skip
        offered[name] = {f"{o.method}:{o.weight.dtype}" for o in options if o.weight is not None}
    assert offered["tensorrt-sm86"] == {"static:s8", "weight-only:s4"}
    assert offered["tensorrt-sm120"] == {*offered["tensorrt-sm86"], "float8:f8", "float4:f4"}


def test_int4_weights_are_native_and_blocked_along_the_sum(
    tmp_path: Path, context: Callable[[Model], PassContext], feed_of: Feeds
) -> None:
    source = _random("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,128] x) => (float[N,64] y) <float[128,192] a = {0}, float[64,192] b = {0}> {
            [first] h = MatMul (x, a) [relu] r = Relu (h)
            [second] y = Gemm <transB: int = 1> (r, b)
        }""")
    planned = Pipeline.parse(_INT4).run(source, context(source)).model
    artifact = lower(planned, tmp_path / "model.onnx", _SM86)
    graph = onnx.load(artifact.path).graph
    types = {t.name: t for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            codes, scale = types[node.input[0]], types[node.input[1]]
            attributes = {a.name: a.i for a in node.attribute}
            found[tuple(codes.dims)] = (attributes, tuple(scale.dims))
            assert codes.data_type == onnx.TensorProto.INT4
            assert scale.data_type == onnx.TensorProto.FLOAT16
    assert found == {
        (128, 192): ({"axis": 0, "block_size": 64}, (2, 192)),
        (64, 192): ({"axis": 1, "block_size": 64}, (64, 3)),
    }
    feed = feed_of(source, 3)
    expected = OrtEvaluator(threads=1).run(planned, feed)
    assert _error(make_session(artifact.path, threads=1).run(feed), expected) < 0.002
    assert broken_rules(artifact.path, _SM86) == []


def test_shortcuts_are_quantized_and_outputs_of_convolutions_are_not(
    tmp_path: Path, context: Callable[[Model], PassContext]
) -> None:
    source = read(shipped("fashion-resnet"))
    planned = Pipeline.parse(_INT8).run(source, context(source)).model
    graph = onnx.load(lower(planned, tmp_path / "model.onnx", _SM86).path).graph
    made = {name: node for node in graph.node for name in node.output}
    adds = [node for node in graph.node if node.op_type == "Add"]
    assert len(adds) == 3
    for add in adds:
        assert sorted(made[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]
    for node in graph.node:
        if node.op_type == "Conv":
            inputs = [made[name].op_type for name in node.input[:2] if name in made]
            assert inputs == ["DequantizeLinear", "DequantizeLinear"]


def test_operands_of_a_concat_share_one_scale(
    tmp_path: Path, context: Callable[[Model], PassContext]
) -> None:
    source = _random("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,8,8,8] x) => (float[N,4,8,8] y)
        <float[8,8,1,1] a = {0}, float[8,8,1,1] b = {0}, float[4,16,1,1] c = {0}> {
            [left] l = Conv (x, a) [right] r = Conv (x, b) [twice] s = Add (r, r)
            [join] j = Concat <axis: int = 1> (l, s) [last] y = Conv (j, c)
        }""")
    planned = Pipeline.parse(_INT8).run(source, context(source)).model
    graph = onnx.load(lower(planned, tmp_path / "model.onnx", _SM86).path).graph
    made = {name: node for node in graph.node for name in node.output}
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    (concat,) = (node for node in graph.node if node.op_type == "Concat")
    read_by = [made[name] for name in concat.input]
    assert {node.op_type for node in read_by} == {"DequantizeLinear"}
    assert len({scales[node.input[1]].item() for node in read_by}) == 1


def test_everything_that_is_not_integer_is_float16(
    tmp_path: Path, context: Callable[[Model], PassContext]
) -> None:
    source = read(shipped("fashion-vit"))
    planned = Pipeline.parse(_INT8).run(source, context(source)).model
    proto = onnx.load(lower(planned, tmp_path / "model.onnx", _SM86).path)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    types |= {t.name: t.data_type for t in inferred.initializer}
    wide = {
        node.op_type
        for node in inferred.node
        if any(types.get(name) == onnx.TensorProto.FLOAT for name in node.output)
    }
    assert wide == {"Cast", "LayerNormalization", "Softmax"}
    for node in inferred.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "Gelu", "Add"):
            given = {types[name] for name in node.input if name in types}
            assert given == {onnx.TensorProto.FLOAT16}


def test_numbers_beyond_float16_stay_float32(tmp_path: Path) -> None:
    source = _random("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,4] x) => (float[2,4] y) <float[4] large = {1e6, 1.0, 1.0, 1.0},
        float low = {-3e38}, float tiny = {1e-9}> {
            [scaled] s = Mul (x, large) [masked] m = Max (s, low) [safe] y = Add (m, tiny)
        }""")
    path = lower(source, tmp_path / "model.onnx", _SM86).path
    feed = {"x": np.array([[0.5, 1, 2, 3], [-0.5, 1, 2, 3]], np.float32)}
    (actual,) = make_session(path, threads=1).run({**feed, "x": feed["x"] * 1e-2}).values()
    expected = feed["x"] * 1e-2 * np.array([1e6, 1, 1, 1])
    np.testing.assert_allclose(actual, expected, rtol=2e-3)
    ops = {n.name: n.op_type for n in onnx.load(path).graph.node}
    assert "Cast" in ops.values()


def test_a_plan_for_another_target_is_refused(tmp_path: Path, calibrated: Calibrated) -> None:
    source = read(shipped("fashion-mobile"))
    text = "canonicalize,choose-kernels{static=false,dynamic=false},insert-fake-quant"
    planned = Pipeline.parse(text).run(source, calibrated(source)).model
    assert lower_for_ort(planned, tmp_path / "ort.onnx").planned
    with pytest.raises(UsageError, match="no kernel of tensorrt-sm86 runs the option 'storage"):
        lower(planned, tmp_path / "model.onnx", _SM86)
    assert not (tmp_path / "model.onnx").exists()


def test_the_same_model_gives_the_same_bytes(
    tmp_path: Path, context: Callable[[Model], PassContext]
) -> None:
    source = read(shipped("fashion-mobile"))
    planned = Pipeline.parse(_INT8).run(source, context(source)).model
    contents = {lower(planned, tmp_path / f"{k}.onnx", _SM86).path.read_bytes() for k in range(2)}
    assert len(contents) == 1


@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-vit", "fashion-lstm"])
def test_a_plan_takes_the_bytes_it_was_chosen_for(
    name: str, tmp_path: Path, context: Callable[[Model], PassContext]
) -> None:
    """What stays float counts as the float16 that is written, and weights count at all."""
    source = read(shipped(name))
    whole = source.source.bytes
    sizes = {}
    for share in (0.52, 0.4):
        limit = f"allocate{{size={round(share * whole)}}}"
        text = f"{_OFFERED},{limit},place-quantizers,insert-fake-quant"
        if share > _LEAST.get(name, 0.0):
            planned = Pipeline.parse(text).run(source, context(source)).model
            sizes[share] = lower(planned, tmp_path / "model.onnx", _SM86).bytes
            predicted = planned.fact(Solution).totals["bytes"]
            assert predicted <= share * whole
            assert abs(predicted - sizes[share]) <= 0.03 * sizes[share]
    assert sizes


def test_build_commands_name_every_dynamic_dimension(tmp_path: Path) -> None:
    source = read(shipped("fashion-mobile"))
    beside = lower(source, tmp_path / "model.onnx", _SM86).beside
    compile(beside["build_engine.py"], "build_engine.py", "exec")
    shell = beside["build_engine.sh"]
    assert "'--onnx=model.onnx'" in shell
    assert "'--minShapes=input:1x1x28x28'" in shell
    assert "'--maxShapes=input:8x1x28x28'" in shell
    assert "'--sparsity=enable'" in shell
    assert "config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)\n" in beside["build_engine.py"]
    # Flags that TensorRT 11 removed.
    assert not {"--int8", "--fp16", "--best", "--calib"} & set(shell.split("'"))


@pytest.mark.skipif(trt_rtx.version() is None, reason="no wheels of TensorRT for RTX")
@pytest.mark.parametrize(
    ("name", "target", "pipeline"),
    [
        ("fashion-mobile", "tensorrt", _INT8),
        ("fashion-resnet", "tensorrt-sm80", _INT8),
        ("fashion-vit", "tensorrt-sm89", _INT8),
        ("fashion-lstm", "tensorrt-sm90", _INT8),
        ("fashion-mobile", "tensorrt-sm120", _INT8),
        ("fashion-resnet", "tensorrt-sm89", preset("fp8")),
        ("fashion-vit", "tensorrt-sm90", preset("fp8")),
        ("fashion-vit", "tensorrt-sm120", preset("fp8")),
        ("fashion-vit", "tensorrt-sm120", preset("nvfp4")),
    ],
)
def test_lowered_files_compile_for_a_part(
    name: str, target: str, pipeline: str, tmp_path: Path, calibrated: Calibrated
) -> None:
    source = read(shipped(name))
    ctx = calibrated(source, target=TARGETS[target])
    planned = Pipeline.parse(pipeline).run(source, ctx).model
    artifact = lower(planned, tmp_path / "model.onnx", TARGETS[target])
    found: Any = check(artifact.path, TARGETS[target])
    assert found.findings == ()
    assert any("built by TensorRT for RTX" in text for text in found.checked)


def _cached(name: str) -> Path:
    return fetch.cache_folder() / name / "model.onnx"


@pytest.mark.slow
@pytest.mark.public
@pytest.mark.skipif(trt_rtx.version() is None, reason="no wheels of TensorRT for RTX")
@pytest.mark.parametrize("name", ["efficientnet-lite0", "minilm"])
def test_public_models_conform_and_compile(
    name: str, tmp_path: Path, context: Callable[[Model], PassContext]
) -> None:
    if not _cached(name).is_file():
        pytest.skip(f"octavo models get {name} fetches the model")
    source = read(_cached(name))
    # Masks of ones: random ones leave rows of attention with nothing to read.
    ctx = replace(context(source), calibration=stand_in(source, count=2))
    planned = Pipeline.parse(_INT8).run(source, ctx).model
    artifact = lower(planned, tmp_path / "model.onnx", _SM86)
    weighted = [node for node in artifact.planned if node.option.startswith("static:")]
    assert len(weighted) > 30
    assert [f for f in check(artifact.path, _SM86).findings if f.error] == []
    feed = next(iter(ctx.calibration or ()))
    truth, expected = (OrtEvaluator(threads=1).run(model, feed) for model in (source, planned))
    session = TensorRtBackend(_SM86).open(artifact.path, threads=1)
    # Codes that move by one step add up over the layers: what counts is the distance from float.
    assert _error(session.run(feed), truth) < 1.2 * _error(expected, truth)
