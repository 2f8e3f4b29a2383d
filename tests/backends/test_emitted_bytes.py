"""Bytes predicted for a plan against the file that lowering writes for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest

from octavo.backends.ort_lowering import lower
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.facts import FLOAT, Choice, Method, Option, Plan, Range, Ranges
from octavo.ir.menu import Menu
from octavo.ir.option_bytes import table_bytes, weight_bytes
from octavo.ir.quant import PerAxis, PerBlock, QuantSpec, QuantType
from octavo.ir.read import read
from octavo.models import shipped
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.insert_fake_quant import InsertFakeQuant
from octavo.passes.offer_options import OfferOptions
from octavo.passes.place_quantizers import PlaceQuantizers

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

# What names and nodes may differ by for every node that is not float: activation quantizers
# that several nodes share or that only an output needs.
_BYTES_PER_NODE = 300
_SHARE = 0.002
# Names of a kind of node are as long as the value that it computes is, which varies.
_TIED_BYTES = 200
_PLANS: tuple[tuple[Method, QuantType, int], ...] = (
    ("static", "s8", 0),
    ("static", "s4", 0),
    ("static", "s2", 0),
    ("dynamic", "s8", 0),
    ("dynamic", "s5", 0),
    ("storage", "s8", 0),
    ("storage", "s3", 0),
    ("storage", "s1", 0),
    ("storage", "f16", 0),
    ("weight-only", "s4", 32),
    ("weight-only", "s3", 64),
    ("weight-only", "s6", 32),
    ("weight-only", "s2", 128),
    ("weight-only", "u4", 32),
    ("weight-only", "u2", 64),
)


def _option(
    node: onnx_ir.Node, method: Method, dtype: QuantType, size: int, *, half: bool
) -> Option:
    row = ORT_CPU.support(node, method).row
    if row is None:
        return FLOAT
    if dtype == "f16":
        return Option(method, QuantSpec("f16"))
    if node.op_type == "LSTM":
        return Option(method, QuantSpec(dtype, PerBlock(2, 0), symmetric=True, half_scales=half))
    weight = node.inputs[row.weights[0]]
    assert weight is not None
    assert weight.shape is not None
    axis = row.weight_axis % weight.shape.rank()
    granularity = PerBlock(1 - axis, size) if size else PerAxis(axis)
    even = dtype[0] == "s"
    return Option(method, QuantSpec(dtype, granularity, symmetric=even, half_scales=half))


def _file_bytes(model: Model, options: Mapping[str, Option], path: Path, ctx: PassContext) -> int:
    model = model.with_fact(Plan({n: Choice(o, "") for n, o in options.items()}, ""))
    for pass_ in (PlaceQuantizers(), InsertFakeQuant()):
        model = pass_.run(model.clone(), ctx)
    return lower(model, path).bytes


@pytest.mark.parametrize("half", [False, True], ids=["", "half"])
@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-vit", "fashion-lstm"])
def test_a_plan_takes_the_bytes_it_was_chosen_for(
    name: str, half: bool, tmp_path: Path, pass_context: PassContext
) -> None:
    model = Canonicalize().run(read(shipped(name)), pass_context)
    values = [v for node in model.graph for v in node.outputs] + list(model.graph.inputs)
    ranges = {v.name or "": Range(-4.0, 4.0, -4.0, 4.0) for v in values}
    model = model.with_fact(Ranges(ranges, "", 1, ""))
    rows = {n.name or "": ORT_CPU.support(n, "storage").row for n in model.graph}
    weights = {name: row.weights for name, row in rows.items() if row is not None}
    nodes = {n.name or "": n for n in model.graph if n.name in weights}

    def predicted(options: Mapping[str, Option]) -> int:
        each = (weight_bytes(nodes[n], weights[n], option) for n, option in options.items())
        return sum(each) + table_bytes(options.values())

    floats = dict.fromkeys(nodes, FLOAT)
    path = tmp_path / "m.onnx"
    fixed = _file_bytes(model, floats, path, pass_context) - predicted(floats)
    for method, dtype, size in _PLANS:
        options = {n: _option(node, method, dtype, size, half=half) for n, node in nodes.items()}
        changed = sum(option is not FLOAT for option in options.values())
        actual = _file_bytes(model, options, path, pass_context)
        error = abs(fixed + predicted(options) - actual)
        assert changed
        assert error <= max(_SHARE * actual, _BYTES_PER_NODE * changed), (method, dtype)
        if method == "storage":
            assert error <= 50 * changed, dtype


_TIED = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[2] k, float[3,640] x) => (float[2,640] e, float[3,997] y) {
    [embed] e = Gather (table, k)  [turn] t = Transpose <perm = [1, 0]> (table)
    [head] y = MatMul (x, t) }"""


def test_every_offer_of_a_tied_weight_takes_its_bytes(
    tmp_path: Path, pass_context: PassContext
) -> None:
    """One table for all that read it: more than its names vary by would be a second one."""
    proto = onnx.parser.parse_model(_TIED)
    array = np.random.default_rng(0).standard_normal((997, 640)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "table"))
    model = Canonicalize().run(read(proto), pass_context)
    menu = OfferOptions().run(model, pass_context).fact(Menu)
    assert len(menu.offers["embed"]) > 20
    for offer in menu.offers["embed"]:
        actual = _file_bytes(model, offer.options, tmp_path / "m.onnx", pass_context)
        predicted = menu.fixed_bytes + offer.bytes + table_bytes(offer.options.values())
        assert abs(actual - predicted) <= _TIED_BYTES, offer.name
