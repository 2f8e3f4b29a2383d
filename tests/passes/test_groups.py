"""Which nodes get one decision, by each tie alone, and which roles they play."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.backends.ort_target import ORT_CPU
from octavo.ir.read import read
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.groups import find_groups
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.ir.target import Tie
    from octavo.passes.base import PassContext

MODELS = Path(__file__).resolve().parents[2] / "models"


def built(text: str) -> Model:
    """A model whose float weights are drawn by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = np.random.default_rng([*info.name.encode()]).standard_normal(shape)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return read(proto)


def members(text: str, *ties: Tie) -> list[tuple[str, ...]]:
    found = find_groups(built(text), ORT_CPU, ties)
    assert all(name == group.name == group.nodes[0] for name, group in found.items())
    return [group.nodes for group in found.values()]


SHARED = """shared (float[1,8] x) => (float[1,8] y) <float[8,8] w, float[8,8] v> {
    [one] a = MatMul (x, w) [t] b = Tanh (a) [other] c = MatMul (b, v)
    [u] d = Tanh (c) [two] y = MatMul (d, w) }"""
EMBEDDING = """tied (int64[3] k) => (float[3,8] y) <float[8,4] table, float[4,4] w> {
    [embed] e = Gather (table, k) [mid] m = MatMul (e, w) [act] h = Tanh (m)
    [turn] t = Transpose <perm = [1, 0]> (table) [head] y = MatMul (h, t) }"""
QKV = """qkv (float[4,8] x) => (float[4,8] y)
    <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo> {
    [q] q = MatMul (x, wq) [k] k = MatMul (x, wk) [v] v = MatMul (x, wv)
    [turn] kt = Transpose <perm = [1, 0]> (k) [score] s = MatMul (q, kt)
    [soft] p = Softmax (s) [mix] m = MatMul (p, v) [out] y = MatMul (m, wo) }"""
RESIDUAL = """res (float[1,8,4,4] x) => (float[1,8,4,4] y)
    <float[8,8,1,1] w1, float[8,8,1,1] w2, float[8,8,1,1] w3, float[8,8,1,1] w4> {
    [stem] a = Conv (x, w1) [r1] b = Relu (a) [in] c = Conv (b, w2) [r2] d = Relu (c)
    [back] e = Conv (d, w3) [sum] f = Add (e, b) [r3] g = Relu (f)
    [last] h = Conv (g, w4) [sum2] y = Add (h, g) }"""
CONCAT = """cat (float[1,8,4,4] x) => (float[1,16,4,4] y)
    <float[8,8,1,1] w1, float[8,8,1,1] w2, float[16,16,1,1] w3> {
    [one] a = Conv (x, w1) [r1] b = Relu (a) [two] c = Conv (x, w2) [r2] d = Relu (c)
    [join] e = Concat <axis = 1> (b, d) [three] y = Conv (e, w3) }"""


@pytest.mark.parametrize(
    ("text", "tie", "expected"),
    [
        (SHARED, "weight", [("one", "two"), ("other",)]),
        (SHARED, "input", [("one",), ("other",), ("two",)]),
        (EMBEDDING, "weight", [("embed", "head"), ("mid",)]),
        (EMBEDDING, "sum", [("embed",), ("mid",), ("head",)]),
        (QKV, "input", [("q", "k", "v"), ("out",)]),
        (QKV, "weight", [("q",), ("k",), ("v",), ("out",)]),
        (RESIDUAL, "sum", [("stem", "back", "last"), ("in",)]),
        (RESIDUAL, "concat", [("stem",), ("in",), ("back",), ("last",)]),
        (CONCAT, "concat", [("one", "two"), ("three",)]),
        (CONCAT, "sum", [("one",), ("two",), ("three",)]),
    ],
)
def test_each_tie_alone(text: str, tie: Tie, expected: list[tuple[str, ...]]) -> None:
    assert members(text, tie) == expected


def test_convolutions_that_read_one_input_are_free() -> None:
    """Only projections, which a kernel may join, are tied by their input."""
    assert members(CONCAT, "input") == [("one",), ("two",), ("three",)]


def test_a_sum_ends_at_an_operator_that_is_not_linear() -> None:
    text = RESIDUAL.replace("[r2] d = Relu (c)\n    [back] e = Conv (d, w3)", "[back] e = Tanh (c)")
    assert text != RESIDUAL
    assert members(text, "sum") == [("stem", "last"), ("in",)]


def test_ties_of_the_target_are_weight_and_input() -> None:
    for text in (SHARED, EMBEDDING, QKV, RESIDUAL, CONCAT):
        assert members(text) == members(text, "weight", "input")
    assert members(RESIDUAL) == [("stem",), ("in",), ("back",), ("last",)]


def test_ties_connect_through_others() -> None:
    """q and k read one input; k and out read one weight: all three agree."""
    text = QKV.replace("MatMul (m, wo)", "MatMul (m, wk)")
    assert members(text, "weight", "input") == [("q", "k", "v", "out")]


@pytest.mark.parametrize(
    ("text", "tie", "reason"),
    [
        (SHARED, "weight", "read one weight"),
        (QKV, "input", "project one input"),
        (RESIDUAL, "sum", "are added to each other"),
        (CONCAT, "concat", "are concatenated"),
    ],
)
def test_groups_say_why(text: str, tie: Tie, reason: str) -> None:
    found = find_groups(built(text), ORT_CPU, (tie,))
    for group in found.values():
        assert group.reason == (reason if len(group.nodes) > 1 else "")


def _deep(names: list[str]) -> str:
    """Blocks of two layers each with a residual, all weights of one shape but the wide one."""
    lines, value = [], "x"
    weights = ", ".join(f"float[8,16] u{n}, float[16,8] d{n}" for n in names)
    for n in names:
        lines.append(f"""[{n}u] a{n} = MatMul ({value}, u{n}) [{n}t] b{n} = Tanh (a{n})
            [{n}d] c{n} = MatMul (b{n}, d{n}) [{n}s] v{n} = Add (c{n}, {value})
            [{n}n] n{n} = Tanh (v{n})""")
        value = f"n{n}"
    body = "\n".join(lines)
    return f"deep (float[2,8] x) => (float[2,8] y) <{weights}> {{ {body} [end] y = Exp ({value}) }}"


def test_repeated_blocks_play_equal_roles_whatever_their_names() -> None:
    names = ["p", "q", "r", "s", "t"]
    roles = [g.role for g in find_groups(built(_deep(names)), ORT_CPU).values()]
    up, down = roles[0::2], roles[1::2]
    # The first block reads the input and the last one feeds the end.
    assert len(set(up[1:-1])) == len(set(down[1:-1])) == 1
    assert set(up).isdisjoint(down)
    others = ["zebra", "alpha", "m", "k9", "b"]
    assert roles == [g.role for g in find_groups(built(_deep(others)), ORT_CPU).values()]


def test_shapes_tell_roles_apart() -> None:
    text = _deep(["p", "q", "r", "s", "t"])
    wider = text.replace("float[8,16] ur, float[16,8] dr", "float[8,32] ur, float[32,8] dr")
    assert wider != text
    roles = {name: g.role for name, g in find_groups(built(wider), ORT_CPU).items()}
    assert roles["qu"] == roles["su"] != roles["ru"]


@pytest.mark.parametrize(
    ("name", "ties", "count"),
    [
        ("fashion_resnet", (), 10),
        ("fashion_vit", (), 20),
        ("fashion_mobile", (), 14),
        ("fashion_lstm", (), 3),
        ("fashion_resnet", ("weight", "input", "sum", "concat"), 7),
        ("fashion_mobile", ("weight", "input", "sum", "concat"), 13),
    ],
)
def test_groups_of_the_shipped_models(
    pass_context: PassContext, name: str, ties: tuple[Tie, ...], count: int
) -> None:
    model = read(MODELS / f"{name}.onnx")
    model = Pipeline((Canonicalize(),)).run(model, pass_context).model
    found = find_groups(model, ORT_CPU, ties)
    assert len(found) == count
    nodes = [node for group in found.values() for node in group.nodes]
    assert len(nodes) == len(set(nodes))
