"""Values of heads in the basis that their outputs need: exact, best at every rank, removable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.ir.axis_groups import axis_groups
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.ir.remove_units import remove_units
from octavo.passes.base import PassContext
from octavo.passes.pipeline import Pipeline

Context = Callable[..., PassContext]

# Four query heads of three dimensions; two of them share a key and a value.
TEXT = Path(__file__).with_name("grouped_attention.txt").read_text(encoding="utf-8")
# Sums in float32, in another order.
RELATIVE = 2e-5
DIMENSIONS, HEADS = 3, 2


def attention(rank: int = DIMENSIONS, text: str = TEXT) -> Model:
    """Random weights; the values of every head have the given rank, in directions of their own."""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        array = rng.standard_normal(tuple(tensor.dims))
        if tensor.name == "wv":
            heads = [
                rng.standard_normal((6, rank)) @ rng.standard_normal((rank, DIMENSIONS))
                for _ in range(HEADS)
            ]
            array = np.concatenate(heads, axis=1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return read(proto)


def outputs(ctx: PassContext, model: Model, name: str = "y") -> np.ndarray:
    assert ctx.calibration is not None
    return np.concatenate([ctx.evaluator.run(model, feed)[name] for feed in ctx.calibration])


def rotated(model: Model, ctx: PassContext) -> Model:
    return Pipeline.parse("rotate-values{samples=512}").run(model, ctx).model


def weight(model: Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy().astype(np.float64)


def test_the_rotated_model_computes_what_it_did(calibrated: Context) -> None:
    model = attention()
    ctx = calibrated(model, 16)
    turned = rotated(model, ctx)
    before = outputs(ctx, model)
    np.testing.assert_allclose(
        outputs(ctx, turned), before, rtol=0, atol=RELATIVE * np.abs(before).max()
    )
    assert np.array_equal(weight(turned, "wq"), weight(model, "wq"))
    assert not np.allclose(weight(turned, "wv"), weight(model, "wv"), atol=0.1)


def test_removing_dimensions_that_carry_nothing_loses_nothing(calibrated: Context) -> None:
    model = attention(rank=1)
    ctx = calibrated(model, 16)
    before = outputs(ctx, model)
    turned = rotated(model, ctx)
    groups = axis_groups(turned).by_name()
    remove_units(turned, groups, {"value#dimensions": [1, 2]})
    assert weight(turned, "wv").shape == (6, HEADS)
    np.testing.assert_allclose(
        outputs(ctx, turned), before, rtol=0, atol=RELATIVE * np.abs(before).max()
    )


def test_every_rank_of_a_head_is_the_best(calibrated: Context) -> None:
    """Against the singular values of W·C^½ by numpy: what r dimensions cannot tell of the rest."""
    model = attention()
    ctx = calibrated(model, 16)
    turned = rotated(model, ctx)
    for some in (model, turned):
        some.graph.outputs.extend(n.outputs[0] for n in some.graph if n.name == "join")
    seen = [outputs(ctx, some, "j").reshape(-1, 12) for some in (model, turned)]
    for head in range(HEADS):
        parts = [slice(DIMENSIONS * at, DIMENSIONS * (at + 1)) for at in (2 * head, 2 * head + 1)]
        second, now = (
            sum(rows[:, part].T.astype(np.float64) @ rows[:, part] for part in parts)
            for rows in seen
        )
        behind, after = (
            np.concatenate([weight(some, "wo")[part].T for part in parts])
            for some in (model, turned)
        )
        power = np.linalg.svd(behind @ np.linalg.cholesky(second), compute_uv=False) ** 2
        for rank in range(1, DIMENSIONS):
            kept, gone = slice(0, rank), slice(rank, DIMENSIONS)
            cross = np.linalg.solve(now[kept, kept], now[kept, gone])
            lost = now[gone, gone] - now[gone, kept] @ cross
            error = np.trace(after[:, gone] @ lost @ after[:, gone].T)
            assert error == pytest.approx(power[rank:].sum(), rel=1e-3)


def test_dimensions_that_are_treated_one_by_one_are_refused(calibrated: Context) -> None:
    text = TEXT.replace(
        "[join] j = Reshape (t, whole)", "[act] r = Relu (t)  j = Reshape (r, whole)"
    )
    model = attention(text=text)
    run = Pipeline.parse("rotate-values").run(model, calibrated(model, 4))
    missed = {remark.where: remark.text for remark in run.records[-1].remarks}
    assert "Relu treats every channel by itself" in missed["act"]
    # Queries and keys are read by no linear layer, whatever lies between.
    assert run.model.fingerprint == model.fingerprint


def test_pruning_takes_the_last_dimensions(calibrated: Context) -> None:
    model = attention(rank=1)
    ctx = calibrated(model, 16)
    text = (
        "rotate-values,prune-channels{ratio=0.6,dimensions=true,round-to=1,repair=none,only=value}"
    )
    left = Pipeline.parse(text).run(model, ctx).model
    before = outputs(ctx, model)
    assert weight(left, "wv").shape == (6, HEADS)
    np.testing.assert_allclose(
        outputs(ctx, left), before, rtol=0, atol=RELATIVE * np.abs(before).max()
    )
