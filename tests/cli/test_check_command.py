"""`octavo check`, and what compiling for TensorRT leaves and says."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import octavo as public
from octavo.backends import trt_rtx
from octavo.models import shipped

Octavo = Callable[..., Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest network compiled for TensorRT."""
    out = tmp_path_factory.mktemp("tensorrt") / "out"
    data = np.load(shipped("fashion"))["input"]
    public.compile(
        shipped("fashion-mobile"), target="tensorrt-sm86", calibration={"input": data[:64]}
    ).save(out)
    return out


def test_a_compiled_model_conforms_and_verifies(octavo: Octavo, compiled: Path) -> None:
    result = octavo("check", compiled, "--target", "tensorrt-sm86", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["ok"]
    assert found["findings"] == []
    assert found["checked"][0] == "conformance rules"
    assert any("which kernels TensorRT takes" in text for text in found["unverified"])
    assert octavo("verify", compiled).code == 0


def test_nothing_is_said_to_be_measured_or_seen(compiled: Path) -> None:
    audit = json.loads((compiled / "audit.json").read_text())
    assert audit["kernels"] == {}
    assert {row["kernel"] for row in audit["rows"]} == {""}
    assert "not verified: which kernels TensorRT takes" in audit["environment"]
    report = (compiled / "report.html").read_text()
    assert "as fast as" not in report


def test_the_build_commands_are_part_of_the_artifact(
    octavo: Octavo, compiled: Path, tmp_path: Path
) -> None:
    files = json.loads((compiled / "manifest.json").read_text())["files"]
    assert {"build_engine.py", "build_engine.sh", "model.onnx", "probes.npz"} == set(files)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in compiled.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "build_engine.sh").write_text("trtexec --fp16\n")
    assert octavo("verify", copy).code == 4


def test_a_loaded_artifact_is_as_accurate_as_the_network(compiled: Path) -> None:
    data = np.load(shipped("fashion-test"))
    feed = {"input": data["input"][:256]}
    (scores,) = public.load(compiled).run(feed).values()
    assert (scores.argmax(-1) == data["label"][:256]).mean() > 0.85


def test_a_file_for_another_runtime_is_found_out(octavo: Octavo, artifact: Path) -> None:
    result = octavo("check", artifact, "--target", "tensorrt-sm86", "--json")
    assert result.code == 4
    assert "does not conform to tensorrt-sm86" in result.err
    findings = json.loads(result.out)["findings"]
    rules = {finding["rule"] for finding in findings if finding["error"]}
    assert rules >= {"uint8", "zero-point"}
    assert all(f["node"] and f["reason"] and f["fix"] for f in findings if f["rule"] == "uint8")


def test_a_table_names_node_reason_and_remedy(octavo: Octavo, artifact: Path) -> None:
    result = octavo("check", artifact, "--target", "tensorrt")
    assert result.code == 4
    for text in ("zero-point", "input_q", "symmetric signed codes", "does not conform"):
        assert text in result.out


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ({trt_rtx.BINDINGS: "1.4.0.76", trt_rtx.LIBRARIES: "1.4.0.76"}, "1.4.0.76"),
        ({trt_rtx.BINDINGS: "1.7.1.116"}, "known: both of 1.7"),
        ({trt_rtx.BINDINGS: "1.7.1.116", trt_rtx.LIBRARIES: "1.7.0.2"}, "1.7.0.2"),
    ],
)
def test_wheels_of_another_version_are_named(
    versions: dict[str, str],
    text: str,
    octavo: Octavo,
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in (trt_rtx.BINDINGS, trt_rtx.LIBRARIES):
            return real(name)
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    result = octavo("check", compiled, "--target", "tensorrt")
    assert result.code == 2
    assert "the wheels of TensorRT for RTX do not fit" in result.err
    assert text in result.err
    assert "octavo[tensorrt-check]" in result.err


def test_without_wheels_the_rules_are_checked_and_the_rest_is_named(
    octavo: Octavo, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_rtx, "version", lambda: None)
    result = octavo("check", compiled, "--target", "tensorrt", "--json")
    found = json.loads(result.out)
    assert result.code == 0
    assert found["checked"] == ["conformance rules"]
    assert any("octavo[tensorrt-check]" in text for text in found["unverified"])


def test_without_data_it_says_what_was_chosen_and_why(octavo: Octavo, tmp_path: Path) -> None:
    source, out = shipped("fashion-mobile"), tmp_path / "out"
    options = ("--target", "tensorrt-sm86", "-c", "none")
    result = octavo("compile", source, "-o", out, *options)
    assert result.code == 0
    weighted = sum(n.op_type in ("Conv", "Gemm") for n in public.read(source).graph)
    said = " ".join(result.out.split())
    for text in (
        "no calibration data: tensorrt-sm86 has no int8 kernels that find ranges at run time",
        f"all {weighted} nodes with weights stay float16",
        "--calibration DATA gives int8",
        "'canonicalize,choose-kernels{weight-only=true,bits=4,block-size=64},insert-fake-quant'",
    ):
        assert text in said


def test_an_artifact_of_float4_weights_is_verified_loaded_and_held_to_its_part(
    octavo: Octavo, tmp_path: Path
) -> None:
    """No runtime here has the type: what runs are the numbers that the codes stand for."""
    data, out = np.load(shipped("fashion-test")), tmp_path / "out"
    public.compile(
        shipped("fashion-vit"), target="tensorrt-sm120", pipeline="nvfp4",
        calibration={"input": np.load(shipped("fashion"))["input"][:64]},
    ).save(out)  # fmt: skip
    assert octavo("verify", out).code == 0
    assert octavo("check", out, "--target", "tensorrt-sm120").code == 0
    refused = octavo("check", out, "--target", "tensorrt-sm89")
    assert refused.code == 4
    assert "FLOAT4E2M1 does not run on sm89" in refused.err
    (scores,) = public.load(out).run({"input": data["input"][:256]}).values()
    assert (scores.argmax(-1) == data["label"][:256]).mean() > 0.85
    sizes = json.loads((out / "manifest.json").read_text())["results"]
    assert sizes["model_bytes"] < 0.21 * sizes["source_bytes"]


def test_what_the_parser_rejects_is_named_with_a_remedy(octavo: Octavo, tmp_path: Path) -> None:
    import onnx
    import onnx.parser

    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x) => (int32[2,4] y)
        <int8[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> {
            [ranges] q, s, z = DynamicQuantizeLinear (x) [product] y = MatMulInteger (q, w, z) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "dynamic.onnx")
    result = octavo("check", tmp_path / "dynamic.onnx", "--target", "tensorrt", "--json")
    assert result.code == 4
    found = {f["node"]: f for f in json.loads(result.out)["findings"] if f["rule"] == "operator"}
    assert found.keys() == {"ranges", "product"}
    assert "--calibration" in found["ranges"]["fix"]
    assert "choose-kernels{weight-only=true,bits=4}" in found["product"]["fix"]
