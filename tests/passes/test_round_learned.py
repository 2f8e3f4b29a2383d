"""Learned rounding and recovery inside the pipeline: they help, and never harm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest

from octavo.cli.calibration_data import load_calibration
from octavo.ir.calibration import Part, samples_of
from octavo.ir.facts import Choice, Option, Placement, Plan, Range, Ranges, Site
from octavo.ir.fake_quant import params_of
from octavo.ir.quant import PerAxis, QuantSpec, dequantize, quantize
from octavo.ir.read import read
from octavo.ir.reference import Original, Reference
from octavo.models import shipped
from octavo.passes.class_maps import ClassMaps
from octavo.passes.distillation import Distillation, sure_classes
from octavo.passes.output_damage import OutputDamage
from octavo.passes.pipeline import Pipeline
from octavo.passes.recover import Recover
from octavo.passes.round_learned import RoundLearned
from octavo.passes.trainable import Trainable

torch = pytest.importorskip("torch")

from octavo.ir.torch_distillation import LABELS, UNSURE, Lesson  # noqa: E402
from octavo.ir.torch_reconstruction import target_name  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo.ir.calibration import Batches, Feed
    from octavo.ir.model import Model
    from octavo.passes.base import Pass, PassContext
    from octavo.passes.output_damage import Kind
    from octavo.passes.pipeline import Compilation

_UP_TO_ORDER_OF_SUMS = 1e-5


@dataclass(frozen=True)
class Relabelled:
    """Other data with labels."""

    source: Batches
    labels: np.ndarray[tuple[int], np.dtype[np.int64]]

    @property
    def samples(self) -> int:
        return self.source.samples

    @property
    def sha256(self) -> str:
        return self.source.sha256

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.source)


def rounded(model: Model, ctx: PassContext, bits: int) -> Model:
    """Every Conv and Gemm at that many bits in storage, activations float."""
    spec = QuantSpec(f"s{bits}", PerAxis(0), symmetric=True)  # type: ignore[arg-type]
    source = Pipeline.parse("canonicalize").run(model, ctx).model
    nodes = [n for n in source.graph if n.op_type in ("Conv", "Gemm")]
    plan = Plan({n.name or "": Choice(Option("storage", weight=spec), "") for n in nodes}, "")
    return Pipeline.parse("insert-fake-quant").run(source.with_fact(plan), ctx).model


def run(model: Model, ctx: PassContext, pass_: Pass) -> Compilation:
    return Pipeline((pass_,)).run(model, ctx)


def damage(model: Model, ctx: PassContext, feeds: list[Feed]) -> float:
    """KL of a compressed model against its reference."""
    reference = model.fact(Reference).model
    ours, theirs = ctx.evaluator.load(model), ctx.evaluator.load(reference)
    found = OutputDamage.of(reference)
    rows = [found.per_sample(theirs(f), ours(f), samples_of(f)) for f in feeds]
    return float(np.concatenate(rows).mean())


def on_grid(model: Model) -> bool:
    """Whether every quantized weight is what its own codes give."""
    for fake in Trainable.of(model).weights.values():
        value = fake.inputs[0]
        assert value is not None
        assert value.const_value is not None
        array, params = value.const_value.numpy(), params_of(fake)
        if not np.array_equal(dequantize(quantize(array, params), params), array):
            return False
    return True


@pytest.fixture(scope="module")
def mobile() -> Model:
    return read(shipped("fashion-mobile"))


@pytest.fixture
def fashion(mobile: Model, pass_context: PassContext) -> PassContext:
    path = shipped("fashion-mobile").with_name("fashion.npz")
    return replace(pass_context, calibration=load_calibration(str(path), mobile, limit=96))


@pytest.mark.parametrize("method", ["adaround", "flexround"])
def test_blocks_come_closer_to_the_float_ones(
    mobile: Model, fashion: PassContext, method: str
) -> None:
    """Held-out KL falls at 3 bits, and what is written lies on the grids."""
    assert fashion.calibration is not None
    model = rounded(mobile, fashion, 3)
    # The second feed of four is what the pass decides by; none of it is learned from.
    held_out = list(Part(fashion.calibration, 1, 4))
    learned = run(model, fashion, RoundLearned(method=method, steps=30))  # type: ignore[arg-type]
    after = damage(learned.model, fashion, held_out)
    assert after < 0.8 * damage(model, fashion, held_out)
    assert on_grid(learned.model)
    for remark in learned.records[-1].remarks:
        assert remark.values["after"] <= remark.values["before"]  # type: ignore[operator]
        assert (remark.kind == "applied") == (remark.values["after"] < remark.values["before"])  # type: ignore[operator]


def test_the_same_seed_gives_the_same_weights(mobile: Model, fashion: PassContext) -> None:
    model = rounded(mobile, fashion, 3)
    for pass_ in (RoundLearned(steps=3, layers=8), Recover(steps=4)):
        first, second = (run(model, fashion, pass_).model.fingerprint for _ in range(2))
        assert first == second != model.fingerprint


def test_recovery_lowers_the_damage_of_samples_it_has_not_learned_from(
    mobile: Model, fashion: PassContext
) -> None:
    """The remark says what the runtime measures, and codes stay as they were."""
    assert fashion.calibration is not None
    model = rounded(mobile, fashion, 3)
    held_out = list(Part(fashion.calibration, 1))
    recovered = run(model, fashion, Recover(steps=40))
    before, after = (damage(m, fashion, held_out) for m in (model, recovered.model))
    (remark,) = recovered.records[-1].remarks
    assert after < 0.7 * before
    assert remark.values["before"] == pytest.approx(before, rel=1e-3)
    assert remark.values["after"] == pytest.approx(after, rel=1e-3)
    assert on_grid(recovered.model)
    pairs = (Trainable.of(m).weights for m in (model, recovered.model))
    for old, new in zip(*(p.values() for p in pairs), strict=True):
        codes = [quantize(f.inputs[0].const_value.numpy(), params_of(f)) for f in (old, new)]  # type: ignore[union-attr]
        np.testing.assert_array_equal(*codes)


def test_weights_of_a_pruned_model_are_trained_by_mixtures_of_samples(
    mobile: Model, fashion: PassContext
) -> None:
    """Nothing is quantized: held-out KL against the model before falls, and far less without."""
    assert fashion.calibration is not None
    pruned = Pipeline.parse("canonicalize,drop-blocks{count=1,samples=32}").run(mobile, fashion)
    held_out = list(Part(fashion.calibration, 1))
    before = against_original(pruned.model, fashion, held_out)
    trained = Recover(
        weights="straight-through", mix=True, steps=40, features=0,
        vectors_rate=0.001, matrices_rate=0.001,
    )  # fmt: skip
    recovered = run(pruned.model, fashion, trained)
    after = against_original(recovered.model, fashion, held_out)
    (remark,) = recovered.records[-1].remarks
    assert remark.values["before"] == pytest.approx(before, rel=1e-3)
    assert remark.values["after"] == pytest.approx(after, rel=1e-3)
    vectors = run(pruned.model, fashion, replace(trained, weights="none"))
    assert after < 0.7 * before
    assert after < against_original(vectors.model, fashion, held_out)


def test_weights_that_are_zero_stay_zero(mobile: Model, fashion: PassContext) -> None:
    sparse = "canonicalize,prune-weights{sparsity=0.5,allocation=uniform},drop-blocks{count=1}"
    pruned = Pipeline.parse(sparse).run(mobile, fashion)
    trained = run(pruned.model, fashion, Recover(weights="straight-through", steps=4))
    assert trained.model.fingerprint != pruned.model.fingerprint
    for name in Trainable.of(pruned.model).matrices:
        old, new = (
            m.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
            for m in (pruned.model, trained.model)
        )
        assert (old == 0).mean() > 0.3
        np.testing.assert_array_equal(new[old == 0], 0)


def test_token_ids_are_not_mixed(calibrated: Callable[..., PassContext]) -> None:
    """Half of one word and half of another is none."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (int64[N,4] ids) => (float[N,4,8] y)
        <float[6,8] table = {0}, float[8,8] w = {0}> {
            [embed] e = Gather (table, ids)
            [layer] y = MatMul (e, w)
        }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    model = read(proto)
    ids = {"ids": rng.integers(0, 6, (16, 4))}
    ctx = replace(calibrated(model), calibration=load_calibration(ids, model))
    whole = "canonicalize,choose-kernels{static=false},insert-fake-quant,recover{mix=true,steps=2}"
    quantized = Pipeline.parse(whole).run(model, ctx)
    notes = [r.text for r in quantized.records[-1].remarks if r.kind == "note"]
    assert notes == ["samples are not mixed: they are no floats of one shape"]


def against_original(model: Model, ctx: PassContext, feeds: list[Feed]) -> float:
    """KL of a pruned model against what it was before."""
    return damage(model.with_fact(Reference(model.fact(Original).model)), ctx, feeds)


def test_what_was_not_compressed_has_nothing_to_recover(
    mobile: Model, fashion: PassContext
) -> None:
    left = run(mobile, fashion, Recover())
    assert left.model.fingerprint == mobile.fingerprint
    (remark,) = left.records[-1].remarks
    assert "no pass before compressed the model" in remark.text


@pytest.mark.parametrize("weights", ["flexround", "straight-through"])
def test_rates_that_ruin_a_model_change_nothing(
    mobile: Model, fashion: PassContext, weights: str
) -> None:
    """The held-out half is no better, so the graph stays what it was."""
    model = rounded(mobile, fashion, 3)
    ruinous = Recover(weights=weights, steps=4, codes_rate=3.0, scales_rate=3.0, vectors_rate=9.0)  # type: ignore[arg-type]
    left = run(model, fashion, ruinous)
    assert left.model.fingerprint == model.fingerprint
    assert left.records[-1].remarks[-1].kind == "missed"


def test_nothing_is_learned_without_data(mobile: Model, pass_context: PassContext) -> None:
    model = rounded(mobile, pass_context, 4)
    for pass_ in (RoundLearned(), Recover()):
        left = run(model, pass_context, pass_)
        assert left.model.fingerprint == model.fingerprint
        assert [r.kind for r in left.records[-1].remarks] == ["note"]


def test_labels_count_where_the_data_has_them_or_the_model_is_sure(
    mobile: Model, fashion: PassContext
) -> None:
    """They change what is learned; without labels and certainty a share changes nothing."""
    assert fashion.calibration is not None
    model = rounded(mobile, fashion, 3)
    plain = run(model, fashion, Recover(steps=4)).model.fingerprint
    missing = run(model, fashion, Recover(steps=4, labels=0.5, sure=1.1)).model.fingerprint
    guessed = run(model, fashion, Recover(steps=4, labels=0.5)).model.fingerprint
    labels = np.arange(fashion.calibration.samples, dtype=np.int64) % 10
    with_labels = replace(fashion, calibration=Relabelled(fashion.calibration, labels))
    labelled = run(model, with_labels, Recover(steps=4, labels=0.5)).model.fingerprint
    assert missing == plain
    assert len({plain, guessed, labelled}) == 3


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_a_class_is_a_label_where_the_model_is_sure_of_it(kind: Kind) -> None:
    chances = np.array([[0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.2, 0.29, 0.51]], np.float32)
    outputs = chances if kind == "probabilities" else np.log(chances) + 7
    assert sure_classes(outputs, kind, 0.5).tolist() == [0, UNSURE, 2]
    assert sure_classes(outputs[:, None], kind, 0.55).tolist() == [[0], [UNSURE], [UNSURE]]


def test_rows_without_a_label_add_nothing() -> None:
    """The mean is over all rows: -log p of the one with a label, halved."""
    lesson = Lesson({"y": "logits"}, (), 0.0, 2.0, 0.0, None, 1, 1, 1, 1)
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    batch = {target_name("y"): logits, LABELS: torch.tensor([0, UNSURE])}
    expected = 2.0 * -np.log(0.25) / 2
    assert float(lesson.loss({"y": logits}, batch)) == pytest.approx(expected, rel=1e-5)
    batch[LABELS] = torch.tensor([UNSURE, UNSURE])
    assert float(lesson.loss({"y": logits}, batch)) == pytest.approx(0.0, abs=1e-6)


def test_maps_of_classes_come_closer_where_they_are_asked_for(
    mobile: Model, fashion: PassContext
) -> None:
    """With a large share, training moves the maps of the held-out half towards the float ones."""
    assert fashion.calibration is not None
    model = rounded(mobile, fashion, 3)
    reference = model.fact(Reference).model
    maps = ClassMaps.of(reference)
    assert maps is not None
    wanted, held_out = maps.reader(reference), list(Part(fashion.calibration, 1))

    def apart(compressed: Model) -> float:
        """Normalised squared error of the maps of the classes that both see."""
        ours, total = maps.reader(compressed), []
        for feed in held_out:
            (theirs, seen), (same, found) = wanted(feed), ours(feed)
            error = np.square(found - seen).sum(1) / np.square(seen).sum(1).clip(1e-9)
            total.append(error[theirs == same])
        return float(np.concatenate(total).mean())

    plain, mapped = (
        apart(run(model, fashion, Recover(steps=30, features=0.0, maps=share)).model)
        for share in (0.0, 3.0)
    )
    assert mapped < 0.9 * plain


def test_values_between_blocks_keep_to_the_memory(mobile: Model, fashion: PassContext) -> None:
    """The deepest that fit are compared: 96 samples of `[128, 7, 7]` are 2.4 MB."""
    assert fashion.calibration is not None
    model = rounded(mobile, fashion, 3)
    damage = OutputDamage.of(model)
    found = {}
    for limit in ("1kB", "3MB", "1GB"):
        options = Recover(max=limit)
        distillation = Distillation(
            Trainable.of(model), fashion, fashion.calibration, damage, options
        )
        found[limit] = distillation.features()
    assert not found["1kB"]
    assert 0 < len(found["3MB"]) < len(found["1GB"])
    assert found["1GB"][-len(found["3MB"]) :] == found["3MB"]


def test_shared_scales_move_together_and_fixed_ones_not(
    tiny_model: Model, calibrated: Callable[..., PassContext]
) -> None:
    """Sites of one group keep one scale; the range that an operator defines stays."""
    u8 = QuantSpec("u8")
    names = {"features": "joint", "active": "joint", "pooled": "own", "row": "fixed"}
    sites = {
        name: Site(name, u8, group, fixed=(0.0, 4.0) if group == "fixed" else None)
        for name, group in names.items()
    }
    readers = {"features": ("relu",), "active": ("pool",), "pooled": ("flat",), "row": ("dense",)}
    ranges = Ranges({name: Range(-1.0, 3.0, -1.0, 3.0) for name in names}, "minmax", 4, "")
    given = tiny_model.with_fact(Plan({}, "")).with_fact(Placement(sites, readers, {}))
    model = (
        Pipeline.parse("insert-fake-quant")
        .run(given.with_fact(ranges), calibrated(tiny_model))
        .model
    )
    student = Trainable.of(model).student(["x"], ["y"], {}, vectors=True, activations=True)
    assert set(student.activations.values()) == {"joint", "own"}
    assert {"row_quant_scale"}.isdisjoint(student.activations)
    assert list(student.factors) == ["joint", "own"]
    with torch.no_grad():
        student.factors["joint"].fill_(0.5)
    moved = student.initializers()
    for name in ("features_quant_scale", "active_quant_scale"):
        before = model.graph.initializers[name].const_value
        assert before is not None
        expected = before.numpy() * np.exp(np.float32(0.5))
        np.testing.assert_allclose(moved[name], expected, rtol=_UP_TO_ORDER_OF_SUMS)
