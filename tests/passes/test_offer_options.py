"""What each group is offered, by the target's table and the request, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from octavo.ir.errors import UsageError
from octavo.ir.menu import Menu
from octavo.ir.option_bytes import option_bytes
from octavo.ir.quant import turned
from octavo.ir.read import read
from octavo.passes.calibrate import Calibrate
from octavo.passes.offer_options import OfferOptions
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.ir.quant import QuantSpec
    from octavo.passes.base import PassContext

    Calibrated = Callable[..., PassContext]

QKV = """qkv (float[4,64] x) => (float[4,64] y)
    <float[64,64] wq, float[64,64] wk, float[64,64] wv> {
    [in] e = Exp (x) [q] q = MatMul (e, wq) [k] k = MatMul (e, wk) [v] v = MatMul (e, wv)
    [one] a = Sub (q, k) [two] y = Sub (a, v) }"""
CONV = """conv (float[1,16,8,8] x) => (float[1,16,8,8] y) <float[16,16,3,3] w> {
    [conv] a = Conv <pads = [1,1,1,1]> (x, w) [exp] y = Exp (a) }"""
TIED = """tied (int64[3] k) => (float[3,96] y) <float[96,64] table> {
    [embed] e = Gather (table, k) [act] h = Exp (e)
    [turn] t = Transpose <perm = [1, 0]> (table) [head] y = MatMul (h, t) }"""


def built(text: str) -> Model:
    """A model whose float weights are drawn by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = np.random.default_rng([*info.name.encode()]).standard_normal(shape)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return read(proto)


def menu_of(model: Model, ctx: PassContext, request: OfferOptions) -> Menu:
    passes = (request,) if ctx.calibration is None else (Calibrate(), request)
    return Pipeline(passes).run(model, ctx).model.fact(Menu)


def methods(offers: tuple[Offer, ...]) -> set[str]:
    return {option.method for offer in offers for option in offer.options.values()}


def test_a_convolution_with_ranges(calibrated: Calibrated) -> None:
    model = built(CONV)
    offers = menu_of(model, calibrated(model), OfferOptions(bits=(8, 4))).offers["conv"]
    assert offers[0].name == "float"
    assert [str(offer.name).split(":")[0] for offer in offers] == [
        "float", "storage", "static", "static", "storage", "storage",
    ]  # fmt: skip
    assert [offer.integer for offer in offers] == [False, False, True, True, False, False]
    assert offers[1].name == "storage:f16/tensor"


def test_without_ranges_nothing_is_static(pass_context: PassContext) -> None:
    menu = menu_of(built(CONV), pass_context, OfferOptions())
    assert methods(menu.offers["conv"]) == {"float", "storage"}
    menu = menu_of(built(QKV), pass_context, OfferOptions())
    assert methods(menu.offers["q"]) == {"float", "dynamic", "weight-only", "storage"}


def test_projections_of_one_input_share_their_offers(calibrated: Calibrated) -> None:
    model = built(QKV)
    menu = menu_of(model, calibrated(model), OfferOptions())
    assert menu.groups["q"].nodes == ("q", "k", "v")
    assert not {"k", "v"} & set(menu.offers)
    for offer in menu.offers["q"]:
        assert list(offer.options) == ["q", "k", "v"]
        assert len(set(offer.options.values())) == 1
        assert "+" not in offer.name
    names = [offer.name for offer in menu.offers["q"]]
    assert len(names) == len(set(names))


def test_what_is_switched_off_is_not_offered(calibrated: Calibrated) -> None:
    model = built(QKV)
    ctx = calibrated(model)
    every = {"static", "dynamic", "weight-only", "storage"}
    for method in every:
        off = OfferOptions(**{method.replace("-", "_"): False})  # type: ignore[arg-type]
        found = menu_of(model, ctx, off).offers["q"]
        assert methods(found) == {"float", *every} - {method}


def test_kept_nodes_are_offered_float_alone(pass_context: PassContext) -> None:
    """One kept node keeps all that must agree with it, and the group says by which pattern."""
    menu = menu_of(built(QKV), pass_context, OfferOptions(keep_float=("k",)))
    assert [offer.name for offer in menu.offers["q"]] == ["float"]
    assert menu.groups["q"].reason == "kept float by 'k'"


def test_bytes_are_those_of_the_three_weights(calibrated: Calibrated) -> None:
    model = built(QKV)
    for offer in menu_of(model, calibrated(model), OfferOptions()).offers["q"]:
        option = offer.options["q"]
        one = option_bytes((64, 64), option, name_bytes=len("wq"), value_bytes=len("e"))
        assert offer.bytes == 3 * one.total


def test_bit_operations(calibrated: Calibrated) -> None:
    """4 rows of 64 sums of 64 products, three times."""
    model = built(QKV)
    products = 3 * 4 * 64 * 64
    activations = {"static": 8, "dynamic": 8, "weight-only": 32}
    for offer in menu_of(model, calibrated(model), OfferOptions()).offers["q"]:
        option = offer.options["q"]
        if option.method in activations and option.weight is not None:
            assert offer.bops == products * option.weight.bits * activations[option.method]
        else:
            # Unpacked when the model loads: multiplied as floats.
            assert offer.bops == products * 32 * 32


def test_a_lookup_tied_to_a_product(pass_context: PassContext) -> None:
    """The lookup reads blocks as the product does, or unpacks the grid it computes with."""
    menu = menu_of(built(TIED), pass_context, OfferOptions(bits=(8, 4, 3), blocks=(32,)))
    assert menu.groups["embed"].nodes == ("embed", "head")
    for offer in menu.offers["embed"]:
        embed, head = offer.options["embed"], offer.options["head"]
        blocks = "weight-only"
        assert (embed.method == blocks) == (head.method == blocks)
        assert (embed.method == "float") == (head.method == "float")
        if embed.weight is not None and head.weight is not None:
            assert turned(embed.weight) == head.weight
            assert offer.bytes < 1.3 * 96 * 64 * embed.weight.bits / 8 + 1000


def test_many_scales_are_stored_as_float16_where_that_is_as_good(
    pass_context: PassContext,
) -> None:
    model = built(QKV)
    specs = _weights(menu_of(model, pass_context, OfferOptions()).offers["q"])
    assert {s.half_scales for s in specs if not s.half} == {True}
    off = OfferOptions(half_scales=False, float16=False)
    specs = _weights(menu_of(model, pass_context, off).offers["q"])
    assert not any(s.half_scales or s.half for s in specs)
    for factor in (1e-6, 1e6):
        scaled = built(QKV)
        for value in scaled.graph.initializers.values():
            assert value.const_value is not None
            array = value.const_value.numpy() * np.float32(factor)
            value.const_value = onnx_ir.Tensor(array, name=value.name)
        specs = _weights(menu_of(scaled, pass_context, OfferOptions()).offers["q"])
        assert not any(s.half_scales for s in specs)
        assert any(s.half for s in specs) == (factor < 1)


def test_recurrent_weights_are_offered_whole_blocks(pass_context: PassContext) -> None:
    text = """lstm (float[3,1,64] x) => (float[3,1,1,64] y)
        <float[1,256,64] w, float[1,256,64] r> {
        [cell] y = LSTM <hidden_size : int = 64> (x, w, r) }"""
    request = OfferOptions(bits=(8, 4), blocks=(32, 48, 64))
    names = [o.name for o in menu_of(built(text), pass_context, request).offers["cell"]]
    assert names == [
        "float", "storage:f16/tensor", "dynamic:s8/block0@2", "dynamic:s4/block0@2",
        "storage:s8/block0@2", "storage:s4/block0@2", "storage:s4/block32@2",
    ]  # fmt: skip


def test_portable_offers_are_what_other_runtimes_execute(calibrated: Calibrated) -> None:
    model = built(QKV)
    menu = menu_of(model, calibrated(model), OfferOptions(portable=True, blocks=(32, 48)))
    assert [offer.name for offer in menu.offers["q"]] == [
        "float", "storage:f16/tensor", "static:s8/axis1",
        # 64 rows are no whole blocks of 48.
        "weight-only:s4/block32@0",
    ]  # fmt: skip
    model = built(CONV)
    menu = menu_of(model, calibrated(model), OfferOptions(portable=True))
    assert [offer.name for offer in menu.offers["conv"]] == [
        "float", "storage:f16/tensor", "static:s8/axis0",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no portable weight has 3, 2 bits"):
        OfferOptions(portable=True, bits=(3, 2)).run(model, calibrated(model))


def _weights(offers: tuple[Offer, ...]) -> list[QuantSpec]:
    options = (option for offer in offers for option in offer.options.values())
    return [option.weight for option in options if option.weight is not None]


def test_a_missing_seconds_row_is_no_offer(pass_context: PassContext) -> None:
    class NoDynamic:
        source = "test"

        def __getattr__(self, name: str) -> object:
            return getattr(pass_context.cost, name)

        def option_seconds(self, node: object, option: object) -> float | None:
            return None if str(option).startswith("dynamic") else 1.0

    ctx = replace(pass_context, cost=NoDynamic())  # type: ignore[arg-type]
    found = menu_of(built(QKV), ctx, OfferOptions()).offers["q"]
    assert methods(found) == {"float", "weight-only", "storage"}
    assert {offer.seconds for offer in found} == {3.0}


def test_integer_kernels_are_offered_few_bits_in_blocks(pass_context: PassContext) -> None:
    """Where a row has several whole blocks, and the processor multiplies whole bytes."""
    model = built(
        "agraph (float[N, 192] x) => (float[N, 8] y, float[N, 8] z)"
        " <float[192, 8] long, float[96, 8] short, float[192, 96] middle>"
        " { [wide] y = MatMul (x, long) [mid] m = MatMul (x, middle) [even] z = MatMul (m, short) }"
    )
    request = OfferOptions(ties=("weight",))
    menu = menu_of(model, pass_context, request)
    found = {n: [s for s in _weights(menu.offers[n]) if s.multiples] for n in menu.offers}
    assert [str(s) for s in found["wide"]] == [f"s{b}/block64@0x" for b in (5, 4, 3, 2)]
    assert not found["even"]
    narrow = replace(pass_context.target, weight_bits=7)
    menu = menu_of(model, replace(pass_context, target=narrow), request)
    assert not any(s.multiples for offers in menu.offers.values() for s in _weights(offers))
