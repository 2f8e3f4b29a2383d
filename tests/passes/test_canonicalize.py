"""What canonicalize learns, keeps and refuses; golden files show how it rewrites."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir
import pytest

from octavo.ir.facts import Norms, QuantizedInput
from octavo.ir.quant import PerAxis, PerBlock, PerTensor
from octavo.ir.read import read
from octavo.passes.canonicalize import Canonicalize

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

FLOAT32_RELATIVE = 1e-5
FLOAT16_RELATIVE = 4e-3


def model_of(body: str, **weights: object) -> Model:
    """A model from ONNX text without its header; weights are inputs of the text made constant."""
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + body)
    for name, array in weights.items():
        value = next(value for value in proto.graph.input if value.name == name)
        proto.graph.input.remove(value)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return read(proto)


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def array(model: Model, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


CONV_NORM = """
m (float[1,2,5,5] x, float[3,2,3,3] w, float[3] g, float[3] b, float[3] mu, float[3] var)
  => (float[1,3,3,3] y)
{
  [conv] c = Conv (x, w)
  [bn] n = BatchNormalization <epsilon = 0.001> (c, g, b, mu, var)
  [relu] y = Relu (n)
}"""
CONV_NORM_SCALE = """
m (float[1,2,5,5] x, float[3,2,3,3] w, float[3] g, float[3] b, float[3] mu, float[3] var,
   float half) => (float[1,3,3,3] y)
{
  [conv] c = Conv (x, w)
  [bn] n = BatchNormalization <epsilon = 0.001> (c, g, b, mu, var)
  [mul] s = Mul (n, half)
  [relu] y = Relu (s)
}"""


def conv_norm(rng: np.random.Generator) -> dict[str, object]:
    return {
        "w": rng.standard_normal((3, 2, 3, 3)).astype(np.float32),
        "g": rng.uniform(0.5, 2, 3).astype(np.float32),
        "b": rng.standard_normal(3).astype(np.float32),
        "mu": rng.standard_normal(3).astype(np.float32),
        "var": rng.uniform(0.1, 4, 3).astype(np.float32),
    }


def test_folded_weight_is_what_the_formula_says(pass_context: PassContext) -> None:
    given = conv_norm(pass_context.rng("weights"))
    after = Canonicalize().run(model_of(CONV_NORM, **given), pass_context)
    g, b, mu, var, w = (np.asarray(given[k], np.float64) for k in ("g", "b", "mu", "var", "w"))
    scale = g / np.sqrt(var + 0.001)
    np.testing.assert_allclose(array(after, "w"), w * scale[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(array(after, "c_bias"), b - mu * scale, rtol=1e-6)


def test_norm_is_known_by_the_name_of_its_output(pass_context: PassContext) -> None:
    given = conv_norm(pass_context.rng("weights"))
    after = Canonicalize().run(model_of(CONV_NORM, **given), pass_context)
    norm = after.fact(Norms).by_value["n"]
    assert after.graph.node("conv").outputs[0].name == "n"
    assert norm.kind == "batch"
    assert norm.epsilon == pytest.approx(0.001)
    for found, name in ((norm.gamma, "g"), (norm.beta, "b"), (norm.mean, "mu")):
        np.testing.assert_array_equal(found, given[name])


def test_norm_follows_a_scale_that_is_folded_after_it(pass_context: PassContext) -> None:
    given = conv_norm(pass_context.rng("weights"))
    after = Canonicalize().run(
        model_of(CONV_NORM_SCALE, half=np.float32(0.5), **given), pass_context
    )
    assert ops(after) == ["Conv", "Relu"]
    assert list(after.fact(Norms).by_value) == ["s"]
    norm = after.fact(Norms).by_value["s"]
    np.testing.assert_allclose(norm.gamma, np.asarray(given["g"]) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(norm.beta, np.asarray(given["b"]) * 0.5, rtol=1e-6)


def test_norm_before_a_linear_operator_describes_its_input(pass_context: PassContext) -> None:
    body = """m (float[N,2] x, float[2] g, float[2] mu, float[2] var, float[2,3] w)
      => (float[N,3] y)
    {
      [neg] a = Neg (x)
      [bn] n = BatchNormalization <epsilon = 0.0> (a, g, g, mu, var)
      [fc] y = Gemm (n, w)
    }"""
    ones, mean = np.ones(2, np.float32), np.array([1, -2], np.float32)
    weights = {"g": ones, "mu": mean, "var": ones * 4, "w": np.ones((2, 3), np.float32)}
    after = Canonicalize().run(model_of(body, **weights), pass_context)
    norm = after.fact(Norms).by_value["a"]
    assert ops(after) == ["Neg", "Gemm"]
    np.testing.assert_array_equal(norm.gamma, [2, 2])
    np.testing.assert_array_equal(norm.beta, mean)


@pytest.mark.parametrize("square", ["Pow (d, two)", "Mul (d, d)"])
def test_decomposed_layer_norm_is_recorded(pass_context: PassContext, square: str) -> None:
    body = f"""m (float[N,4] x, float two, float eps, int64[1] axes, float[4] g,
      float[4] b) => (float[N,4] y)
    {{
      mean = ReduceMean <keepdims = 1> (x, axes)
      d = Sub (x, mean)
      p = {square}
      v = ReduceMean <keepdims = 1> (p, axes)
      e = Add (v, eps)
      s = Sqrt (e)
      q = Div (d, s)
      m = Mul (g, q)
      y = Add (m, b)
    }}"""
    gamma, beta = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    weights = {"two": np.float32(2), "eps": np.float32(1e-6), "axes": np.array([-1])}
    model = model_of(body, g=gamma, b=beta, **weights)
    after = Canonicalize().run(model.clone(), pass_context)
    norm = after.fact(Norms).by_value["y"]
    assert norm.kind == "layer"
    assert norm.mean is None
    assert norm.epsilon == pytest.approx(1e-6)
    np.testing.assert_array_equal(norm.gamma, gamma)
    np.testing.assert_array_equal(norm.beta, beta)
    assert sorted(ops(after)) == sorted(ops(model))


def test_facts_survive_a_second_run(pass_context: PassContext) -> None:
    given = conv_norm(pass_context.rng("weights"))
    once = Canonicalize().run(
        model_of(CONV_NORM_SCALE, half=np.float32(0.5), **given), pass_context
    )
    twice = Canonicalize().run(once.clone(), pass_context)
    assert twice.fingerprint == once.fingerprint
    assert list(twice.fact(Norms).by_value) == list(once.fact(Norms).by_value)


def test_float16_weights_fold_in_their_own_type(
    pass_context: PassContext,
    feed_of: Callable[[Model, int], Feed],
    agrees: Callable[[Feed, Feed, float], None],
) -> None:
    body = """m (float16[1,2,4,4] x, float16[2,2,1,1] w, float16[2,1,1] s, float16[2,1,1] t)
      => (float16[1,2,4,4] y)
    {
      [conv] c = Conv (x, w)
      [mul] d = Mul (c, s)
      [add] y = Add (d, t)
    }"""
    rng = pass_context.rng("half")
    shapes = {"w": (2, 2, 1, 1), "s": (2, 1, 1), "t": (2, 1, 1)}
    weights = {k: rng.standard_normal(v).astype(np.float16) for k, v in shapes.items()}
    model = model_of(body, **weights)
    after = Canonicalize().run(model.clone(), pass_context)
    assert ops(after) == ["Conv"]
    assert after.graph.initializers["w"].dtype == onnx_ir.DataType.FLOAT16
    feed, run = feed_of(model, 0), pass_context.evaluator.run
    agrees(run(after, feed), run(model, feed), FLOAT16_RELATIVE)


def test_a_scale_that_overflows_the_weight_stays(pass_context: PassContext) -> None:
    body = """m (float16[1,1,2,2] x, float16[1,1,1,1] w, float16 s) => (float16[1,1,2,2] y)
    { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }"""
    huge = {"w": np.full((1, 1, 1, 1), 6e4, np.float16), "s": np.float16(2)}
    assert ops(Canonicalize().run(model_of(body, **huge), pass_context)) == ["Conv", "Mul"]


def test_tied_embedding_stays_tied(pass_context: PassContext) -> None:
    body = """m (int64[N] ids, float[N,64] x, float[100,64] table, float half)
      => (float[N,64] e, float[N,100] y)
    {
      [embed] e = Gather (table, ids)
      [turn] t = Transpose <perm = [1,0]> (table)
      [head] h = MatMul (x, t)
      [scale] y = Mul (h, half)
    }"""
    table = np.ones((100, 64), np.float32)
    after = Canonicalize().run(model_of(body, table=table, half=np.float32(0.5)), pass_context)
    assert ops(after) == ["Gather", "Transpose", "MatMul", "Mul"]
    assert set(after.graph.initializers) == {"table", "half"}


def test_shared_weight_is_not_copied(pass_context: PassContext) -> None:
    body = """m (float[1,1,2,2] x, float[1,1,1,1] w, float[1] p)
      => (float[1,1,2,2] y, float[1,1,2,2] z)
    {
      [one] c = Conv (x, w)
      [bn] y = BatchNormalization (c, p, p, p, p)
      [two] z = Conv (y, w)
    }"""
    weights = {"w": np.ones((1, 1, 1, 1), np.float32), "p": np.ones(1, np.float32)}
    Canonicalize().run(model_of(body, **weights), pass_context)
    missed = [(r.where, r.text) for r in pass_context.recorder.remarks if r.kind == "missed"]
    assert missed == [("bn", "the weight of 'one' is shared; its output is a graph output")]


@pytest.mark.parametrize(
    "op", ["ConstantOfShape (shape)", "Expand (one, shape)", "Tile (one, shape)"]
)
def test_huge_constants_are_never_computed(pass_context: PassContext, op: str) -> None:
    body = f"m (int64[1] shape, float[1] one) => (float[N] y) {{ [big] y = {op} }}"
    weights = {"shape": np.array([1 << 40]), "one": np.ones(1, np.float32)}
    after = Canonicalize().run(model_of(body, **weights), pass_context)
    assert ops(after) == [op.split()[0]]


def test_small_shape_arithmetic_is_computed(pass_context: PassContext) -> None:
    body = """m (float[2,3,4] x, int64[1] two, int64[1] rest) => (float[2,12] y)
    {
      zeros = ConstantOfShape (two)
      rounded = Cast <to = 7> (zeros)
      shape = Concat <axis = 0> (two, rest)
      target = Add (shape, rounded)
      y = Reshape (x, target)
    }"""
    after = Canonicalize().run(model_of(body, two=np.array([2]), rest=np.array([12])), pass_context)
    assert ops(after) == ["Reshape"]


def test_parameters_of_a_quantized_model(pass_context: PassContext) -> None:
    body = """m (float[4,8] x, float s, uint8 z, int8[8,4] w, float[4] ws, int4[8,4] v,
      float[2,4] vs)
      => (float[4,4] y)
    {
      [q] a = QuantizeLinear (x, s, z)
      [dq] b = DequantizeLinear (a, s, z)
      [dqw] c = DequantizeLinear <axis = 1> (w, ws)
      [dqv] d = DequantizeLinear <axis = 0, block_size = 4> (v, vs)
      [mm] e = MatMul (b, c)
      [mv] f = MatMul (b, d)
      [add] y = Add (e, f)
    }"""
    import ml_dtypes

    weights = {
        "s": np.float32(0.5),
        "z": np.uint8(3),
        "w": np.ones((8, 4), np.int8),
        "ws": np.full(4, 0.25, np.float32),
        "v": np.ones((8, 4), ml_dtypes.int4),
        "vs": np.full((2, 4), 0.125, np.float32),
    }
    model = model_of(body, **weights)
    after = Canonicalize().run(model.clone(), pass_context)
    found = after.fact(QuantizedInput).by_value
    specs = {name: params.spec for name, params in found.items()}
    assert ops(after) == ops(model)
    assert {name: (s.dtype, s.granularity) for name, s in specs.items()} == {
        "x": ("u8", PerTensor()),
        "b": ("u8", PerTensor()),
        "c": ("s8", PerAxis(1)),
        "d": ("s4", PerBlock(0, 4)),
    }
    assert (float(found["x"].scale), int(found["x"].zero_point)) == (0.5, 3)
    notes = [r.where for r in pass_context.recorder.remarks if r.kind == "note"]
    assert notes == ["q", "dq", "dqw", "dqv"]


def test_weights_stored_as_codes_and_scale(pass_context: PassContext) -> None:
    body = """m (float[N,3] x, int8[3,4] w, float[1,4] s) => (float[N,4] y)
    {
      [cast] c = Cast <to = 1> (w)
      [scale] d = Mul (c, s)
      [mm] y = MatMul (x, d)
    }"""
    codes, scale = np.ones((3, 4), np.int8), np.arange(1, 5, dtype=np.float32)
    model = model_of(body, w=codes, s=scale[None])
    after = Canonicalize().run(model.clone(), pass_context)
    params = after.fact(QuantizedInput).by_value["d"]
    assert ops(after) == ["Cast", "Mul", "MatMul"]
    assert (params.spec.dtype, params.spec.granularity) == ("s8", PerAxis(1))
    np.testing.assert_array_equal(params.scale, scale)


def test_float_model_has_no_quantized_input(pass_context: PassContext) -> None:
    after = Canonicalize().run(
        model_of("m (float[2] x) => (float[2] y) { y = Neg (x) }"), pass_context
    )
    assert after.find(QuantizedInput) is None


def test_branches_are_canonicalized_and_outer_values_forgotten(
    pass_context: PassContext,
    feed_of: Callable[[Model, int], Feed],
    agrees: Callable[[Feed, Feed, float], None],
) -> None:
    body = """m (float[2] x, bool[1] given, bool yes, float zero) => (float[2] y, float[2] z)
    {
      n = Neg (x)
      y = If (given) <then_branch = a () => (float[2] p) { p = Max (n, zero) },
                      else_branch = b () => (float[2] q) { q = Identity (x) }>
      z = If (yes) <then_branch = c () => (float[2] r) { r = Abs (n) },
                    else_branch = d () => (float[2] s) { s = Exp (n) }>
    }"""
    model = model_of(body, yes=np.bool_(True), zero=np.float32(0))
    after = Canonicalize().run(model.clone(), pass_context)
    assert sorted(ops(after)) == ["Abs", "If", "Neg"]
    assert sorted(n.op_type for n in after.graph.all_nodes()) == [
        "Abs",
        "Identity",
        "If",
        "Neg",
        "Relu",
    ]
    readers = {use.node.op_type for use in after.graph.node(0).outputs[0].uses()}
    assert readers == {"Relu", "Abs"}
    feed, run = feed_of(model, 0), pass_context.evaluator.run
    agrees(run(after, feed), run(model, feed), FLOAT32_RELATIVE)


def test_source_is_untouched(pass_context: PassContext) -> None:
    given = conv_norm(pass_context.rng("weights"))
    model = model_of(CONV_NORM_SCALE, half=np.float32(0.5), **given)
    before = read(onnx_ir.to_proto(model.ir)).fingerprint
    Canonicalize().run(model.clone(), pass_context)
    assert read(onnx_ir.to_proto(model.ir)).fingerprint == before
