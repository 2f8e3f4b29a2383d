"""Budgets and accuracy goals from end to end: what is promised is held against the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnxruntime
import pytest

import octavo as api
from octavo.cli.calibration_data import load_calibration
from octavo.cli.candidates import Candidate
from octavo.cli.planned import Planner
from octavo.ir.calibration import Part
from octavo.ir.errors import BudgetInfeasible, UsageError
from octavo.ir.read import read

MODELS = Path(__file__).resolve().parents[2] / "models"
DATA = MODELS / "fashion.npz"
# Few samples and generations, so that no time limit decides.
MIXED = (
    "canonicalize,calibrate,offer-options,sensitivity{samples=16},allocate,"
    "refine{generations=2,samples=32,seconds=600},place-quantizers,insert-fake-quant"
)
# Damage by the weights alone, no search and nothing done to the codes: the budgets are tested.
PLAIN = (
    "canonicalize,calibrate{max-samples=64},offer-options,sensitivity{estimator=weight-error},allocate,"
    "place-quantizers,insert-fake-quant"
)
QUICK = ("--no-measure", "-p", PLAIN)
Octavo = Callable[..., Any]


@pytest.fixture(scope="module")
def labelled_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 images with labels."""
    path = tmp_path_factory.mktemp("data") / "labelled.npz"
    with np.load(MODELS / "fashion_test.npz") as data:
        np.savez(path, input=data["input"][:256], labels=data["label"][:256])
    return path


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Path:
    """The smallest network within 30 % of its bytes, with damage measured and the plan refined."""
    from octavo.cli.main import main

    out = tmp_path_factory.mktemp("budgeted") / "out"
    command = ["compile", network, "-o", out, "-c", DATA, "--size", "30%", "--no-measure"]
    extras = ["--pareto", "4", "--top-k", "2", "-p", MIXED]
    assert main([str(part) for part in (*command, *extras)]) == 0
    return out


def emitted_bytes(folder: Path) -> int:
    """What is deployed: the model and the weights beside it."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


@pytest.mark.parametrize(("name", "share"), [("resnet", 15), ("mobile", 30)])
def test_the_files_keep_to_the_size(octavo: Octavo, tmp_path: Path, name: str, share: int) -> None:
    source, out = MODELS / f"fashion_{name}.onnx", tmp_path / "out"
    result = octavo("compile", source, "-o", out, "-c", DATA, "--size", f"{share}%", *QUICK)
    assert (result.code, result.err) == (0, "")
    budget = source.stat().st_size * share // 100
    assert emitted_bytes(out) <= budget
    assert emitted_bytes(out) >= 0.9 * budget


def test_the_file_says_what_was_decided_between(budgeted: Path, network: Path) -> None:
    plan = json.loads((budgeted / "plan.json").read_text(encoding="utf-8"))
    solution, groups = plan["solution"], plan["groups"]
    assert solution["status"] == "optimal"
    assert 0 <= solution["gap"] <= 1e-4
    assert solution["objective"] == "damage"
    assert solution["limits"]["bytes"] <= 0.3 * network.stat().st_size
    assert (plan["estimator"], plan["metric"], plan["samples"]) == (
        "measured", "KL of the outputs", 16
    )  # fmt: skip
    chosen = {g["name"]: {o["option"]: o for o in g["offers"]}[g["chosen"]] for g in groups}
    for resource in ("bytes", "damage", "bops"):
        assert sum(offer[resource] for offer in chosen.values()) <= solution["totals"][resource]
    assert all(offer["standard_error"] >= 0 for g in groups for offer in g["offers"])
    assert any(len({o["option"] for o in g["offers"]}) > 5 for g in groups)
    assert len(solution["curve"]) == 4
    assert len(solution["alternatives"]) == 1


def test_the_plan_is_what_the_file_holds(budgeted: Path) -> None:
    plan = json.loads((budgeted / "plan.json").read_text(encoding="utf-8"))
    audit = json.loads((budgeted / "audit.json").read_text(encoding="utf-8"))
    assert audit["ok"] is True
    by_node = {row["node"]: row["option"] for row in audit["rows"]}
    single = {g["nodes"][0]: g["chosen"] for g in plan["groups"] if len(g["nodes"]) == 1}
    shared = single.keys() & by_node.keys()
    assert len(shared) > 15
    assert {name: by_node[name] for name in shared} == {name: single[name] for name in shared}


def test_fewer_bits_are_more_than_one_width(budgeted: Path) -> None:
    """Otherwise a plan for the whole graph would be no different from uniform bits."""
    plan = json.loads((budgeted / "plan.json").read_text(encoding="utf-8"))
    widths = {g["chosen"].partition("/")[0] for g in plan["groups"]} - {"float", "static"}
    assert len(widths) > 1


@pytest.mark.slow
def test_a_latency_budget_is_kept_or_missed_aloud(octavo: Octavo, tmp_path: Path) -> None:
    source, out = MODELS / "fashion_resnet.onnx", tmp_path / "out"
    options = ("--latency", "0.5x", "--shape", "input=64x1x28x28", "--refine-seconds", "0")
    arguments = ("--estimator", "weight-error", "--json")
    result = octavo("compile", source, "-o", out, "-c", DATA, *options, *arguments)
    rows = json.loads(result.out)["bench"]["rows"]
    if result.code == 0:
        assert rows[-1]["speed"] >= 1 / 0.5
    else:
        assert result.code == 3
        assert "of --latency 0.5x" in result.err
    assert (out / "model.onnx").is_file()


def test_structure_that_nothing_can_have_is_missed_aloud(octavo: Octavo, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.onnx"
    graph = "narrow (float[N,4] x) => (float[N,4] y) <float[4,4] w> { y = MatMul (x, w) }"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {graph}')
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    del proto.graph.value_info[:]
    onnx.save(proto, narrow)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((16, 4)).astype(np.float32))
    out = tmp_path / "out"
    asked = ("--structure", "--no-measure", "--size", "1kB")
    done = octavo("compile", narrow, "-c", tmp_path / "x.npz", "-o", out, *asked)
    assert done.code == 3
    assert "--structure: nothing could go" in done.err
    assert (out / "model.onnx").is_file()


def accuracy(path: Path, data: Path) -> float:
    """Top-1 on the half of the data that no plan saw."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    held_out = Part(load_calibration(str(data), read(MODELS / "fashion_mobile.onnx")), 1)
    found = [session.run(None, dict(feed))[0].argmax(1) for feed in held_out]
    assert held_out.labels is not None
    assert 100 <= len(held_out.labels) <= 156
    return float((np.concatenate(found) == held_out.labels).mean())


@pytest.mark.slow
@pytest.mark.parametrize("goal", ["smallest", "fastest"])
def test_an_accuracy_goal_is_met_on_held_out_samples(
    octavo: Octavo, network: Path, labelled_data: Path, tmp_path: Path, goal: str
) -> None:
    out = tmp_path / "out"
    options = ("--max-drop", "2%", "--goal", goal, *QUICK)
    result = octavo("compile", network, "-o", out, "-c", labelled_data, *options)
    assert (result.code, result.err) == (0, "")
    before = accuracy(network, labelled_data)
    assert accuracy(out / "model.onnx", labelled_data) >= before * 0.98
    assert "goal: top-1 accuracy of" in " ".join(result.out.split()).replace("note: ", "")
    if goal == "smallest":
        assert emitted_bytes(out) < 0.45 * network.stat().st_size


def test_a_goal_that_cannot_be_met_leaves_the_best_artifact(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric is 1 for the source, then 0.5 for whatever is asked about."""
    text = "from itertools import chain, repeat\n\nscores = chain([1.0], repeat(0.5))\n\n\n"
    text += "def falling(run):\n    return next(scores)\n"
    (tmp_path / "falling_metric.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = ("--max-drop", "0.0001%", "--eval", "falling_metric:falling", *QUICK)
    result = octavo("compile", network, "-o", tmp_path / "out", "-c", DATA, *options)
    assert result.code == 3
    assert "the metric falls from 1.0000 to 0.5000 at best, more than --max-drop" in result.err
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert octavo("verify", tmp_path / "out").code == 0


def test_an_accuracy_goal_needs_labels(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    result = octavo(
        "compile", network, "-o", tmp_path / "o", "-c", DATA, "--max-drop", "1%", *QUICK
    )
    assert result.code == 2
    assert "needs labels or a metric" in result.err
    assert "--eval module:function" in result.err
    assert list(tmp_path.iterdir()) == []


def test_python_takes_the_same_budgets_and_gives_the_same_bytes(
    budgeted: Path, network: Path, tmp_path: Path
) -> None:
    """Without a cache: everything is found again."""
    compiled = api.compile(
        network, calibration=DATA, pipeline=MIXED, size="30%", measure=False, pareto=4, top_k=2
    )
    assert compiled.missed == ()
    compiled.save(tmp_path / "out")
    for name in ("model.onnx", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (budgeted / name).read_bytes()


def test_python_refuses_what_the_command_refuses(network: Path) -> None:
    options: dict[str, Any] = {"measure": False, "estimator": "weight-error"}
    with pytest.raises(BudgetInfeasible) as caught:
        api.compile(network, size="1kB", **options)
    assert caught.value.nearest["bytes"] is not None
    with pytest.raises(UsageError, match="budgets need a pipeline that allocates"):
        api.compile(network, size="30%", pipeline="int8", **options)
    with pytest.raises(UsageError, match="portable weights need a pipeline that allocates"):
        api.compile(network, portable=True, pipeline="int8", **options)
    with pytest.raises(UsageError, match="the least latency needs a bound"):
        api.compile(network, minimise="latency", **options)


def test_the_least_size_within_a_damage(network: Path) -> None:
    """A larger allowance never makes a larger file."""
    sizes = []
    for allowed in (1e-6, 1.0):
        compiled = api.compile(
            network, calibration=DATA, minimise="size", max_damage=allowed, measure=False,
            pipeline=PLAIN,
        )  # fmt: skip
        sizes.append(compiled.artifact.bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.8 * sizes[0]


def test_a_plan_that_nothing_refines_is_built_once(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], Planner._build

    def counted(self: Planner, *args: Any, **options: Any) -> Candidate:
        built.append(options)
        return build(self, *args, **options)

    monkeypatch.setattr(Planner, "_build", counted)
    deciding = (
        "canonicalize,offer-options{bits=8,static=false},sensitivity{estimator=weight-error},"
        "allocate,{refine}place-quantizers,insert-fake-quant"
    )
    for refine, calls in (("", [{}]), ("refine{seconds=0},", [{}, {"refined": True}])):
        api.compile(
            network, calibration=str(DATA), size="60%", measure=False,
            pipeline=deciding.replace("{refine}", refine),
        )  # fmt: skip
        assert built == calls
        built.clear()
