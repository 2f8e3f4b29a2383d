"""Gradients of the torch graph against central differences in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto

import octavo.models
from octavo.ir.errors import ModelError
from octavo.ir.fake_quant import declare_functions, fake_quant_node
from octavo.ir.model import Model, Source
from octavo.ir.quant import QuantParams, QuantSpec, QuantType
from octavo.ir.read import read
from octavo.ir.torch_module import TorchGraph, differentiable
from octavo.ir.torch_values import as_torch

if TYPE_CHECKING:
    from onnx.backend.test.case.test_case import TestCase as NodeCase

FASHION = sorted(Path(octavo.models.__file__).parent.glob("fashion_*.onnx"))
STEP = 1e-6
# Truncation and cancellation of a central difference at that step.
RELATIVE, ABSOLUTE = 1e-5, 1e-7
OPERATORS = 125
SKIPPED = {
    # A choice of one side of a jump, or numbers that are not finite.
    "Sign",
    "Cast",
    "CastLike",
    "Range",
}


@cache
def cases() -> dict[str, NodeCase]:
    """The first case of every operator that takes and gives float32."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        every = load_model_tests(kind="node")
    listed = Path(__file__).with_name("unsupported_torch_cases.txt").read_text(encoding="utf-8")
    broken = {line.split(": ")[0] for line in listed.splitlines()}
    found: dict[str, NodeCase] = {}
    for case in every:
        assert case.model is not None
        graph = case.model.graph
        ends = [any(map(_is_float, values)) for values in (graph.input, graph.output)]
        empty = "empty_set" in case.name
        if len(graph.node) == 1 and all(ends) and case.name not in broken and not empty:
            found.setdefault(graph.node[0].op_type, case)
    return found


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT


def _module(case: NodeCase) -> TorchGraph:
    assert case.model is not None
    try:
        model = read(case.model)
    except ModelError:
        model = Model(onnx_ir.from_proto(case.model), Source(case.name, "", 0))
    return differentiable(model, double=True)


def _feed(case: NodeCase, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The case's inputs; floats are moved off the ties and kinks that examples like."""
    assert case.model is not None
    assert case.data_sets is not None
    feed = {}
    for value, given in zip(case.model.graph.input, case.data_sets[0][0], strict=False):
        array = onnx.numpy_helper.to_array(given) if isinstance(given, TensorProto) else given
        tensor = as_torch(np.asarray(array))
        if tensor.dtype == torch.float32:
            near = torch.from_numpy(rng.uniform(1e-3, 1e-2, tensor.shape))
            tensor = tensor.double() * (1 + near) + near
        feed[value.name] = tensor
    return feed


def _check(
    value: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    point: dict[str, torch.Tensor],
    direction: Mapping[str, torch.Tensor],
    what: str,
) -> None:
    """The derivative along a direction: by backward, and by a central difference."""

    def moved(step: torch.Tensor | float) -> dict[str, torch.Tensor]:
        return point | {name: point[name] + step * d for name, d in direction.items()}

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    total = value(moved(step))
    exact = 0.0
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, step, allow_unused=True)
        exact = 0.0 if gradient is None else float(gradient)
    with torch.no_grad():
        numeric = float(value(moved(STEP)) - value(moved(-STEP))) / (2 * STEP)
    size = max(1.0, abs(float(total.detach())))
    assert exact == pytest.approx(numeric, rel=RELATIVE, abs=ABSOLUTE * size), what


def _weighed(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the float outputs times fixed random numbers."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        if output.dtype == torch.float64:
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output * weights).sum()
    return total


def _direction(
    tensors: Mapping[str, torch.Tensor], rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float64
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.nodes
def test_operators_by_central_differences() -> None:
    for op_type, case in cases().items():
        if op_type in SKIPPED:
            continue
        rng = np.random.default_rng(0)
        module, feed = _module(case), _feed(case, rng)

        def value(point: Mapping[str, torch.Tensor], module: TorchGraph = module) -> torch.Tensor:
            return _weighed(module.run(point))

        _check(value, feed, _direction(feed, rng), case.name)


def test_nearly_all_operators_are_checked() -> None:
    assert len(cases().keys() - SKIPPED) >= OPERATORS


@pytest.mark.parametrize("path", FASHION, ids=lambda path: path.stem)
def test_every_weight_of_a_model_by_central_differences(path: Path) -> None:
    module = differentiable(read(path), double=True)
    rng = np.random.default_rng(0)
    image = {module.inputs[0]: torch.from_numpy(rng.standard_normal((2, 1, 28, 28)))}
    weights = {name: p.detach() for name, p in module.parameters.items()}

    def value(point: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return _weighed(module.run(image, point))

    for name, weight in weights.items():
        scale = float(weight.abs().mean()) + 1e-3
        along = {k: d * scale for k, d in _direction({name: weight}, rng).items()}
        _check(value, {name: weight}, along, f"{path.stem} {name}")


def test_the_check_notices_a_wrong_gradient() -> None:
    def value(point: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # The gradient of the second factor is lost.
        return (point["x"] * point["x"].detach()).sum()

    point = {"x": torch.tensor([2.0], dtype=torch.float64)}
    with pytest.raises(AssertionError):
        _check(value, point, {"x": torch.ones(1, dtype=torch.float64)}, "square")


def test_fake_quant_passes_gradients_inside_its_range() -> None:
    params = QuantParams(QuantSpec("s8"), np.array(0.5, np.float32), np.array(3, np.int32))
    x = torch.tensor([-70.0, -65.4, -3.3, 0.0, 0.26, 61.9, 62.4, 80.0], requires_grad=True)
    found = differentiable(_fake(params, len(x))).run({"x": x})["y"]
    (gradient,) = torch.autograd.grad(found.sum(), x)
    codes = torch.round(x / 0.5) + 3
    expected = ((codes >= -128) & (codes <= 127)).float()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert set(expected.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("dtype", "largest"), [("f8", 448.0), ("f4", 6.0)])
def test_floating_codes_pass_gradients_inside_their_range(dtype: QuantType, largest: float) -> None:
    params = QuantParams(QuantSpec(dtype), np.array(0.5, np.float32), np.array(0, np.int32))
    reach = largest / 2
    x = torch.tensor([-2 * reach, -0.9 * reach, -0.3, 0.0, 1.1, reach + 1], requires_grad=True)
    found = differentiable(_fake(params, len(x))).run({"x": x})["y"]
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def _fake(params: Any, size: int) -> Model:
    float32 = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape((size,)), type=float32)
    graph = onnx_ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 21})
    node = fake_quant_node(x, params, "fake", graph)
    node.outputs[0].name = "y"
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = onnx_ir.Model(graph, ir_version=10)
    declare_functions(model)
    return read(model)
