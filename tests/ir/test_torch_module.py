"""Models and ONNX node cases in torch, against ONNX's expectation and onnxruntime.

`unsupported_torch_cases.txt` lists the cases with float outputs that cannot pass and why; a
listed case that passes is a failure, so that the list only shrinks.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import octavo.models
from octavo.ir.errors import ModelError, NotDifferentiable, OctavoError, UnknownName
from octavo.ir.fake_quant import declare_functions, fake_quant_node
from octavo.ir.model import Model, Source
from octavo.ir.quant import PerAxis, PerBlock, QuantSpec, dequantize, params_for_weight, quantize
from octavo.ir.read import read
from octavo.ir.torch_module import differentiable
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    from onnx.backend.test.case.test_case import TestCase as NodeCase

LIST = Path(__file__).with_name("unsupported_torch_cases.txt")
GROUPS = 4
# ONNX's float types, float8 and float4 included.
FLOATS = {1, 10, 11, 16, 17, 18, 19, 20, 23, 24}
EXCEPTED = {"If", "Loop", "Scan"}
EXCEPTED_PARTS = ("Sequence", "Optional", "String")
FAILURES = (OctavoError, AssertionError, TypeError, ValueError, RuntimeError, IndexError)
FASHION = sorted(Path(octavo.models.__file__).parent.glob("fashion_*.onnx"))
PUBLIC = sorted((Path.home() / ".cache" / "octavo" / "models").glob("*/model.onnx"))
# Sums in another order, relative to the largest output; a sigmoid near 0 loses the most.
RELATIVE = 2e-5
TINY = 1e-6


@cache
def node_cases() -> tuple[NodeCase, ...]:
    """The cases of which at least one output is a tensor of floats."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        # numpy warns of the overflows and divisions that some cases are about.
        warnings.simplefilter("ignore", RuntimeWarning)
        cases = load_model_tests(kind="node")
    return tuple(case for case in cases if any(map(_is_float, _graph(case).output)))


def _graph(case: NodeCase) -> onnx.GraphProto:
    assert case.model is not None
    return case.model.graph


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in FLOATS


def _excepted(case: NodeCase) -> bool:
    """Other domains, control flow, sequences, optionals, strings, training."""
    return case.name.startswith("test_training_") or any(
        node.domain or node.op_type in EXCEPTED or node.op_type.startswith(EXCEPTED_PARTS)
        for node in _graph(case).node
    )


def unsupported() -> dict[str, str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def model_of(case: NodeCase) -> Model:
    """The case as octavo reads it, or as it is where its opset is too new to be read."""
    assert case.model is not None
    try:
        return read(case.model)
    except ModelError:
        return Model(onnx_ir.from_proto(case.model), Source(case.name, "", 0))


def problem(case: NodeCase) -> str:
    """Why a case fails, in one line; empty if it passes."""
    graph = _graph(case)
    try:
        module = differentiable(model_of(case))
        for inputs, expected in case.data_sets or ():
            feed = {v.name: _tensor(x) for v, x in zip(graph.input, inputs, strict=False)}
            with torch.no_grad():
                outputs = list(module.run(feed).values())
            assert len(outputs) == len(expected)
            for value, actual, truth in zip(graph.output, outputs, expected, strict=True):
                if _is_float(value):
                    _compare(actual, _tensor(truth), case)
    except FAILURES as error:
        return " ".join(f"{type(error).__name__} {error}".split())[:160]
    return ""


def _tensor(value: Any) -> torch.Tensor:
    array = onnx.numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
    return as_torch(np.asarray(array))


def _compare(actual: torch.Tensor, truth: torch.Tensor, case: NodeCase) -> None:
    assert (actual.dtype, actual.shape) == (truth.dtype, truth.shape)
    numbers = actual.double().numpy(), truth.double().numpy()
    np.testing.assert_allclose(*numbers, rtol=case.rtol, atol=case.atol)


@pytest.mark.nodes
@pytest.mark.parametrize("group", range(GROUPS))
def test_node_cases(group: int) -> None:
    listed = unsupported()
    found = {case.name: problem(case) for case in node_cases()[group::GROUPS]}
    assert {name: why for name, why in found.items() if why and name not in listed} == {}
    mended = [name for name, why in found.items() if not why and name in listed]
    assert not mended, "these cases pass now: remove them from the list"


def test_the_list_leaves_nearly_every_case() -> None:
    names = {case.name for case in node_cases()}
    wanted = {case.name for case in node_cases() if not _excepted(case)}
    assert set(unsupported()) <= names
    assert len(wanted) > 0.9 * len(names)
    assert len(wanted - set(unsupported())) >= 0.97 * len(wanted)


def _feed(model: Model, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = {}
    for value in model.graph.inputs:
        sizes = list(value.shape or ())
        shape = [n if isinstance(n, int) else 2 if k == 0 else 32 for k, n in enumerate(sizes)]
        assert value.dtype is not None
        drawn: np.ndarray = rng.integers(1, 99, shape)
        if value.dtype.is_floating_point():
            drawn = rng.standard_normal(shape)
        elif "mask" in str(value.name):
            drawn = np.ones(shape)
        feed[str(value.name)] = drawn.astype(value.dtype.numpy())
    return feed


def _matches_onnxruntime(path: Path) -> None:
    model = read(path)
    feed = _feed(model, 0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        found = differentiable(model).run({k: torch.from_numpy(v) for k, v in feed.items()})
    for actual, truth in zip(found.values(), session.run(None, feed), strict=True):
        limit = RELATIVE * np.abs(truth).max() + TINY
        np.testing.assert_allclose(actual.numpy(), truth, rtol=0, atol=limit)


@pytest.mark.parametrize("path", FASHION, ids=lambda path: path.stem)
def test_shipped_models_match_onnxruntime(path: Path) -> None:
    _matches_onnxruntime(path)


@pytest.mark.public
@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.parent.name)
def test_public_models_match_onnxruntime(path: Path) -> None:
    _matches_onnxruntime(path)


def _linear(weight: np.ndarray, op_type: str = "Relu") -> Model:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "layer/w:0"], ["hidden"], name="first"),
            helper.make_node(op_type, ["hidden"], ["y"], name="second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "layer/w:0")],
    )
    opset = [helper.make_opsetid("", 21)]
    return read(helper.make_model(graph, opset_imports=opset, ir_version=10))


def test_parameters_share_the_model_s_memory_and_can_be_replaced() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3) - 2
    model = _linear(weight)
    graph = differentiable(model, ["hidden", "y"])
    assert list(graph.parameters) == ["layer/w:0"]
    tensor = model.graph.initializers["layer/w:0"].const_value
    assert tensor is not None
    assert graph.parameters["layer/w:0"].data_ptr() == tensor.numpy().ctypes.data
    x = torch.tensor([[1.0, -1.0]])
    other = torch.ones(2, 3, requires_grad=True)
    found = graph.run({"x": x}, {"layer/w:0": other * 2})
    torch.testing.assert_close(found["hidden"], torch.zeros(1, 3), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found["hidden"].sum(), other)
    torch.testing.assert_close(gradient, torch.tensor([[2.0] * 3, [-2.0] * 3]), rtol=0, atol=0)
    plain = graph.run({"x": x})
    expected = torch.from_numpy(np.maximum(x.numpy() @ weight, 0))
    torch.testing.assert_close(plain["y"], expected, rtol=0, atol=0)


def test_wrong_names_are_refused() -> None:
    model = _linear(np.ones((2, 3), np.float32))
    with pytest.raises(UnknownName, match="hiden"):
        differentiable(model, ["hiden"])
    graph = differentiable(model)
    with pytest.raises(UnknownName, match="layer/w"):
        graph.run({"x": torch.ones(1, 2)}, {"layer/w": torch.ones(2, 3)})
    with pytest.raises(UnknownName, match="'x'"):
        graph.run({"y": torch.ones(1, 2)})


def test_an_operator_without_a_torch_form_names_itself_and_who_can_do_without() -> None:
    model = _linear(np.ones((2, 3), np.float32), "RandomNormalLike")
    with pytest.raises(NotDifferentiable) as caught:
        differentiable(model)
    text = str(caught.value)
    assert "RandomNormalLike" in text
    assert "'second'" in text
    assert all(word in text for word in ("measured", "layer-error", "weight-error"))
    assert caught.value.exit_code == 2
    # What comes before it still has gradients.
    assert differentiable(model, ["hidden"]).outputs == ("hidden",)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("s8", PerAxis(1), symmetric=True),
        QuantSpec("u4"),
        QuantSpec("s4", PerBlock(0, 2)),
        QuantSpec("f8"),
        QuantSpec("f8", PerAxis(1), symmetric=True),
        QuantSpec("f4"),
        QuantSpec("f4", PerBlock(0, 2), symmetric=True),
    ],
    ids=str,
)
def test_fake_quant_rounds_as_the_reference_does(spec: QuantSpec) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    params = params_for_weight(x, spec)
    model = _fake(params)
    found = differentiable(model).run({"x": torch.from_numpy(x)})["y"]
    expected = dequantize(quantize(x, params), params)
    np.testing.assert_allclose(found.numpy(force=True), expected, rtol=1.2e-7, atol=0)
    assert len(np.unique(expected)) > 3


def _fake(params: Any) -> Model:
    float32 = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape((4, 3)), type=float32)
    graph = onnx_ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 21})
    node = fake_quant_node(x, params, "fake", graph)
    node.outputs[0].name = "y"
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = onnx_ir.Model(graph, ir_version=10)
    declare_functions(model)
    return read(model)
