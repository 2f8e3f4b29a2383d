"""A second target re-measures what differs, and a device's table decides on another machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from octavo.backends import ort_session
from octavo.ir.cache import ENVIRONMENT
from octavo.ir.latency_table import read_table
from octavo.passes.sweep import sweep_ranges

Octavo = Callable[..., Any]
DATA = Path(__file__).resolve().parents[2] / "models" / "fashion.npz"
SHAPE = ("--shape", "input=1x1x28x28")
MIXED = (
    "canonicalize,calibrate{max-samples=16},offer-options,sensitivity{samples=4},allocate,"
    "place-quantizers,insert-fake-quant"
)


@dataclass
class Counters:
    """What was measured since the last `clear`: values swept, trials of damage, files timed."""

    swept: list[str] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.swept, self.trials, self.timed = [], [], []


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    from octavo.backends import ort_timing
    from octavo.passes import measure_damage

    found = Counters()
    run, time_nodes = measure_damage._Study._run, ort_timing.time_nodes

    def swept(model: Any, evaluator: Any, batches: Any, names: Any, *rest: Any) -> Any:
        found.swept += names
        return sweep_ranges(model, evaluator, batches, names, *rest)

    def tried(study: Any, job: Any) -> Any:
        found.trials += job.trials
        return run(study, job)

    def timed(artifacts: Any, *rest: Any, **options: Any) -> Any:
        found.timed += [artifact.path.parent.name for artifact in artifacts]
        return time_nodes(artifacts, *rest, **options)

    monkeypatch.setattr("octavo.passes.calibrate.sweep_ranges", swept)
    monkeypatch.setattr(measure_damage._Study, "_run", tried)
    monkeypatch.setattr(ort_timing, "time_nodes", timed)
    return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`machine("board")`: from here on everything runs on another processor, with its own cache."""

    def move(name: str) -> None:
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path / f"cache-{name}"))
        monkeypatch.setattr(ort_session, "processor", lambda: name)

    return move


def test_a_second_target_measures_only_what_differs(
    octavo: Octavo, network: Path, tmp_path: Path, counters: Counters, machine: Any
) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    machine("one machine")
    arguments = ("plan", network, "-c", DATA, "-p", MIXED, "--size", "60%", *SHAPE, "--no-measure")
    assert octavo(*arguments, "--target", "ort-cpu").code == 0
    first = replace(counters)
    assert first.swept
    assert any(name.startswith("value ") for name in first.trials)
    counters.clear()
    assert octavo(*arguments, "--target", "ort-cpu").code == 0
    assert (counters.swept, counters.trials) == ([], [])
    second = octavo(*arguments, "--target", "openvino")
    assert second.code == 0, second.err
    # Ranges, and what storing in 4 or 8 bits does, are known; OpenVINO has no other offers here.
    assert not set(counters.swept) & set(first.swept)
    assert not set(counters.trials) & set(first.trials)
    assert len(counters.trials) < len(first.trials) / 4


def test_planning_again_measures_nothing(
    octavo: Octavo, network: Path, tmp_path: Path, counters: Counters, machine: Any
) -> None:
    machine("one machine")
    arguments = ("plan", network, "-c", DATA, "-p", MIXED, "--size", "60%", *SHAPE)
    assert octavo(*arguments).code == 0
    assert counters.timed.count("float") >= 1
    counters.clear()
    assert octavo(*arguments).code == 0
    assert (counters.swept, counters.trials, counters.timed) == ([], [], [])


def test_a_table_of_the_device_decides_on_another_machine(
    octavo: Octavo, network: Path, tmp_path: Path, counters: Counters, machine: Any
) -> None:
    table = tmp_path / "board.json"
    machine("Board CPU")
    recorded = octavo("profile", network, "-o", table, "--seconds", "0", "--kind", "static", *SHAPE)
    assert recorded.code == 0, recorded.err
    assert "Board CPU" in read_table(table).environment
    # On that device integer kernels are slow: only a plan that reads the table can know.
    content = json.loads(table.read_text(encoding="utf-8"))
    for row in content["rows"].values():
        for option in row:
            row[option] = 1e-6 if option == "float" else 1e-3
    table.write_text(json.dumps(content), encoding="utf-8")
    counters.clear()
    machine("Build server")
    arguments = ("plan", network, "-c", DATA, "-p", MIXED, "--size", "60%", *SHAPE, "--json")
    there = octavo(*arguments, "--profile", table)
    assert there.code == 0, there.err
    assert counters.timed == []
    found = json.loads(there.out)
    options = [group["chosen"] for group in found["groups"]]
    assert options
    assert not [option for option in options if option.startswith("static")]
    assert found["cost_source"].startswith("measured on onnxruntime")
    (note,) = (text for text in found["notes"] if "elsewhere" in text)
    assert note == (
        "board.json was recorded elsewhere: processor: the profile has 'Board CPU', "
        "here is 'Build server'"
    )


def test_a_latency_is_kept_on_the_device_and_not_here(
    octavo: Octavo, network: Path, tmp_path: Path, machine: Any
) -> None:
    table, out = tmp_path / "board.json", tmp_path / "out"
    machine("Board CPU")
    options = ("--seconds", "0", "--kind", "static", *SHAPE)
    assert octavo("profile", network, "-o", table, *options).code == 0
    # Integer kernels of that device are a hundred times faster, and moving codes is free.
    content = json.loads(table.read_text(encoding="utf-8"))
    for row in content["rows"].values():
        for option in row:
            row[option] = 1e-4 if option == "float" else 1e-6
    table.write_text(json.dumps(content), encoding="utf-8")
    machine("Build server")
    pipeline = MIXED.replace("sensitivity{samples=4}", "sensitivity{estimator=weight-error}")
    arguments = ("compile", network, "-o", out, "-c", DATA, "-p", pipeline, *SHAPE)
    # No file is ten times faster than its source here.
    done = octavo(*arguments, "--latency", "0.1x", "--profile", table)
    assert done.code == 0, done.err
    assert "--latency is kept by the seconds of board.json" in done.out
    assert octavo(*arguments, "--latency", "0.1x", "--force").code in (2, 3)


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"runtime": "onnxruntime 1.19.0"}, 0, "runtime: the profile has 'onnxruntime 1.19.0'"),
        ({"runtime": "openvino 2026.1"}, 2, "was recorded with openvino 2026.1"),
        ({"keep": 3}, 0, "nodes are not in board.json: their seconds are estimated"),
        ({"keep": 0}, 2, "holds no node of the model"),
    ],
)
def test_a_table_that_does_not_fit_is_told(
    octavo: Octavo, network: Path, tmp_path: Path, machine: Any,
    change: dict[str, Any], code: int, text: str,
) -> None:  # fmt: skip
    table = tmp_path / "board.json"
    machine("Board CPU")
    options = ("--seconds", "0", "--kind", "static", *SHAPE)
    assert octavo("profile", network, "-o", table, *options).code == 0
    content = json.loads(table.read_text(encoding="utf-8"))
    runtime, _, rest = content["environment"].partition(", ")
    content["environment"] = f"{change.get('runtime', runtime)}, {rest}"
    content["rows"] = dict(list(content["rows"].items())[: change.get("keep")])
    table.write_text(json.dumps(content), encoding="utf-8")
    pipeline = MIXED.replace("sensitivity{samples=4}", "sensitivity{estimator=weight-error}")
    arguments = ("plan", network, "-c", DATA, "-p", pipeline, "--size", "60%", *SHAPE)
    planned = octavo(*arguments, "--profile", table)
    said = planned.out + planned.err
    assert (planned.code, text in said) == (code, True), said
