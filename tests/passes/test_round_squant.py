"""SQuant: sums of rounding errors, against brute force over all roundings of tiny kernels."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.facts import Choice, Option, Plan
from octavo.ir.fake_quant import params_of
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantSpec, params_for_weight, quantize
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline
from octavo.passes.squant import balanced_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.pipeline import Compilation

    Float32 = NDArray[np.float32]

# Sums of float32 errors of the sizes below.
SUMMED = 1e-3


def inner(shape: tuple[int, ...], seed: int = 0) -> Float32:
    """Weights in steps that no end of a 4-bit grid stops."""
    return np.random.default_rng(seed).uniform(-6.4, 6.4, shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(16, 8, 9), (7, 300, 1), (40, 1, 25), (3, 5, 2), (1, 1, 1)])
def test_errors_of_kernels_and_channels_cancel(shape: tuple[int, ...]) -> None:
    scaled = inner(shape)
    codes = balanced_codes(scaled, -7, 7)
    error = (codes - scaled).astype(np.float64)
    by_kernel, by_channel = np.abs(error.sum(axis=2)), np.abs(error.sum(axis=(1, 2)))
    assert by_channel.max() <= 0.5 + SUMMED
    assert by_kernel.max() < 1 + SUMMED
    # The second part moves one code in some kernels, and leaves all others within half a step.
    channel_moves = np.rint(np.abs(_kernels_only(scaled).sum(axis=(1, 2))))
    assert np.all((by_kernel > 0.5 + SUMMED).sum(axis=1) <= channel_moves)
    assert np.all(np.abs(error) < 1)


def _kernels_only(scaled: Float32) -> NDArray[np.float64]:
    """The errors after the first part: every kernel as a channel of its own."""
    alone = scaled.reshape(-1, 1, scaled.shape[2])
    return (balanced_codes(alone, -7, 7) - alone).reshape(scaled.shape).astype(np.float64)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_rounding_of_a_kernel_is_as_close(seed: int) -> None:
    """Of all roundings to a neighbour whose errors sum to half a step, it has least ‖error‖²."""
    scaled = inner((1, 1, 9), seed)
    codes = balanced_codes(scaled, -7, 7)
    floor = np.floor(scaled[0, 0]).astype(np.float64)
    best = min(
        float(((floor + up - scaled[0, 0]) ** 2).sum())
        for up in itertools.product((0, 1), repeat=9)
        if abs(float((floor + up - scaled[0, 0]).sum())) <= 0.5
    )
    assert float(((codes - scaled) ** 2).sum()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_no_other_choice_of_kernels_is_as_close(seed: int) -> None:
    """Among choices of one move in some kernels that balance the channel, by kernel sums."""
    scaled = inner((1, 6, 4), seed)
    sums = _kernels_only(scaled).sum(axis=2)[0]
    error = (balanced_codes(scaled, -7, 7) - scaled).astype(np.float64)
    best = min(
        float(((sums - np.sign(sums) * moved) ** 2).sum())
        for moved in itertools.product((0, 1), repeat=6)
        if abs(float((sums - np.sign(sums) * moved).sum())) <= 0.5
    )
    assert float((error.sum(axis=2) ** 2).sum()) == pytest.approx(best, rel=1e-4)


def test_codes_stay_on_the_grid() -> None:
    scaled = np.random.default_rng(0).uniform(-12, 12, (8, 4, 9)).astype(np.float32)
    codes = balanced_codes(scaled, -7, 7)
    assert (codes.min(), codes.max()) == (-7, 7)
    np.testing.assert_array_equal(codes[scaled > 7.5], 7)


def test_whole_numbers_stay_as_they_are() -> None:
    scaled = np.rint(inner((8, 4, 9)))
    np.testing.assert_array_equal(balanced_codes(scaled, -7, 7), scaled)


_LAYERS = {
    "conv": ("float[1,4,6,6] x", "Conv (x, w)", (6, 4, 3, 3)),
    "grouped": ("float[1,4,6,6] x", "Conv <group: int = 4> (x, w)", (8, 1, 3, 3)),
    "turned": ("float[1,4,6,6] x", "ConvTranspose (x, w)", (4, 6, 3, 3)),
    "matmul": ("float[3,40] x", "MatMul (x, w)", (40, 6)),
    "gemm": ("float[3,40] x", "Gemm <transB: int = 1> (x, w)", (6, 40)),
}


def squant(
    layer: str, spec: QuantSpec, ctx: PassContext, method: str = "round-squant"
) -> tuple[Model, Compilation, Float32]:
    given, call, shape = _LAYERS[layer]
    weight = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    numbers = ",".join(map(str, shape))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({given}) => (float y) <float[{numbers}] w> {{ [one] y = {call} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.value_info[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    plan = Plan({"one": Choice(Option("storage", spec), "")}, "test")
    before = Pipeline.parse("insert-fake-quant").run(read(proto).with_fact(plan), ctx).model
    return before, Pipeline.parse(method).run(before, ctx), weight


@pytest.mark.parametrize(
    ("layer", "axis", "kernels"),
    [
        ("conv", 0, (2, 3)),
        ("grouped", 0, (2, 3)),
        ("turned", 1, (2, 3)),
        ("matmul", 1, ()),
        ("gemm", 0, ()),
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_channels_are_those_of_the_operator(
    layer: str, axis: int, kernels: tuple[int, ...], tensor: bool, pass_context: PassContext
) -> None:
    spec = QuantSpec("s5", PerTensor() if tensor else PerAxis(axis), symmetric=True)
    _, after, weight = squant(layer, spec, pass_context)
    (fake,) = (node for node in after.model.graph if node.domain == "octavo")
    assert fake.inputs[0] is not None
    assert fake.inputs[0].const_value is not None
    params = params_of(fake)
    codes = quantize(fake.inputs[0].const_value.numpy(), params).astype(np.float64)
    along = [-1 if k == axis else 1 for k in range(weight.ndim)]
    error = codes - weight / (params.scale if tensor else params.scale.reshape(along))
    others = tuple(k for k in range(weight.ndim) if k != axis)
    assert np.abs(error.sum(axis=others)).max() <= 0.5 + SUMMED
    assert np.abs(error.sum(axis=kernels)).max() < 1 + SUMMED
    assert np.abs(error).max() < 1


def test_each_block_is_a_channel(pass_context: PassContext) -> None:
    spec = QuantSpec("s4", PerBlock(0, 16), symmetric=True)
    _, after, weight = squant("matmul", spec, pass_context)
    (fake,) = (node for node in after.model.graph if node.domain == "octavo")
    assert fake.inputs[0] is not None
    assert fake.inputs[0].const_value is not None
    params = params_of(fake)
    codes = quantize(fake.inputs[0].const_value.numpy(), params)
    for block, start in enumerate(range(0, 40, 16)):
        part = slice(start, start + 16)
        error = codes[part] - weight[part].astype(np.float64) / params.scale[block]
        assert np.abs(error.sum(axis=0)).max() <= 0.5 + SUMMED


def test_the_remark_says_how_far_channels_were_off(pass_context: PassContext) -> None:
    spec = QuantSpec("s4", PerAxis(1), symmetric=True)
    _, after, weight = squant("matmul", spec, pass_context)
    params = params_for_weight(weight, spec)
    error = quantize(weight, params) - weight.astype(np.float64) / params.scale
    (remark,) = after.records[0].remarks
    assert remark.kind == "applied"
    assert remark.values["before"] == pytest.approx(np.abs(error.sum(axis=0)).mean(), rel=1e-4)
    assert isinstance(remark.values["after"], float)
    assert remark.values["after"] <= 0.5


@pytest.mark.parametrize(
    ("layer", "spec", "why"),
    [
        ("matmul", QuantSpec("s1", PerAxis(1), symmetric=True), "neighbours"),
        ("matmul", QuantSpec("s4", PerAxis(0), symmetric=True), "output channels"),
    ],
)
def test_what_has_no_sums_is_left_alone(
    layer: str, spec: QuantSpec, why: str, pass_context: PassContext
) -> None:
    before, after, _ = squant(layer, spec, pass_context)
    assert after.model.fingerprint == before.fingerprint
    (remark,) = after.records[0].remarks
    assert remark.kind == "missed"
    assert why in remark.text


def test_a_rounded_weight_keeps_its_codes(pass_context: PassContext) -> None:
    spec = QuantSpec("s4", PerAxis(1), symmetric=True)
    once = squant("matmul", spec, pass_context)[1].model
    again = squant("matmul", spec, pass_context, "round-squant,round-squant")[1].model
    assert again.fingerprint == once.fingerprint
