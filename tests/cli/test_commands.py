"""Every command but compile: what it prints for people, for programs, and its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime
import pytest

from octavo import __version__
from octavo.backends.ort_target import ORT_CPU
from octavo.backends.registry import TARGETS
from octavo.cli.render import format_bytes, format_seconds, print_json, printable
from octavo.ir.arrays_io import write_arrays
from octavo.ir.artifact import Probes
from octavo.ir.artifact_io import PROBES, read_artifact, write_probes
from octavo.ir.errors import PassFailed
from octavo.ir.model import Model
from octavo.ir.output_folder import MANIFEST
from octavo.passes.base import Pass, PassContext
from octavo.passes.pipeline import Pipeline
from octavo.passes.presets import PRESETS
from octavo.passes.registry import PASSES
from octavo.passes.reproducer import Reproducer

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "compile", "inspect", "bench", "verify", "run", "replay", "passes", "targets", "models",
    "synthesize",
)  # fmt: skip
Octavo = Callable[..., Any]


@final
@dataclass(frozen=True)
class Crash(Pass):
    """Raise, unless it was mended."""

    name = "crash"

    mended: bool = False

    def run(self, model: Model, ctx: PassContext) -> Model:
        if not self.mended:
            raise KeyError("surprise")
        return model


def test_the_version_is_printed(octavo: Octavo) -> None:
    result = octavo("--version")
    assert (result.code, result.out) == (0, f"octavo {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(octavo: Octavo, command: str) -> None:
    assert command in octavo("--help").out
    result = octavo(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Usage: octavo" in result.out


def test_inspect_lists_the_nodes_of_a_model(octavo: Octavo, network: Path) -> None:
    text = octavo("inspect", network)
    content = json.loads(octavo("inspect", network, "--json").out)
    assert text.code == 0
    assert len(content["nodes"]) == 39
    assert content["inputs"].keys() == {"input"}
    convolution = next(row for row in content["nodes"] if row["operator"] == "Conv")
    assert convolution["weights"].startswith("FLOAT [16,1,3,3]")
    assert convolution["weight_bytes"] >= 4 * 16 * 9
    assert all(row["node"] in text.out for row in content["nodes"])


def test_inspect_lists_the_layers_of_an_artifact(octavo: Octavo, artifact: Path) -> None:
    text = octavo("inspect", artifact)
    content = json.loads(octavo("inspect", artifact, "--json").out)
    assert text.code == 0
    assert content["manifest"]["target"] == "ort-cpu"
    layers = {row["node"]: row for row in content["layers"]}
    first = layers["/0/0.0/Conv"]
    assert first["option"] == "static:s8/axis0"
    assert first["kernel"].endswith("QLinearConv")
    assert 0 < first["weight_bytes"] < first["source_bytes"]
    assert all(name in text.out for name in layers)


def test_inspect_shows_the_pass_log_and_one_pass(octavo: Octavo, artifact: Path) -> None:
    table = octavo("inspect", artifact, "--passes")
    content = json.loads(octavo("inspect", artifact, "--passes", "--json").out)
    names = [record["spec"].partition("{")[0] for record in content["passes"]]
    assert names == PRESETS["int8"].split(",")
    assert all(name in table.out for name in names)
    one = octavo("inspect", artifact, "--pass", 1)
    (alone,) = json.loads(octavo("inspect", artifact, "--pass", 1, "--json").out)["passes"]
    assert alone == content["passes"][0]
    assert alone["diff"]["removed"]
    assert all(name in one.out for name in alone["diff"]["removed"])
    assert all(remark["text"] in one.out for remark in alone["remarks"])


def test_verify_accepts_what_was_written(octavo: Octavo, artifact: Path) -> None:
    text = octavo("verify", artifact)
    content = json.loads(octavo("verify", artifact, "--json").out)
    assert (text.code, text.err) == (0, "")
    assert content["ok"] is True
    assert [row["difference"] for row in content["probes"]] == [0.0] * len(content["probes"])
    assert content["audit"]["ok"] is True


def test_verify_finds_outputs_that_moved(octavo: Octavo, artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    saved = read_artifact(copy)
    probes = saved.probes()
    moved = tuple({name: np.multiply(a, 1.5) for name, a in out.items()} for out in probes.outputs)
    write_probes(Probes(probes.feeds, moved), copy / PROBES)
    _forget_hash(copy, PROBES)
    result = octavo("verify", copy)
    assert result.code == 4
    assert "probe outputs differ" in result.err
    assert octavo("verify", copy, "--tolerance", 0.9).code == 0


def test_run_gives_what_the_runtime_gives(
    octavo: Octavo, artifact: Path, network: Path, tmp_path: Path
) -> None:
    feed = {"input": np.random.default_rng(1).random((3, 1, 28, 28), dtype=np.float32)}
    write_arrays(tmp_path / "feed.npz", feed)
    for model, file in ((network, network), (artifact, artifact / "model.onnx")):
        result = octavo("run", model, "-i", tmp_path / "feed.npz", "-o", tmp_path / "out.npz")
        assert (result.code, result.err) == (0, "")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        with np.load(tmp_path / "out.npz") as stored:
            np.testing.assert_array_equal(stored["logits"], session.run(None, feed)[0])


def test_bench_compares_with_the_first(octavo: Octavo, artifact: Path, network: Path) -> None:
    arguments = ("bench", network, artifact, "--rounds", 5, "--shape", "input=2x1x28x28")
    content = json.loads(octavo(*arguments, "--json").out)
    assert content["shapes"] == {"input": "float32[2, 1, 28, 28]"}
    assert (content["rounds"], content["threads"], content["feed"]) == (5, 1, "random")
    first, second = content["rows"]
    assert first["speed"] == 1.0
    assert second["bytes"] == (artifact / "model.onnx").stat().st_size
    assert second["median_seconds"] > 0
    assert "1.00x" in octavo(*arguments).out


def test_bench_finds_the_source_of_an_artifact(
    octavo: Octavo,
    artifact: Path,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("bench", artifact, "--rounds", 3, "--json")
    alone = octavo(*arguments)
    assert len(json.loads(alone.out)["rows"]) == 1
    assert "is not here" in alone.err
    (tmp_path / network.name).write_bytes(b"another file of that name")
    assert len(json.loads(octavo(*arguments).out)["rows"]) == 1
    shutil.copy(network, tmp_path)
    found = octavo(*arguments)
    assert [row["file"] for row in json.loads(found.out)["rows"]] == [
        network.name,
        str(artifact / "model.onnx"),
    ]
    assert found.err == ""


def test_replay_runs_a_crash_again_until_it_is_mended(
    octavo: Octavo,
    tiny_model: Model,
    pass_context: PassContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PASSES, "crash", Crash)
    ctx = replace(pass_context, workdir=tmp_path)
    with pytest.raises(PassFailed):
        Pipeline((Crash(),)).run(tiny_model, ctx, [Reproducer(tmp_path / "crashes")])
    (folder,) = (tmp_path / "crashes").iterdir()
    broken = octavo("replay", folder)
    assert broken.code == 1
    assert broken.err.startswith("error: crash: KeyError: 'surprise'")
    replay = folder / "replay.json"
    content = json.loads(replay.read_text(encoding="utf-8"))
    content["pipeline"] = "crash{mended=true}"
    content["versions"]["numpy"] = "1.0"
    replay.write_text(json.dumps(content), encoding="utf-8")
    mended = octavo("replay", folder)
    assert mended.code == 0
    assert mended.out.endswith("no error now; it was: KeyError: 'surprise'\n")
    assert "warning: the folder was written with numpy 1.0" in mended.err


def test_passes_lists_options_and_presets(octavo: Octavo) -> None:
    content = json.loads(octavo("passes", "--json").out)
    assert content.keys() == PASSES.keys()
    assert content["calibrate"]["options"]["method"]["default"] == "percentile"
    text = octavo("passes").out
    assert all(f"{name}: " in text for name in PASSES)
    assert json.loads(octavo("passes", "--presets", "--json").out) == PRESETS


def test_documentation_pages_are_written_and_checked(octavo: Octavo, tmp_path: Path) -> None:
    (tmp_path / "forgotten.md").touch()
    arguments = ("passes", "--write-docs", tmp_path, "--goldens", ROOT / "tests" / "golden")
    assert octavo(*arguments, "--check").code == 4
    assert octavo(*arguments).code == 0
    assert octavo(*arguments, "--check").code == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(PASSES)
    page = (tmp_path / "calibrate.md").read_text(encoding="utf-8")
    assert page.startswith("# calibrate\n")
    assert "| `method` | mse or minmax or percentile or entropy | `percentile` |" in page


def test_the_documentation_of_the_project_is_up_to_date(octavo: Octavo) -> None:
    arguments = ("--write-docs", ROOT / "passes" / "docs", "--goldens", ROOT / "tests" / "golden")
    result = octavo("passes", *arguments, "--check")
    assert (result.code, result.err) == (0, "")


def test_targets_show_every_row(octavo: Octavo) -> None:
    listed = json.loads(octavo("targets", "list", "--json").out)
    counted = {row["target"]: row["kernels"] for row in listed}
    assert counted == {name: len(target.rows) for name, target in TARGETS.items()}
    assert {"ort-cpu", "ort-cpu-avx2", "openvino", "tensorrt"} <= set(counted)
    content = json.loads(octavo("targets", "show", "ort-cpu", "--json").out)
    assert [row["op_type"] for row in content["rows"]] == [row.op_type for row in ORT_CPU.rows]
    assert content["never"]["GRU"] == dict(ORT_CPU.never)["GRU"]
    text = octavo("targets", "show", "ort-cpu").out
    assert all(condition.text in text for row in ORT_CPU.rows for condition in row.conditions)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, ""), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4_851_234, "4.85 MB")],
)
def test_bytes_are_short(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (2.5, "2.50 s"), (0.0094, "9.40 ms"), (4.8e-5, "48.0 µs")],
)
def test_seconds_are_short(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_json_holds_no_number_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, float("inf"), (float("nan"), "x")]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, [None, "x"]]}


def test_names_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\u202e\nc") == "a\\x1b[31mb\\r\\u202e\nc"


def _forget_hash(folder: Path, name: str) -> None:
    """Make the manifest not know a file, so that only its content is checked."""
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["files"][name]
    path.write_text(json.dumps(content), encoding="utf-8")
