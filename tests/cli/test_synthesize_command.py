"""`octavo synthesize` and compiling without data, as their users meet them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import octavo
from octavo.cli import synthetic_data
from octavo.cli.main import main
from octavo.cli.png import contact_sheet, write_png
from octavo.cli.synthetic_options import SyntheticOptions
from octavo.passes.synthesis import Synthesis

Octavo = Callable[..., Any]
QUICK = ("--samples", 16, "--steps", 10, "--no-cache")

PLAIN = """
<ir_version: 10, opset_import: ["" : 21]>
plain (float[N, 16] x) => (float[N, 16] y) <float[16, 16] w = {0}> {
    h = MatMul (x, w)
    y = Relu (h)
}
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model that tells nothing of its inputs."""
    proto = onnx.parser.parse_model(PLAIN)
    array = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    path = tmp_path / "plain.onnx"
    onnx.save(proto, path)
    return path


def _pixels(path: Path) -> Any:
    """A grey PNG, read by its specification."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        length, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + length]
        check = int.from_bytes(data[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(name + content)
        chunks[name], at = content, at + 12 + length
    width, height = (int.from_bytes(chunks[b"IHDR"][k : k + 4]) for k in (0, 4))
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    assert rows.shape[1] == 1 + width
    return rows[:, 1:]


def test_data_is_written_with_a_picture_and_its_name(
    octavo: Octavo, network: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.npz"
    result = octavo("synthesize", network, "-o", data, *QUICK, "--json")
    assert (result.code, result.err) == (0, "")
    content = json.loads(result.out)
    assert (content["origin"], content["samples"]) == ("synthetic-bn", 16)
    assert set(content["parts"]) == {"seeds", "statistics", "bounds", "classes", "certainty"}
    assert 0 < content["trust"] < 1
    with np.load(data) as stored:
        assert {name: array.shape for name, array in stored.items()} == {"input": (16, 1, 28, 28)}
    assert _pixels(tmp_path / "data.png").std() > 10
    out = tmp_path / "out"
    assert octavo("compile", network, "-o", out, "-c", data, "--no-measure").code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["calibration_source"], manifest["calibration_samples"]) == ("synthetic-bn", 16)


def test_the_same_seed_gives_the_same_file(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.npz" for k in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        arguments = ("-o", file, "--seed", seed, "--no-sheet", *QUICK)
        assert octavo("synthesize", network, *arguments).code == 0
    first, second, other = (file.read_bytes() for file in files)
    assert first == second
    assert first != other


def test_nothing_is_overwritten_unasked(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    data.write_text("mine")
    result = octavo("synthesize", network, "-o", data, *QUICK)
    assert result.code == 2
    assert "--force" in result.err
    assert data.read_text() == "mine"


def test_a_model_that_tells_nothing_is_refused_with_a_way_out(
    octavo: Octavo, plain: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.npz"
    result = octavo("synthesize", plain, "-o", data, *QUICK)
    assert result.code == 2
    assert "no BatchNormalization statistics" in result.err
    assert "--input 'x=normal(0,1)'" in result.err
    given = ("--input", "x=uniform(0,255)")
    assert octavo("synthesize", plain, "-o", data, *given, *QUICK).code == 0
    with np.load(data) as stored:
        assert stored["x"].shape == (16, 16)
        assert 200 < stored["x"].max() <= 255


def test_ranges_without_data_make_a_static_artifact(
    octavo: Octavo, network: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = octavo("compile", network, "-o", out, "-c", "analytic", "--no-measure")
    assert (result.code, result.err) == (0, "")
    assert "no data, analytic ranges" in result.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["calibration_source"] == "analytic"
    plan = (out / "plan.json").read_text()
    assert '"static' in plan


def test_ranges_without_data_rest_on_the_given_law(
    octavo: Octavo, plain: Path, tmp_path: Path
) -> None:
    """Without norms and laws there is nothing that they could rest on."""
    out = tmp_path / "out"
    asked = ("compile", plain, "-o", out, "-c", "analytic", "--no-measure", "--json")
    refused = octavo(*asked)
    assert refused.code == 2
    assert "no normalization bounds" in refused.err
    assert "--input 'x=normal(0,1)'" in refused.err
    assert octavo(*asked, "--input", "x=uniform(-2,5)").code == 0
    initial = onnx.load(out / "model.onnx").graph.initializer
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in initial}
    (scale,) = (array for name, array in scales.items() if name.startswith("x") and "scale" in name)
    assert scale == pytest.approx((5 + 2) / 255)


def test_an_assumed_law_is_named(octavo: Octavo, network: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = octavo("compile", network, "-o", out, "-c", "analytic", "--no-measure")
    assert "input 'input' is taken as normal(0,1); --input says otherwise" in result.out


def test_without_data_the_model_s_own_is_taken_and_named(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_data, "_UNASKED", {"samples": 16, "steps": 5})
    monkeypatch.setattr(synthetic_data, "_ENOUGH_TRUST", 0.0)
    out = tmp_path / "out"
    result = octavo("compile", network, "-o", out, "--no-measure", "--no-cache")
    assert (result.code, result.err) == (0, "")
    assert "no data given: made from the model" in result.out
    assert "calibration data is synthetic-bn, 16 samples, trust" in result.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["calibration_source"] == "synthetic-bn"


def test_data_without_trust_is_left_out_and_named(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_data, "_UNASKED", {"samples": 16, "steps": 5})
    monkeypatch.setattr(synthetic_data, "_ENOUGH_TRUST", 1.0)
    out = tmp_path / "out"
    result = octavo("compile", network, "-o", out, "--no-measure", "--no-cache")
    assert (result.code, result.err) == (0, "")
    assert "is not trusted" in result.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["calibration_source"] == ""


def test_data_that_takes_too_long_is_left_out_and_named(
    octavo: Octavo, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried = {"seconds": 0.4, "all_or_nothing": True}
    monkeypatch.setattr(synthetic_data, "_UNASKED", hurried)
    result = octavo("compile", network, "-o", tmp_path / "out", "--no-measure", "--no-cache")
    assert (result.code, result.err) == (0, "")
    assert "none could be made: it would take more than 0 s" in result.out


def test_none_and_a_silent_model_compile_as_ever(
    octavo: Octavo, plain: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / "first", tmp_path / "second"]
    for out, more in zip(outs, ((), ("-c", "none")), strict=True):
        assert octavo("compile", plain, "-o", out, "--no-measure", *more).code == 0
    first, second = (out.joinpath("manifest.json").read_bytes() for out in outs)
    assert first == second


@pytest.fixture(scope="module")
def made(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the network's own in a file."""
    path = tmp_path_factory.mktemp("made") / "data.npz"
    how = ("--samples", "16", "--steps", "20", "--no-cache", "--no-sheet")
    assert main(["synthesize", str(network), "-o", str(path), *how]) == 0
    return path


def test_plans_and_orders_rest_on_made_data_as_on_any(
    octavo: Octavo, network: Path, made: Path
) -> None:
    quick = ("--estimator", "layer-error", "--no-measure", "--no-cache")
    plan = octavo("plan", network, "-c", made, "--size", "30%", "--json", *quick)
    assert (plan.code, plan.err) == (0, "")
    found = json.loads(plan.out)
    damages = [offer["damage"] for group in found["groups"] for offer in group["offers"]]
    assert max(damages) > 0
    steps = ("--step", "prune-channels{ratio=0.1}", "--step", "prune-weights")
    order = octavo("order", network, "-c", made, *steps, "--json")
    assert (order.code, order.err) == (0, "")
    assert len(json.loads(order.out)["pairs"]) == 1


def test_any_command_makes_data_where_it_is_asked_to(
    octavo: Octavo, network: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates are those of the same data in a file."""
    how = Synthesis(samples=16, steps=20)
    monkeypatch.setattr(SyntheticOptions, "synthesis", lambda self, model: how)
    damages = []
    for data in (made, "synthetic"):
        asked = ("--estimator", "layer-error", "--json", "--no-cache")
        found = octavo("sensitivity", network, "-c", data, *asked)
        assert (found.code, found.err) == (0, "")
        damages.append([group["offers"] for group in json.loads(found.out)["groups"]])
    assert damages[0] == damages[1]
    assert len(damages[0]) > 5


def test_pruning_is_repaired_and_recovered_on_made_data(
    octavo: Octavo, network: Path, made: Path, tmp_path: Path
) -> None:
    """Real images, which nothing has seen, get the classes that they had."""
    with np.load(network.with_name("fashion.npz")) as stored:
        images = stored["input"]

    def classes(path: Path) -> Any:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {"input": images})[0].argmax(1)

    def agreement(pruning: str, behind: str = "") -> float:
        out = tmp_path / f"{pruning}{behind}"
        text = (
            f"canonicalize,prune-channels{{{pruning}}},calibrate,choose-kernels,"
            f"place-quantizers,insert-fake-quant{behind}"
        )
        given = ("-c", made, "-p", text, "--no-measure", "--no-cache")
        assert octavo("compile", network, "-o", out, *given).code == 0
        return float((classes(out / "model.onnx") == classes(network)).mean())

    pruned = agreement("ratio=0.1,repair=none")
    assert pruned < 0.5
    assert agreement("ratio=0.1") > pruned + 0.2
    assert agreement("ratio=0.1,repair=none", ",recover{steps=20}") > pruned + 0.2


def test_a_sheet_shows_images_side_by_side(tmp_path: Path) -> None:
    images = np.zeros((4, 1, 8, 8), np.float32)
    images[1] = 1.0
    sheet = contact_sheet(images)
    assert sheet is not None
    # Seven times eight pixels, and a margin of two.
    assert sheet.shape == (116, 116)
    assert (sheet[:56, :56].max(), sheet[:56, 58:114].min()) == (0, 255)
    write_png(tmp_path / "sheet.png", sheet)
    np.testing.assert_array_equal(_pixels(tmp_path / "sheet.png"), sheet)
    assert contact_sheet(np.zeros((4, 16), np.float32)) is None
    assert contact_sheet(np.zeros((4, 5, 8, 8), np.float32)) is None
    colour = contact_sheet(np.zeros((2, 64, 64, 3), np.float32))
    assert colour is not None
    assert colour.shape == (66, 132, 3)


def test_the_python_function_compiles_without_data_too(network: Path) -> None:
    compiled = octavo.compile(network, calibration="analytic", measure=False)
    assert any(node.option.startswith("static:") for node in compiled.artifact.planned)
    silent = octavo.compile(network, measure=False)
    assert not any(node.option.startswith("static") for node in silent.artifact.planned)
