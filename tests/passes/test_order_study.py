"""Orders of compressions against running them by hand."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from octavo.cli.calibration_data import load_calibration
from octavo.ir.calibration import Part, first_samples, samples_of
from octavo.ir.errors import UsageError
from octavo.ir.read import read
from octavo.passes.order_study import Pair, equivalent_ratio, order_study, rounded
from octavo.passes.output_damage import OutputDamage
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

FOLDER = Path(str(files("octavo.models")))
PRUNE = "prune-weights{sparsity=0.3,method=magnitude}"


@pytest.fixture
def prepared(pass_context: PassContext) -> tuple[Model, PassContext]:
    """The canonical ResNet, and a context with its calibration data."""
    model = read(FOLDER / "fashion_resnet.onnx")
    data = load_calibration(str(FOLDER / "fashion.npz"), model)
    ctx = replace(pass_context, calibration=data)
    return Pipeline.parse("canonicalize").run(model, ctx).model, ctx


def test_both_orders_are_measured_on_data_that_proposes_nothing(
    prepared: tuple[Model, PassContext],
) -> None:
    model, ctx = prepared
    study = order_study(model, ctx, ["bits=4", PRUNE], samples=64)
    assert [c.text for c in study.compressions] == [PRUNE, "bits=4"]
    (pair,) = study.pairs
    assert ctx.calibration is not None
    fit = replace(ctx, calibration=Part(ctx.calibration, 0))
    damage = OutputDamage.of(model)

    def rows_of(changed: Model, half: int) -> np.ndarray:
        assert ctx.calibration is not None
        rows = [
            damage.per_sample(
                ctx.evaluator.run(model, feed), ctx.evaluator.run(changed, feed), samples_of(feed)
            )
            for feed in first_samples(Part(ctx.calibration, half), 64)
        ]
        return np.concatenate(rows)

    def lost(changed: Model, half: int) -> float:
        return float(rows_of(changed, half).mean())

    pruned = Pipeline.parse(PRUNE).run(model, fit).model
    after = Pipeline.parse(PRUNE).run(rounded(model, ctx, 4), fit).model
    assert study.compressions[0].intensity == pytest.approx(lost(pruned, 0))
    assert study.compressions[1].intensity == pytest.approx(lost(rounded(model, ctx, 4), 0))
    assert pair.proposed == pytest.approx(lost(rounded(pruned, ctx, 4), 1))
    # Rounding that something followed is done again.
    assert pair.swapped == pytest.approx(lost(rounded(after, ctx, 4), 1))
    assert pair.gap == pytest.approx(lost(rounded(model, ctx, 4), 0) - lost(pruned, 0))
    saved = rows_of(rounded(after, ctx, 4), 1) - rows_of(rounded(pruned, ctx, 4), 1)
    assert pair.advantage == pytest.approx(saved.mean())
    assert pair.standard_error == pytest.approx(saved.std(ddof=1) / np.sqrt(saved.size))
    agrees = bool(saved.mean() >= -saved.std(ddof=1) / np.sqrt(saved.size))
    assert study.best == ((PRUNE, "bits=4") if agrees else ("bits=4", PRUNE))
    assert study.agrees == agrees
    # 16 bits over 4: what plain rounding to 4 bits is worth.
    assert study.compressions[1].ratio == pytest.approx(4.0)


def test_weaker_passes_come_first(prepared: tuple[Model, PassContext]) -> None:
    model, ctx = prepared
    strong = "prune-weights{sparsity=0.6,method=magnitude,allocation=uniform}"
    weak = "prune-weights{sparsity=0.1,method=magnitude,allocation=uniform}"
    study = order_study(model, ctx, [strong, weak], samples=32)
    assert [c.text for c in study.compressions] == [weak, strong]


@pytest.mark.parametrize(("swapped", "agrees"), [(0.9, True), (0.7, True), (0.69, False)])
def test_a_swap_has_to_save_more_than_chance_does(swapped: float, agrees: bool) -> None:
    pair = Pair("one", "two", 1.0, swapped, 0.0, standard_error=0.3 + 1e-9)
    assert pair.agrees == agrees


def test_ratio_lies_on_the_curve_of_rounding() -> None:
    curve = [(8, 1e-6), (4, 1e-2), (2, 1.0)]
    assert equivalent_ratio(curve, 1e-2) == pytest.approx(4)
    assert equivalent_ratio(curve, 0.1) == pytest.approx(6)
    assert equivalent_ratio(curve, 1e-4) == pytest.approx(3)
    assert [equivalent_ratio(curve, d) for d in (0.0, 9.0)] == [2, 8]


def test_rounded_weights_have_few_values(prepared: tuple[Model, PassContext]) -> None:
    model, ctx = prepared
    for node in rounded(model, ctx, 3).graph:
        if node.op_type in ("Conv", "Gemm"):
            value = node.inputs[1]
            assert value is not None
            assert all(len(np.unique(row)) <= 7 for row in np.asarray(value.const_value))


def test_order_of_one_is_refused(prepared: tuple[Model, PassContext]) -> None:
    with pytest.raises(UsageError, match="two compressions"):
        order_study(*prepared, ["bits=4"])
