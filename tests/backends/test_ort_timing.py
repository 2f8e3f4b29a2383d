"""Shares of nodes: they add up to the latency that the clock shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from octavo.backends import ort_timing
from octavo.backends.ort_profile import KernelTime, Profile
from octavo.backends.ort_timing import time_nodes
from octavo.ir.artifact import Artifact, PlannedNode

_TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[64,256] x) => (float[64,256] y)
    <float a = {0.05}, uint8 z = {128}> {
    [small] s = MatMul (x, w)  [q] q = QuantizeLinear (s, a, z)
    [dq] t = DequantizeLinear (q, a, z)  [exp] e = Exp (t)  [other] y = Tanh (e) }"""


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    proto = onnx.parser.parse_model(_TEXT)
    array = np.ones((256, 256), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    rows = (("small", "MatMul", "s"), ("exp", "Exp", "e"), ("other", "Tanh", "y"))
    planned = (PlannedNode(n, op, "float", "", value, (), 0, 0) for n, op, value in rows)
    return Artifact(path, "ort-cpu", tuple(planned))


def test_nodes_and_quantizers_add_up_to_the_latency(artifact: Artifact) -> None:
    feed = {"x": np.ones((64, 256), np.float32)}
    timings = time_nodes([artifact, artifact], feed, seconds_limit=0.05)
    assert len(timings) == 2
    for timing in timings:
        assert set(timing.by_node) == {"small", "exp", "other"}
        assert set(timing.quantizers) == {"QuantizeLinear", "DequantizeLinear"}
        quantizing = sum(seconds for seconds, _ in timing.quantizers.values())
        total = sum(timing.by_node.values()) + quantizing
        assert total == pytest.approx(timing.seconds, rel=1e-9)
        assert {moved for _, moved in timing.quantizers.values()} == {4 * 64 * 256}
        # 4 million multiplications against 16 thousand exponentials.
        assert timing.by_node["small"] > timing.by_node["exp"] > 0


def test_a_kernel_nobody_owns_is_spread_over_the_others(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(name: str, op_type: str, seconds: float) -> KernelTime:
        tensors = (("float", 10),)
        return KernelTime(name, op_type, seconds, frozenset((name,)), tensors, tensors)

    kernels = (
        kernel("small", "MatMul", 60e-6),
        kernel("exp", "Exp", 20e-6),
        kernel("inserted", "ReorderInput", 10e-6),
        kernel("q", "QuantizeLinear", 10e-6),
    )
    monkeypatch.setattr(ort_timing, "read_profile", lambda *_: Profile(kernels, None))
    monkeypatch.setattr(ort_timing, "_rounds", lambda *_: [[0.0001], [0.0003], [0.0002]])
    (timing,) = time_nodes([artifact], {"x": np.ones((64, 256), np.float32)})
    # The median run takes 200 µs for 100 µs of kernels: all count twice.
    assert timing.seconds == 0.0002
    ((name, (quantizing, moved)),) = timing.quantizers.items()
    assert (name, moved) == ("QuantizeLinear", 40)
    assert quantizing == pytest.approx(20e-6)
    assert timing.by_node == {"small": pytest.approx(135e-6), "exp": pytest.approx(45e-6)}
