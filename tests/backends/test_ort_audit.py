"""The audit on graphs whose kernels are known, sound and broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from octavo.backends.ort_audit import audit
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.artifact import Artifact, Audit, AuditRow, PlannedNode
from octavo.ir.errors import VerificationFailed

_HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g'
_CONSTANTS = """<int8[8,8,3,3] w, float[8] ws, int8[8] wz, float a = {0.05}, float a2 = {0.07},
    uint8 h = {128}, uint8 z = {0}, int8 i = {0}, int8[80,60] m, float[60] ms, int8[60] mz>"""
_X = "x_q = QuantizeLinear (x, a, h)  x_dq = DequantizeLinear (x_q, a, h)"
_W = "w_dq = DequantizeLinear <axis : int = 0> (w, ws, wz)"
_M = "m_dq = DequantizeLinear <axis : int = 1> (m, ms, mz)"
_CONV = "[conv] c = Conv <pads : ints = [1,1,1,1]> (x_dq, w_dq)"
_C = "c_q = QuantizeLinear (c, a2, h)  y = DequantizeLinear (c_q, a2, h)"


def _artifact(
    tmp_path: Path, body: str, *planned: PlannedNode, x: str = "float[1,8,16,16]", y: str = "y"
) -> Artifact:
    proto = onnx.parser.parse_model(f"{_HEADER} ({x} x) => ({y}) {_CONSTANTS} {{ {body} }}")
    used = {name for node in proto.graph.node for name in node.input}
    for info in proto.graph.value_info:
        if info.name in used:
            proto.graph.initializer.append(numpy_helper.from_array(_drawn(info), info.name))
    del proto.graph.value_info[:]
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return Artifact(path, "ort-cpu", planned)


def _drawn(info: onnx.ValueInfoProto) -> NDArray[Any]:
    tensor = info.type.tensor_type
    shape = [d.dim_value for d in tensor.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    rng = np.random.default_rng([*info.name.encode()])
    if info.name.endswith("z"):
        return np.zeros(shape, dtype)
    drawn = rng.uniform(0.001, 0.01, shape) if dtype.kind == "f" else rng.integers(-90, 90, shape)
    return drawn.astype(dtype)


def _planned(
    name: str, op_type: str, output: str, option: str = "", absorbed_by: str = ""
) -> PlannedNode:
    method = option.partition(":")[0]
    rows = [r for r in ORT_CPU.rows if (r.op_type, r.method) == (op_type, method)]
    weights = ":" in option
    kernels = next((r.kernels for r in rows if bool(r.weights) == weights), ())
    kernels = () if absorbed_by else kernels
    return PlannedNode(name, op_type, option, "planned", output, kernels, 0, 0, absorbed_by)


_CONV_PLAN = _planned("conv", "Conv", "c", "static:s8/axis0")


def _feed(*shape: int) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(0).standard_normal(shape or (1, 8, 16, 16)).astype("f4")}


def _row(found: Audit, name: str) -> AuditRow:
    return next(row for row in found.rows if row.node == name)


def test_integer_kernels_pass(tmp_path: Path) -> None:
    body = f"""{_X} {_W} {_CONV} [relu] r = Relu (c)  r_q = QuantizeLinear (r, a2, z)
        r_dq = DequantizeLinear (r_q, a2, z)  [move] t = Transpose <perm : ints = [0,2,3,1]> (r_dq)
        t_q = QuantizeLinear (t, a2, z)  y = DequantizeLinear (t_q, a2, z)"""
    plan = (
        _planned("conv", "Conv", "r", "static:s8/axis0"),
        _planned("relu", "Relu", "r", "static:s8/axis0", absorbed_by="conv"),
        _planned("move", "Transpose", "t", "static"),
    )
    found = audit(_artifact(tmp_path, body, *plan), _feed())
    assert found.ok
    assert found.kernels["com.microsoft::QLinearConv"] == 1
    assert _row(found, "conv").kernel == "com.microsoft::QLinearConv"
    assert _row(found, "relu").kernel == "com.microsoft::QLinearConv"
    seconds = _row(found, "conv").seconds
    assert seconds is not None
    assert 0 < seconds < 1
    # The kernels compute channels last, so that this Transpose has nothing left to do.
    assert _row(found, "move").kernel in ("merged", "Transpose")
    assert json.dumps(found.to_json())


_BROKEN = {
    "no quantizer on the output": (f"{_X} {_W} {_CONV} y = Exp (c)", "y"),
    "input 'x' is not quantized": (f"{_W} {_CONV.replace('x_dq', 'x')} {_C}", "y"),
    "'also' reads the output as float": (f"{_X} {_W} {_CONV} {_C} [also] e = Exp (c)", "y, e"),
    "the output is a graph output as float": (f"{_X} {_W} {_CONV} {_C}", "y, c"),
    "input 'x_dq' is int8; uint8 activations fuse": (
        f"{_X.replace(', h', ', i')} {_W} {_CONV} {_C} e = Exp (x_dq)",
        "y, e",
    ),
    "its activation does not saturate where the quantizer behind it does": (
        f"{_X} {_W} {_CONV} r = Relu (c) {_C.replace('(c,', '(r,')}",
        "y",
    ),
}


@pytest.mark.parametrize(("reason", "body", "y"), [(k, *v) for k, v in _BROKEN.items()])
def test_a_float_convolution_fails_with_the_reason(
    reason: str, body: str, y: str, tmp_path: Path
) -> None:
    output = "r" if "Relu" in body else "c"
    plan = _planned("conv", "Conv", output, "static:s8/axis0")
    found = audit(_artifact(tmp_path, body, plan, y=y), _feed())
    assert not found.ok
    assert _row(found, "conv").reason == reason
    assert _row(found, "conv").kernel.endswith("Conv")


def test_movement_with_two_scales_fails(tmp_path: Path) -> None:
    body = f"{_X} [conv] c = Transpose (x_dq) {_C}"
    found = audit(_artifact(tmp_path, body, _planned("conv", "Transpose", "c", "static")), _feed())
    assert _row(found, "conv").reason == "input and output do not share scale and zero point"


def test_gemm_without_zero_point_fails(tmp_path: Path) -> None:
    body = f"{_X} {_M.replace(', mz', '')} [gemm] y = Gemm (x_dq, m_dq)"
    plan = _planned("gemm", "Gemm", "y", "static:s8/axis1")
    found = audit(_artifact(tmp_path, body, plan, x="float[4,80]"), _feed(4, 80))
    assert _row(found, "gemm").reason.startswith("a weight without zero point")
    assert _row(found, "gemm").kernel == "Gemm"


def test_a_node_that_is_not_there_fails(tmp_path: Path) -> None:
    plan = _planned("lost", "Conv", "nowhere", "static:s8/axis0")
    found = audit(_artifact(tmp_path, f"{_X} {_W} {_CONV} {_C}", plan), _feed())
    assert _row(found, "lost").reason == "no kernel has its name or its output"


def test_an_absorbed_node_shares_the_verdict_of_its_kernel(tmp_path: Path) -> None:
    body = f"{_X} {_W} {_CONV} [relu] r = Relu (c) {_C.replace('(c,', '(r,')}"
    plan = (
        _planned("conv", "Conv", "r", "static:s8/axis0"),
        _planned("relu", "Relu", "r", "static:s8/axis0", absorbed_by="conv"),
    )
    assert not _row(audit(_artifact(tmp_path, body, *plan), _feed()), "relu").ok


@pytest.mark.parametrize("rank", [2, 3])
def test_a_bias_behind_a_matmul_is_found(rank: int, tmp_path: Path) -> None:
    """The runtime turns both nodes into one Gemm, between Reshapes where the rank is 3."""
    shape = (4, 80) if rank == 2 else (1, 4, 80)
    body = f"""{_X} {_M} b = Constant <value_ints : ints = [{",".join(["3"] * 60)}]> ()
        b32 = Cast <to : int = 6> (b) bs = Mul (ms, a) b_dq = DequantizeLinear (b32, bs)
        [matmul] p = MatMul (x_dq, m_dq) [bias] y = Add (p, b_dq)"""
    plan = (
        _planned("matmul", "MatMul", "y", "static:s8/axis1"),
        _planned("bias", "Add", "y", "static:s8/axis1", absorbed_by="matmul"),
    )
    x = f"float[{','.join(map(str, shape))}]"
    found = audit(_artifact(tmp_path, body, *plan, x=x), _feed(*shape))
    assert found.ok
    assert _row(found, "matmul").kernel.startswith("com.microsoft::")
    assert _row(found, "bias").ok


def test_dequantizing_a_weight_in_every_run_is_found(tmp_path: Path) -> None:
    """4,800 elements; a bias of 60 would not matter."""
    body = f"{_M} [gemm] y = Gemm (x, m_dq)  t2 = Transpose (m_dq)"
    found = audit(_artifact(tmp_path, body, x="float[4,80]", y="y, t2"), _feed(4, 80))
    assert not found.ok
    assert any("converts the 4800 elements of 'm' in every run" in text for text in found.findings)


def test_unpacking_on_loading_is_no_finding(tmp_path: Path) -> None:
    body = """f = Cast <to : int = 1> (m)  v = Mul (f, ms)  [mm] y = MatMul (x, v)"""
    plan = _planned("mm", "MatMul", "y", "storage:s8/axis1")
    found = audit(_artifact(tmp_path, body, plan, x="float[4,80]"), _feed(4, 80))
    assert found.ok
    assert _row(found, "mm").kernel == "MatMul"


def test_signed_activations_are_found(tmp_path: Path) -> None:
    """A kernel that computes on int8 directly is an integer kernel, and a slow one."""
    body = """[q] x_q = QuantizeLinear (x, a, i)
        [mm] y = com.microsoft.MatMulIntegerToFloat (x_q, m, a, ms, i, mz)"""
    plan = _planned("mm", "MatMul", "y", "static:s8/axis1")
    found = audit(_artifact(tmp_path, body, plan, x="float[4,80]"), _feed(4, 80))
    assert _row(found, "mm").ok
    assert found.findings == (
        "com.microsoft::MatMulIntegerToFloat 'mm' reads the int8 activation 'x_q'",
    )


def test_exact_block_kernels_are_found(tmp_path: Path) -> None:
    """Without accuracy_level 4 the 8-bit kernel is 20 times slower than float."""
    path = tmp_path / "model.onnx"
    proto = onnx.parser.parse_model(
        f"""{_HEADER} (float[4,32] x) => (y) {{ [mm] y = com.microsoft.MatMulNBits
        <K : int = 32, N : int = 16, bits : int = 8, block_size : int = 32> (x, w, s) }}"""
    )
    arrays: dict[str, NDArray[Any]] = {"w": np.full((16, 1, 32), 130, np.uint8)}
    arrays["s"] = np.ones((16, 1), np.float32)
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in arrays.items())
    onnx.save(proto, path)
    plan = _planned("mm", "MatMul", "y", "weight-only:s8/block32@0")
    found = audit(Artifact(path, "ort-cpu", (plan,)), _feed(4, 32))
    assert found.findings == ("MatMulNBits 'mm' has accuracy_level = 0: slow or inexact",)


def test_session_options_of_the_artifact_are_used(tmp_path: Path) -> None:
    artifact = _artifact(tmp_path, f"{_X} {_W} {_CONV} {_C}", _CONV_PLAN)
    literal = {"session.disable_quant_qdq": "1"}
    changed = Artifact(artifact.path, artifact.target, artifact.planned, literal)
    assert audit(artifact, _feed()).ok
    assert not audit(changed, _feed()).ok


def test_what_fails_only_when_it_runs_is_an_error(tmp_path: Path) -> None:
    """A DQ in blocks under a MatMul of codes loads, and fails at the first run."""
    proto = onnx.parser.parse_model(
        f"""{_HEADER} (float[4,32] x) => (y) <float a = {{0.05}}, uint8 h = {{128}}> {{ {_X}
        w_dq = DequantizeLinear <axis : int = 0, block_size : int = 16> (w, s, z)
        p = MatMul (x_dq, w_dq) q = QuantizeLinear (p, a, h) y = DequantizeLinear (q, a, h) }}"""
    )
    arrays: dict[str, NDArray[Any]] = {"w": np.ones((32, 16), np.int8)}
    arrays |= {"s": np.ones((2, 16), np.float32)}
    arrays["z"] = np.zeros((2, 16), np.int8)
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in arrays.items())
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    with pytest.raises(VerificationFailed, match="fails while it runs"):
        audit(Artifact(path, "ort-cpu", ()), _feed(4, 32))
