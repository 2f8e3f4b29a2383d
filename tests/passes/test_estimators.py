"""Every estimator of damage against its formula, computed another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnxruntime
import pytest
import torch
from torch.nn import functional

from octavo.backends.ort_target import ORT_CPU_AVX2
from octavo.ir.cache import Cache
from octavo.ir.errors import NotDifferentiable, UnknownName
from octavo.ir.menu import Damage, Menu, Sensitivity
from octavo.ir.quant import PerAxis, QuantSpec, round_weight
from octavo.ir.read import read
from octavo.passes.activation_rounding import ActivationRounding
from octavo.passes.estimators import ESTIMATORS, estimator
from octavo.passes.layer_error import layer_error
from octavo.passes.offer_options import OfferOptions
from octavo.passes.offered_rounding import offered_roundings
from octavo.passes.pipeline import Pipeline
from octavo.passes.residual_blocks import Block, residual_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Array = NDArray[np.float32]

# Two residual blocks of equal shapes behind one projection, and a classifier. `second` is read
# through a Transpose, as tied weights are.
_NETWORK = """
<ir_version: 10, opset_import: ["" : 21]>
tiny (float[N,6] x) => (float[N,5] y)
<float[6,8] first = {0}, float[8,8] second = {0}, float[8,8] third = {0}, float[8,5] last = {0}> {
    [m1] a = MatMul (x, first)
    [t1] h = Tanh (a)
    [turn] turned = Transpose <perm: ints = [1, 0]> (second)
    [m2] b = MatMul (h, turned)
    [t2] c = Tanh (b)
    [add1] d = Add (h, c)
    [m3] e = MatMul (d, third)
    [t3] f = Tanh (e)
    [add2] g = Add (d, f)
    [m4] y = MatMul (g, last)
}
"""
_SHAPES = {"first": (6, 8), "second": (8, 8), "third": (8, 8), "last": (8, 5)}
_NODES = {"m1": "first", "m2": "second", "m3": "third", "m4": "last"}
_SAMPLES = 6
# float32 sums of a few dozen terms, in other orders.
CLOSE = 1e-4


@dataclass(frozen=True)
class Data:
    """Calibration data with labels or without."""

    feeds: tuple[Feed, ...]
    labels: NDArray[np.generic] | None = None
    sha256: str = "data"

    @property
    def samples(self) -> int:
        return sum(len(feed["x"]) for feed in self.feeds)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


@pytest.fixture
def weights() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    spread = {"first": 1.0, "second": 0.5, "third": 0.25, "last": 2.0}
    return {
        name: (spread[name] * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in _SHAPES.items()
    }


@pytest.fixture
def model(weights: Mapping[str, Array], pass_context: PassContext) -> Model:
    return _offered(_NETWORK, weights, pass_context)


@pytest.fixture
def data() -> Data:
    x = np.random.default_rng(4).standard_normal((_SAMPLES, 6)).astype(np.float32)
    return Data(({"x": x[:4]}, {"x": x[4:]}))


def _offered(text: str, weights: Mapping[str, Array], ctx: PassContext) -> Model:
    proto = onnx.parser.parse_model(text)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    return Pipeline((OfferOptions(static=False, bits=(8, 4, 3)),)).run(read(proto), ctx).model


def _found(name: str, model: Model, ctx: PassContext, data: Data, limit: int = 64) -> Sensitivity:
    return estimator(name)(model, ctx, data, limit, "auto")


def _rounded(weights: Mapping[str, Array], node: str, bits: int) -> Array:
    """A weight as storage of some bits rounds it: symmetric, a scale per column as it is read."""
    spec = QuantSpec(f"s{bits}", PerAxis(1), symmetric=True)  # type: ignore[arg-type]
    weight = weights[_NODES[node]]
    turned = node == "m2"
    found = round_weight(weight.T if turned else weight, spec)
    return found.T if turned else found


def _storage(found: Sensitivity, node: str, bits: int) -> float:
    return found.damage(node, f"storage:s{bits}/axis1").mean


def _x(data: Data) -> Array:
    return np.concatenate([feed["x"] for feed in data.feeds]).astype(np.float32)


def _forward(x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
    h = torch.tanh(x @ w["first"])
    d = h + torch.tanh(h @ w["second"].T)
    return (d + torch.tanh(d @ w["third"])) @ w["last"]


def _tensors(weights: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(w, dtype=torch.float64, requires_grad=True) for n, w in weights.items()}


def _exact_fisher(
    weights: Mapping[str, Array], x: Array, labels: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """The mean of squared gradients, one sample at a time."""
    total = {name: np.zeros(shape) for name, shape in _SHAPES.items()}
    for row, label in zip(x, labels, strict=True):
        w = _tensors(weights)
        logits = _forward(torch.tensor(row[None], dtype=torch.float64), w)
        functional.cross_entropy(logits, torch.tensor([label])).backward()  # type: ignore[no-untyped-call]
        for name, tensor in w.items():
            assert tensor.grad is not None
            total[name] += tensor.grad.numpy() ** 2 / len(x)
    return total


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return float((p.exp() * (p - q)).sum(-1).mean().detach())


def _output_damage(weights: Mapping[str, Array], x: Array, node: str, bits: int) -> float:
    """KL of the logits with one weight rounded."""
    changed = {**weights, _NODES[node]: _rounded(weights, node, bits)}
    inputs = torch.tensor(x, dtype=torch.float64)
    return _kl(_forward(inputs, _tensors(weights)), _forward(inputs, _tensors(changed)))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_every_estimator_knows_every_offer(
    name: str, model: Model, pass_context: PassContext, data: Data
) -> None:
    found = _found(name, model, pass_context, data)
    menu = model.fact(Menu)
    assert {g: set(of) for g, of in found.by_group.items()} == {
        g: {offer.name for offer in offers} for g, offers in menu.offers.items()
    }
    assert found.estimator == name
    for group in menu.groups:
        assert found.damage(group, "float").mean == 0.0
        damages = [_storage(found, group, bits) for bits in (8, 4, 3)]
        assert 0 < damages[0] < damages[1] < damages[2]
        assert all(np.isfinite(d.standard_error) for d in found.by_group[group].values())


@pytest.mark.parametrize("node", list(_NODES))
def test_measured_is_the_damage_of_the_bits_that_are_used(
    node: str, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    # Integer kernels of this target use 7 of 8 bits, storage uses all of them.
    ctx = replace(pass_context, target=ORT_CPU_AVX2)
    model = _offered(_NETWORK, weights, ctx)
    found = _found("measured", model, ctx, data)
    exact = _output_damage(weights, _x(data), node, 8)
    # The runtime computes the outputs in float32.
    assert _storage(found, node, 8) == pytest.approx(exact, rel=0.05)
    assert found.damage(node, "dynamic:s8/axis1").mean > 2 * exact


@pytest.mark.parametrize("node", list(_NODES))
def test_weight_error_is_relative(
    node: str, model: Model, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    weight = weights[_NODES[node]]
    expected = np.square(_rounded(weights, node, 4) - weight).sum() / np.square(weight).sum()
    found = _found("weight-error", model, pass_context, data)
    assert _storage(found, node, 4) == pytest.approx(expected, rel=CLOSE)
    assert found.samples == 0


@pytest.mark.parametrize("node", ["m1", "m2", "m4"])
def test_layer_error_is_that_of_the_layer_alone(
    node: str, model: Model, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    read_by = {"m1": "x", "m2": "h", "m4": "g"}[node]
    session = onnxruntime.InferenceSession(
        _shown(weights, read_by), providers=["CPUExecutionProvider"]
    )
    x = _x(data)
    operand = x if read_by == "x" else session.run([read_by], {"x": x})[0]
    weight, rounded = weights[_NODES[node]], _rounded(weights, node, 4)
    if node == "m2":
        weight, rounded = weight.T, rounded.T
    truth, actual = operand @ weight, operand @ rounded
    rows = np.square(actual - truth).sum(1) / np.square(truth).sum(1)
    found = _found("layer-error", model, pass_context, data)
    damage = found.damage(node, "storage:s4/axis1")
    assert damage.mean == pytest.approx(rows.mean(), rel=CLOSE)
    error = rows.std(ddof=1) / np.sqrt(_SAMPLES)
    assert damage.standard_error == pytest.approx(error, rel=CLOSE)
    assert found.samples == _SAMPLES


def test_known_layer_errors_are_not_measured_again(
    model: Model, pass_context: PassContext, data: Data
) -> None:
    roundings = offered_roundings(model, ORT_CPU_AVX2, ActivationRounding(pass_context.evaluator))
    trials = roundings["m3"].trials
    known = {key: Damage(0.5) for key, trial in trials.items() if trial.rounds_weights}
    found = layer_error(model, pass_context, data, 64, "auto", known).by_group["m3"]
    measured = layer_error(model, pass_context, data, 64, "auto").by_group["m3"]
    assert found["storage:s4/axis1"].mean == 0.5
    of_activations = measured["dynamic:s8/axis1"].mean - measured["storage:s8/axis1"].mean
    assert found["dynamic:s8/axis1"].mean == pytest.approx(0.5 + of_activations, rel=CLOSE)


def _shown(weights: Mapping[str, Array], name: str) -> bytes:
    """The network with one of its values as another output."""
    proto = onnx.parser.parse_model(_NETWORK)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    if name != "x":
        shown = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        proto.graph.output.append(shown)
    return bytes(proto.SerializeToString())


def test_layer_error_counts_activations_that_are_quantized_at_run_time(
    model: Model, pass_context: PassContext, data: Data
) -> None:
    found = _found("layer-error", model, pass_context, data)
    dynamic = found.damage("m1", "dynamic:s8/axis1").mean
    assert dynamic > _storage(found, "m1", 8)
    weights_only = _found("weight-error", model, pass_context, data)
    same = weights_only.damage("m1", "dynamic:s8/axis1").mean
    assert same == _storage(weights_only, "m1", 8)


def test_blocks_end_at_sums_of_computed_values(model: Model) -> None:
    inner, outer = Block("h", "d"), Block("d", "g")
    assert residual_blocks(model) == {
        "m2": inner, "t2": inner, "m3": outer, "t3": outer,
    }  # fmt: skip


def test_a_block_with_a_projection_begins_where_its_branches_do() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {0}, float[4,4] v = {0}, float[4] b = {0}> {
        [in] z = Relu (x)
        [left] l = MatMul (z, w)
        [right] r = MatMul (z, v)
        [bias] q = Add (r, b)
        [sum] y = Add (l, q)
    }
    """
    proto = onnx.parser.parse_model(text)
    for tensor in proto.graph.initializer:
        array = np.ones(tuple(tensor.dims), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    block = Block("z", "y")
    assert residual_blocks(read(proto)) == {"left": block, "right": block, "bias": block}


def test_lim_is_one_minus_the_cosine_of_the_block(
    model: Model, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    x = _x(data)
    h = np.tanh(x @ weights["first"])
    d = h + np.tanh(h @ weights["second"].T)
    cosine = (h * d).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(d, axis=1)
    found = _found("lim", model, pass_context, data)
    error = _found("weight-error", model, pass_context, data)
    ratio = _storage(found, "m2", 4) / _storage(error, "m2", 4)
    assert ratio == pytest.approx((1 - cosine).mean(), rel=CLOSE)
    # m4 has no block, and its output another shape than its input.
    assert _storage(found, "m4", 4) == pytest.approx(_storage(error, "m4", 4), rel=CLOSE)


def test_zd_counts_large_weights(
    model: Model, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    third = weights["third"]
    large = np.mean(np.abs(third - third.mean()) > third.std())
    found = _found("zd", model, pass_context, data)
    error = _found("weight-error", model, pass_context, data)
    ratio = _storage(found, "m3", 4) / _storage(error, "m3", 4)
    assert ratio == pytest.approx(1 - large, rel=CLOSE)


def _labelled(data: Data) -> Data:
    return replace(data, labels=np.array([0, 3, 1, 4, 2, 0], np.int64))


@pytest.mark.parametrize("node", list(_NODES))
def test_fisher_weighs_squared_changes_and_is_scaled_at_four_bits(
    node: str, model: Model, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    labelled = _labelled(data)
    assert labelled.labels is not None
    diagonal = _exact_fisher(weights, _x(data), labelled.labels.astype(np.int64))
    roles = model.fact(Menu).groups

    def score(at: str, bits: int) -> float:
        moved = np.square(_rounded(weights, at, bits) - weights[_NODES[at]])
        return float((diagonal[_NODES[at]] * moved).sum())

    alike = [name for name in _NODES if roles[name].role == roles[node].role]
    measured = sum(_output_damage(weights, _x(data), name, 4) for name in alike)
    alpha = measured / sum(score(name, 4) for name in alike)
    found = _found("fisher", model, pass_context, labelled)
    assert _storage(found, node, 3) == pytest.approx(alpha * score(node, 3), rel=1e-3)
    assert "labels" in found.metric


@pytest.mark.parametrize("node", list(_NODES))
def test_lampq_is_the_type_scaled_trace_and_falls_by_gamma_per_bit(
    node: str, model: Model, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    labelled = _labelled(data)
    assert labelled.labels is not None
    diagonal = _exact_fisher(weights, _x(data), labelled.labels.astype(np.int64))
    roles = model.fact(Menu).groups
    traces = {name: diagonal[weight].sum() for name, weight in _NODES.items()}
    alike = [name for name in _NODES if roles[name].role == roles[node].role]
    measured = sum(_output_damage(weights, _x(data), name, 3) for name in alike)
    omega = measured / sum(traces[name] for name in alike) * traces[node]
    found = _found("lampq", model, pass_context, labelled)
    assert _storage(found, node, 3) == pytest.approx(omega, rel=1e-3)
    assert _storage(found, node, 3) / _storage(found, node, 4) == pytest.approx(4, rel=CLOSE)
    assert _storage(found, node, 4) / _storage(found, node, 8) == pytest.approx(4**4, rel=CLOSE)


def test_layers_of_one_type_share_their_scale(pass_context: PassContext, data: Data) -> None:
    # A chain of equal layers: those in the middle have the same neighbourhood.
    layers = 7
    names = [f"w{k}" for k in range(layers)]
    steps = "".join(
        f"[n{k}] a{k} = MatMul ({f'b{k - 1}' if k else 'x'}, w{k})\n[r{k}] b{k} = Tanh (a{k})\n"
        for k in range(layers)
    )
    held = ", ".join(f"float[6,6] {name} = {{0}}" for name in names)
    text = (
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[N,6] x) => (float[N,6] y) <{held}> {{ {steps} y = Identity (b{layers - 1}) }}"
    )
    rng = np.random.default_rng(5)
    weights = {name: rng.standard_normal((6, 6)).astype(np.float32) for name in names}
    model = _offered(text, weights, pass_context)
    groups = model.fact(Menu).groups
    alike = [name for name in groups if groups[name].role == groups["n3"].role]
    assert len(alike) >= 3
    found = _found("lampq", model, pass_context, data)
    measured = _found("measured", model, pass_context, data)
    # First and last of the type are measured, so that their sum is exact and the rest follows.
    ends = (alike[0], alike[-1])
    expected = sum(_storage(measured, name, 3) for name in ends)
    assert sum(_storage(found, name, 3) for name in ends) == pytest.approx(expected, rel=CLOSE)
    roles = [group.role for group in groups.values()]
    sampled = sum(min(2, roles.count(role)) for role in set(roles))
    assert found.metric.endswith(f"{sampled} of {layers} groups measured)")
    assert sampled < layers
    middle = alike[1]
    assert _storage(found, middle, 3) != pytest.approx(_storage(measured, middle, 3), rel=1e-3)
    assert "Gauss-Newton" in found.metric


def _hessian_trace(
    weights: Mapping[str, Array], loss: Callable[..., torch.Tensor], at: str
) -> float:
    w = _tensors(weights)

    def of(flat: torch.Tensor) -> torch.Tensor:
        return loss({**w, at: flat.reshape(_SHAPES[at])})

    whole = torch.autograd.functional.hessian(of, w[at].detach().reshape(-1))  # type: ignore[no-untyped-call]
    return float(torch.trace(whole))


@pytest.mark.parametrize("node", list(_NODES))
@pytest.mark.parametrize("with_labels", [False, True])
def test_hessian_is_mean_trace_times_squared_change(
    node: str,
    with_labels: bool,
    model: Model,
    weights: Mapping[str, Array],
    pass_context: PassContext,
    data: Data,
) -> None:
    x = torch.tensor(_x(data), dtype=torch.float64)
    logits = _forward(x, _tensors(weights)).detach()
    source, likely = torch.log_softmax(logits, -1), logits.argmax(-1)
    # One feed: the trace is that of the mean over feeds, which differ in size otherwise.
    whole = Data(({"x": _x(data)},), likely.numpy() if with_labels else None)

    def loss(w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logs = torch.log_softmax(_forward(x, w), -1)
        if with_labels:
            return functional.nll_loss(logs, likely)
        return (source.exp() * (source - logs)).sum(-1).mean()

    moved = np.square(_rounded(weights, node, 4) - weights[_NODES[node]]).mean()
    exact = max(_hessian_trace(weights, loss, _NODES[node]), 0.0) * moved
    found = _found("hessian", model, pass_context, whole).damage(node, "storage:s4/axis1")
    # 16 draws, and errors that are estimated from them.
    assert abs(found.mean - exact) <= 4 * found.standard_error
    assert 0 < found.standard_error < exact


def test_the_model_s_own_labels_where_there_are_none(
    model: Model, pass_context: PassContext, data: Data
) -> None:
    found = _found("fisher", model, pass_context, data)
    assert "classes the model is sure of, others drawn" in found.metric
    assert found == replace(_found("fisher", model, pass_context, data), seconds=found.seconds)


def test_logits_in_front_of_a_softmax_are_found(
    weights: Mapping[str, Array], pass_context: PassContext, data: Data, model: Model
) -> None:
    text = _NETWORK.replace("[m4] y =", "[m4] z =").replace("}\n", "[s] y = Softmax (z)\n}\n")
    ending = _offered(text, weights, pass_context)
    labelled = _labelled(data)
    probabilities = _found("fisher", ending, pass_context, labelled)
    logits = _found("fisher", model, pass_context, labelled)
    assert "(labels, " in probabilities.metric
    for node in ("m1", "m2", "m3"):
        ratio = _storage(probabilities, node, 3) / _storage(logits, node, 3)
        assert ratio == pytest.approx(1, rel=1e-3)


def test_what_was_found_is_found_again(
    model: Model, pass_context: PassContext, data: Data, tmp_path: Path
) -> None:
    ctx = replace(pass_context, cache=Cache(tmp_path))
    first = _found("layer-error", model, ctx, data)
    assert _found("layer-error", model, ctx, data) == first
    other = replace(data, sha256="other")
    assert _found("layer-error", model, ctx, other).seconds != first.seconds
    assert _found("layer-error", model, ctx, data, limit=4).samples == 4


def test_torch_keeps_its_threads(model: Model, pass_context: PassContext, data: Data) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _found("hessian", model, pass_context, data)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["fisher", "lampq", "hessian"])
def test_operators_without_gradients_are_named(
    name: str, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    text = _NETWORK.replace(
        "[t1] h = Tanh (a)",
        "[t1] h = If <then_branch = t () => (float[N,8] p) { p = Tanh (a) }, "
        "else_branch = e () => (float[N,8] q) { q = Sin (a) }> (yes)",
    ).replace("[m1] a", "yes = Constant <value: tensor = bool {1}> ()\n    [m1] a")
    offered = _offered(text, weights, pass_context)
    with pytest.raises(NotDifferentiable, match="If"):
        _found(name, offered, pass_context, data)


@pytest.mark.parametrize("name", ["fisher", "lampq", "hessian"])
def test_whole_numbers_have_no_gradients(
    name: str, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    text = _NETWORK.replace("(float[N,5] y)", "(int64[N,1] y)").replace("[m4] y =", "[m4] z =")
    text = text.replace("}\n", "[best] y = ArgMax <axis: int = 1> (z)\n}\n")
    with pytest.raises(NotDifferentiable, match="ArgMax of node 'best'"):
        _found(name, _offered(text, weights, pass_context), pass_context, data)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_models_without_weights_have_nothing_to_damage(
    name: str, pass_context: PassContext, data: Data
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,6] x) => (float[N,6] y) { y = Relu (x) }"""
    found = _found(name, _offered(text, {}, pass_context), pass_context, data)
    assert found.by_group == {}


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_weights_that_no_output_depends_on_do_no_damage_to_it(
    name: str, weights: Mapping[str, Array], pass_context: PassContext, data: Data
) -> None:
    text = _NETWORK.replace("(float[N,5] y)", "(float[N,5] y, int64[N,1] best)")
    text = text.replace("float[8,5] last = {0}>", "float[8,5] last = {0}, float[6,4] other = {0}>")
    more = "[v5] v = Neg (x)\n[m5] z = MatMul (v, other)\n[best] best = ArgMax <axis: int = 1> (z)"
    text = text.replace("}\n", f"{more}\n}}\n")
    held = {**weights, "other": np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)}
    found = _found(name, _offered(text, held, pass_context), pass_context, data)
    by_outputs = name in ("measured", "fisher", "lampq", "hessian")
    assert (_storage(found, "m5", 3) == 0) == by_outputs


def test_unknown_estimators_have_near_misses() -> None:
    with pytest.raises(UnknownName, match="layer-error"):
        estimator("layer-eror")
