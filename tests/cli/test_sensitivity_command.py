"""`octavo sensitivity`: the table, the agreement it prints, and what it refuses."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.cli.main import main
from octavo.cli.stand_in import stand_in
from octavo.ir.read import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Octavo = Callable[..., Any]

MODELS = Path(__file__).resolve().parents[2] / "models"
RESNET = MODELS / "fashion_resnet.onnx"
DATA = MODELS / "fashion.npz"
_CHEAP = "measured,layer-error,weight-error"
_REQUEST = ("sensitivity", RESNET, "-c", DATA, "--estimator", _CHEAP, "--samples", 16)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def found(_own_cache: None) -> dict[str, Any]:
    with redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, _REQUEST), "--json"]) == 0
    content: dict[str, Any] = json.loads(out.getvalue())
    return content


def _spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """1 - 6 Σ d² / (n (n² - 1)), which holds where no two values are equal."""
    assert len(set(left)) == len(left)
    assert len(set(right)) == len(right)
    ranks = [{v: k for k, v in enumerate(sorted(side))} for side in (left, right)]
    squares = sum((ranks[0][a] - ranks[1][b]) ** 2 for a, b in zip(left, right, strict=True))
    n = len(left)
    return 1 - 6 * squares / (n * (n * n - 1))


def test_agreement_is_spearman_s_with_what_was_measured(found: dict[str, Any]) -> None:
    shown = [group["offers"][group["offer"]] for group in found["groups"]]
    measured = [damage["measured"]["damage"] for damage in shown]
    by_name = {row["estimator"]: row for row in found["estimators"]}
    assert list(by_name) == ["measured", "layer-error", "weight-error"]
    assert by_name["measured"]["spearman"] is None
    for name in ("layer-error", "weight-error"):
        other = [damage[name]["damage"] for damage in shown]
        expected = _spearman(measured, other)
        assert by_name[name]["spearman_at_bits"] == pytest.approx(expected, abs=1e-9)
        # Over all bits, most of the order is that of the bits.
        assert by_name[name]["spearman"] > expected


def test_ranks_follow_the_damage_at_the_bits_that_are_shown(found: dict[str, Any]) -> None:
    for row in found["estimators"]:
        ranks, name = row["ranks"], row["estimator"]
        damages = {
            group["group"]: group["offers"][group["offer"]][name]["damage"]
            for group in found["groups"]
        }
        assert all(":s4/" in group["offer"] for group in found["groups"])
        order = sorted(damages, key=lambda group: -damages[group])
        assert [ranks[group] for group in order] == list(range(1, len(order) + 1))


def test_groups_are_those_with_weights_in_the_order_of_the_graph(found: dict[str, Any]) -> None:
    nodes = [node.name for node in onnx.load(RESNET).graph.node]
    names = [group["group"] for group in found["groups"]]
    assert names == [name for name in nodes if name.endswith(("Conv", "Gemm"))]
    first = next(iter(onnx.load(RESNET).graph.initializer))
    assert found["groups"][0]["bytes"] > np.prod(first.dims) * 4
    assert found["bits"] == 4


def test_the_table_says_what_the_document_says(octavo: Octavo, found: dict[str, Any]) -> None:
    outcome = octavo(*_REQUEST)
    group = found["groups"][0]
    line = next(row for row in outcome.out.splitlines() if row.startswith(f" {group['group']} "))
    damage = group["offers"][group["offer"]]["measured"]
    cells = line.split()
    assert cells[1:3] == [group["role"], "1"]
    assert f"{damage['damage']:.2e}" in cells
    assert f"{damage['standard_error']:.2e}" in cells
    last = next(row for row in outcome.out.splitlines() if row.startswith(" weight-error "))
    row = next(r for r in found["estimators"] if r["estimator"] == "weight-error")
    assert last.split()[-2:] == [f"{row['spearman_at_bits']:.3f}", f"{row['spearman']:.3f}"]


def test_what_was_found_is_kept(octavo: Octavo, found: dict[str, Any]) -> None:
    again = octavo(*_REQUEST, "--json")
    # The seconds as well: they are those of the first time.
    assert json.loads(again.out) == found


def test_random_inputs_where_there_is_no_data(octavo: Octavo) -> None:
    outcome = octavo("sensitivity", RESNET, "--samples", 4, "--bits", 7, "--json")
    content = json.loads(outcome.out)
    assert content["notes"] == ["no calibration data: damage is estimated on 4 random samples"]
    assert content["estimators"][0]["samples"] == 4
    assert ":s7/" in content["groups"][0]["offer"]


def test_nodes_that_stay_float_are_listed_without_damage(octavo: Octavo) -> None:
    outcome = octavo(
        "sensitivity", RESNET, "--estimator", "weight-error", "--keep-float", "type:Gemm", "--json"
    )
    groups = json.loads(outcome.out)["groups"]
    assert [group["offer"] is None for group in groups] == [False] * 9 + [True]
    table = octavo("sensitivity", RESNET, "--estimator", "zd", "--keep-float", "type:Gemm")
    assert next(row for row in table.out.splitlines() if "Gemm" in row).endswith("kB")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--estimator", "fischer"), 2, "did you mean fisher"),
        (("--estimator", ","), 2, "no estimator is named"),
        (("--target", "ort-cpuu"), 2, "did you mean ort-cpu"),
        (("--bits", "9"), 2, "--bits"),
        (("--keep-float", "type:Conv", "--keep-float", "type:Gemm"), 2, "4-bit weights"),
    ],
)
def test_requests_that_cannot_work(
    arguments: tuple[str, ...], code: int, message: str, octavo: Octavo
) -> None:
    outcome = octavo("sensitivity", RESNET, "--samples", 1, *arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert not outcome.out


_CHOICE = """
<ir_version: 10, opset_import: ["" : 21]>
choice (float[N,4] x) => (float[N,4] y) <float[4,4] w = {0}, float zero = {0}> {
    [dense] a = MatMul (x, w)
    [sum] s = ReduceSum <keepdims: int = 0> (x)
    [positive] p = Greater (s, zero)
    [choice] y = If <then_branch = t () => (float[N,4] r) { r = Relu (a) },
                     else_branch = e () => (float[N,4] q) { q = Tanh (a) }> (p)
}
"""


def test_models_without_gradients(octavo: Octavo, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(_CHOICE)
    eye = onnx.numpy_helper.from_array(np.eye(4, 4, dtype=np.float32) * 0.7, "w")
    proto.graph.initializer[0].CopyFrom(eye)
    path = tmp_path / "choice.onnx"
    onnx.save(proto, path)
    outcome = octavo("sensitivity", path, "--estimator", "fisher")
    assert outcome.code == 2
    assert "If of node 'choice' has no torch form" in outcome.err
    assert "measured, layer-error" in outcome.err
    content = json.loads(octavo("sensitivity", path, "--estimator", "all", "--json").out)
    names = [row["estimator"] for row in content["estimators"]]
    assert names == ["measured", "scaled-error", "layer-error", "weight-error", "lim", "zd"]
    assert [note.partition(":")[0] for note in content["notes"][1:]] == [
        "fisher", "lampq", "hessian",
    ]  # fmt: skip


def test_random_feeds_are_different_and_come_again() -> None:
    model = read(RESNET)
    first, second = stand_in(model, seed=1, count=3), stand_in(model, seed=1, count=3)
    assert first.samples == 3
    assert first.sha256 == second.sha256 != stand_in(model, seed=2, count=3).sha256
    feeds = [feed["input"] for feed in first]
    assert not np.array_equal(feeds[0], feeds[1])
    np.testing.assert_array_equal(feeds[2], [feed["input"] for feed in second][2])
