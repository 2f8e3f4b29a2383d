"""Raising the opset keeps what operators compute: the source is the truth, in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from octavo.ir.model import PROVENANCE
from octavo.ir.read import read
from octavo.ir.write import serialize

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def scales(*factors: float) -> np.ndarray:
    return np.array(factors, np.float32)


OLD: list[tuple[str, int, list[np.ndarray], list[np.ndarray], dict[str, Any]]] = [
    ("Upsample", 7, [floats(1, 2, 4, 4)], [], {"scales": [1.0, 1.0, 2.0, 2.0]}),
    ("Upsample", 9, [floats(1, 2, 4, 5)], [scales(1, 1, 1.5, 2.5)], {"mode": "nearest"}),
    ("Upsample", 9, [floats(1, 2, 4, 4)], [scales(1, 1, 2, 2)], {"mode": "linear"}),
    ("Resize", 10, [floats(1, 2, 4, 4)], [scales(1, 1, 2, 2)], {"mode": "linear"}),
    ("Resize", 10, [floats(1, 2, 4, 4)], [scales(1, 1, 3, 2)], {"mode": "nearest"}),
    ("Slice", 9, [floats(4, 5, 6)], [], {"axes": [0, 2], "starts": [1, -3], "ends": [3, 100]}),
    ("Pad", 10, [floats(1, 2, 3, 3)], [], {"pads": [0, 0, 1, 1, 0, 0, 2, 2], "value": 0.5}),
    ("Clip", 10, [floats(3, 4)], [], {"max": 0.6}),
    ("Softmax", 12, [floats(2, 3, 4)], [], {}),
    ("LogSoftmax", 11, [floats(2, 3, 4)], [], {"axis": 1}),
    ("Squeeze", 11, [floats(1, 3, 1)], [], {"axes": [0]}),
    ("Unsqueeze", 11, [floats(3)], [], {"axes": [0, 2]}),
    ("ReduceSum", 11, [floats(2, 3, 4)], [], {"axes": [1], "keepdims": 0}),
    ("ReduceMean", 17, [floats(2, 3, 4)], [], {"axes": [-1]}),
    (
        "BatchNormalization",
        7,
        [floats(2, 3, 4)],
        [floats(3), floats(3), floats(3), floats(3) ** 2],
        {},
    ),
    ("AveragePool", 7, [floats(1, 2, 6, 6)], [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("Gemm", 7, [floats(2, 3)], [floats(3, 4), floats(4)], {"alpha": 0.5}),
    ("LSTM", 7, [floats(5, 2, 3)], [floats(1, 16, 3), floats(1, 16, 4)], {"hidden_size": 4}),
    ("Dropout", 7, [floats(3, 4)], [], {"ratio": 0.3}),
    ("GridSample", 16, [floats(1, 2, 4, 4), floats(1, 3, 3, 2)], [], {"mode": "bilinear"}),
    ("DFT", 17, [floats(1, 10, 8, 1)], [], {}),
    ("Scatter", 10, [floats(3, 4)], [np.array([[0, 2]]), floats(1, 2)], {"axis": 1}),
]


def one_node(
    op_type: str,
    opset: int,
    arrays: list[np.ndarray],
    constants: list[np.ndarray],
    attributes: dict[str, Any],
) -> onnx.ModelProto:
    """A model of one node called `old`, with inputs `x0`, … and initializers `w0`, …"""
    inputs = [
        helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, array.shape)
        for k, array in enumerate(arrays)
    ]
    weights = [numpy_helper.from_array(array, f"w{k}") for k, array in enumerate(constants)]
    names = [*(value.name for value in inputs), *(tensor.name for tensor in weights)]
    node = helper.make_node(op_type, names, ["y"], name="old", **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "graph", inputs, [output], weights)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def output_of(content: bytes, arrays: list[np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options)
    feed = {f"x{k}": array for k, array in enumerate(arrays)}
    output: np.ndarray = session.run(None, feed)[0]
    return output


@pytest.mark.parametrize("case", OLD, ids=lambda case: f"{case[0]}-{case[1]}")
def test_old_operators_keep_their_meaning(
    case: tuple[str, int, list[np.ndarray], list[np.ndarray], dict[str, Any]],
) -> None:
    source, arrays = one_node(*case), case[2]
    model = read(source)
    truth = output_of(source.SerializeToString(), arrays)
    actual = output_of(serialize(model), arrays)
    assert (truth.dtype, truth.shape) == (actual.dtype, actual.shape)
    np.testing.assert_allclose(actual, truth, rtol=1e-5, atol=1e-5)
    assert model.ir.opset_imports[""] == 21
    assert all(node.metadata_props[PROVENANCE] == "old" for node in model.graph)


@pytest.mark.parametrize("opset", [7, 13, 18, 21, 22, 26])
def test_the_opset_is_raised_to_21_and_never_lowered(opset: int) -> None:
    model = read(one_node("Relu", opset, [floats(5)], [], {}))
    assert model.ir.opset_imports[""] == max(opset, 21)
    x = scales(-1, 2, 2, 0, 1)
    np.testing.assert_array_equal(output_of(serialize(model), [x]), [0, 2, 2, 0, 1])
