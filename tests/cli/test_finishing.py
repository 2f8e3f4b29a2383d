"""Passes behind the quantizers: run once, logged by what they do to the outputs."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest

import octavo as api
from octavo.backends.ort_session import make_session
from octavo.cli.calibration_data import load_calibration
from octavo.cli.request import Request
from octavo.cli.requested_pipeline import pipeline_of, suited
from octavo.ir.read import read
from octavo.models import shipped
from octavo.passes.offer_options import OfferOptions

if TYPE_CHECKING:
    from octavo.cli.compilation import Compiled
    from octavo.ir.model import Model

_BASE = "canonicalize,calibrate,choose-kernels{bits=4},place-quantizers,insert-fake-quant"
_SAMPLES = 16


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return api.compile(
        shipped("fashion-resnet"),
        calibration=str(shipped("fashion")),
        pipeline=f"{_BASE},clip-weights,round-gptq",
        measure=False,
    )


def test_every_pass_has_one_record_with_what_it_does_to_the_outputs(compiled: Compiled) -> None:
    names = [record.spec.partition("{")[0] for record in compiled.records]
    assert names[-3:] == ["insert-fake-quant", "clip-weights", "round-gptq"]
    assert len(set(names)) == len(names) == len(compiled.pipeline.passes)
    damages = [record.damage for record in compiled.records]
    assert damages[:-3] == [None] * (len(names) - 3)
    nearest, _, rounded = damages[-3:]
    assert nearest is not None
    assert rounded is not None
    assert rounded < 0.5 * nearest


def test_the_logged_damage_is_that_of_the_file(compiled: Compiled) -> None:
    data = load_calibration(str(shipped("fashion")), compiled.source)
    feeds = list(islice(data, _SAMPLES))
    outputs = []
    for path in (shipped("fashion-resnet"), compiled.artifact.path):
        run = make_session(path, threads=1).run
        outputs.append(np.concatenate([next(iter(run(f).values())) for f in feeds])[:_SAMPLES])
    before, after = (_log_softmax(logits.astype(np.float64)) for logits in outputs)
    truth = float((np.exp(before) * (before - after)).sum(axis=1).mean())
    # Integer kernels and FakeQuants round a few activations to neighbouring codes.
    assert compiled.records[-1].damage == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize(
    ("name", "static"), [("int4", False), ("mixed", False), (_BASE, True), ("", True)]
)
def test_a_preset_finds_ranges_at_run_time_where_tokens_are_read(name: str, static: bool) -> None:
    request = Request(pipeline=name)
    found = suited(pipeline_of(request, calibrated=True), _tokens(), request)
    deciding = [p for p in found.passes if p.name in ("choose-kernels", "offer-options")]
    assert [pass_.static for pass_ in deciding] == [static]


@pytest.mark.parametrize(
    ("budgets", "fast"),
    [
        ({"latency": "0.2x"}, True), ({"latency": "0.2x", "memory": "50%"}, True),
        ({"latency": "0.2x", "size": "20%"}, False), ({"max_drop": "1%"}, False),
        ({"latency": "0.2x", "pipeline": _BASE}, False),
    ],
)  # fmt: skip
def test_structure_that_saves_time_alone_is_offered_fewer_widths(
    budgets: dict[str, Any], fast: bool
) -> None:
    request = Request(structure=True, **budgets)
    pipeline = pipeline_of(Request(structure=True, latency="0.2x"), calibrated=True)
    found = suited(pipeline, read(shipped("fashion-vit")), request)
    (offering,) = (p for p in found.passes if isinstance(p, OfferOptions))
    assert (offering.bits == (8, 4)) == fast


def test_a_preset_keeps_static_kernels_where_images_are_read() -> None:
    request = Request(pipeline="int4")
    pipeline = pipeline_of(request, calibrated=True)
    assert suited(pipeline, read(shipped("fashion-vit")), request) == pipeline


def _tokens() -> Model:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[N] ids) => (float[N,4] y) <float[3,4] table = {0,1,2,3,4,5,6,7,8,9,10,11}>
    { [look] y = Gather (table, ids) }"""
    return read(onnx.parser.parse_model(text))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
