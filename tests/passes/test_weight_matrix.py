"""Rows times columns is what the runtime computes, whatever the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.errors import UsageError
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantSpec,
    broadcast_params,
    params_for_weight,
)
from octavo.ir.read import read
from octavo.passes.weight_matrix import WeightMatrix, operand, why_no_matrix

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.ir.quant import Granularity
    from octavo.passes.base import PassContext

# Sums of up to a hundred float32 products of normal numbers, in another order.
ABSOLUTE = 2e-5

CONVOLUTIONS = [
    ("[2,3,9,8]", (4, 3, 3, 3), "group = 1"),
    ("[2,3,9,8]", (4, 3, 3, 2), "strides = [2, 1], pads = [1, 0, 2, 1]"),
    ("[2,4,9,8]", (4, 1, 3, 3), "group = 4, dilations = [2, 1], pads = [1, 1, 1, 1]"),
    ("[1,4,9,8]", (6, 2, 3, 3), 'group = 2, auto_pad = "SAME_UPPER", strides = [2, 3]'),
    ("[1,4,7,8]", (8, 1, 2, 4), 'group = 4, auto_pad = "SAME_LOWER"'),
    ("[1,4,7,8]", (8, 4, 2, 4), 'auto_pad = "VALID", dilations = [3, 1]'),
    ("[2,3,11]", (5, 3, 4), "strides = [3], pads = [2, 1], dilations = [2]"),
    ("[1,2,4,5,6]", (3, 2, 2, 3, 2), "pads = [0, 1, 0, 1, 1, 0]"),
]


def made(body: str, x: str, weight: np.ndarray) -> tuple[Model, onnx_ir.Node]:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float{x} x) => (float y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = read(proto)
    return model, next(n for n in model.graph if n.op_type not in ("Transpose", "Identity"))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng([7, *shape]).standard_normal(shape).astype(np.float32)


def dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.strip("[]").split(",")))


@pytest.mark.parametrize(("x", "shape", "attributes"), CONVOLUTIONS)
def test_convolution(
    x: str, shape: tuple[int, ...], attributes: str, pass_context: PassContext
) -> None:
    weight, fed = normal(*shape), normal(*dims(x))
    model, node = made(f"y = Conv <{attributes}> (x, w)", x, weight)
    matrix = WeightMatrix.of(node, 1)
    expected = pass_context.evaluator.run(model, {"x": fed})["y"]
    product = np.einsum("gnk,gsk->sgn", matrix.rows(weight), matrix.columns(fed))
    by_channel = np.moveaxis(expected, 1, -1).reshape(-1, expected.shape[1])
    np.testing.assert_allclose(product.reshape(len(product), -1), by_channel, rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize(
    ("body", "x", "shape"),
    [
        ("y = MatMul (x, w)", "[2,3,5]", (5, 4)),
        ("y = Gemm <transB = 1> (x, w)", "[3,5]", (4, 5)),
        ("y = Gemm (x, w)", "[3,5]", (5, 4)),
        ("y = Gemm <transA = 1, transB = 1> (x, w)", "[5,3]", (4, 5)),
    ],
)
def test_products(body: str, x: str, shape: tuple[int, ...], pass_context: PassContext) -> None:
    weight, fed = normal(*shape), normal(*dims(x))
    model, node = made(body, x, weight)
    matrix = WeightMatrix.of(node, 1)
    expected = pass_context.evaluator.run(model, {"x": fed})["y"]
    product = matrix.columns(fed)[0] @ matrix.rows(weight)[0].T
    np.testing.assert_allclose(product, expected.reshape(-1, 4), rtol=0, atol=ABSOLUTE)


def test_a_turned_weight_has_the_shape_that_is_read(pass_context: PassContext) -> None:
    weight, fed = normal(4, 5), normal(3, 5)
    model, node = made("t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", "[3,5]", weight)
    matrix = WeightMatrix.of(node, 1)
    expected = pass_context.evaluator.run(model, {"x": fed})["y"]
    product = matrix.columns(fed)[0] @ matrix.rows(weight.T)[0].T
    np.testing.assert_allclose(product, expected, rtol=0, atol=ABSOLUTE)


def test_transposed_convolution_without_overlap(pass_context: PassContext) -> None:
    weight, fed = normal(3, 4, 2, 2), normal(1, 3, 5, 6)
    model, node = made("y = ConvTranspose <strides = [2, 2]> (x, w)", "[1,3,5,6]", weight)
    matrix = WeightMatrix.of(node, 1)
    expected = pass_context.evaluator.run(model, {"x": fed})["y"]
    product = matrix.columns(fed)[0] @ matrix.rows(weight)[0].T
    images = product.reshape(1, 5, 6, 4, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(1, 4, 10, 12)
    np.testing.assert_allclose(images, expected, rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_states(direction: str, pass_context: PassContext) -> None:
    """An RNN with an identity-like activation: y(t) = W x(t) + R y(t - 1)."""
    directions = 1 + (direction == "bidirectional")
    weight, recurrent = normal(directions, 2, 3), normal(directions, 2, 2) * np.float32(0.5)
    fed = normal(4, 2, 3)
    listed = ", ".join(['"Affine"'] * directions)
    ones, zeros = ", ".join(["1.0"] * directions), ", ".join(["0.0"] * directions)
    activations = (
        f"activations = [{listed}], activation_alpha = [{ones}], activation_beta = [{zeros}]"
    )
    body = f'y = RNN <hidden_size = 2, direction = "{direction}", {activations}> (x, w, r)'
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[4,2,3] x) => (float[4,{directions},2,2] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(recurrent, "r"))
    model = read(proto)
    node = next(iter(model.graph))
    assert (operand(node, 1).name, operand(node, 2).name) == ("x", "y")
    expected = pass_context.evaluator.run(model, {"x": fed})["y"]
    inputs, states = WeightMatrix.of(node, 1), WeightMatrix.of(node, 2)
    fresh = np.einsum("gnk,gsk->gsn", inputs.rows(weight), inputs.columns(fed))
    kept = np.einsum("gnk,gsk->gsn", states.rows(recurrent), states.columns(expected))
    for at in range(directions):
        backwards = direction == "reverse" or at == 1
        own = expected[:, at] - fresh[at].reshape(4, 2, 2)
        later = own[:-1] if backwards else own[1:]
        np.testing.assert_allclose(kept[at].reshape(3, 2, 2), later, rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (6, 1, 3, 3)])
def test_rows_and_back(shape: tuple[int, ...]) -> None:
    groups = 2 if shape[1] == 3 else 6
    weight = normal(*shape)
    _, node = made(f"y = Conv <group = {groups}> (x, w)", f"[1,{groups * shape[1]},5,5]", weight)
    matrix = WeightMatrix.of(node, 1)
    assert matrix.rows(weight).shape == (groups, shape[0] // groups, matrix.width)
    np.testing.assert_array_equal(matrix.restore(matrix.rows(weight)), weight)


GRANULARITIES: list[Granularity] = [
    PerTensor(), PerAxis(0), PerAxis(1), PerBlock(0, 3), PerBlock(1, 4), PerBlock(1, 100)
]  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    ("body", "x", "shape"),
    [
        ("y = MatMul (x, w)", "[2,10]", (10, 6)),
        ("y = Gemm <transB = 1> (x, w)", "[2,10]", (6, 10)),
        ("y = Conv (x, w)", "[1,10,5,5]", (6, 10, 3, 2)),
    ],
)
def test_scales_of_rows_and_blocks(
    body: str, x: str, shape: tuple[int, ...], granularity: Granularity
) -> None:
    weight = normal(*shape)
    matrix = WeightMatrix.of(made(body, x, weight)[1], 1)
    params = params_for_weight(weight, QuantSpec("s4", granularity, symmetric=True))
    scale, zero, cells = matrix.scales(params)
    full = np.broadcast_to(broadcast_params(params, weight.shape)[0], weight.shape)
    np.testing.assert_array_equal(scale[:, :, cells.block], matrix.rows(full))
    back = matrix.params(params.spec, scale, zero)
    np.testing.assert_array_equal(back.scale, params.scale)
    np.testing.assert_array_equal(back.zero_point, params.zero_point)


def test_a_limit_draws_some_columns_once() -> None:
    weight = normal(4, 3, 3, 3)
    matrix = WeightMatrix.of(made("y = Conv (x, w)", "[2,3,9,8]", weight)[1], 1)
    fed = normal(2, 3, 9, 8)
    every = {tuple(row) for row in matrix.columns(fed)[0]}
    some = matrix.columns(fed, limit=20, seed=1)[0]
    assert len({tuple(row) for row in some} & every) == 20
    np.testing.assert_array_equal(some, matrix.columns(fed, limit=20, seed=1)[0])
    assert not np.array_equal(some, matrix.columns(fed, limit=20, seed=2)[0])


@pytest.mark.parametrize(
    ("body", "x", "shape", "index", "reason"),
    [
        ("i = Cast <to = 7> (x) y = Gather (w, i)", "[2]", (5, 4), 0, "an embedding multiplies"),
        ("y = MatMul (w, x)", "[4,2]", (5, 4), 0, "input 0 of MatMul"),
        ("y = MatMul (x, w)", "[2,3,4]", (2, 4, 5), 1, "a weight of rank 3"),
        ("y = ConvTranspose <group = 2> (x, w)", "[1,4,5,5]", (4, 2, 3, 3), 1, "a grouped"),
        ("y = MatMul (x, w)", "[2,4]", (4, 5), 7, "the weight is not a constant"),
    ],
)
def test_refusals(body: str, x: str, shape: tuple[int, ...], index: int, reason: str) -> None:
    model, _ = made(body, x, normal(*shape))
    node = list(model.graph)[-1]
    assert reason in why_no_matrix(node, index)
    with pytest.raises(UsageError, match="is not a matrix"):
        WeightMatrix.of(node, index)
