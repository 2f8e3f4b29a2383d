"""How far outputs are from the source's, against sums written out entry by entry."""

from __future__ import annotations

import math

import numpy as np
import onnx.parser
import pytest

from octavo.ir.read import read
from octavo.passes.output_damage import OutputDamage, summary

RELATIVE = 1e-9


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """Σ p log(p / q) of two vectors of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def _softmax(row: np.ndarray) -> np.ndarray:
    powers = [math.exp(v) for v in row.tolist()]
    return np.array([v / sum(powers) for v in powers])


def _drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_divergence_of_logits() -> None:
    p, q = _drawn(6, 5), _drawn(6, 5, seed=1)
    found = OutputDamage({"y": "logits"}).per_sample({"y": p}, {"y": q}, 6)
    expected = [_kl(_softmax(a), _softmax(b)) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=RELATIVE)
    # It has a direction.
    back = OutputDamage({"y": "logits"}).per_sample({"y": q}, {"y": p}, 6)
    assert np.abs(back - found).max() > 0.1


def test_logits_may_be_large_and_shifted() -> None:
    p, q = _drawn(3, 5), _drawn(3, 5, seed=1)
    plain = OutputDamage({"y": "logits"}).per_sample({"y": p}, {"y": q}, 3)
    moved = OutputDamage({"y": "logits"}).per_sample({"y": p + 512}, {"y": q - 512}, 3)
    np.testing.assert_allclose(moved, plain, rtol=1e-3)
    huge = np.array([[1e4, 0.0]], np.float32)
    assert OutputDamage({"y": "logits"}).per_sample({"y": huge}, {"y": -huge}, 1)[0] == 1e4


def test_rows_of_a_sample_are_averaged() -> None:
    p, q = _drawn(2, 3, 4), _drawn(2, 3, 4, seed=1)
    found = OutputDamage({"y": "logits"}).per_sample({"y": p}, {"y": q}, 2)
    rows = [[_kl(_softmax(p[n, t]), _softmax(q[n, t])) for t in range(3)] for n in range(2)]
    np.testing.assert_allclose(found, [sum(r) / 3 for r in rows], rtol=RELATIVE)


def test_divergence_of_probabilities() -> None:
    p = np.stack([_softmax(row) for row in _drawn(4, 5)])
    q = np.stack([_softmax(row) for row in _drawn(4, 5, seed=1)])
    found = OutputDamage({"y": "probabilities"}).per_sample({"y": p}, {"y": q}, 4)
    np.testing.assert_allclose(found, [_kl(a, b) for a, b in zip(p, q, strict=True)], rtol=RELATIVE)
    # A class that rounding made impossible costs much, not infinitely much.
    one = OutputDamage({"y": "probabilities"})
    lost = one.per_sample({"y": np.array([[0.5, 0.5]])}, {"y": np.array([[1.0, 0.0]])}, 1)
    assert 5 < lost[0] < 50


def test_error_of_values() -> None:
    p, q = _drawn(3, 2, 4), _drawn(3, 2, 4, seed=1)
    found = OutputDamage({"y": "values"}).per_sample({"y": p}, {"y": q}, 3)
    expected = [
        sum((a - b) ** 2 for a, b in zip(p[n].ravel().tolist(), q[n].ravel().tolist(), strict=True))
        / sum(a**2 for a in p[n].ravel().tolist())
        for n in range(3)
    ]
    np.testing.assert_allclose(found, expected, rtol=RELATIVE)


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_equal_outputs_have_no_damage(kind: str) -> None:
    p = _drawn(3, 4)
    damage = OutputDamage({"y": kind})  # type: ignore[dict-item]
    assert damage.per_sample({"y": p}, {"y": p}, 3).tolist() == [0, 0, 0]
    zero = np.zeros_like(p)
    assert damage.per_sample({"y": zero}, {"y": zero}, 3).tolist() == [0, 0, 0]


def test_outputs_are_summed_and_missing_ones_count_nothing() -> None:
    p, q = _drawn(3, 4), _drawn(3, 4, seed=1)
    both = OutputDamage({"a": "logits", "b": "values"})
    parts = [OutputDamage({n: k}) for n, k in both.kinds.items()]
    expected, actual = {"a": p, "b": p}, {"a": q, "b": q}
    alone = [part.per_sample(expected, actual, 3) for part in parts]
    np.testing.assert_allclose(both.per_sample(expected, actual, 3), sum(alone), rtol=RELATIVE)
    np.testing.assert_array_equal(both.per_sample(expected, {"b": q}, 3), alone[1])


def test_an_output_that_does_not_count_samples_gives_all_one_number() -> None:
    """Steps first: `[5, 2, 4]` for two samples."""
    p, q = _drawn(5, 2, 4), _drawn(5, 2, 4, seed=1)
    found = OutputDamage({"y": "values"}).per_sample({"y": p}, {"y": q}, 2)
    whole = float(np.square(p.astype(float) - q).sum() / np.square(p.astype(float)).sum())
    np.testing.assert_allclose(found, [whole, whole], rtol=RELATIVE)


def test_summary() -> None:
    values = [0.5, 1.5, 4.0, 2.0]
    found = summary(np.array(values))
    mean = sum(values) / 4
    assert found.mean == pytest.approx(mean, rel=RELATIVE)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3) / math.sqrt(4)
    assert found.standard_error == pytest.approx(error, rel=RELATIVE)
    assert summary(np.array([3.0])).standard_error == 0
    assert summary(np.zeros(0)).mean == 0


_ENDS = {
    "[mm] y = MatMul (x, w)": "logits",
    "[mm] m = MatMul (x, w) [bias] y = Add (m, b)": "logits",
    "[mm] y = Gemm (x, w, b)": "logits",
    "[mm] m = MatMul (x, w) [soft] y = Softmax (m)": "probabilities",
    "[mm] m = MatMul (x, w) [same] y = Identity (m)": "logits",
    "[mm] m = MatMul (x, w) [tanh] y = Tanh (m)": "values",
    "[mm] m = MatMul (x, w) [norm] y = LayerNormalization (m, b)": "values",
    "[mm] m = MatMul (x, w) [sum] y = Add (m, x)": "values",
}


def _ending(end: str) -> OutputDamage:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        model (float[N,4] x) => (float[N,4] y)
        <float[4,4] w = {{1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}}, float[4] b = {{1,2,3,4}}>
        {{ {end} }}"""
    return OutputDamage.of(read(onnx.parser.parse_model(text)))


@pytest.mark.parametrize(("end", "kind"), _ENDS.items())
def test_what_an_output_is(end: str, kind: str) -> None:
    assert _ending(end).kinds == {"y": kind}


def test_the_metric_may_be_asked_for() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        model (float[N,4] x) => (float[N,4] y, float[N,1] z, int64[N] k) {
        [a] y = Tanh (x) [b] z = ReduceMax <keepdims = 1> (x, axis) [c] k = ArgMax <axis = 1,
        keepdims = 0> (x) }"""
    text = text.replace("k) {", "k) <int64[1] axis = {1}> {")
    model = read(onnx.parser.parse_model(text))
    # Whole numbers have no damage, and one column is no distribution.
    assert OutputDamage.of(model, "kl").kinds == {"y": "logits", "z": "values"}
    assert OutputDamage.of(model, "error").kinds == {"y": "values", "z": "values"}
    assert "KL" in OutputDamage.of(model, "kl").text
    assert "KL" not in OutputDamage.of(model, "error").text


@pytest.mark.parametrize("kind", ["logits", "probabilities", "values"])
def test_a_few_rows_at_a_time_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = (np.abs(_drawn(3, 7, 5, seed=seed)) + 0.1 for seed in (0, 1))
    damage = OutputDamage({"y": kind})  # type: ignore[dict-item]
    whole = damage.per_sample({"y": p}, {"y": q}, 3)
    monkeypatch.setattr("octavo.passes.output_damage._ELEMENTS", 30)
    np.testing.assert_allclose(damage.per_sample({"y": p}, {"y": q}, 3), whole, rtol=RELATIVE)
