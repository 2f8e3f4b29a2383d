"""Engines: what an inspector says is read here; a device is tested where there is one."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from octavo.backends import trt_engine
from octavo.backends.trt_backend import TensorRtBackend
from octavo.backends.trt_layers import audit_of, read_layers
from octavo.backends.trt_target import TARGETS
from octavo.ir.artifact import PlannedNode
from octavo.ir.errors import UsageError
from octavo.ir.read import read
from octavo.models import shipped

# As the inspector writes them with detailed verbosity.
_LAYERS = {
    "Layers": [
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x_q", "Format/Datatype": "Thirty-two wide channel vectorized "
                        "row major Int8 format"}],
            "TacticName": "sm86_xmma_fprop_implicit_gemm_interleaved_i8i8",
            "Metadata": "[ONNX Layer: conv1]\\x1e[ONNX Layer: relu1]",
        },
        {
            "Name": "__myl_Fc_0",
            "LayerType": "kgen",
            "Inputs": [{"Name": "h", "Format/Datatype": "Half"}],
            "TacticName": "__myl_Fc_0",
            "Metadata": "[ONNX Layer: dense]",
        },
        {"Name": "cast", "LayerType": "Reformat", "Inputs": [], "TacticName": "", "Metadata": ""},
    ]
}  # fmt: skip


def _planned(name: str, option: str, absorbed_by: str = "") -> PlannedNode:
    return PlannedNode(name, "Conv", option, "why", name, ("Conv",), 0, 0, absorbed_by)


def test_a_node_passes_when_its_layer_reads_codes() -> None:
    planned = [
        _planned("conv1", "static:s8/axis0"),
        _planned("relu1", "static:s8/axis0", "conv1"),
        _planned("dense", "static:s8/axis0"),
        _planned("lost", "static:s8/axis0"),
        _planned("other", "float"),
    ]
    audit = audit_of(read_layers(_LAYERS), planned, "device")
    kernel = "sm86_xmma_fprop_implicit_gemm_interleaved_i8i8"
    assert [(row.kernel, row.ok) for row in audit.rows] == [
        (kernel, True), (kernel, True), ("__myl_Fc_0", False), ("merged", False), ("merged", True),
    ]  # fmt: skip
    assert audit.rows[2].reason == "its layer reads Half"
    assert audit.kernels == {"Reformat": 1, "__myl_Fc_0": 1, kernel: 1}
    assert audit.seen
    assert not audit.ok


def test_an_older_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "10.7.0")
    with pytest.raises(UsageError, match=r"TensorRT 10\.7\.0 is installed, octavo lowers for 11"):
        trt_engine.version()


@pytest.mark.skipif(trt_engine.version() is None, reason="TensorRT 11 or a GPU is missing here")
def test_an_engine_computes_what_the_file_does(tmp_path: Path) -> None:
    backend = TensorRtBackend(TARGETS["tensorrt"])
    artifact = backend.lower(read(shipped("fashion-mobile")), tmp_path / "model.onnx")
    feed = {"input": np.load(shipped("fashion"))["input"][:1]}
    audit = backend.audit(replace(artifact, planned=()), feed)
    assert audit.kernels
    error = float(audit.environment.partition("relative error ")[2].split()[0])
    assert error < 0.01
