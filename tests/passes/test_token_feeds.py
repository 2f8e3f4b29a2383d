"""Made-up text: frames and masks by hand, and decoders that write what is known beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper
import pytest

from octavo.ir.errors import CalibrationError, UsageError
from octavo.ir.read import read
from octavo.ir.synthetic import Synthetic
from octavo.ir.vocabulary import Vocabulary, read_vocabulary
from octavo.passes.input_laws import InputLaw
from octavo.passes.last_logits import last_logits
from octavo.passes.pipeline import Pipeline
from octavo.passes.synthesis import Synthesis
from octavo.passes.token_inputs import TokenInputs
from octavo.passes.trust import Truster

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

ROWS = 24
HOW = Synthesis(samples=32, length=12)
ENCODER = """
<ir_version: 10, opset_import: ["" : 21]>
encoder (int64[N, T] input_ids, int64[N, T] attention_mask, int64[N, T] token_type_ids,
         int64[N, T] position_ids) => (float[N, T, 4] y)
<float[24, 4] table = {0}, float[2, 4] types = {0}, float[64, 4] places = {0},
 int64[1] last = {2}> {
    e = Gather (table, input_ids)
    t = Gather (types, token_type_ids)
    p = Gather (places, position_ids)
    m = Cast <to = 1> (attention_mask)
    u = Unsqueeze (m, last)
    a = Add (e, t)
    b = Add (a, p)
    y = Mul (b, u)
}
"""
# The logits of a token point at the one three further on.
DECODER = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[N, T] input_ids) => (float[N, T, 24] logits)
<float[24, 24] next = {0}> { logits = Gather (next, input_ids) }
"""
HEADED = """
<ir_version: 10, opset_import: ["" : 21]>
headed (int64[N, T] input_ids) => (float[N, T, 24] logits, float[N, T, 4] hidden)
<float[24, 4] table = {0}, float[4, 24] head = {0}, float[24] bias = {0}> {
    e = Gather (table, input_ids)
    hidden = Identity (e)
    d = MatMul (e, head)
    b = Add (bias, d)
    logits = Tanh (b)
}
"""
# What a token says of its place depends on all others, a little.
MASKED = """
<ir_version: 10, opset_import: ["" : 21]>
masked (int64[N, T] input_ids, int64[N, T] attention_mask) => (float[N, T, 24] logits)
<float[24, 24] next = {0}, int64[1] last = {2}, int64[1] tokens = {1}> {
    e = Gather (next, input_ids)
    m = Cast <to = 1> (attention_mask)
    u = Unsqueeze (m, last)
    k = Mul (e, u)
    a = ReduceMean (k, tokens)
    logits = Add (e, a)
}
"""
NORMED = """
<ir_version: 10, opset_import: ["" : 21]>
normed (int64[N, T] input_ids) => (float[N, T, 4] y)
<float[24, 4] table = {0}, float[4] gain = {0}, float[4] shift = {0}, float[4, 4] w = {0}> {
    e = Gather (table, input_ids)
    n = LayerNormalization (e, gain, shift)
    y = MatMul (n, w)
}
"""
# The cache holds the ids seen so far; a token's successor is as far on as the cache is long.
CACHED = """
<ir_version: 10, opset_import: ["" : 21]>
cached (int64[N, T] input_ids, float[N, 1, P, 1] past)
  => (float[N, T, 24] logits, float[N, 1, S, 1] present)
<float[24, 24] eye = {0}, float[24, 24] table = {0}, int64 all = {24}, int64 two = {2},
 int64[2] axes = {1, 3}> {
    e = Gather (table, input_ids)
    f = Cast <to = 1> (input_ids)
    g = Unsqueeze (f, axes)
    present = Concat <axis = 2> (past, g)
    shape = Shape (past)
    seen = Gather (shape, two)
    moved = Add (input_ids, seen)
    id = Mod (moved, all)
    h = Gather (eye, id)
    zero = Sub (e, e)
    logits = Add (h, zero)
}
"""


def _model(text: str, **arrays: Any) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            drawn = rng.standard_normal(tuple(tensor.dims))
            array = np.asarray(arrays.get(tensor.name, drawn), np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return read(proto)


def _vocabulary() -> Vocabulary:
    special = frozenset({0, 1, 2, 3})
    return Vocabulary(ROWS, begin=(1,), end=(2,), special=special, pad=0, mask=3)


def test_inputs_are_known_by_what_they_select() -> None:
    found = TokenInputs.of(_model(ENCODER))
    assert found is not None
    assert dict(found.roles) == {
        "input_ids": "ids",
        "attention_mask": "mask",
        "token_type_ids": "segments",
        "position_ids": "positions",
    }
    assert found.rows == ROWS


def test_random_text_is_framed_padded_and_masked(pass_context: PassContext) -> None:
    how = replace(HOW, vocabulary=_vocabulary())
    data = how.run(_model(ENCODER), pass_context)
    assert (data.origin, data.samples) == ("sampled-text", 32)
    lengths = set()
    for feed in data.feeds:
        ids, mask = feed["input_ids"], feed["attention_mask"]
        assert (ids.dtype, mask.dtype) == (np.int64, np.int64)
        np.testing.assert_array_equal(feed["position_ids"][0], np.arange(ids.shape[1]))
        assert not feed["token_type_ids"].any()
        for row, seen in zip(ids, mask, strict=True):
            length = int(seen.sum())
            lengths.add(length)
            np.testing.assert_array_equal(seen, np.arange(len(seen)) < length)
            assert (row[0], row[length - 1]) == (1, 2)
            assert not row[length:].any()
            assert np.isin(row[1 : length - 1], np.arange(4, ROWS)).all()
    assert len(lengths) > 3
    assert max(lengths) <= 12


def test_ranked_words_begin_with_the_frequent_ones(pass_context: PassContext) -> None:
    counts = {}
    for prior in ("ranked", "uniform"):
        how = replace(HOW, samples=400, vocabulary=_vocabulary(), prior=prior)
        data = how.run(_model(ENCODER), pass_context)
        ids = np.concatenate([feed["input_ids"].reshape(-1) for feed in data.feeds])
        words = np.bincount(ids, minlength=ROWS)[4:]
        counts[prior] = words / words.sum()
    expected = 1 / (np.arange(ROWS - 4) + 2.7)
    np.testing.assert_allclose(counts["ranked"], expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(counts["uniform"], 1 / (ROWS - 4), atol=0.03)


def test_words_are_as_frequent_as_their_embeddings_are_long(pass_context: PassContext) -> None:
    table = np.random.default_rng(1).standard_normal((ROWS, 4)) * np.arange(ROWS)[:, None]
    how = replace(HOW, samples=600, vocabulary=_vocabulary(), prior="norm")
    data = how.run(_model(ENCODER, table=table), pass_context)
    ids = np.concatenate([feed["input_ids"].reshape(-1) for feed in data.feeds])
    words, norms = np.bincount(ids, minlength=ROWS)[4:], np.linalg.norm(table[4:], axis=1)
    np.testing.assert_allclose(words / words.sum(), norms / norms.sum(), atol=0.02)


def test_a_masked_head_rewrites_the_words_it_is_asked_for(pass_context: PassContext) -> None:
    """What the mask stands for is token 7 here; frames and padding stay as they were."""
    logits = np.random.default_rng(0).standard_normal((ROWS, ROWS))
    logits[3, 7] = 60.0
    how = replace(HOW, vocabulary=_vocabulary())
    data = how.run(_model(MASKED, next=logits), pass_context)
    assert data.origin == "sampled-text"
    for feed in data.feeds:
        for row, seen in zip(feed["input_ids"], feed["attention_mask"], strict=True):
            length = int(seen.sum())
            expected = [1, *[7] * (length - 2), 2, *[0] * (len(row) - length)]
            np.testing.assert_array_equal(row, expected)


def test_text_is_trusted_by_what_its_halves_and_the_norms_say(pass_context: PassContext) -> None:
    """Words that the model was never trained on differ in their ranges; one word is no text."""
    model = Pipeline.parse("canonicalize").run(_model(NORMED), pass_context).model
    truster = Truster(model, pass_context, {})
    trust = truster.of(replace(HOW, vocabulary=_vocabulary()).run(model, pass_context))
    assert set(trust.parts) == {"seeds", "bounds"}
    assert trust.parts["seeds"] > 0.8
    same = np.full((8, 12), 5)
    feeds = tuple({"input_ids": same + k} for k in (0, 9))
    few = truster.of(Synthetic(feeds, "sampled-text", (0, 1)))
    assert few.value < 0.8 * trust.value
    assert few.parts["bounds"] < trust.parts["bounds"]


def test_a_decoder_writes_what_its_logits_say(pass_context: PassContext) -> None:
    sharp = 50.0 * np.roll(np.eye(ROWS), 3, axis=1)
    data = HOW.run(_model(DECODER, next=sharp), pass_context)
    assert (data.origin, data.samples) == ("generated-text", 32)
    ids = np.concatenate([feed["input_ids"] for feed in data.feeds])
    assert ids.shape == (32, 12)
    np.testing.assert_array_equal(np.diff(ids, axis=1) % ROWS, 3)
    assert len(set(ids[:, 0].tolist())) > 5


def test_a_decoder_with_a_head_writes_as_the_whole_model_would(pass_context: PassContext) -> None:
    """Logits of all positions are known to numpy here; the model gives those of the last alone."""
    rng = np.random.default_rng(0)
    table, head, bias = (rng.standard_normal(s) for s in ((ROWS, 4), (4, ROWS), (ROWS,)))
    model = _model(HEADED, table=table, head=head, bias=bias)
    last = last_logits(model, pass_context)
    ids = rng.integers(0, ROWS, (2, 7))
    run, whole = (pass_context.evaluator.load(each) for each in (last, model))
    found, expected = run({"input_ids": ids}), whole({"input_ids": ids})
    by_hand = np.tanh(table[ids[:, -1:]] @ head + bias)
    np.testing.assert_allclose(found["logits"], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["hidden"], expected["hidden"])
    gathers = [node for node in last.graph if node.op_type == "Gather"]
    assert gathers[-1].outputs[0].uses()[0].node.op_type == "MatMul"
    data = HOW.run(model, pass_context)
    assert (data.origin, data.samples) == ("generated-text", 32)
    for feed in data.feeds:
        logits = np.tanh(table[feed["input_ids"]] @ head + bias)
        greedy = logits.argmax(-1)
        np.testing.assert_array_equal(feed["input_ids"][:, 1:5], greedy[:, :4])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("d = MatMul (e, head)", "x = Softmax <axis = 1> (e)\n d = MatMul (x, x)"),
        ("hidden = Identity (e)", "hidden = Identity (d)"),
    ],
)
def test_only_products_with_a_head_are_cut(old: str, new: str, pass_context: PassContext) -> None:
    """Products of two activations, and values that are read elsewhere, stay whole."""
    text = HEADED.replace(old, new)
    model = _model(text)
    assert last_logits(model, pass_context) is model


def test_a_cache_is_carried_from_step_to_step(pass_context: PassContext) -> None:
    data = HOW.run(_model(CACHED, eye=50.0 * np.eye(ROWS)), pass_context)
    assert data.origin == "generated-text"
    ids = np.concatenate([feed["input_ids"] for feed in data.feeds])
    # Behind t tokens the cache holds t - 1 of them.
    np.testing.assert_array_equal(np.diff(ids, axis=1) % ROWS, np.tile(np.arange(11), (32, 1)))
    assert data.feeds[0]["past"].shape == (1, 1, 0, 1)


def test_the_clock_cuts_text_and_says_so(pass_context: PassContext) -> None:
    sharp = 50.0 * np.roll(np.eye(ROWS), 3, axis=1)
    data = replace(HOW, seconds=0.0).run(_model(DECODER, next=sharp), pass_context)
    assert any("the clock ended the writing" in note for note in data.notes)
    assert all(feed["input_ids"].shape[1] >= 8 for feed in data.feeds)


def test_logits_that_are_not_finite_are_refused(pass_context: PassContext) -> None:
    endless = DECODER.replace(
        "logits = Gather (next, input_ids)",
        "n = Gather (next, input_ids)\n s = Abs (n)\n m = Neg (s)\n logits = Log (m)",
    )
    with pytest.raises(CalibrationError, match="not finite"):
        HOW.run(_model(endless), pass_context)


def test_given_ids_bound_the_words(pass_context: PassContext) -> None:
    laws = {"input_ids": InputLaw.parse("ids(5,9)")}
    data = replace(HOW, laws=laws).run(_model(ENCODER), pass_context)
    ids = np.concatenate([feed["input_ids"].reshape(-1) for feed in data.feeds])
    assert set(ids.tolist()) - {0} == {5, 6, 7, 8, 9}


def test_without_a_tokenizer_that_is_said(pass_context: PassContext) -> None:
    assert "no tokenizer" in HOW.run(_model(ENCODER), pass_context).notes[0]


@pytest.mark.parametrize("size", [ROWS + 1, 2 * ROWS, 1000])
def test_a_tokenizer_of_another_model_is_refused(size: int, pass_context: PassContext) -> None:
    how = replace(HOW, vocabulary=Vocabulary(size))
    with pytest.raises(CalibrationError, match=f"{size} tokens, the model's embedding {ROWS} rows"):
        how.run(_model(ENCODER), pass_context)


def test_an_input_beside_the_tokens_is_refused(pass_context: PassContext) -> None:
    text = ENCODER.replace("position_ids) =>", "position_ids, float[N, 9] more) =>")
    with pytest.raises(UsageError, match="'more' is read beside token ids"):
        HOW.run(_model(text), pass_context)


def _tokenizer(post: dict[str, Any]) -> dict[str, Any]:
    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "[unused0]": 4, "word": 5}
    special = [{"id": k, "content": name, "special": True} for name, k in list(vocab.items())[:4]]
    return {"model": {"vocab": vocab}, "added_tokens": special, "post_processor": post}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ],
    "special_tokens": {"[CLS]": {"ids": [1]}, "[SEP]": {"ids": [2]}},
}
BERT = {"type": "BertProcessing", "cls": ["[CLS]", 1], "sep": ["[SEP]", 2]}


@pytest.mark.parametrize("post", [TEMPLATE, BERT, {"type": "Sequence", "processors": [TEMPLATE]}])
def test_a_tokenizer_file_tells_the_frame(post: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_tokenizer(post)), encoding="utf-8")
    expected = Vocabulary(6, (1,), (2,), frozenset({0, 1, 2, 3, 4}), 0, 3)
    assert read_vocabulary(path) == expected
    lines = tmp_path / "vocab.txt"
    lines.write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\n[unused0]\nword\n", encoding="utf-8")
    assert read_vocabulary(lines) == expected


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"vocab": {}}}', '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match="the tokenizer cannot be read"):
        read_vocabulary(path)
