"""Writing gives a valid file that computes the same, the same bytes each time, or nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from octavo.ir import write as writing
from octavo.ir.errors import UsageError, VerificationFailed
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.ir.write import ir_version, serialize, write

WEIGHT = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)


def network(opset: int = 21) -> Model:
    """`y = Relu(x @ w) @ w + b`, with a bias that is small."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["p"], name="second"),
        helper.make_node("Add", ["p", "b"], ["y"], name="bias"),
    ]
    value = helper.make_tensor_value_info
    constants = {"w": WEIGHT, "b": WEIGHT[0]}
    graph = helper.make_graph(
        nodes,
        "network",
        [value("x", TensorProto.FLOAT, ["n", 40])],
        [value("y", TensorProto.FLOAT, ["n", 40])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return read(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def result(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    output: np.ndarray = session.run(None, {"x": WEIGHT[:3]})[0]
    return output


def expected() -> np.ndarray:
    return np.asarray(np.maximum(WEIGHT[:3] @ WEIGHT, 0) @ WEIGHT + WEIGHT[0])


@pytest.fixture
def external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network, written with its weight in a file of its own."""
    monkeypatch.setattr(writing, "INLINE_BYTES", 1000)
    monkeypatch.setattr(writing, "INLINE_BYTES_OF_EXTERNAL_SOURCE", 1000)
    folder = tmp_path / "source"
    folder.mkdir()
    write(network(), folder / "model.onnx")
    return folder / "model.onnx"


def test_one_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(network(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == serialize(network())
    np.testing.assert_allclose(result(path), expected(), rtol=1e-5, atol=1e-5)


def test_writing_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = network()
    before, version = model.fingerprint, model.ir.ir_version
    write(model, tmp_path / "model.onnx")
    assert Model(model.ir, model.source).fingerprint == before
    assert model.ir.ir_version == version


def test_large_weights_go_to_one_aligned_file(external: Path) -> None:
    assert sorted(p.name for p in external.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    data = external.with_name("model.onnx.data")
    assert data.read_bytes() == WEIGHT.tobytes()
    onnx.checker.check_model(external)
    np.testing.assert_allclose(result(external), expected(), rtol=1e-5, atol=1e-5)
    model = read(external)
    kinds = {name: type(v.const_value) for name, v in model.graph.initializers.items()}
    assert kinds["w"] is onnx_ir.ExternalTensor
    assert kinds["b"] is not onnx_ir.ExternalTensor


def test_a_tensor_of_two_initializers_is_stored_once(external: Path) -> None:
    model = read(external).clone()
    weight = model.graph.initializers["w"]
    twin = onnx_ir.Value(
        name="twin", shape=weight.shape, type=weight.type, const_value=weight.const_value
    )
    model.graph.register_initializer(twin)
    model.graph.node("second").replace_input_with(1, twin)
    path = external.with_name("tied.onnx")
    write(model, path)
    assert path.with_name("tied.onnx.data").stat().st_size == WEIGHT.nbytes
    np.testing.assert_allclose(result(path), expected(), rtol=1e-5, atol=1e-5)


def test_small_external_weights_come_back_into_the_file(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "INLINE_BYTES_OF_EXTERNAL_SOURCE", 1 << 20)
    path = external.with_name("inline.onnx")
    write(read(external), path)
    assert not path.with_name("inline.onnx.data").exists()
    np.testing.assert_allclose(result(path), expected(), rtol=1e-5, atol=1e-5)


def test_the_same_model_gives_the_same_bytes(external: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        write(read(external), external.with_name(name))
    one, two = (external.with_name(name) for name in ("one.onnx", "two.onnx"))
    assert one.read_bytes() == two.read_bytes().replace(b"two.onnx.data", b"one.onnx.data")
    assert one.with_name("one.onnx.data").read_bytes() == WEIGHT.tobytes()


def test_never_over_weights_that_are_still_mapped(external: Path) -> None:
    before = {p.name: p.read_bytes() for p in external.parent.iterdir()}
    for target in (external, external.with_name("model.onnx.data")):
        with pytest.raises(UsageError, match="written over"):
            write(read(external), target)
    assert {p.name: p.read_bytes() for p in external.parent.iterdir()} == before


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old model")

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, step, no_space)
    with pytest.raises(UsageError, match="No space left") as caught:
        write(network(), path)
    assert caught.value.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"the old model"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in ("missing", "file"):
        with pytest.raises(UsageError, match="cannot write"):
            write(network(), tmp_path / folder / "model.onnx")


def test_a_broken_model_is_not_written(tmp_path: Path) -> None:
    model = network().clone()
    model.graph.node("relu").op_type = "Rellu"
    with pytest.raises(VerificationFailed, match="Rellu"):
        write(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("opset", "version"), [(21, 10), (23, 11), (24, 12), (25, 13), (26, 13)])
def test_the_ir_version_goes_with_the_opset(opset: int, version: int) -> None:
    proto = onnx.ModelProto.FromString(serialize(network(opset)))
    assert proto.ir_version == version == ir_version(opset)
    assert proto.opset_import[0].version == opset


def test_imports_and_functions_are_those_in_use() -> None:
    model = network().clone()
    relu = model.graph.node("relu")
    relu.domain, relu.op_type = "com.microsoft", "Gelu"
    body = onnx.parser.parse_function(
        '<opset_import: ["" : 21], domain: "octavo"> Unused (x) => (y) { y = Relu (x) }'
    )
    function = onnx_ir.serde.deserialize_function(body)
    model.ir.functions[function.identifier()] = function
    proto = onnx.ModelProto.FromString(serialize(model))
    assert {o.domain: o.version for o in proto.opset_import} == {"": 21, "com.microsoft": 1}
    assert not proto.functions
    assert function.identifier() in model.ir.functions


def test_functions_that_nodes_call_are_written_and_read_back() -> None:
    model = network().clone()
    body = onnx.parser.parse_function(
        '<opset_import: ["" : 21], domain: "octavo"> Clamp (x) => (y) { y = Relu (x) }'
    )
    function = onnx_ir.serde.deserialize_function(body)
    model.ir.functions[function.identifier()] = function
    relu = model.graph.node("relu")
    relu.domain, relu.op_type = "octavo", "Clamp"
    again = read(onnx.ModelProto.FromString(serialize(model)))
    assert again.graph.node("relu").op_identifier() == function.identifier()
    assert set(again.ir.functions) == {function.identifier()}
    assert again.ir.opset_imports == {"": 21, "octavo": 1}
