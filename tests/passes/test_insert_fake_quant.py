"""The plan as nodes: which parameters they carry, and that the graph computes what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.facts import Choice, Option, Placement, Plan, Range, Ranges, Site
from octavo.ir.fake_quant import OPTION, params_of
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    QuantSpec,
    dequantize,
    params_for_range,
    params_for_weight,
    quantize,
)
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

_TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[3,4] x) => (float[3,4] y) <float[4,4] w> {
    [one] a = MatMul (x, w) [exp] b = Tanh (a) [two] c = MatMul (b, w) [end] y = Neg (c) }"""
WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
S8 = QuantSpec("s8", PerAxis(1), symmetric=True)
U8 = QuantSpec("u8")
# One more float32 rounding per product than numpy's own order of sums.
RELATIVE = 1e-6


@pytest.fixture
def model() -> Model:
    proto = onnx.parser.parse_model(_TEXT)
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return read(proto)


def inserted(
    model: Model,
    ctx: PassContext,
    options: Mapping[str, Option],
    placement: Placement | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Model:
    plan = Plan({name: Choice(option, "") for name, option in options.items()}, "test")
    own = model.with_fact(plan)
    if placement is not None:
        known = {k: Range(low, high, low, high) for k, (low, high) in (ranges or {}).items()}
        own = own.with_fact(placement).with_fact(Ranges(known, "min-max", 1, ""))
    return Pipeline.parse("insert-fake-quant").run(own, ctx).model


def fakes(model: Model) -> dict[str, onnx_ir.Node]:
    return {node.name or "": node for node in model.graph if node.domain == "octavo"}


def output_of(model: Model, ctx: PassContext) -> NDArray[np.float32]:
    return np.asarray(ctx.evaluator.run(model, {"x": X})["y"], np.float32)


def rounded(array: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    params = params_for_weight(array, spec)
    return dequantize(quantize(array, params), params)


def test_a_stored_weight_is_rounded_for_its_readers_only(
    model: Model, pass_context: PassContext
) -> None:
    found = inserted(model, pass_context, {"one": Option("storage", S8)})
    assert list(fakes(found)) == ["w_storage"]
    assert fakes(found)["w_storage"].outputs[0].consumers()[0].name == "one"
    expected = -(np.tanh(X @ rounded(WEIGHT, S8)) @ WEIGHT)
    actual = output_of(found, pass_context)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * 4)


def test_readers_with_one_option_share_a_quantizer(model: Model, pass_context: PassContext) -> None:
    options = {"one": Option("storage", S8), "two": Option("storage", S8)}
    found = inserted(model, pass_context, options)
    assert list(fakes(found)) == ["w_storage"]
    assert len(fakes(found)["w_storage"].outputs[0].uses()) == 2


def test_readers_along_other_axes_have_their_own(model: Model, pass_context: PassContext) -> None:
    rows = QuantSpec("s8", PerAxis(0), symmetric=True)
    options = {"one": Option("storage", S8), "two": Option("storage", rows)}
    found = inserted(model, pass_context, options)
    specs = {name: str(params_of(node).spec) for name, node in fakes(found).items()}
    assert specs == {"w_storage": "s8/axis1", "w_storage1": "s8/axis0"}
    expected = -(np.tanh(X @ rounded(WEIGHT, S8)) @ rounded(WEIGHT, rows))
    actual = output_of(found, pass_context)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * 4)


def test_a_block_is_a_share_of_an_axis(model: Model, pass_context: PassContext) -> None:
    blocks = QuantSpec("s8", PerBlock(0, 2), symmetric=True)
    found = inserted(model, pass_context, {"one": Option("weight-only", blocks)})
    (fake,) = fakes(found).values()
    assert (fake.op_type, params_of(fake).scale.shape) == ("FakeQuantBlocks", (2, 4))
    expected = -(np.tanh(X @ rounded(WEIGHT, blocks)) @ WEIGHT)
    actual = output_of(found, pass_context)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * 4)


def test_a_dynamic_node_rounds_what_it_reads(model: Model, pass_context: PassContext) -> None:
    found = inserted(model, pass_context, {"one": Option("dynamic", S8)})
    assert {n: node.op_type for n, node in fakes(found).items()} == {
        "w_dynamic": "FakeQuant",
        "x_dynamic": "FakeQuantDynamic",
    }
    one = next(node for node in found.graph if node.name == "one")
    assert [value.name for value in one.inputs if value] == ["x_dynamic_fq", "w_dynamic_fq"]
    assert one.metadata_props[OPTION] == "dynamic:s8/axis1"


def test_a_placed_value_takes_the_range_of_its_group(
    model: Model, pass_context: PassContext
) -> None:
    sites = {"x": Site("x", U8, "x"), "b": Site("b", U8, "x")}
    placement = Placement(sites, {"x": ("one",), "b": ("two",)}, {})
    found = inserted(model, pass_context, {}, placement, {"x": (-1.0, 2.0), "b": (-3.0, 1.0)})
    wanted = params_for_range(U8, -3.0, 2.0)
    for name in ("x_quant", "b_quant"):
        params = params_of(fakes(found)[name])
        assert (params.scale, params.zero_point) == (wanted.scale, wanted.zero_point)


@pytest.mark.parametrize(
    ("site", "low", "high"),
    [
        (Site("x", U8, "x"), -1.0, 9.0),
        (Site("x", U8, "x", nonnegative=True), 0.0, 9.0),
        (Site("x", U8, "x", nonnegative=True, clip_high=6.0), 0.0, 6.0),
        (Site("x", U8, "x", fixed=(0.0, 1.0)), 0.0, 1.0),
    ],
)
def test_what_a_site_says_bounds_the_range(
    model: Model, pass_context: PassContext, site: Site, low: float, high: float
) -> None:
    placement = Placement({"x": site}, {"x": ("one",)}, {})
    found = inserted(model, pass_context, {}, placement, {"x": (-1.0, 9.0)})
    params, wanted = params_of(fakes(found)["x_quant"]), params_for_range(U8, low, high)
    assert (params.scale, params.zero_point) == (wanted.scale, wanted.zero_point)


def test_only_the_listed_readers_read_codes(model: Model, pass_context: PassContext) -> None:
    placement = Placement({"a": Site("a", U8, "a")}, {"a": ()}, {})
    found = inserted(model, pass_context, {}, placement, {"a": (-1.0, 1.0)})
    exp = next(node for node in found.graph if node.name == "exp")
    assert exp.inputs[0] is not None
    assert exp.inputs[0].name == "a"


def test_a_quantized_output_keeps_its_name(model: Model, pass_context: PassContext) -> None:
    placement = Placement({"y": Site("y", U8, "y")}, {"y": ()}, {})
    found = inserted(model, pass_context, {}, placement, {"y": (-1.0, 1.0)})
    (output,) = found.graph.outputs
    producer = output.producer()
    assert output.name == "y"
    assert producer is not None
    assert producer.op_type == "FakeQuant"
    actual = output_of(found, pass_context)
    params = params_for_range(U8, -1.0, 1.0)
    expected = output_of(model, pass_context)
    np.testing.assert_allclose(
        actual, dequantize(quantize(expected, params), params), rtol=RELATIVE, atol=0
    )


def test_float_nodes_are_left_alone(model: Model, pass_context: PassContext) -> None:
    found = inserted(model, pass_context, {"one": Option("float")})
    assert found.fingerprint == model.fingerprint
