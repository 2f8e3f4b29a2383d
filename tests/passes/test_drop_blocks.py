"""Removed residual blocks against what the graph computes without them."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest

from octavo.cli.calibration_data import load_calibration
from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.errors import UsageError
from octavo.ir.read import read
from octavo.passes.drop_blocks import removable_branches, without_branches
from octavo.passes.output_damage import OutputDamage
from octavo.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

FOLDER = Path(str(files("octavo.models")))
FLOAT32_RELATIVE = 1e-6

CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
chain (float[N,3] x) => (float[N,3] y)
<float[3,3] a = {0}, float[3,3] b = {0}, float[3,3] c = {0}, float[3,3] d = {0}> {
    [up] p = MatMul (x, a)
    [one] q = Add (x, p)
    [down] r = MatMul (q, b)
    [act] s = Tanh (r)
    [two] t = Add (s, q)
    [last] u = MatMul (t, c)
    [three] y = Add (t, u)
}
"""


def chain() -> Model:
    """Three residual blocks; the output is the last sum."""
    proto = onnx.parser.parse_model(CHAIN)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        array = 0.3 * rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


@pytest.mark.parametrize(
    "names", [("one",), ("two",), ("three",), ("one", "three"), ("one", "two", "three")]
)
def test_sums_without_a_branch_hand_on_their_identity(
    names: tuple[str, ...],
    pass_context: PassContext,
    feed_of: Callable[..., Feed],
    agrees: Callable[[Feed, Feed, float], None],
) -> None:
    model, weights = chain(), {}
    for name, value in model.graph.initializers.items():
        weights[name] = np.asarray(value.const_value)
    branches = removable_branches(model)
    assert list(branches) == ["one", "two", "three"]
    left = without_branches(model, pass_context, {n: branches[n] for n in names})
    feed = feed_of(model, 1)
    x = feed["x"]
    q = x if "one" in names else x + x @ weights["a"]
    t = q if "two" in names else q + np.tanh(q @ weights["b"])
    y = t if "three" in names else t + t @ weights["c"]
    agrees(pass_context.evaluator.run(left, feed), {"y": y}, FLOAT32_RELATIVE)
    assert sum(n.op_type == "MatMul" for n in left.graph) == 3 - len(names)


def test_greedy_choice_is_the_least_damage_there_is(pass_context: PassContext) -> None:
    model = read(FOLDER / "fashion_vit.onnx")
    data = load_calibration(str(FOLDER / "fashion.npz"), model)
    ctx = replace(pass_context, calibration=data)
    prepared = Pipeline.parse("canonicalize").run(model, ctx).model
    only = "re:^/b/b.[23]/Add"
    run = Pipeline.parse(f"drop-blocks{{count=2,samples=16,only={only}}}").run(prepared, ctx)
    applied = [r for r in run.records[-1].remarks if r.kind == "applied"]
    branches = {
        n: k for n, k in removable_branches(prepared).items() if n[:6] in ("/b/b.2", "/b/b.3")
    }
    assert len(branches) == 4
    damage, feeds = OutputDamage.of(prepared), tuple(first_samples(data, 16))
    truths = [ctx.evaluator.run(prepared, feed) for feed in feeds]

    def lost(names: tuple[str, ...]) -> float:
        left = without_branches(prepared, ctx, {n: branches[n] for n in names})
        rows = [
            damage.per_sample(truth, ctx.evaluator.run(left, feed), samples_of(feed))
            for truth, feed in zip(truths, feeds, strict=True)
        ]
        return float(np.concatenate(rows).mean())

    single = {name: lost((name,)) for name in branches}
    assert applied[0].where == min(single, key=single.__getitem__)
    assert applied[0].values["damage"] == pytest.approx(min(single.values()), rel=1e-3)
    pairs = {p: lost(p) for p in combinations(branches, 2) if applied[0].where in p}
    assert {r.where for r in applied} == set(min(pairs, key=pairs.__getitem__))
    assert all(0 < float(r.values["influence"] or 0) < 1 for r in applied)
    assert sum(v.const_value is not None for v in run.model.graph.initializers.values()) < sum(
        v.const_value is not None for v in prepared.graph.initializers.values()
    )


@pytest.mark.parametrize("of", ["macs", "seconds"])
def test_the_share_that_is_asked_for_is_saved(of: str, pass_context: PassContext) -> None:
    """As much as the cost of the whole model and of what is left say."""
    model = read(FOLDER / "fashion_vit.onnx")
    data = load_calibration(str(FOLDER / "fashion.npz"), model)
    ctx = replace(pass_context, calibration=data)
    prepared = Pipeline.parse("canonicalize").run(model, ctx).model
    text = f"drop-blocks{{ratio=0.1,of={of},samples=16,beam=2}}"
    run = Pipeline.parse(text).run(prepared, ctx)
    applied = [r for r in run.records[-1].remarks if r.kind == "applied"]
    whole, left = (_cost(m, ctx, of) for m in (prepared, run.model))
    assert left <= 0.9 * whole
    assert float(applied[-1].values["saved"] or 0) == pytest.approx(1 - left / whole, rel=1e-6)
    assert f"of the {of} (analytic) saved" in applied[-1].text


def _cost(model: Model, ctx: PassContext, of: str) -> float:
    cost = ctx.cost
    rows = [cost.macs(n) if of == "macs" else cost.seconds(n, "float") for n in model.graph]
    return float(sum(row or 0 for row in rows))


def test_a_share_that_all_blocks_do_not_have_is_an_error(
    calibrated: Callable[..., PassContext],
) -> None:
    model = chain()
    with pytest.raises(UsageError, match=r"can be removed \(one\)"):
        Pipeline.parse("drop-blocks{ratio=0.9,of=seconds,only=one}").run(model, calibrated(model))


def test_a_count_is_one_of_blocks(pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match="a share of macs needs a ratio"):
        Pipeline.parse("drop-blocks{count=1,of=macs}").run(chain(), pass_context)


@pytest.mark.parametrize(
    "options", ["", "count=1,ratio=0.5", "ratio=1", "ratio=0", "count=-1", "count=1,beam=0"]
)
def test_count_or_ratio_has_to_be_given(options: str, pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match="either a count"):
        Pipeline.parse(f"drop-blocks{{{options}}}").run(chain(), pass_context)


def test_no_sample_tells_no_damage(pass_context: PassContext) -> None:
    with pytest.raises(UsageError, match="samples must be at least 1"):
        Pipeline.parse("drop-blocks{count=1,samples=0}").run(chain(), pass_context)


def test_more_blocks_than_there_are_is_an_error(
    calibrated: Callable[..., PassContext],
) -> None:
    model = chain()
    with pytest.raises(UsageError, match="4 blocks are to be removed, and 3 can be"):
        Pipeline.parse("drop-blocks{count=4}").run(model, calibrated(model))
