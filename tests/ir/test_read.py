"""Reading brings every exporter's graph into one form and changes nothing that it computes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from octavo.ir.errors import ModelError, UsageError
from octavo.ir.model import PROVENANCE, Model
from octavo.ir.read import read
from octavo.ir.verify import verify
from octavo.ir.write import serialize

RNG = np.random.default_rng(0)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def proto(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, Any]],
    outputs: dict[str, tuple[int, Any]],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 21,
    **fields: Any,
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value(name, *kind) for name, kind in inputs.items()],
        [value(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    fields = {"opset_imports": opsets, "ir_version": 8, **fields}
    return helper.make_model(graph, **fields)


def run(content: bytes, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    outputs: list[np.ndarray] = onnxruntime.InferenceSession(content, options).run(None, feed)
    return outputs


def read_alike(source: onnx.ModelProto, *arrays: np.ndarray) -> Model:
    """Read a model that must compute what onnxruntime makes of the source, within 1e-6."""
    before = source.SerializeToString(deterministic=True)
    model = read(source)
    assert source.SerializeToString(deterministic=True) == before
    verify(model, after_pass="reading")
    feed = dict(zip([value.name for value in source.graph.input], arrays, strict=False))
    nameless = onnx.ModelProto.FromString(before)
    clear_node_names(nameless.graph)
    truths = run(nameless.SerializeToString(), feed)
    for truth, actual in zip(truths, run(serialize(model), feed), strict=True):
        assert (truth.dtype, truth.shape) == (actual.dtype, actual.shape)
        np.testing.assert_allclose(actual, truth, rtol=1e-6, atol=1e-6)
    return model


def clear_node_names(graph: onnx.GraphProto) -> None:
    """Take away names, for onnxruntime does not load a model in which two nodes bear the same."""
    for node in graph.node:
        node.ClearField("name")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                clear_node_names(attribute.g)


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def names(model: Model) -> list[str | None]:
    return [node.name for node in model.graph.all_nodes()]


def shape_of(model: Model, name: str) -> str:
    values = {v.name: v for node in model.graph.all_nodes() for v in node.outputs}
    return str(values[name].shape)


def test_constants_and_identities_become_initializers() -> None:
    weight = numpy_helper.from_array(floats(3, 4), "")
    source = proto(
        [
            helper.make_node("Constant", [], ["w"], value=weight),
            helper.make_node("Constant", [], ["shape"], value_ints=[-1, 2]),
            helper.make_node("Constant", [], ["scale"], value_float=0.5),
            helper.make_node("Identity", ["b"], ["b1"]),
            helper.make_node("Identity", ["b1"], ["b2"]),
            helper.make_node("Gemm", ["x", "w", "b2"], ["g"], name="gemm"),
            helper.make_node("Mul", ["g", "scale"], ["m"]),
            helper.make_node("Reshape", ["m", "shape"], ["y"]),
            helper.make_node("Identity", ["b"], ["z"]),
            helper.make_node("Constant", [], ["k"], value_int=7),
        ],
        {"x": (FLOAT, ["n", 3])},
        {"y": (FLOAT, None), "z": (FLOAT, [4]), "k": (INT64, [])},
        {"b": floats(4)},
    )
    model = read_alike(source, floats(2, 3))
    assert operators(model) == ["Gemm", "Mul", "Reshape", "Identity", "Constant"]
    assert set(model.graph.initializers) == {"b", "w", "shape", "scale"}
    assert shape_of(model, "y") == "[unk__0,2]"


def test_an_initializer_used_twice_stays_one() -> None:
    source = proto(
        [
            helper.make_node("Identity", ["w"], ["w1"]),
            helper.make_node("Gather", ["w", "i"], ["e"]),
            helper.make_node("Gemm", ["e", "w1"], ["y"], transB=1),
        ],
        {"i": (INT64, ["n"])},
        {"y": (FLOAT, ["n", 9])},
        {"w": floats(9, 4)},
    )
    model = read_alike(source, np.array([3, 1], np.int64))
    tied = model.graph.initializers["w"]
    assert [node.op_type for node in tied.consumers()] == ["Gather", "Gemm"]
    twin = model.clone().graph.initializers["w"]
    assert twin.const_value is tied.const_value


def test_names_become_unique_and_keep_their_origin() -> None:
    source = proto(
        [
            helper.make_node("Relu", ["x"], ["a"], name="act", doc_string="first"),
            helper.make_node("Neg", ["a"], ["b"], name="act"),
            helper.make_node("Abs", ["b"], ["y"]),
        ],
        {"x": (FLOAT, [2])},
        {"y": (FLOAT, [2])},
    )
    source.graph.node[1].metadata_props.add(key="who", value="me")
    model = read_alike(source, floats(2))
    assert names(model) == ["act", "act_1", "Abs"]
    assert [n.metadata_props[PROVENANCE] for n in model.graph] == ["act", "act", "Abs"]
    assert model.graph[0].doc_string == "first"
    assert model.graph[1].metadata_props["who"] == "me"


def test_branches_with_the_same_names() -> None:
    def branch(op_type: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node(op_type, ["x", "big"], ["t"], name="inner"),
            helper.make_node("Relu", ["t"], ["r"], name="inner"),
        ]
        big = numpy_helper.from_array(floats(400), "big")
        value = helper.make_tensor_value_info("r", FLOAT, [400])
        return helper.make_graph(nodes, op_type, [], [value], [big])

    node = helper.make_node(
        "If", ["c"], ["y"], name="if", then_branch=branch("Add"), else_branch=branch("Mul")
    )
    inputs: dict[str, tuple[int, Any]] = {"x": (FLOAT, [400]), "c": (TensorProto.BOOL, [])}
    source = proto([node], inputs, {"y": (FLOAT, [400])})
    for flag in (True, False):
        model = read_alike(source, floats(400), np.array(flag))
    assert names(model) == ["if", "inner", "inner_1", "inner_2", "inner_3"]
    assert set(model.graph.initializers) == {"big", "big_1"}
    values = [v.name for n in model.graph.all_nodes() for v in n.outputs]
    assert len(values) == len(set(values))


def test_functions_are_inlined_and_their_call_remembered() -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    body = [
        helper.make_node("Mul", ["a", "a"], ["b"], name="square"),
        helper.make_node("Elu", ["b"], ["c"], name="elu"),
    ]
    body[1].attribute.add(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function("local", "F", ["a"], ["c"], body, opsets[:1], ["alpha"])
    source = proto(
        [
            helper.make_node("F", ["x"], ["h"], name="one", domain="local", alpha=0.5),
            helper.make_node("F", ["h"], ["y"], name="two", domain="local", alpha=2.0),
        ],
        {"x": (FLOAT, [3])},
        {"y": (FLOAT, [3])},
        opset_imports=opsets,
        functions=[function],
        ir_version=9,
    )
    model = read_alike(source, floats(3))
    assert operators(model) == ["Mul", "Elu", "Mul", "Elu"]
    assert [n.metadata_props[PROVENANCE] for n in model.graph] == ["one", "one", "two", "two"]
    assert not model.ir.functions


def test_sparse_tensors_become_dense() -> None:
    values = numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w")
    flat = numpy_helper.from_array(np.array([0, 5, 7], np.int64), "i")
    pairs = numpy_helper.from_array(np.array([[0, 0], [1, 1], [1, 3]], np.int64), "i")
    constant = helper.make_node(
        "Constant", [], ["v"], sparse_value=helper.make_sparse_tensor(values, pairs, [2, 4])
    )
    source = proto(
        [constant, helper.make_node("Sum", ["x", "w", "v"], ["y"])],
        {"x": (FLOAT, [2, 4])},
        {"y": (FLOAT, [2, 4])},
    )
    source.graph.sparse_initializer.append(helper.make_sparse_tensor(values, flat, [2, 4]))
    model = read(source)
    dense = [[1, 0, 0, 0], [0, 2, 0, 3]]
    for name in ("w", "v"):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), dense)
    x = floats(2, 4)
    (y,) = run(serialize(model), {"x": x})
    np.testing.assert_allclose(y, x + 2 * np.array(dense, np.float32), rtol=1e-6)


def test_declared_shapes_that_contradict_inference_go() -> None:
    source = proto(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("FusedMatMul", ["h", "v"], ["f"], domain="com.microsoft"),
            helper.make_node("Relu", ["f"], ["y"]),
        ],
        {"x": (FLOAT, ["batch", 3])},
        {"y": (FLOAT, ["batch", 77])},
        {"w": floats(3, 4), "v": floats(4, 5)},
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
    )
    value = helper.make_tensor_value_info
    source.graph.value_info.extend(
        [value("h", FLOAT, ["batch", 99]), value("f", FLOAT, ["batch", 5])]
    )
    model = read(source)
    shapes = [shape_of(model, name) for name in ("h", "f", "y")]
    assert shapes == ["[batch,4]", "[batch,5]", "[batch,5]"]


def test_declared_shapes_stay_where_nothing_is_inferred() -> None:
    source = proto(
        [helper.make_node("Reshape", ["x", "s"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        {"x": (FLOAT, ["n", -1]), "s": (INT64, [2])},
        {"y": (FLOAT, ["rows", 8])},
    )
    source.graph.value_info.append(helper.make_tensor_value_info("h", FLOAT, ["rows", 8]))
    model = read(source)
    assert str(model.graph.inputs[0].shape) == "[n,None]"
    assert shape_of(model, "h") == shape_of(model, "y") == "[rows,8]"


def test_unsorted_nodes_are_sorted() -> None:
    source = proto(
        [
            helper.make_node("Neg", ["b"], ["y"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Abs", ["x"], ["a"]),
        ],
        {"x": (FLOAT, [2])},
        {"y": (FLOAT, [2])},
    )
    assert operators(read(source)) == ["Abs", "Relu", "Neg"]


def test_initializers_are_not_inputs() -> None:
    source = proto(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        {"x": (FLOAT, [2]), "w": (FLOAT, [2])},
        {"y": (FLOAT, [2])},
        {"w": floats(2)},
        ir_version=3,
        opset=7,
    )
    model = read_alike(source, floats(2))
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_everything_around_the_graph_survives_conversion() -> None:
    source = proto(
        [helper.make_node("Softmax", ["x"], ["y"], name="soft", axis=1, doc_string="about it")],
        {"x": (FLOAT, ["batch", 3, 4])},
        {"y": (FLOAT, ["batch", 3, 4])},
        opset=11,
        producer_name="maker",
        producer_version="7",
        doc_string="a model",
    )
    helper.set_model_props(source, {"task": "test"})
    source.graph.doc_string = "a graph"
    source.graph.node[0].metadata_props.add(key="who", value="me")
    model = read_alike(source, floats(2, 3, 4))
    ir = model.ir
    assert (ir.producer_name, ir.producer_version, ir.doc_string) == ("maker", "7", "a model")
    assert ir.metadata_props == {"task": "test"}
    assert ir.graph.doc_string == "a graph"
    assert model.ir.opset_imports == {"": 21}
    soft = next(node for node in model.graph if node.op_type == "Softmax")
    assert (soft.name, soft.doc_string, soft.metadata_props["who"]) == ("soft", "about it", "me")
    # Flattening and its inverse are inserted by the converter, and come from the same node.
    assert len(model.graph) > 1
    assert {node.metadata_props[PROVENANCE] for node in model.graph} == {"soft"}


def test_external_data_is_mapped(tmp_path: Path) -> None:
    weight = floats(64, 64)
    source = proto(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("MatMul", ["h", "v"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 64])},
        {"y": (FLOAT, ["n", 64])},
        {"w": weight, "v": weight},
    )
    for tensor in source.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights/w.bin")
    data, path = tmp_path / "weights" / "w.bin", tmp_path / "model.onnx"
    data.parent.mkdir()
    data.write_bytes(weight.tobytes())
    path.write_bytes(source.SerializeToString())
    model = read(str(path))
    first, second = (model.graph.initializers[name].const_value for name in ("w", "v"))
    assert isinstance(first, onnx_ir.ExternalTensor)
    # Two initializers of the same bytes of the same file are one tensor.
    assert first is second
    np.testing.assert_array_equal(first.numpy(), weight)
    assert not first.numpy().flags.writeable
    content = path.read_bytes() + data.read_bytes()
    assert model.source.name == str(path)
    assert model.source.sha256 == hashlib.sha256(content).hexdigest()
    assert model.source.bytes == len(content)


def test_a_graph_in_memory_is_read_and_left_alone() -> None:
    source = proto(
        [helper.make_node("Relu", ["x"], ["y"], name="same")],
        {"x": (FLOAT, [2])},
        {"y": (FLOAT, [2])},
        opset=13,
    )
    graph = onnx_ir.from_proto(source)
    one, other = read(graph), read(graph)
    assert graph.opset_imports[""] == 13
    assert one.fingerprint == other.fingerprint == read(source).fingerprint
    assert one.source == other.source
    assert len(one.source.sha256) == 64


def test_reading_what_was_written_changes_nothing() -> None:
    source = proto(
        [helper.make_node("Softmax", ["x"], ["y"], axis=1)],
        {"x": (FLOAT, ["batch", 3, 4])},
        {"y": (FLOAT, ["batch", 3, 4])},
        opset=11,
    )
    model = read(source)
    content = serialize(model)
    again = read(onnx.ModelProto.FromString(content))
    assert again.fingerprint == model.fingerprint
    assert serialize(again) == content


def test_types_that_passes_cannot_hold_are_refused() -> None:
    source = proto([helper.make_node("Relu", ["x"], ["y"])], {}, {"y": (FLOAT, [2])})
    kind = source.graph.input.add(name="x").type.map_type
    kind.key_type = INT64
    kind.value_type.tensor_type.elem_type = FLOAT
    with pytest.raises(ModelError, match="cannot be read"):
        read(source)


def test_example_inputs_are_for_torch_modules(tmp_path: Path) -> None:
    source = proto(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}
    )
    with pytest.raises(UsageError, match="example inputs"):
        read(source, (floats(2),))
