"""Every row of the target table against the runtime: build the pattern, read back the kernel.

The patterns are written here a second time, not by the lowering: the table is what is tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from octavo.backends.ort_session import make_session
from octavo.backends.ort_target import MICROSOFT, ORT_CPU
from octavo.ir.target import KernelRow

Array = NDArray[Any]
_CARRIERS = ("QuantizeLinear", "DequantizeLinear")
_IN = (np.array(0.04, np.float32), np.array(120, np.uint8))
_OUT = (np.array(0.07, np.float32), np.array(130, np.uint8))
_UNIT = (np.array(1 / 255, np.float32), np.array(0, np.uint8))


@dataclass(frozen=True)
class Example:
    """One node; a shape among `inputs` is a float32 activation, an array a constant.

    `indices` says that an int64 output, which nobody quantizes, follows the float ones.
    """

    op_type: str
    inputs: tuple[tuple[int, ...] | Array, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    indices: bool = False
    opset: int = 21

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, v if isinstance(v, tuple) else v.shape)) or "0"
                          for v in self.inputs)  # fmt: skip
        return "-".join([self.op_type, shapes, *(f"{k}={v}" for k, v in self.attributes.items())])


def _w(*shape: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(shape)
    return (rng.standard_normal(shape) * 0.2).astype(np.float32)


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


_X, _FLAT = (1, 8, 10, 10), (4, 32)
_RECURRENT = {"hidden_size": 8}

EXAMPLES = (
    Example("Conv", (_X, _w(16, 8, 3, 3), _w(16))),
    Example("Conv", (_X, _w(8, 1, 3, 3), _w(8)), {"group": 8}),
    Example("Conv", (_X, _w(16, 2, 3, 3)), {"group": 4}),
    Example("MatMul", (_FLAT, _w(32, 16))),
    Example("MatMul", ((2, 4, 32), _w(32, 16))),
    Example("MatMul", ((2, 4, 32), (2, 32, 16))),
    Example("Gemm", (_FLAT, _w(32, 16), _w(16))),
    Example("Gemm", (_FLAT, _w(16, 32), _w(16)), {"transB": 1}),
    Example("Add", (_X, _X)),
    Example("Add", (_X, _w(8, 1, 1))),
    Example("Mul", (_X, _X)),
    Example("Concat", (_X, _X), {"axis": 1}),
    Example("Where", (np.arange(10) % 2 == 0, _X, _X)),
    Example("AveragePool", (_X,), {"kernel_shape": [2, 2]}),
    Example("GlobalAveragePool", (_X,)),
    Example("Softmax", (_FLAT,)),
    Example("Sigmoid", (_X,)),
    Example("LeakyRelu", (_X,), {"alpha": 0.1}),
    Example("MaxPool", (_X,), {"kernel_shape": [2, 2]}),
    Example("Reshape", (_X, _ints(8, 100))),
    Example("Transpose", (_X,), {"perm": [0, 2, 3, 1]}),
    Example("Squeeze", (_X, _ints(0))),
    Example("Unsqueeze", (_X, _ints(0))),
    Example("Flatten", (_X,)),
    Example("Slice", (_X, _ints(1), _ints(4), _ints(1))),
    Example("Expand", (_X, _ints(3, 8, 10, 10))),
    Example("Tile", (_X, _ints(1, 2, 1, 1))),
    Example("DepthToSpace", (_X,), {"blocksize": 2}),
    Example("Resize", (_X, np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)),
            {"mode": "nearest"}),
    Example("Split", (_X,), {"axis": 1, "num_outputs": 2}, outputs=2),
    Example("Gather", (_X, _ints(1, 3)), {"axis": 1}),
    Example("GatherElements", (_FLAT, np.zeros((4, 3), np.int64)), {"axis": 1}),
    Example("ReduceMax", (_X, _ints(2))),
    Example("ConvTranspose", (_X, _w(8, 4, 3, 3))),
    Example("ConvTranspose", (_X, _w(8, 4, 3, 3)), {"group": 2}),
    Example("GRU", ((5, 2, 6), _w(1, 24, 6), _w(1, 24, 8)), _RECURRENT),
    Example("RNN", ((5, 2, 6), _w(1, 8, 6), _w(1, 8, 8)), _RECURRENT),
)  # fmt: skip

NEVER = (
    *(e for e in EXAMPLES if e.op_type in ("ConvTranspose", "GRU", "RNN")),
    *(Example(op, (_X, _X)) for op in ("Sub", "Div", "Pow", "Max", "Min")),
    *(
        Example(op, (_X,))
        for op in ("HardSwish", "HardSigmoid", "Tanh", "Elu", "Gelu", "Erf", "Exp", "Sqrt", "Relu")
    ),
    Example("Clip", (_X, np.array(-1, np.float32), np.array(1, np.float32))),
    Example("ReduceMean", (_X, _ints(2))),
    Example("Pad", (_X, _ints(0, 0, 1, 1, 0, 0, 1, 1))),
    Example("TopK", (_FLAT, _ints(3)), indices=True),
    Example("LogSoftmax", (_FLAT,)),
    Example("Einsum", (_FLAT,), {"equation": "ij->ji"}),
    Example("LayerNormalization", (_FLAT, _w(32), _w(32))),
    Example("RMSNormalization", (_FLAT, _w(32)), opset=23),
    Example("InstanceNormalization", (_X, _w(8), _w(8))),
    Example("BatchNormalization", (_X, _w(8), _w(8), _w(8), abs(_w(8)))),
    Example("Attention", ((1, 2, 4, 8),) * 3, opset=23),
    Example("PRelu", (_X, _w(8, 1, 1))),
)

# Nodes that miss one condition of the rows of their operator, and stay float for it.
MISSES = (
    Example("Gemm", (_FLAT, _w(32, 16), _w(16)), {"beta": 0.5}),
    Example(
        "Resize",
        (_X, np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)),
        {"mode": "linear"},
    ),
)


class Pattern:
    """Nodes and constants of a model under construction."""

    def __init__(self, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[str] = []
        self.opset = opset

    def constant(self, name: str, array: Array) -> str:
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def activation(self, name: str, shape: Sequence[int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        made = helper.make_node(op_type, inputs, [output], name=output, domain=domain, **attributes)
        self.nodes.append(made)
        return output

    def quantized(self, value: str, params: tuple[Array, Array]) -> str:
        """`value → Q → DQ`."""
        numbers = [self.constant(f"{value}_{k}", n) for k, n in zip("sz", params, strict=True)]
        codes = self.add("QuantizeLinear", [value, *numbers], f"{value}_q")
        return self.add("DequantizeLinear", [codes, *numbers], f"{value}_dq")

    def model(self) -> bytes:
        outputs = [helper.make_empty_tensor_value_info(name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10 + (self.opset > 21))
        content: bytes = model.SerializeToString()
        return content


def _codes(weight: Array, axis: int | None) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 codes and scales, one scale per index of `axis`."""
    others = None if axis is None else tuple(k for k in range(weight.ndim) if k != axis)
    scale = np.asarray(np.abs(weight).max(axis=others) / 127, np.float32)
    shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
    spread = scale if axis is None else scale.reshape(shape)
    return np.rint(weight / spread).astype(np.int8), scale


def _node(example: Example) -> onnx_ir.Node:
    """The plain float node inside a graph, as the table's conditions see it."""
    pattern = Pattern(example.opset)
    names = [_plain(pattern, f"v{k}", v) for k, v in enumerate(example.inputs)]
    _call(pattern, example, names)
    model = onnx_ir.serde.deserialize_model(onnx.ModelProto.FromString(pattern.model()))
    model.graph.outputs.clear()
    return next(iter(model.graph))


def _plain(pattern: Pattern, name: str, value: tuple[int, ...] | Array) -> str:
    if isinstance(value, tuple):
        return pattern.activation(name, value)
    return pattern.constant(name, value) if value.size else ""


def _call(pattern: Pattern, example: Example, names: Sequence[str]) -> list[str]:
    outputs = [f"y{k}" for k in range(example.outputs)]
    made = [*outputs, "indices"] if example.indices else outputs
    node = helper.make_node(
        example.op_type, names, made, name=example.op_type, **example.attributes
    )
    pattern.nodes.append(node)
    pattern.outputs = outputs
    return outputs


def _static(example: Example, row: KernelRow, quantized_output: bool) -> Pattern:
    pattern = Pattern(example.opset)
    operands = range(len(example.inputs)) if row.variadic else row.operands
    names, scale = [], np.ones((), np.float32)
    for index, value in enumerate(example.inputs):
        name = f"v{index}"
        if index in row.weights:
            assert not isinstance(value, tuple)
            codes, scale = _codes(value, row.weight_axis % value.ndim)
            names.append(_dequantized(pattern, name, codes, scale, row.weight_axis % value.ndim))
        elif index in operands:
            names.append(
                pattern.quantized(pattern.activation(name, value), _IN)
                if isinstance(value, tuple)
                else _dequantized_operand(pattern, name, value)
            )
        elif index == row.bias and not quantized_output:
            assert not isinstance(value, tuple)
            scale = np.asarray(scale * _IN[0], np.float32)
            names.append(
                _dequantized(pattern, name, np.rint(value / scale).astype(np.int32), scale, 0)
            )
        else:
            names.append(_plain(pattern, name, value))
    outputs = _call(pattern, example, names)
    if quantized_output:
        params = _IN if row.same_params else _UNIT if row.fixed_range else _OUT
        pattern.outputs = [pattern.quantized(name, params) for name in outputs]
    return pattern


def _dequantized(
    pattern: Pattern, name: str, codes: Array, scale: NDArray[np.float32], axis: int
) -> str:
    inputs = [
        pattern.constant(f"{name}_q", codes),
        pattern.constant(f"{name}_s", scale),
        pattern.constant(f"{name}_z", np.zeros(scale.shape, codes.dtype)),
    ]
    return pattern.add("DequantizeLinear", inputs, f"{name}_dq", axis=axis)


def _dequantized_operand(pattern: Pattern, name: str, value: Array) -> str:
    codes = np.clip(np.rint(value / _IN[0]) + _IN[1], 0, 255).astype(np.uint8)
    inputs = [pattern.constant(f"{name}_q", codes)]
    scale, zero_point = _IN
    inputs += [pattern.constant(f"{name}_s", scale), pattern.constant(f"{name}_z", zero_point)]
    return pattern.add("DequantizeLinear", inputs, f"{name}_dq")


def _optimized(pattern: Pattern, folder: Path) -> onnx.GraphProto:
    path = folder / "optimized.onnx"
    make_session(pattern.model(), threads=1, optimized_path=path)
    return onnx.load(path, load_external_data=False).graph


def _kernels(graph: onnx.GraphProto) -> list[str]:
    return [f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node]


def _float_twins(graph: onnx.GraphProto) -> list[str]:
    """Kernels that compute on dequantized values."""
    real = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return [n.op_type for n in graph.node if n.op_type not in _CARRIERS and real & set(n.input)]


def _run(pattern: Pattern, optimization: Literal["all", "none"]) -> list[Array]:
    rng = np.random.default_rng(0)
    feed = {
        value.name: rng.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim])
        .astype(np.float32)
        for value in pattern.inputs
    }  # fmt: skip
    session = make_session(pattern.model(), threads=1, optimization=optimization)
    return list(session.run(feed).values())


def _static_examples() -> Iterator[tuple[KernelRow, Example, bool]]:
    """Every static row with its examples, with and without a quantizer where it allows both."""
    outputs = {"quantized": (True,), "either": (True, False), "float": (False,)}
    for example in EXAMPLES:
        row = ORT_CPU.support(_node(example), "static").row
        if row is not None:
            yield from ((row, example, quantized) for quantized in outputs[row.output])


def _first_row(example: Example) -> KernelRow:
    return next(r for r in ORT_CPU.rows if (r.op_type, r.method) == (example.op_type, "static"))


def _around(example: Example) -> KernelRow:
    """A row that quantizes every activation, whatever the operator."""
    activations = (k for k, value in enumerate(example.inputs) if isinstance(value, tuple))
    return KernelRow(example.op_type, "static", (), operands=tuple(activations))


def _text(parameter: object) -> str:
    """The id of a parameter; the row goes without saying, its example names the operator."""
    return "" if isinstance(parameter, KernelRow) else str(parameter)


STATIC = list(_static_examples())


def test_every_static_row_has_an_example() -> None:
    shown = [row for row, _, _ in STATIC]
    assert not [r for r in ORT_CPU.rows if r.method == "static" and r not in shown]


@pytest.mark.parametrize(("row", "example", "quantized"), STATIC, ids=_text)
def test_static_rows(row: KernelRow, example: Example, quantized: bool, tmp_path: Path) -> None:
    pattern = _static(example, row, quantized)
    graph = _optimized(pattern, tmp_path)
    assert set(_kernels(graph)) & set(row.kernels)
    assert not _float_twins(graph)
    step = float(_UNIT[0] if row.fixed_range else _OUT[0]) if quantized else 1e-4
    for actual, literal in zip(_run(pattern, "all"), _run(pattern, "none"), strict=True):
        np.testing.assert_allclose(actual, literal, rtol=0, atol=2.01 * step)


NEEDS_OUTPUT = [(r, e) for r, e, _ in STATIC if r.output == "quantized" and not r.same_params]


@pytest.mark.parametrize(("row", "example"), NEEDS_OUTPUT, ids=_text)
def test_rows_that_need_an_output_quantizer(
    row: KernelRow, example: Example, tmp_path: Path
) -> None:
    assert _float_twins(_optimized(_static(example, row, False), tmp_path))


SAME_PARAMS = [(row, example) for row, example, _ in STATIC if row.same_params]


@pytest.mark.parametrize(("row", "example"), SAME_PARAMS, ids=_text)
def test_movement_needs_one_scale(row: KernelRow, example: Example, tmp_path: Path) -> None:
    other = replace(row, same_params=False)
    assert _float_twins(_optimized(_static(example, other, True), tmp_path))


@pytest.mark.parametrize("example", NEVER, ids=_text)
def test_operators_without_a_kernel(example: Example, tmp_path: Path) -> None:
    assert ORT_CPU.support(_node(example), "static").row is None
    graph = _optimized(_static(example, _around(example), True), tmp_path)
    assert _float_twins(graph)


def test_every_operator_without_a_kernel_is_shown() -> None:
    assert {op_type for op_type, _ in ORT_CPU.never} == {e.op_type for e in NEVER}


@pytest.mark.parametrize("example", MISSES, ids=_text)
def test_conditions(example: Example, tmp_path: Path) -> None:
    support = ORT_CPU.support(_node(example), "static")
    assert support.row is None
    assert "needs" in support.reason
    assert _float_twins(_optimized(_static(example, _first_row(example), True), tmp_path))
