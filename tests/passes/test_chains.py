"""Chains: what one integer kernel computes, and where it ends."""

from __future__ import annotations

from dataclasses import replace

import onnx.parser
import pytest

from octavo.backends.ort_target import ORT_CPU
from octavo.ir.facts import Range, Ranges
from octavo.ir.quant import QuantSpec
from octavo.ir.read import read
from octavo.passes.chains import Chain, coarse_logits, find_chains

_CONSTANTS = """<float[4,4] w, float[4] b, float[1,4] row, float[4,1] column, float one = {1.0},
    float zero = {0.0}, float six = {6.0}, float[2,2,1,1] k,
    int64[2] size = {3, 4}>"""


def chains_of(body: str, x: str = "[3,4]", outputs: str = "float[3,4] y") -> dict[str, Chain]:
    """The chains of a graph whose weights are ones."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float{x} x, bool c) => ({outputs}) {_CONSTANTS} {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        size = 1
        for dim in shape:
            size *= dim
        proto.graph.initializer.append(
            onnx.helper.make_tensor(info.name, onnx.TensorProto.FLOAT, shape, [1.0] * size)
        )
    del proto.graph.value_info[:]
    return dict(find_chains(read(proto), ORT_CPU))


def members(chains: dict[str, Chain]) -> dict[str, list[str | None]]:
    return {name: [node.name for node in chain.members] for name, chain in chains.items()}


@pytest.mark.parametrize("bias", ["b", "row"])
@pytest.mark.parametrize("order", ["m, {}", "{}, m"])
def test_a_matmul_absorbs_its_bias_and_activation(bias: str, order: str) -> None:
    chains = chains_of(
        f"[mm] m = MatMul (x, w) [add] a = Add ({order.format(bias)}) [relu] y = Relu (a)"
    )
    assert members(chains) == {"mm": ["mm", "add", "relu"]}
    assert (chains["mm"].nonnegative, chains["mm"].clip_high) == (True, float("inf"))
    assert [value.name for value in chains["mm"].operands] == ["x"]
    assert [value.name for value in chains["mm"].outputs] == ["y"]


@pytest.mark.parametrize("other", ["one", "column", "x"])
def test_what_is_no_bias_is_not_absorbed(other: str) -> None:
    chains = chains_of(f"[mm] m = MatMul (x, w) [add] y = Add (m, {other})", x="[4,4]")
    assert members(chains) == {"mm": ["mm"], "add": ["add"]}


@pytest.mark.parametrize(
    ("clip", "high"),
    [("Clip (m, zero, six)", 6.0), ("Clip (m, zero)", float("inf")), ("Relu (m)", float("inf"))],
)
def test_an_activation_bounds_the_output(clip: str, high: float) -> None:
    chain = chains_of(f"[mm] m = MatMul (x, w) [act] y = {clip}")["mm"]
    assert (len(chain.members), chain.nonnegative, chain.clip_high) == (2, True, high)


@pytest.mark.parametrize("clip", ["Clip (m, one, six)", "Clip (m)", "Tanh (m)", "Clip (m, , six)"])
def test_other_activations_stay_behind(clip: str) -> None:
    chain = chains_of(f"[mm] m = MatMul (x, w) [act] y = {clip}")["mm"]
    assert (len(chain.members), chain.nonnegative, chain.clip_high) == (1, False, None)


def test_what_somebody_else_reads_ends_the_chain() -> None:
    body = "[mm] m = MatMul (x, w) [relu] r = Relu (m) [tanh] y = Tanh (m)"
    assert members(chains_of(body, outputs="float[3,4] y, float[3,4] r")) == {"mm": ["mm"]}
    body = "[mm] m = MatMul (x, w) [relu] y = Relu (m)"
    assert members(chains_of(body, outputs="float[3,4] y, float[3,4] m")) == {"mm": ["mm"]}


def test_a_body_ends_the_chain() -> None:
    body = """[mm] m = MatMul (x, w) [if] y = If (c) <
        then_branch = yes () => (float[3,4] t) { [relu] t = Relu (m) },
        else_branch = no () => (float[3,4] e) { [tanh] e = Tanh (x) }>"""
    assert members(chains_of(body)) == {"mm": ["mm"]}


def test_movement_hands_on_all_its_outputs_and_absorbs_nothing() -> None:
    body = "[split] p, q = Split <axis = 0, num_outputs = 2> (x) [relu] y = Relu (p)"
    chains = chains_of(body, x="[2,4]", outputs="float[1,4] y, float[1,4] q")
    assert members(chains) == {"split": ["split"]}
    assert [value.name for value in chains["split"].outputs] == ["p", "q"]
    assert chains["split"].row.same_params


def test_a_variadic_kernel_reads_every_input() -> None:
    chain = chains_of("[cat] y = Concat <axis = 0> (x, x, w)", x="[4,4]", outputs="float[12,4] y")
    assert [value.name for value in chain["cat"].operands] == ["x", "x", "w"]


def test_a_weight_in_disguise_is_no_activation() -> None:
    body = "[turn] t = Transpose <perm = [1,0]> (w) [exp] e = Exp (w)"
    body += "[mul] f = Mul (x, e) [mm] y = MatMul (f, t)"
    chains = chains_of(body, x="[4,4]")
    assert "turn" not in chains
    assert "mul" not in chains


def test_only_activations_of_the_target_are_absorbed() -> None:
    body = "[mm] m = MatMul (x, w) [relu] y = Relu (m)"
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[3,2] x) => (float[3,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{ {body} }}"""
    model = read(onnx.parser.parse_model(text))
    plain = replace(ORT_CPU, fused_activations=())
    assert members(dict(find_chains(model, plain))) == {"mm": ["mm"]}
    assert members(dict(find_chains(model, ORT_CPU))) == {"mm": ["mm", "relu"]}


_ATTENTION = """
    [scores] s = MatMul (x, w) [mask] a = Add (s, x) [view] v = Reshape (a, size)
    [softmax] p = Softmax (v) [mean] y = MatMul (p, w)"""


@pytest.mark.parametrize(
    ("grid", "lowest", "coarse"),
    [
        (QuantSpec("u8"), -1e4, {"a": 39.2, "v": 39.2}),
        (QuantSpec("u8"), -100.0, {}),
        (QuantSpec("u8"), -30.0, {}),
        # Half of the codes are for scores above zero, of which there are few.
        (QuantSpec("s8", symmetric=True), -1e4, {"a": 1e4 / 127, "v": 1e4 / 127}),
        (QuantSpec("s8", symmetric=True), -100.0, {"a": 100 / 127, "v": 100 / 127}),
        (QuantSpec("s8", symmetric=True), -30.0, {}),
    ],
)
def test_a_softmax_is_not_told_its_inputs_in_coarse_steps(
    grid: QuantSpec, lowest: float, coarse: dict[str, float]
) -> None:
    """Where a mask leaves scores one step, nothing between Add and Softmax is 8-bit."""
    chains = chains_of(_ATTENTION)
    ranges = Ranges({n: Range(lowest, 12.0, lowest, 12.0) for n in "xsavpy"}, "minmax", 1, "")
    found = coarse_logits(chains, ranges, grid)
    assert {"scores", "mask", "view", "softmax", "mean"} == set(chains)
    assert found == pytest.approx(coarse, rel=0.01)
