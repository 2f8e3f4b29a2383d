"""Which channels may carry a scale, and that carrying one changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.facts import Norm, Norms
from octavo.ir.read import read
from octavo.models import fetch
from octavo.models.public import PUBLIC
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.scale_edits import accept, layers_of, write_scales
from octavo.passes.scale_links import find_links

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext
    from octavo.passes.scale_links import Link

    Agrees = Callable[[Feed, Feed, float], None]
    FeedOf = Callable[..., Feed]

# Scales between 1/20 and 20, twice in a row: sums of float32 products in another order.
RELATIVE = 1e-4
MODELS = Path(__file__).parents[2] / "models"

# A decoder block: RMSNorm spelled out, 2 key heads for 4 query heads of 4 channels, SwiGLU.
DECODER = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (float[B,S,16] x) => (float[B,S,16] y)
<float[16] gain = {0}, float[16] gain2 = {0}, float[16,16] wq = {0}, float[16,8] wk = {0},
 float[16,8] wv = {0}, float[16,16] wo = {0}, float[16,24] wg = {0}, float[16,24] wu = {0},
 float[24,16] wd = {0}, float two = {2}, int64[1] last = {-1}, float tiny = {0.00001},
 int64[1] one = {1}, int64[1] twice = {2}, int64[1] four = {4}, int64[1] all = {16},
 int64[1] place = {2}>
{
  [shape] sizes = Shape (x)
  [b] batch = Gather <axis = 0> (sizes, first)
  [s] length = Gather <axis = 0> (sizes, one)
  [square] x2 = Pow (x, two)
  [mean] m = ReduceMean (x2, last)
  [plus] me = Add (m, tiny)
  [root] r = Sqrt (me)
  [over] unit = Div (x, r)
  [norm] h = Mul (gain, unit)
  [q] q = MatMul (h, wq)
  [k] k = MatMul (h, wk)
  [v] v = MatMul (h, wv)
  [to_q] shape_q = Concat <axis = 0> (batch, length, last, four)
  [q_heads] q4 = Reshape (q, shape_q)
  [k_heads] k4 = Reshape (k, shape_q)
  [v_heads] v4 = Reshape (v, shape_q)
  [q_turn] qt = Transpose <perm = [0, 2, 1, 3]> (q4)
  [k_turn] kt = Transpose <perm = [0, 2, 1, 3]> (k4)
  [v_turn] vt = Transpose <perm = [0, 2, 1, 3]> (v4)
  [k_wide] k5 = Unsqueeze (kt, place)
  [v_wide] v5 = Unsqueeze (vt, place)
  [to_wide] shape_5 = Concat <axis = 0> (batch, twice, twice, length, four)
  [k_repeat] kr = Expand (k5, shape_5)
  [v_repeat] vr = Expand (v5, shape_5)
  [to_heads] shape_4 = Concat <axis = 0> (batch, four, length, four)
  [k_flat] kf = Reshape (kr, shape_4)
  [v_flat] vf = Reshape (vr, shape_4)
  [k_last] kl = Transpose <perm = [0, 1, 3, 2]> (kf)
  [scores] a = MatMul (qt, kl)
  [softmax] p = Softmax <axis = -1> (a)
  [mix] o = MatMul (p, vf)
  [o_turn] ot = Transpose <perm = [0, 2, 1, 3]> (o)
  [to_row] shape_3 = Concat <axis = 0> (batch, length, all)
  [o_flat] row = Reshape (ot, shape_3)
  [o] attended = MatMul (row, wo)
  [res] x1 = Add (x, attended)
  [square2] x12 = Mul (x1, x1)
  [mean2] m2 = ReduceMean (x12, last)
  [plus2] me2 = Add (m2, tiny)
  [root2] r2 = Sqrt (me2)
  [rec2] i2 = Reciprocal (r2)
  [unit2] n2 = Mul (x1, i2)
  [norm2] h2 = Mul (gain2, n2)
  [gate] g = MatMul (h2, wg)
  [sig] sg = Sigmoid (g)
  [silu] act = Mul (g, sg)
  [up] u = MatMul (h2, wu)
  [glu] gu = Mul (act, u)
  [down] d = MatMul (gu, wd)
  [res2] y = Add (x1, d)
}
""".replace("int64[1] one =", "int64[1] first = {0}, int64[1] one =")

# One fused projection for query, key and value, as timm writes it; LayerNorm; a class token.
ENCODER = """
<ir_version: 10, opset_import: ["" : 21]>
encoder (float[B,5,12] x) => (float[B,3] y)
<float[12] gamma = {0}, float[12] beta = {0}, float[12,36] wqkv = {0}, float[36] bqkv = {0},
 float[12,12] wo = {0}, float[12] bo = {0}, float[3,12] wc = {0}, float[3] bc = {0},
 int64[5] heads = {0, 5, 3, 2, -1}, int64[3] ones = {1, 1, 1}, int64[3] flat = {0, 5, 12},
 int64[1] first = {0}, int64 token = {0}, float[12] gamma2 = {0}, float[12] beta2 = {0}>
{
  [norm] h = LayerNormalization <axis = -1> (x, gamma, beta)
  [qkv] fused = MatMul (h, wqkv)
  [qkv_bias] biased = Add (bqkv, fused)
  [split_heads] five = Reshape (biased, heads)
  [turn] t = Transpose <perm = [2, 0, 3, 1, 4]> (five)
  [parts] q1, k1, v1 = Split <axis = 0> (t, ones)
  [q] q = Squeeze (q1, first)
  [k] k = Squeeze (k1, first)
  [v] v = Squeeze (v1, first)
  [kt] kt = Transpose <perm = [0, 1, 3, 2]> (k)
  [scores] a = MatMul (q, kt)
  [softmax] p = Softmax <axis = -1> (a)
  [mix] o = MatMul (p, v)
  [ot] ot = Transpose <perm = [0, 2, 1, 3]> (o)
  [row] row = Reshape (ot, flat)
  [o] projected = MatMul (row, wo)
  [o_bias] out = Add (projected, bo)
  [res] sum = Add (x, out)
  [norm2] h2 = LayerNormalization <axis = -1> (sum, gamma2, beta2)
  [cls] c = Gather <axis = 1> (h2, token)
  [head] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (c, wc, bc)
}
"""

# Every operator of a convolutional network that a scale passes, and grouped weights.
CONVOLUTIONS = """
<ir_version: 10, opset_import: ["" : 21]>
convolutions (float[B,3,9,9] x) => (float[B,5] y)
<float[8,3,3,3] w1 = {0}, float[8] b1 = {0}, float[8,1,3,3] w2 = {0}, float[8] b2 = {0},
 float[8,4,3,3] w3 = {0}, float[8] b3 = {0}, float[4,8,1,1] ws = {0}, float[8,4,1,1] wt = {0},
 float[8,6,3,3] w4 = {0}, float[6] b4 = {0}, float[8,1,1] slope = {0}, int64[8] pads = {0, 0,
 1, 1, 0, 0, 1, 1}, float[12,5] w5 = {0}, float[6,6,1,1] w6 = {0}>
{
  [c1] a = Conv (x, w1, b1)
  [r1] ar = Relu (a)
  [pad] ap = Pad (ar, pads)
  [dw] b = Conv <group = 8> (ap, w2, b2)
  [leaky] bl = LeakyRelu <alpha = 0.1> (b)
  [pool] bp = MaxPool <kernel_shape = [2, 2]> (bl)
  [grouped] c = Conv <group = 2, pads = [1, 1, 1, 1]> (bp, w3, b3)
  [prelu] cr = PRelu (c, slope)
  [gap] g = GlobalAveragePool (cr)
  [squeeze] s = Conv (g, ws)
  [sr] sr = Relu (s)
  [excite] e = Conv (sr, wt)
  [gate] eg = HardSigmoid (e)
  [se] cg = Mul (cr, eg)
  [up] d = ConvTranspose <strides = [2, 2]> (cg, w4, b4)
  [avg] da = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (d)
  [c6] f = Conv (da, w6)
  [join] j = Concat <axis = 1> (f, da)
  [gap2] jg = GlobalAveragePool (j)
  [flat] row = Flatten (jg)
  [fc] y = MatMul (row, w5)
}
"""


def seeded(text: str, seed: int = 0) -> Model:
    """The model of a text: float constants that are all zero get seeded numbers, shared seeds."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for tensor in proto.graph.initializer:
        shape = tuple(tensor.dims)
        if tensor.data_type == onnx.TensorProto.FLOAT and shape:
            array = rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return read(proto)


def links_of(model: Model) -> dict[str, list[str]]:
    found, _ = find_links(model.graph)
    return {
        link.producer.name: [c.linear.node.name or "" for c in link.consumers] for link in found
    }


def link_of(model: Model, name: str) -> Link:
    return next(link for link in find_links(model.graph)[0] if link.producer.name == name)


def reason_of(text: str, name: str) -> str:
    return find_links(seeded(text).graph)[1][name]


def scaled(model: Model, ctx: PassContext) -> Model:
    """The model with random scales on every channel that may have one."""
    own = model.clone()
    links, _ = find_links(own.graph)
    layers, rng = layers_of(links), np.random.default_rng(7)
    scales = {}
    for at, link in enumerate(links):
        drawn = np.exp(rng.uniform(np.log(0.05), np.log(20), link.free.size))
        scales[at] = np.where(link.free, drawn, 1.0)
        accept(link, layers, scales[at])
    return write_scales(own, ctx, scales, links, layers)


@pytest.mark.parametrize("text", [DECODER, ENCODER, CONVOLUTIONS])
@pytest.mark.parametrize("canonical", [False, True])
def test_scales_cancel(
    text: str, canonical: bool, pass_context: PassContext, feed_of: FeedOf, agrees: Agrees
) -> None:
    model = seeded(text)
    if canonical:
        model = Canonicalize().run(model, pass_context)
    after, feed = scaled(model, pass_context), feed_of(model, 1, free_dimension=3)
    assert after.fingerprint != model.fingerprint
    expected = pass_context.evaluator.run(model, feed)
    agrees(pass_context.evaluator.run(after, feed), expected, RELATIVE)


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_vit", "fashion_mobile"])
def test_scales_cancel_in_shipped_models(
    name: str, pass_context: PassContext, feed_of: FeedOf, agrees: Agrees
) -> None:
    model = Canonicalize().run(read(MODELS / f"{name}.onnx"), pass_context)
    after, feed = scaled(model, pass_context), feed_of(model, 1)
    expected = pass_context.evaluator.run(model, feed)
    agrees(pass_context.evaluator.run(after, feed), expected, RELATIVE)


@pytest.mark.public
@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("OCTAVO_PUBLIC_MODELS") != "1",
    reason="downloads public models; set OCTAVO_PUBLIC_MODELS=1",
)
@pytest.mark.parametrize(
    ("name", "count"),
    [("minilm", 6), ("smollm2-135m", 120), ("efficientnet-lite0", 2), ("ppocr-rec", 20)],
)
def test_scales_cancel_in_public_models(
    name: str, count: int, pass_context: PassContext, agrees: Agrees
) -> None:
    file = fetch.get(PUBLIC[name], fetch.cache_folder())[0]
    model = Canonicalize().run(read(file), pass_context)
    assert len(find_links(model.graph)[0]) == count
    rng = np.random.default_rng(3)
    tokens = {"input_ids": rng.integers(0, 999, (2, 7)), "attention_mask": np.ones((2, 7), int)}
    image = {"input": (1, 3, 224, 224), "x": (1, 3, 48, 320)}
    names = [value.name or "" for value in model.graph.inputs]
    feed = {
        n: tokens[n] if n in tokens else rng.standard_normal(image[n]).astype(np.float32)
        for n in names
    }
    expected = pass_context.evaluator.run(model, feed)
    actual = pass_context.evaluator.run(scaled(model, pass_context), feed)
    agrees(actual, expected, 10 * RELATIVE)


def test_a_decoder_links_norms_values_and_the_gated_branch() -> None:
    assert links_of(seeded(DECODER)) == {
        "norm": ["q", "k", "v"],
        "v": ["o"],
        "norm2": ["gate", "up"],
        "up": ["down"],
    }


def test_repeated_heads_read_the_channels_of_their_key_head() -> None:
    (consumer,) = link_of(seeded(DECODER), "v").consumers
    assert consumer.labels.tolist() == [*range(4), *range(4), *range(4, 8), *range(4, 8)]


def test_of_a_fused_projection_only_values_may_scale() -> None:
    link = link_of(seeded(ENCODER), "qkv")
    assert np.flatnonzero(link.free).tolist() == list(range(24, 36))
    (consumer,) = link.consumers
    assert consumer.linear.node.name == "o"
    assert consumer.labels.tolist() == list(range(24, 36))


def test_a_concatenation_scales_only_the_channels_of_its_producer() -> None:
    (consumer,) = link_of(seeded(CONVOLUTIONS), "c6").consumers
    assert consumer.labels.tolist() == [*range(6), *[-1] * 6]


TWO = """
<ir_version: 10, opset_import: ["" : 21]>
two (float[B,3,4,4] x) => (float[B,2,4,4] y)
<float[4,3,1,1] w1 = {0}, float[2,4,1,1] w2 = {0}, float[4] b1 = {0}, float high = {6},
 float low = {0}>
{
  [first] a = Conv (x, w1, b1)
  [between] b = Relu (a)
  [second] y = Conv (b, w2)
}
"""


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("= Relu (a)", "= Clip (a, low, high)", "'between' (Clip) would need bounds per channel"),
        ("= Relu (a)", "= Sigmoid (a)", "'between' (Sigmoid) passes no scale"),
        ("= Relu (a)", "= Mul (a, a)", "'between' (Mul) multiplies it by itself"),
        ("= Relu (a)", "= Div (b1a, a)", "'between' (Div) divides by it"),
        ("= Conv (x, w1, b1)", "= Conv (x, w1, w1b)", "the bias of 'first' is not one"),
        ("(float[B,2,4,4] y)", "(float[B,2,4,4] y, float[B,4,4,4] b)", "'b' is a graph output"),
        (
            "[second] y = Conv (b, w2)",
            "[second] c = Conv (b, w2)\n [other] d = Conv (b, w2)\n [sum] y = Add (c, d)",
            "the weight of 'second' is shared",
        ),
        (
            "[second] y = Conv (b, w2)",
            "[mix] c = Add (x1, b)\n [second] y = Conv (c, w2)",
            "'mix' (Add) adds what does not carry its scale",
        ),
    ],
)
def test_a_reader_that_changes_with_the_scale_is_named(
    before: str, after: str, reason: str
) -> None:
    text = TWO.replace(before, after).replace(
        "x) =>", "x, float[B,4,4,4] x1, float[4,4,4] b1a, float[4] w1b) =>"
    )
    assert reason in reason_of(text, "first")


def test_a_tied_weight_is_not_scaled() -> None:
    text = """
<ir_version: 10, opset_import: ["" : 21]>
tied (int64[B,S] x) => (float[B,S,9] y)
<float[9,4] table = {0}, float[4] gain = {0}, float[4] shift = {0}>
{
  [embed] e = Gather (table, x)
  [norm] h = LayerNormalization (e, gain, shift)
  [turn] t = Transpose <perm = [1, 0]> (table)
  [head] y = MatMul (h, t)
}
"""
    assert reason_of(text, "norm") == "the weight of 'head' is read through a Transpose"


def test_a_norm_with_another_reader_is_left_alone() -> None:
    text = DECODER.replace("Add (x, attended)", "Add (h, attended)")
    assert reason_of(text, "norm") == "'res' (Add) adds what does not carry its scale"


def test_two_norms_may_share_their_constants(
    pass_context: PassContext, feed_of: FeedOf, agrees: Agrees
) -> None:
    model = seeded(ENCODER.replace("gamma2, beta2)", "gamma, beta)"))
    after, feed = scaled(model, pass_context), feed_of(model, 1)
    assert {"norm", "norm2"} <= links_of(model).keys()
    expected = pass_context.evaluator.run(model, feed)
    agrees(pass_context.evaluator.run(after, feed), expected, RELATIVE)


def test_a_reader_inside_a_branch_keeps_its_channels() -> None:
    text = TWO.replace(
        "[second] y = Conv (b, w2)",
        "[second] c = Conv (b, w2)\n [if] y = If (flag) <then_branch = t () => (float[B,2,4,4] u)"
        " { u = Conv (b, w3) }, else_branch = e () => (float[B,2,4,4] v) { v = Identity (c) }>",
    ).replace("x) =>", "x, bool flag, float[2,4,1,1] w3) =>")
    assert reason_of(text, "first") == "a subgraph reads it"


def test_recorded_normalizations_follow_the_scale(pass_context: PassContext) -> None:
    gamma, beta = np.arange(1, 5, dtype=np.float32), np.ones(4, np.float32)
    model = seeded(TWO).with_fact(Norms({"b": Norm("batch", gamma, beta)}))
    (link,), _ = find_links(model.graph)
    scale = np.array([2.0, 4.0, 8.0, 1.0])
    layers = layers_of([link])
    accept(link, layers, scale)
    norm = write_scales(model, pass_context, {0: scale}, [link], layers).fact(Norms).by_value["b"]
    np.testing.assert_array_equal(norm.gamma, gamma / scale)
    np.testing.assert_array_equal(norm.beta, beta / scale)


def test_unknown_shapes_move_no_labels() -> None:
    text = ENCODER.replace("int64[5] heads = {0, 5, 3, 2, -1}, ", "").replace(
        "x) =>", "x, int64[5] heads) =>"
    )
    reason = reason_of(text, "qkv")
    assert reason == "'split_heads' (Reshape) moves channels to places that are not known"
