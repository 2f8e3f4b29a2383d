"""`octavo package`: the packaged model computes what the artifact does, wherever it is loaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import octavo
from octavo.ir.arrays_io import read_arrays

Octavo = Callable[..., Any]
HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "models"
LIBRARY = Path(onnxruntime.__file__).parent / "capi"
SYSTEM_HEADERS = Path("/usr/include/onnxruntime")


@pytest.fixture(scope="module")
def packaged(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaged") / "package"
    octavo.package(artifact, folder)
    return folder


def _kernels(config: str) -> set[tuple[str, str]]:
    """Domain and operator of every entry; types, which hold commas, are left out."""
    found = set()
    for line in config.splitlines():
        if not line.startswith("#"):
            domain, _, operators = line.split(";")
            depth, name = 0, ""
            for character in f"{operators},":
                depth += (character == "{") - (character == "}")
                if character == "," and depth == 0:
                    found.add((domain, name))
                    name = ""
                elif depth == 0 and character != "}":
                    name += character
    return found


def _executed(path: Path, feed: dict[str, np.ndarray], folder: Path) -> set[str]:
    """Operators that one run really executes, from the runtime's own profile."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "args" in e}


def _feed(artifact: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(artifact / "probes.npz")
    return {name.split(".", 2)[2]: a for name, a in arrays.items() if name.startswith("0.in.")}


def test_both_forms_give_the_same_outputs(artifact: Path, packaged: Path) -> None:
    feed = _feed(artifact)
    expected, actual = octavo.load(artifact).run(feed), octavo.load(packaged).run(feed)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


@pytest.mark.parametrize("network", ["fashion_resnet", "fashion_vit", "fashion_lstm"])
def test_float_models_give_the_same_outputs_too(
    octavo: Octavo, network: str, tmp_path: Path
) -> None:
    import octavo as library

    out = tmp_path / "out"
    arguments = ("-o", out, "--no-measure", "-p", "canonicalize", "--calibration", "none")
    assert octavo("compile", MODELS / f"{network}.onnx", *arguments).code == 0
    library.package(out)
    feed = _feed(out)
    expected, actual = library.load(out).run(feed), library.load(out / "package").run(feed)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


def test_the_reduced_build_holds_every_kernel_that_runs(
    artifact: Path, packaged: Path, tmp_path: Path
) -> None:
    config = (packaged / "required_operators_and_types.config").read_text(encoding="utf-8")
    listed = _kernels(config)
    executed = _executed(packaged / "model.ort", _feed(artifact), tmp_path)
    assert executed
    assert executed <= {operator for _, operator in listed}
    # The kernels of the optimised graph, which a list made from the .onnx file misses.
    named = {node.op_type for node in onnx.load(artifact / "model.onnx").graph.node}
    assert "QLinearConv" in executed - named
    assert ("com.microsoft", "QLinearConv") in listed
    assert re.search(r'QLinearAdd\{"inputs": \{"0": \["uint8_t"\]\}\}', config)
    # No path of the machine that wrote it.
    assert "/" not in config


def test_a_package_for_any_processor_has_no_layout_of_this_one(
    octavo: Octavo, tmp_path: Path
) -> None:
    out, data = tmp_path / "out", tmp_path / "package" / "required_operators_and_types.config"
    source = MODELS / "fashion_resnet.onnx"
    arguments = ("-o", out, "--no-measure", "-p", "canonicalize", "--calibration", "none")
    assert octavo("compile", source, *arguments).code == 0
    assert octavo("package", out, "-o", tmp_path / "package", "--any-processor").code == 0
    assert "nchwc" not in data.read_text(encoding="utf-8")
    here = octavo("package", out, "-o", tmp_path / "package", "--force", "--json")
    blocked = "nchwc" in data.read_text(encoding="utf-8")
    assert (json.loads(here.out)["processor"] == "x86_64") is not blocked


def test_the_python_example_runs_and_notices_a_difference(packaged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "package"
    shutil.copytree(packaged, copy)
    command = [sys.executable, str(copy / "load.py")]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "largest difference 0\n" in good.stdout
    stored = np.fromfile(copy / "probe/output0.bin", np.float32)
    (stored + 1).tofile(copy / "probe/output0.bin")
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "not those that were proved" in bad.stderr


@pytest.fixture(scope="module")
def program(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, compiled against the library of the Python wheel."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    libraries = sorted(LIBRARY.glob("libonnxruntime.so.*"))
    if compiler is None or not libraries:
        pytest.skip("needs a C++ compiler, and a wheel of onnxruntime with libonnxruntime.so")
    folder = tmp_path_factory.mktemp("program")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    headers = SYSTEM_HEADERS if SYSTEM_HEADERS.is_dir() else HERE / "stand_in"
    places = ["-I", str(headers), "-L", str(folder), f"-Wl,-rpath,{folder}", "-lonnxruntime"]
    source, built = str(packaged / "load.cpp"), folder / "load"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", source, "-o", str(built)]
    subprocess.run([*command, *places], check=True)
    return built


def test_the_cpp_example_runs_and_notices_a_difference(
    packaged: Path, program: Path, tmp_path: Path
) -> None:
    good = subprocess.run([program, packaged], capture_output=True, text=True, check=True)
    assert good.stdout.endswith("largest difference 0\n")
    copy = tmp_path / "package"
    shutil.copytree(packaged, copy)
    stored = np.fromfile(copy / "probe/output0.bin", np.float32)
    (stored + 1).tofile(copy / "probe/output0.bin")
    bad = subprocess.run([program, copy], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.endswith("is not what was proved\n")
    (copy / "model.ort").write_bytes(b"no model")
    broken = subprocess.run([program, copy], capture_output=True, text=True, check=False)
    assert (broken.returncode, bool(broken.stderr)) == (1, True)


def test_the_command_prints_sizes_load_times_and_how_to_build(
    octavo: Octavo, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "package"
    done = octavo("package", artifact, "-o", out)
    assert done.code == 0
    assert re.search(r"model\.onnx +[\d.]+ kB +[\d.]+ ms", done.out)
    assert re.search(r"model\.ort +[\d.]+ kB +[\d.]+ ms", done.out)
    assert "--include_ops_by_config required_operators_and_types.config" in done.out
    again = octavo("package", artifact, "-o", out)
    assert (again.code, "--force" in again.err) == (2, True)


def test_bad_input_says_what_is_wrong(octavo: Octavo, artifact: Path, tmp_path: Path) -> None:
    none = octavo("package", MODELS / "fashion_mobile.onnx", "-o", tmp_path / "a")
    assert (none.code, "is not an octavo artifact" in none.err) == (2, True)
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    changed = octavo("package", copy, "-o", tmp_path / "b")
    assert (changed.code, "the manifest says" in changed.err) == (4, True)
    assert not (tmp_path / "b").exists()
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "target": "openvino"}))
    other = octavo("package", copy, "-o", tmp_path / "c")
    assert other.code == 2
    assert "an artifact for openvino is not packaged for ONNX Runtime" in other.err


def test_a_damaged_package_is_not_loaded(packaged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "package"
    shutil.copytree(packaged, copy)
    (copy / "package.json").write_text('{"format": "something else"}', encoding="utf-8")
    with pytest.raises(octavo.OctavoError, match=r"package\.json is damaged"):
        octavo.load(copy)


def test_session_options_of_the_artifact_are_set_when_it_is_loaded(
    artifact: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["session_options"] = {"session.disable_quant_qdq": "1"}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    for folder in (copy, octavo.package(copy).folder):
        session = octavo.load(folder)
        options = session.handle.get_session_options()
        assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    # The option decides which kernels there are, and the package was made with it.
    config = (copy / "package/required_operators_and_types.config").read_text(encoding="utf-8")
    assert "QLinearConv" not in config
    assert '{"session.disable_quant_qdq", "1"}' in (copy / "package/load.cpp").read_text()
