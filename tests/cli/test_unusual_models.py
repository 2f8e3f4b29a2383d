"""Models at the edges of what compiles: each computes what its source does, with and without data.

`w_4x3` in `unusual_models.txt` is a seeded normal weight, `z_4x3` one of zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from octavo.api import compile as compiled_from
from octavo.backends.ort_session import make_session
from octavo.cli.compilation import Compiled
from octavo.ir.errors import CalibrationError
from octavo.ir.read import read

Feed = dict[str, NDArray[Any]]
TEXTS = Path(__file__).with_name("unusual_models.txt").read_text(encoding="utf-8")
MODELS = {text.split(maxsplit=1)[0]: text for text in TEXTS.split("// -----\n")}
WEIGHT = re.compile(r"\b[wz]_\d[\dx]*(?:_[a-z])?\b")
IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13}
# ‖error‖ / ‖output‖ of a few int8 layers.
INT8_ERROR = 0.07
FREE_DIMENSION = 4


@cache
def source(name: str, opset: int = 21) -> onnx.ModelProto:
    """A model with its weights; one that the text declares as input stays one, with a default."""
    head, arrow, rest = MODELS[name].partition("=>")
    weights = sorted(set(WEIGHT.findall(MODELS[name])))
    added = [f"float[{','.join(_sizes(w))}] {w}" for w in weights if w not in head]
    inputs = ", ".join([head.rstrip()[:-1], *added])
    header = f'<ir_version: {IR_VERSIONS[opset]}, opset_import: ["" : {opset}]>'
    proto = onnx.parser.parse_model(f"{header} {inputs}) {arrow} {rest}")
    rng = np.random.default_rng(3)
    for weight in weights:
        shape = [int(size) for size in _sizes(weight)]
        fan_in = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
        drawn = rng.standard_normal(shape) / math.sqrt(max(fan_in, 1))
        array = (drawn if weight[0] == "w" else 0 * drawn).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, weight))
    for value in [v for v in proto.graph.input if v.name in weights and v.name not in head]:
        proto.graph.input.remove(value)
    return proto


def _sizes(weight: str) -> Sequence[str]:
    return weight.split("_")[1].split("x")


def feed_of(name: str, seed: int) -> Feed:
    """Seeded inputs; the condition alternates with the seed."""
    proto, rng = source(name), np.random.default_rng(seed)
    constants = {tensor.name for tensor in proto.graph.initializer}
    feed: Feed = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        drawn = rng.standard_normal([d.dim_value or FREE_DIMENSION for d in tensor.shape.dim])
        if name == "empty_batch":
            drawn = drawn[:0]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind == "i":
            drawn = np.abs(drawn) * 4
        feed[value.name] = np.asarray(drawn).astype(dtype)
    feed |= {"c": np.asarray(seed % 2 == 1)} if "c" in feed else {}
    feed |= {"front": np.zeros(1, np.int64)} if "front" in feed else {}
    return {k: array for k, array in feed.items() if k not in constants}


def compiled(name: str, calibrated: bool, opset: int = 21) -> Compiled:
    feeds = [feed_of(name, seed) for seed in range(4)] if calibrated else None
    shapes = {k: array.shape for k, array in feed_of(name, 0).items() if array.ndim}
    return compiled_from(read(source(name, opset)), calibration=feeds, shapes=shapes, measure=False)


def assert_computes_its_source(name: str, found: Compiled, opset: int = 21) -> None:
    assert found.audit.ok, [row for row in found.audit.rows if not row.ok]
    assert not found.audit.findings
    before = make_session(source(name, opset).SerializeToString(), threads=1)
    after = make_session(found.artifact.path, threads=1)
    for seed in (100, 101):
        expected, actual = before.run(feed_of(name, seed)), after.run(feed_of(name, seed))
        assert list(actual) == list(expected)
        for output, truth in expected.items():
            array = actual[output]
            assert (array.dtype, array.shape) == (truth.dtype, truth.shape), output
            if truth.dtype.kind == "f":
                error = np.subtract(array, truth, dtype=np.float64)
                assert np.linalg.norm(error) <= INT8_ERROR * np.linalg.norm(truth), output
            else:
                np.testing.assert_array_equal(array, truth, err_msg=output)


def methods(found: Compiled) -> dict[str, str]:
    """The method of every planned node, `absorbed` for what another kernel does along."""
    return {
        node.node: "absorbed" if node.absorbed_by else node.option.partition(":")[0]
        for node in found.artifact.planned
    }


def initializers(found: Compiled) -> dict[str, NDArray[Any]]:
    graph = onnx.load(found.artifact.path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("name", MODELS)
def test_without_data(name: str) -> None:
    assert_computes_its_source(name, compiled(name, calibrated=False))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "empty_batch"])
def test_with_data(name: str) -> None:
    assert_computes_its_source(name, compiled(name, calibrated=True))


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_opsets(opset: int) -> None:
    found = compiled("batch_one", True, opset)
    assert_computes_its_source("batch_one", found, opset)
    assert methods(found)["a"] == "static"
    assert onnx.load(found.artifact.path).ir_version == IR_VERSIONS[opset]


def test_a_weight_that_two_convolutions_share_is_stored_once() -> None:
    found = compiled("shared_convolution_weight", calibrated=True)
    assert methods(found) == {"a": "static", "b": "static", "r": "absorbed"}
    assert [a.shape for a in initializers(found).values() if a.size > 16] == [(16, 16, 3, 3)]


def test_a_weight_read_along_two_axes_has_two_sets_of_codes() -> None:
    found = compiled("weight_shared_along_two_axes", calibrated=True)
    assert {node.option for node in found.artifact.planned} == {
        "static:s8/axis0",
        "static:s8/axis1",
    }
    codes = [a for a in initializers(found).values() if a.dtype == np.int8 and a.ndim == 2]
    first, second = codes
    assert not np.array_equal(first, second)


def test_a_tied_embedding_keeps_no_float_copy() -> None:
    found = compiled("tied_embedding", calibrated=False)
    floats = [a for a in initializers(found).values() if a.dtype == np.float32]
    assert max(a.size for a in floats) <= 300


@pytest.mark.parametrize(
    ("name", "node", "weight"),
    [("weight_is_output", "a", "w_64x64"), ("captured_by_if", "a", "w_16x16x3x3")],
)
def test_a_weight_that_is_needed_in_float_is_not_stored_beside_it(
    name: str, node: str, weight: str
) -> None:
    found = compiled(name, calibrated=False)
    assert methods(found)[node] == "float"
    shape = tuple(map(int, _sizes(weight)))
    same = {n for n, array in initializers(found).items() if array.shape == shape}
    assert same - {f"{weight}_b_q"} == {weight}


def test_a_body_stays_float_and_reads_what_the_integer_part_computes() -> None:
    found = compiled("captured_by_if", calibrated=True)
    chosen = methods(found)
    assert {name: chosen[name] for name in "abr"} == {
        "a": "static",
        "b": "static",
        "r": "absorbed",
    }
    assert not {"tt", "ee"} & set(chosen)
    graph = onnx.load(found.artifact.path).graph
    branch = next(node for node in graph.node if node.name == "if")
    bodies = [attribute.g for attribute in branch.attribute]
    ops = sorted([node.op_type for node in body.node] for body in bodies)
    assert ops == [["DequantizeLinear", "Conv"], ["DequantizeLinear", "Tanh"]]


@pytest.mark.parametrize(
    "name", ["no_nodes", "nothing_to_quantize", "integer_only", "boolean_only"]
)
def test_nothing_to_do_changes_nothing(name: str) -> None:
    found = compiled(name, calibrated=True)
    assert methods(found) == {}
    nodes = [node.op_type for node in onnx.load(found.artifact.path).graph.node]
    assert nodes == [node.op_type for node in source(name).graph.node]


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the sample is empty"):
        compiled("empty_batch", calibrated=True)


def test_a_matrix_bias_keeps_a_gemm_from_integer_kernels() -> None:
    found = compiled("gemm_with_matrix_bias", calibrated=True)
    assert set(methods(found).values()) == {"storage"}
    assert "one entry per column" in found.artifact.planned[0].reason
