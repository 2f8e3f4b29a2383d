"""A part of a model, fed with what the whole computes, computes what the whole computes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.backends.ort_session import OrtEvaluator
from octavo.ir.errors import UnknownName
from octavo.ir.extract import extract, values_by_name
from octavo.ir.read import read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model

    Values = dict[str, NDArray[np.generic]]

MODELS = Path(__file__).resolve().parents[2] / "models"
# Both sides run unoptimized: the same kernels on the same numbers.
RELATIVE = 1e-6
EVALUATOR = OrtEvaluator(threads=1, optimization="none")


def built(text: str) -> Model:
    """A model whose float weights are drawn by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = np.random.default_rng([*info.name.encode()]).standard_normal(shape)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return read(proto)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    wide = expected.astype(np.float64)
    bound = RELATIVE * float(np.abs(wide).max())
    np.testing.assert_allclose(actual.astype(np.float64), wide, rtol=0, atol=bound)


@cache
def shipped(name: str) -> tuple[Model, Values, Values]:
    """A shipped model, four images, and every value it computes of them."""
    model = read(MODELS / f"{name}.onnx")
    with np.load(MODELS / "fashion_test.npz") as data:
        (value,) = model.graph.inputs
        feed: Values = {value.name or "": data["input"][:4]}
    names = [v.name or "" for node in model.graph for v in node.outputs]
    return model, feed, next(iter(EVALUATOR.stream(model, _One(feed), names)))


class _One:
    """One feed as calibration data."""

    samples = 4
    sha256 = ""
    labels = None

    def __init__(self, feed: Values) -> None:
        self.feed = feed

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield self.feed


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_vit"])
@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_cut_of_a_shipped_model_computes_the_same(name: str, place: float) -> None:
    """Everything that is made before a place and read after it is fed."""
    model, feed, computed = shipped(name)
    nodes = list(model.graph)
    at = int(place * len(nodes))
    before = {v.name or "" for node in nodes[:at] for v in node.outputs}
    read_after = {v.name or "" for node in nodes[at:] for v in node.inputs if v is not None}
    cut = sorted(before & read_after)
    outputs = [v.name or "" for v in model.graph.outputs]
    part = extract(model, cut, outputs)
    assert len(list(part.graph)) <= len(nodes) - at
    known = {**feed, **computed}
    # Other numbers go in than the graph inputs would give, so that nothing is computed again.
    moved = EVALUATOR.run(part, {v.name or "": known[v.name or ""] for v in part.graph.inputs})
    assert {v.name for v in part.graph.inputs} >= set(cut)
    assert list(moved) == outputs
    for output in outputs:
        close(moved[output], computed[output])
    head = extract(model, (), cut)
    found = EVALUATOR.run(head, feed)
    for value in cut:
        close(found[value], computed[value])


def test_the_source_is_left_alone() -> None:
    model, _, _ = shipped("fashion_resnet")
    before = model.fingerprint
    names = [v.name or "" for node in model.graph for v in node.outputs]
    extract(model, [names[4]], [names[9]])
    assert model.fingerprint == before


_CHAIN = """chain (float[2,4] x, float[2,4] other) => (float[2,4] y) <float[4,4] w> {
    [one] a = MatMul (x, w) [sum] b = Add (a, other) [exp] y = Tanh (b) }"""


def test_a_constant_becomes_an_input() -> None:
    model = built(_CHAIN)
    part = extract(model, ["a", "w", "x"], ["y"])
    # The weight and the input are asked for although nobody reads them behind `a`.
    assert {v.name for v in part.graph.inputs} >= {"a", "other"}
    part = extract(model, ["w"], ["y"])
    assert [v.name for v in part.graph.inputs] == ["x", "other", "w"]
    x, other, w = normal(2, 4), normal(2, 4, seed=1), normal(4, 4, seed=2)
    found = EVALUATOR.run(part, {"x": x, "other": other, "w": w})
    close(found["y"], np.tanh(x @ w + other))


def test_graph_inputs_that_nobody_needs_are_gone() -> None:
    part = extract(built(_CHAIN), ["b"], ["y"])
    assert [v.name for v in part.graph.inputs] == ["b"]
    assert [node.name for node in part.graph] == ["exp"]
    assert not part.graph.initializers


def test_a_value_may_be_both_fed_and_asked_for() -> None:
    a = normal(2, 4)
    found = EVALUATOR.run(extract(built(_CHAIN), ["b"], ["b", "y"]), {"b": a})
    close(found["b"], a)
    close(found["y"], np.tanh(a))


_HALVES = """halves (float[2,4] x) => (float[2,2] y) {
    [halve] a, b = Split <num_outputs = 2, axis = 1> (x) [both] y = Mul (a, b) }"""


def test_one_output_of_a_node_may_be_fed_while_another_is_computed() -> None:
    part = extract(built(_HALVES), ["a"], ["y", "a"])
    x, a = normal(2, 4), normal(2, 2, seed=1)
    found = EVALUATOR.run(part, {"x": x, "a": a})
    close(found["y"], a * x[:, 2:])
    close(found["a"], a)


_TIED = """tied (int64[3] tokens) => (float[3,8] logits, float[3,4] e) <float[8,4] table> {
    [embed] e = Gather (table, tokens) [act] h = Tanh (e)
    [turn] t = Transpose <perm = [1, 0]> (table) [head] logits = MatMul (h, t) }"""


def test_a_tied_weight_is_fed_to_all_its_readers() -> None:
    tokens, table = np.array([1, 7, 2]), normal(8, 4, seed=3)
    part = extract(built(_TIED), ["table"], ["logits", "e"])
    found = EVALUATOR.run(part, {"tokens": tokens, "table": table})
    close(found["logits"], np.tanh(table[tokens]) @ table.T)
    close(found["e"], table[tokens])


def test_one_side_of_a_tied_weight_is_fed_alone() -> None:
    """The transposed value is an input; the embedding still reads the constant."""
    model = built(_TIED)
    table = model.graph.initializers["table"].const_value
    assert table is not None
    tokens, turned = np.array([1, 7, 2]), normal(4, 8, seed=3)
    found = EVALUATOR.run(extract(model, ["t"], ["logits"]), {"tokens": tokens, "t": turned})
    close(found["logits"], np.tanh(table.numpy()[tokens]) @ turned)


_IF = """branch (float[4] x, bool c) => (float[4] y) <float[4] w> {
    [one] a = Exp (x)
    [if] y = If (c) <then_branch = yes () => (float[4] p) { [add] p = Add (a, w) },
                     else_branch = no () => (float[4] q) { [sub] q = Sub (a, w) }> }"""


@pytest.mark.parametrize("taken", [True, False])
def test_a_body_reads_what_is_fed(taken: bool) -> None:
    part = extract(built(_IF), ["a", "w"], ["y"])
    a, w = normal(4), normal(4, seed=1)
    found = EVALUATOR.run(part, {"c": np.array(taken), "a": a, "w": w})
    close(found["y"], a + w if taken else a - w)
    assert {v.name for v in part.graph.inputs} == {"c", "a", "w"}


@pytest.mark.parametrize(("inputs", "outputs"), [(["bb"], ["y"]), (["b"], ["yy"])])
def test_unknown_values_are_refused(inputs: list[str], outputs: list[str]) -> None:
    with pytest.raises(UnknownName, match="value"):
        extract(built(_CHAIN), inputs, outputs)


def test_all_values_have_names() -> None:
    assert set(values_by_name(built(_CHAIN))) == {"x", "other", "w", "a", "b", "y"}
