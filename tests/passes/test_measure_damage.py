"""Damage measured on suffixes against whole models that are built with one change and run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from octavo.backends.ort_session import OrtEvaluator
from octavo.backends.trt_target import TARGETS
from octavo.ir.cache import Cache
from octavo.ir.constants import constant_behind
from octavo.ir.facts import Ranges
from octavo.ir.menu import Menu, Sensitivity
from octavo.ir.quant import round_weight
from octavo.ir.read import read
from octavo.passes.calibrate import Calibrate
from octavo.passes.canonicalize import Canonicalize
from octavo.passes.measure_damage import measure_damage
from octavo.passes.offer_options import OfferOptions
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.menu import Offer
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Array = NDArray[Any]

MODELS = Path(__file__).resolve().parents[2] / "models"
RELATIVE, ABSOLUTE = 1e-5, 1e-9
QKV = """qkv (float[N,6,8] x) => (float[N,6,8] y)
    <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo> {
    [in] e = Tanh (x)
    [q] q = MatMul (e, wq) [k] k = MatMul (e, wk) [v] v = MatMul (e, wv)
    [turn] kt = Transpose <perm = [0, 2, 1]> (k) [score] s = MatMul (q, kt)
    [soft] p = Softmax (s) [mix] m = MatMul (p, v) [out] y = MatMul (m, wo) }"""


def built(text: str) -> Model:
    """A model whose float weights are drawn by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for info in proto.graph.value_info:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = np.random.default_rng([*info.name.encode()]).standard_normal(shape) / 2
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return read(proto)


@dataclass(frozen=True)
class Listed:
    """Feeds in a list."""

    feeds: tuple[Feed, ...]
    sha256: str = "listed"
    labels: None = None

    @property
    def samples(self) -> int:
        return sum(len(next(iter(feed.values()))) for feed in self.feeds)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


def feeds_of(model: Model, name: str) -> Listed:
    (value,) = model.graph.inputs
    if name == "qkv":
        drawn = np.random.default_rng(0).standard_normal((6, 6, 8)).astype(np.float32)
    else:
        with np.load(MODELS / "fashion_test.npz") as data:
            drawn = data["input"][:3]
    return Listed(({value.name or "": drawn[:2]}, {value.name or "": drawn[2:]}))


@dataclass(frozen=True)
class Case:
    """A model with a menu and ranges, its data, and what was measured."""

    model: Model
    ctx: PassContext
    batches: Batches
    found: Sensitivity


_CASES: dict[str, Case] = {}


@pytest.fixture
def case(request: pytest.FixtureRequest, pass_context: PassContext) -> Case:
    """Prepared and measured once per model; few bits keep the menu small."""
    name: str = request.param
    if name not in _CASES:
        model = built(QKV) if name == "qkv" else read(MODELS / f"{name}.onnx")
        batches = feeds_of(model, name)
        ctx = replace(pass_context, calibration=batches)
        offer = OfferOptions(bits=(8, 2), blocks=(32,))
        model = Pipeline((Canonicalize(), Calibrate(), offer)).run(model, ctx).model
        _CASES[name] = Case(model, ctx, batches, measure_damage(model, ctx, batches, 64, "auto"))
    return replace(_CASES[name], ctx=replace(pass_context, calibration=_CASES[name].batches))


def divergences(model: Model, expected: list[Array], batches: Batches) -> Array:
    """KL of the softmax of the only output, for every sample, mean over its rows."""
    rows = []
    run = OrtEvaluator(threads=1, optimization="none").load(model)
    for truth, feed in zip(expected, batches, strict=True):
        (output,) = run(feed).values()
        p, q = (a.astype(np.float64) for a in (truth, output))
        p, q = (np.exp(a - a.max(-1, keepdims=True)) for a in (p, q))
        p, q = (a / a.sum(-1, keepdims=True) for a in (p, q))
        kl = (p * np.log(p / q)).sum(-1)
        rows.append(kl.reshape(len(kl), -1).mean(-1))
    return np.concatenate(rows)


def references(case: Case) -> list[Array]:
    run = OrtEvaluator(threads=1, optimization="none").load(case.model)
    return [next(iter(run(feed).values())) for feed in case.batches]


def with_rounded_weights(model: Model, offer: Offer) -> Model:
    """The whole model, the weights of one offer replaced by what rounding leaves of them."""
    own = model.clone()
    for node in own.graph:
        option = offer.options.get(node.name or "")
        if option is None or option.weight is None:
            continue
        for index in (0,) if node.op_type == "Gather" else (1,):
            tensor = constant_behind(node.inputs[index])
            assert tensor is not None
            rounded = round_weight(tensor.numpy(), option.weight)
            name = f"{node.name}#rounded{index}"
            value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(rounded, name=name))
            own.graph.initializers[name] = value
            old = node.inputs[index]
            node.replace_input_with(index, value)
            if old is not None and not old.uses():
                own.graph.initializers.pop(old.name or "", None)
    return own


def with_rounded_activations(
    model: Model, read_by: Callable[[onnx_ir.Node, onnx_ir.Value], bool], text: Mapping[str, Any]
) -> Model:
    """The whole model with QuantizeLinear and DequantizeLinear in front of some reads."""
    own = model.clone()
    reads = [
        (node, k, v)
        for node in own.graph
        for k, v in enumerate(node.inputs)
        if v is not None and read_by(node, v)
    ]
    assert reads
    for at, (node, index, value) in enumerate(reads):
        if text:
            scale, zero = (
                onnx_ir.Value(name=f"{n}#{at}", const_value=onnx_ir.tensor(a, name=f"{n}#{at}"))
                for n, a in text.items()
            )
            for constant in (scale, zero):
                own.graph.initializers[constant.name or ""] = constant
            codes = onnx_ir.node("QuantizeLinear", [value, scale, zero], name=f"q#{at}")
            back = onnx_ir.node("DequantizeLinear", [codes.outputs[0], scale, zero])
        else:
            codes = onnx_ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
            back = onnx_ir.node("DequantizeLinear", list(codes.outputs))
        for k, output in enumerate((*codes.outputs, *back.outputs)):
            output.name = f"rounded#{at}_{k}"
        own.graph.insert_before(node, [codes, back])
        node.replace_input_with(index, back.outputs[0])
    return own


def same(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


EVERY = pytest.mark.parametrize("case", ["qkv", "fashion_vit", "fashion_resnet"], indirect=True)
TINY = pytest.mark.parametrize("case", ["qkv"], indirect=True)


@EVERY
def test_weights(case: Case) -> None:
    """Offers that round nothing but weights; of large models three groups are enough."""
    truth = references(case)
    menu = case.model.fact(Menu)
    names = [n for n, offers in menu.offers.items() if any(_stored(o) for o in offers)]
    for name in (*names[:1], *names[len(names) // 2 :][:1], *names[-1:]):
        for offer in filter(_stored, menu.offers[name]):
            rows = divergences(with_rounded_weights(case.model, offer), truth, case.batches)
            damage = case.found.damage(name, offer.name)
            assert rows.mean() > 0
            same(damage.mean, float(rows.mean()))
            same(damage.standard_error, float(rows.std(ddof=1)) / len(rows) ** 0.5)


def _stored(offer: Offer) -> bool:
    return all(option.method == "storage" for option in offer.options.values())


@EVERY
def test_calibrated_activations(case: Case) -> None:
    truth = references(case)
    ranges = case.model.fact(Ranges).by_value
    names = list(case.found.by_value)
    assert names
    for name in (*names[:2], *names[len(names) // 2 :][:1], *names[-2:]):
        low, high = min(ranges[name].low, 0.0), max(ranges[name].high, 0.0)
        scale = (high - low) / 255
        numbers = {
            "scale": np.float32(scale),
            "zero": np.uint8(np.clip(round(-low / scale), 0, 255)),
        }
        changed = with_rounded_activations(
            case.model, lambda node, value, name=name: value.name == name, numbers
        )
        rows = divergences(changed, truth, case.batches)
        same(case.found.by_value[name].mean, float(rows.mean()))


@TINY
def test_calibrated_activations_of_a_symmetric_target(case: Case, tmp_path: Path) -> None:
    """Codes around zero with float16 scales, whatever another target left in the cache."""
    cache = Cache(tmp_path / "cache")
    measured(case, cache, counted())
    own = replace(case, ctx=replace(case.ctx, target=TARGETS["tensorrt"]))
    found = measured(own, cache, counted())
    truth = references(case)
    ranges = case.model.fact(Ranges).by_value
    assert found.by_value
    for name, damage in found.by_value.items():
        scale = np.float16(max(-ranges[name].low, ranges[name].high) / 127)
        numbers = {"scale": np.float32(scale), "zero": np.int8(0)}
        changed = with_rounded_activations(
            case.model, lambda node, value, name=name: value.name == name, numbers
        )
        same(damage.mean, float(divergences(changed, truth, case.batches).mean()))


@pytest.mark.parametrize("case", ["qkv", "fashion_vit"], indirect=True)
def test_activations_rounded_at_run_time(case: Case) -> None:
    """The damage of an offer is that of its weights plus that of its activations."""
    truth = references(case)
    menu = case.model.fact(Menu)
    tried = 0
    for name, group in menu.groups.items():
        for offer in menu.offers[name][: 0 if tried > 6 else None]:
            if not all(o.method == "dynamic" for o in offer.options.values()):
                continue
            changed = with_rounded_activations(
                case.model,
                lambda node, value, group=group: (
                    node.name in group.nodes and value is node.inputs[0]
                ),
                {},
            )
            activations = divergences(changed, truth, case.batches)
            weights = divergences(with_rounded_weights(case.model, offer), truth, case.batches)
            mean = float(activations.mean() + weights.mean())
            same(case.found.damage(name, offer.name).mean, mean)
            tried += 1
    assert tried > 2


@EVERY
def test_nothing_is_forgotten(case: Case) -> None:
    menu = case.model.fact(Menu)
    for name, offers in menu.offers.items():
        assert list(case.found.by_group[name]) == [offer.name for offer in offers]
        assert case.found.damage(name, "float").mean == 0
    assert case.found.samples == case.batches.samples


@dataclass
class Counted(OrtEvaluator):
    """Counts the sessions that are made; fails from one on."""

    made: list[str] = field(default_factory=list)
    most: int = 10_000

    def load(self, model: Model) -> Callable[[Feed], dict[str, NDArray[np.generic]]]:
        if len(self.made) >= self.most:
            raise KeyboardInterrupt
        self.made.append(model.fingerprint)
        return super().load(model)


def counted(most: int = 10_000) -> Counted:
    return Counted(threads=1, optimization="none", most=most)


def measured(case: Case, cache: Cache | None, evaluator: Counted, threads: int = 1) -> Sensitivity:
    with ThreadPoolExecutor(threads) as executor:
        ctx = replace(case.ctx, cache=cache, evaluator=evaluator, executor=executor)
        return measure_damage(case.model, ctx, case.batches, 64, "auto")


@TINY
def test_the_cache_gives_the_same_without_sessions(case: Case, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first, again = counted(), counted()
    found = measured(case, cache, first)
    repeated = measured(case, cache, again)
    assert replace(found, seconds=0) == replace(repeated, seconds=0)
    assert replace(found, seconds=0) == replace(case.found, seconds=0)
    # The source itself runs for its outputs, no suffix does.
    assert again.made == first.made[:1]
    assert len(first.made) > 4


@TINY
def test_interrupted_work_goes_on(case: Case, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    whole = counted()
    expected = measured(case, None, whole)
    cut = counted(most=len(whole.made) - 2)
    with pytest.raises(KeyboardInterrupt):
        measured(case, cache, cut)
    rest = counted()
    assert replace(measured(case, cache, rest), seconds=0) == replace(expected, seconds=0)
    assert 1 < len(rest.made) < len(whole.made) - 2


@TINY
def test_other_data_is_measured_again(case: Case, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    measured(case, cache, counted())
    again = counted()
    assert isinstance(case.batches, Listed)
    measured(replace(case, batches=replace(case.batches, sha256="other")), cache, again)
    assert len(again.made) > 1


@TINY
def test_threads_change_nothing(case: Case) -> None:
    one, three = (measured(case, None, counted(), threads) for threads in (1, 3))
    assert replace(one, seconds=0) == replace(three, seconds=0)
