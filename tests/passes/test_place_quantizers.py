"""Where activation quantizers go for a given plan, who reads them, and who shares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from octavo.ir.facts import Choice, Option, Placement, Plan
from octavo.ir.read import read
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext


def placed(
    body: str, ctx: PassContext, *static: str, outputs: str = "float[1,4,8,8] y"
) -> Placement:
    """The placement when the named nodes are static; `w…` are 1x1 convolutions."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[1,4,8,8] x, bool c) => ({outputs})
        <float[4,4,1,1] w, float zero = {{0.0}}, float six = {{6.0}}, int64[4] shape = {{1,4,8,8}},
         float[1,4,8,8] offset, int64[2] halves = {{2,2}}> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for info in proto.graph.value_info:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(
            numpy_helper.from_array(np.ones(dims, np.float32), info.name)
        )
    del proto.graph.value_info[:]
    model = _planned(read(proto), static)
    return Pipeline.parse("place-quantizers").run(model, ctx).model.fact(Placement)


def _planned(model: Model, static: tuple[str, ...]) -> Model:
    names = {node.name for node in model.graph}
    assert set(static) <= names
    return model.with_fact(Plan({n: Choice(Option("static"), "") for n in static}, "test"))


def test_a_kernel_reads_and_writes_codes(pass_context: PassContext) -> None:
    found = placed("[conv] y = Conv (x, w)", pass_context, "conv")
    assert list(found.sites) == ["x", "y"]
    assert found.consumers == {"x": ("conv",), "y": ()}
    assert str(found.sites["x"].spec) == "u8/tensor"
    assert found.fused == {}


@pytest.mark.parametrize(
    ("activation", "high"), [("Relu (a)", float("inf")), ("Clip (a, zero, six)", 6.0)]
)
def test_the_quantizer_goes_behind_an_absorbed_activation(
    pass_context: PassContext, activation: str, high: float
) -> None:
    found = placed(f"[conv] a = Conv (x, w) [act] y = {activation}", pass_context, "conv")
    assert list(found.sites) == ["x", "y"]
    assert (found.sites["y"].nonnegative, found.sites["y"].clip_high) == (True, high)
    assert found.fused == {"act": "conv"}
    assert not found.sites["x"].nonnegative


def test_a_float_node_in_between_gets_no_quantizer(pass_context: PassContext) -> None:
    body = "[one] a = Conv (x, w) [exp] b = Exp (a) [two] y = Conv (b, w)"
    found = placed(body, pass_context, "one", "two")
    assert list(found.sites) == ["x", "a", "b", "y"]
    # Only codes are computed of `a`; `b` is a float that one node quantizes.
    assert found.consumers == {"x": ("one",), "a": ("exp",), "b": ("two",), "y": ()}


def test_float_readers_keep_the_float_input(pass_context: PassContext) -> None:
    body = "[conv] a = Conv (x, w) [exp] b = Exp (x) [add] y = Add (a, b)"
    assert placed(body, pass_context, "conv").consumers["x"] == ("conv",)


def test_nodes_that_are_not_static_get_nothing(pass_context: PassContext) -> None:
    body = "[one] a = Conv (x, w) [two] y = Conv (a, w)"
    assert placed(body, pass_context) == Placement({}, {}, {})
    assert list(placed(body, pass_context, "one").sites) == ["x", "a"]


def test_a_matmul_may_leave_its_output_float(pass_context: PassContext) -> None:
    found = placed("[mm] y = MatMul (x, x)", pass_context, "mm")
    assert list(found.sites) == ["x"]


def test_movement_shares_its_parameters(pass_context: PassContext) -> None:
    body = """[conv] a = Conv (x, w) [relu] b = Relu (a) [shape] d = Reshape (b, shape)
        [turn] e = Transpose (d) [pool] y = MaxPool <kernel_shape = [1,1]> (e)"""
    found = placed(body, pass_context, "conv", "shape", "turn", "pool")
    assert {site.group for name, site in found.sites.items() if name != "x"} == {"b"}
    # What the Relu says of zero holds for all that it was moved to.
    assert all(site.nonnegative for name, site in found.sites.items() if name != "x")
    assert found.sites["x"].group == "x"


def test_all_outputs_of_a_split_share_with_its_input(pass_context: PassContext) -> None:
    body = "[split] y, z = Split <axis = 1> (x, halves)"
    found = placed(body, pass_context, "split", outputs="float[1,2,8,8] y, float[1,2,8,8] z")
    assert {site.group for site in found.sites.values()} == {"x"}
    assert list(found.sites) == ["x", "y", "z"]


def test_a_residual_has_parameters_of_its_own(pass_context: PassContext) -> None:
    body = "[conv] a = Conv (x, w) [add] y = Add (a, x)"
    found = placed(body, pass_context, "conv", "add")
    assert {name: site.group for name, site in found.sites.items()} == {
        "x": "x",
        "a": "a",
        "y": "y",
    }
    assert found.consumers["x"] == ("conv", "add")


def test_a_constant_operand_is_quantized_too(pass_context: PassContext) -> None:
    found = placed("[add] y = Add (x, offset)", pass_context, "add")
    assert set(found.sites) == {"x", "offset", "y"}
    assert found.consumers["offset"] == ("add",)


def test_an_operator_may_fix_its_range(pass_context: PassContext) -> None:
    found = placed("[sig] y = Sigmoid (x)", pass_context, "sig")
    assert found.sites["y"].fixed == (0.0, 1.0)
    assert found.sites["x"].fixed is None


def test_a_value_read_twice_is_listed_once(pass_context: PassContext) -> None:
    found = placed("[add] y = Add (x, x)", pass_context, "add")
    assert found.consumers["x"] == ("add",)


def test_a_body_reads_the_quantized_value(pass_context: PassContext) -> None:
    body = """[conv] a = Conv (x, w) [if] y = If (c) <
        then_branch = yes () => (float[1,4,8,8] t) { [exp] t = Exp (a) },
        else_branch = no () => (float[1,4,8,8] e) { [neg] e = Neg (x) }>"""
    found = placed(body, pass_context, "conv")
    assert found.consumers == {"x": ("conv",), "a": ("exp",)}
