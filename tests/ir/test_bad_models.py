"""Every bad model file gives one clear error of the right kind, and leaves the folder alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from octavo.ir.errors import ModelError, UnsafeModel, UsageError
from octavo.ir.read import read

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def linear(weight: np.ndarray = WEIGHT, opset: int = 21) -> onnx.ModelProto:
    """`y = Relu(x @ w)`."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def external(folder: Path, location: str = "w.bin", **entries: str) -> Path:
    """The linear model with its weight in a file; `entries` are its external data fields."""
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(source: object, *words: str, error: type[ModelError] = ModelError) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read(source)
    assert type(caught.value) is error
    assert caught.value.exit_code == 5
    assert caught.value.where
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_good_models_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    model = read(external(tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model", b"\x00" * 100, b"hello"])
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == content


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model file"):
        read(tmp_path / "model.onnx")


def test_not_a_model_object() -> None:
    with pytest.raises(UsageError, match="a dict is not a model"):
        read({})


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear().SerializeToString()[:-40])
    refused(path, "truncated")


@pytest.mark.parametrize(("opset", "word"), [(27, "too new"), (99, "too new"), (6, "too old")])
def test_opset(opset: int, word: str) -> None:
    refused(linear(opset=opset), f"opset {opset} is {word}", "7 to 26")


def test_ir_version() -> None:
    model = linear()
    model.ir_version = 14
    refused(model, "IR version 14")


def test_external_data_is_missing(tmp_path: Path) -> None:
    refused(external(tmp_path), "'w.bin' does not exist")


def test_external_data_without_folder(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    refused(onnx.load(external(tmp_path), load_external_data=False), "by its path")


def test_external_data_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:-1])
    refused(external(tmp_path), "ends beyond", "48 bytes", "47")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"length": "47"}, ("48 bytes", "47")),
        ({"offset": "1"}, ("ends beyond",)),
        ({"offset": "-4"}, ("'-4'",)),
        ({"offset": "four"}, ("'four'",)),
        ({"offset": "9" * 30}, ("not a number",)),
    ],
)
def test_external_data_lies_elsewhere(
    tmp_path: Path, entries: dict[str, str], words: tuple[str, ...]
) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    refused(external(tmp_path, **entries), *words)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "..\\w.bin", ""])
def test_external_data_escapes(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    refused(external(folder, location), "plain relative path", error=UnsafeModel)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_external_data_is_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    link(tmp_path / "secret", folder / "w.bin")
    refused(external(folder), "link", error=UnsafeModel)


def test_external_data_in_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "elsewhere")
    refused(external(tmp_path / "model", "weights/w.bin"), "symbolic link", error=UnsafeModel)


@pytest.mark.parametrize("dims", [[3, 5], [1 << 40, 1 << 40], [3, -4], [1] * 65])
def test_declared_size_is_not_the_held_size(dims: list[int]) -> None:
    model = linear()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    refused(model, "tensor 'w'")


@pytest.mark.parametrize("data_type", [0, 99, TensorProto.STRING, TensorProto.INT64])
def test_data_type_does_not_fit(data_type: int) -> None:
    model = linear()
    model.graph.initializer[0].data_type = data_type
    refused(model, "tensor 'w'")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_are_not_finite(bad: float, dtype: type[np.floating]) -> None:
    weight = WEIGHT.astype(dtype)
    weight[1, 2] = bad
    model = linear(weight)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    refused(model, "weights 'w' hold", "'linear'")


def test_external_weights_are_not_finite(tmp_path: Path) -> None:
    weight = WEIGHT.copy()
    weight[2, 3] = np.nan
    (tmp_path / "w.bin").write_bytes(weight.tobytes())
    refused(external(tmp_path), "weights 'w' hold NaN")


def test_infinite_masks_are_read() -> None:
    model = linear()
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)[:1]
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    model.graph.node[1].CopyFrom(helper.make_node("Add", ["h", "mask"], ["y"], name="masked"))
    assert len(read(model).graph) == 2


def test_cycle() -> None:
    model = linear()
    model.graph.node[0].input[0] = "y"
    model.graph.node[1].input[0] = "h"
    refused(model, "cycle", "'linear'", "'relu'")


@pytest.mark.parametrize("domain", ["com.example", "ai.onnx.preview", "octavo"])
def test_unknown_domain(domain: str) -> None:
    model = linear()
    model.graph.node[1].domain = domain
    model.opset_import.append(helper.make_opsetid(domain, 1))
    refused(model, f"domain '{domain}'", "'relu'")


def test_unknown_operator() -> None:
    model = linear()
    model.graph.node[1].op_type = "Rellu"
    refused(model, "Rellu")


def test_value_assigned_twice() -> None:
    model = linear()
    model.graph.node[1].output[0] = "h"
    refused(model, "'h' is assigned twice", "'relu'")


def test_value_never_computed() -> None:
    model = linear()
    model.graph.node[1].input[0] = "nowhere"
    refused(model, "'nowhere'", "'relu'")


def test_output_never_computed() -> None:
    model = linear()
    model.graph.output[0].name = "nowhere"
    refused(model, "output 'nowhere'")


def test_deep_nesting() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["out0"], name="deepest")],
        "level0",
        [],
        [helper.make_tensor_value_info("out0", TensorProto.FLOAT, None)],
    )
    for level in range(1, 20):
        node = (
            helper.make_node(
                "If",
                ["c"],
                [f"out{level}"],
                name=f"if{level}",
                then_branch=inner,
                else_branch=inner,
            )
            if level < 4
            else helper.make_node(
                "Loop", ["", "c"], [f"out{level}"], name=f"loop{level}", body=inner
            )
        )
        output = helper.make_tensor_value_info(f"out{level}", TensorProto.FLOAT, None)
        inner = helper.make_graph([node], f"level{level}", [], [output])
    model = linear()
    model.graph.node.extend(inner.node)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    refused(model, "nested more than 16 deep", error=UnsafeModel)


def test_functions_that_unfold_without_end() -> None:
    model = linear()
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    model.opset_import.append(opsets[1])
    for level in range(40):
        name = f"f{level + 1}"
        calls = [
            helper.make_node(name, ["a"], ["b"], domain="f"),
            helper.make_node(name, ["b"], ["c"], domain="f"),
        ]
        body = calls if level < 39 else [helper.make_node("Relu", ["a"], ["c"])]
        model.functions.append(helper.make_function("f", f"f{level}", ["a"], ["c"], body, opsets))
    model.graph.node[1].CopyFrom(helper.make_node("f0", ["h"], ["y"], domain="f"))
    refused(model, "unfold", error=UnsafeModel)


def test_function_that_calls_itself() -> None:
    model = linear()
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    model.opset_import.append(opsets[1])
    body = [helper.make_node("f", ["a"], ["c"], domain="f")]
    model.functions.append(helper.make_function("f", "f", ["a"], ["c"], body, opsets))
    model.graph.node[1].CopyFrom(helper.make_node("f", ["h"], ["y"], domain="f"))
    refused(model, "calls itself")


@pytest.mark.parametrize("dims", [[1 << 40], [-3]])
def test_sparse_tensor_of_any_size(dims: list[int]) -> None:
    model = linear()
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "w"),
        numpy_helper.from_array(np.zeros(1, np.int64), "i"),
        dims,
    )
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(sparse)
    refused(model, "sparse tensor 'w'", error=UnsafeModel)


def test_sparse_indices_beyond_the_shape() -> None:
    model = linear()
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "w"),
        numpy_helper.from_array(np.array([12], np.int64), "i"),
        [3, 4],
    )
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(sparse)
    refused(model, "indices of the sparse tensor 'w'")


def test_hardmax_that_flattens() -> None:
    model = linear(opset=11)
    model.graph.node[1].op_type = "Hardmax"
    refused(model, "Hardmax of opset 11", "'relu'")


def test_resize_that_shrinks_by_its_own_rule() -> None:
    model = linear(opset=10)
    scales = numpy_helper.from_array(np.array([1, 0.5], np.float32), "scales")
    model.graph.initializer.append(scales)
    model.graph.node[1].CopyFrom(helper.make_node("Resize", ["h", "scales"], ["y"], name="resize"))
    refused(model, "Resize of opset 10", "'resize'")
