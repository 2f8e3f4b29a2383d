"""Patterns select nodes, and one that selects none is an error that helps."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from octavo.ir.errors import UsageError
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.passes.patterns import select

NODES = {"enc/conv.1": "Conv", "enc/relu.1": "Relu", "enc/conv.2": "Conv", "dec[0]": "Conv",
         "head": "Sigmoid"}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    """Five nodes in a row, named as exporters do."""
    nodes = [
        helper.make_node(op_type, [f"v{k}", "w"][: 1 + (op_type == "Conv")], [f"v{k + 1}"], name)
        for k, (name, op_type) in enumerate(NODES.items())
    ]
    kind, weight = (TensorProto.FLOAT, [1, 2, 4, 4]), np.ones((2, 2, 1, 1), np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("v0", *kind)],
        [helper.make_tensor_value_info("v5", *kind)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    return read(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head", ["head"]),
        ("enc/*", ["enc/conv.1", "enc/relu.1", "enc/conv.2"]),
        ("*.[12]", ["enc/conv.1", "enc/relu.1", "enc/conv.2"]),
        ("re:conv", ["enc/conv.1", "enc/conv.2"]),
        ("re:^enc.*2$", ["enc/conv.2"]),
        ("type:Conv", ["enc/conv.1", "enc/conv.2", "dec[0]"]),
    ],
)
def test_each_kind_selects_what_it_says(model: Model, pattern: str, names: list[str]) -> None:
    assert select(model, [pattern]) == dict.fromkeys(names, pattern)


def test_a_name_is_taken_literally_before_it_is_a_glob(model: Model) -> None:
    assert select(model, ["dec[0]"]) == {"dec[0]": "dec[0]"}


def test_the_first_pattern_is_the_reason(model: Model) -> None:
    found = select(model, ["enc/conv.1", "type:Conv"])
    assert found["enc/conv.1"] == "enc/conv.1"
    assert found["dec[0]"] == "type:Conv"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("hed", "did you mean head"),
        ("ENC/CONV.1", "enc/conv.1"),
        ("type:Convv", "did you mean type:Conv"),
        ("zzzz", "octavo inspect lists"),
    ],
)
def test_a_pattern_without_a_match_is_an_error(model: Model, pattern: str, hint: str) -> None:
    with pytest.raises(UsageError, match="selects no node") as error:
        select(model, ["head", pattern])
    assert pattern in error.value.what
    assert hint in error.value.hint


def test_a_broken_regular_expression_says_where(model: Model) -> None:
    with pytest.raises(UsageError, match="not a regular expression") as error:
        select(model, ["re:conv("])
    assert "position" in error.value.why


def test_no_patterns_select_nothing(model: Model) -> None:
    assert select(model, []) == {}
