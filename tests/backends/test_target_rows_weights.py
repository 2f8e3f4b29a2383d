"""The rows without calibrated activations: dynamic, weight-only and storage.

Each pattern is ONNX text, beside the float graph that it stands for; both share their drawn
constants, and the float one runs without optimization.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from octavo.backends.ort_session import make_session
from octavo.backends.ort_target import ORT_CPU
from octavo.ir.errors import OctavoError
from octavo.ir.facts import Method
from octavo.ir.packing import kernel_bits

_HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g'
_DRAWN = {np.dtype(np.int8): (-127, 128), np.dtype(np.uint8): (1, 256)}
# ‖y - truth‖ / ‖truth‖: one rounding of the activations; through time in an LSTM; none.
_ONE_ROUNDING, _RECURRENT, _EXACT = 0.02, 0.05, 1e-5


@dataclass(frozen=True)
class Pattern:
    """How a row is written; `axis` tells the rows of one operator and method apart.

    `signature` holds input, output and constants of both bodies. Constants called `z…` are zero,
    scales `s…` positive and small.
    """

    op_type: str
    method: Method
    axis: int
    signature: str
    body: str
    truth: str
    error: float
    bits: int = 8

    def __str__(self) -> str:
        return f"{self.op_type}-{self.method}-{self.axis}-{self.bits}"


def _dynamic(op_type: str, axis: int, constants: str, tail: str, truth: str) -> Pattern:
    signature = f"(float[4,32] x) => (y) <int8[32,16] w, float[16] s{constants}>"
    body = f"""xq, xs, xz = DynamicQuantizeLinear (x)  i = MatMulInteger (xq, w, xz)
        f = Cast <to : int = 1> (i)  c = Mul (xs, s)  {tail}"""
    real = "f = Cast <to : int = 1> (w)  v = Mul (f, s)"
    return Pattern(op_type, "dynamic", axis, signature, body, f"{real}  {truth}", _ONE_ROUNDING)


def _blocked(op_type: str, axis: int, bits: int) -> Pattern:
    """MatMulNBits of 40 rows in blocks of 32; digits are taken from a byte by division."""
    per_byte = 8 // bits
    signature = f"""(float[4,40] x) => (y)
        <uint8[16,2,{32 // per_byte}] w, float[16,2] s, float[16] b>"""
    bias = ", , , b" if op_type == "Gemm" else ""
    body = f"""y = com.microsoft.MatMulNBits <K : int = 40, N : int = 16, bits : int = {bits},
        block_size : int = 32, accuracy_level : int = 4> (x, w, s{bias})"""
    gemm, matmul = "y = Gemm <transB : int = 1> (x, v, b)", "g = Transpose (v)  y = MatMul (x, g)"
    call = gemm if bias else matmul
    places = ", ".join(f"{2.0 ** (bits * place)}" for place in range(per_byte))
    truth = f"""f = Cast <to : int = 1> (w)  l = Constant <value_ints : ints = [-1]> ()
        e = Unsqueeze (f, l)  p = Constant <value_floats : floats = [{places}]> ()
        r = Constant <value_float : float = {2.0**bits}> ()
        o = Constant <value_float : float = {2.0 ** (bits - 1)}> ()
        h = Div (e, p)  i = Floor (h)  d = Mod <fmod : int = 1> (i, r)  c = Sub (d, o)
        n = Constant <value_ints : ints = [16, 2, 32]> ()  q = Reshape (c, n)
        u = Unsqueeze (s, l)  m = Mul (q, u)
        k = Constant <value_ints : ints = [16, 64]> ()  a = Reshape (m, k)
        z = Constant <value_ints : ints = [0]> ()  j = Constant <value_ints : ints = [40]> ()
        t = Constant <value_ints : ints = [1]> ()  v = Slice (a, z, j, t)
        {call}"""
    return Pattern(op_type, "weight-only", axis, signature, body, truth, _ONE_ROUNDING, bits)


def _stored(op_type: str, axis: int, shapes: tuple[str, str, str], call: str) -> Pattern:
    x, w, s = shapes
    signature = f"(float[{x}] x) => (y) <int8[{w}] w, float[{s}] s>"
    body = f"f = Cast <to : int = 1> (w)  v = Mul (f, s)  y = {call}"
    return Pattern(op_type, "storage", axis, signature, body, body, _EXACT)


def _stored_recurrent(op_type: str, gates: int) -> Pattern:
    rows = 8 * gates
    signature = f"""(float[5,2,6] x) => (y)
        <int8[1,{rows},6] w, float[1,{rows},1] s, int8[1,{rows},8] w2, float[1,{rows},1] s2>"""
    body = f"""f = Cast <to : int = 1> (w)  v = Mul (f, s)  f2 = Cast <to : int = 1> (w2)
        v2 = Mul (f2, s2)  y = {op_type} <hidden_size : int = 8> (x, v, v2)"""
    return Pattern(op_type, "storage", 1, signature, body, body, _EXACT)


PATTERNS = (
    _dynamic("MatMul", 1, "", "y = Mul (f, c)", "y = MatMul (x, v)"),
    *(
        _dynamic("Gemm", k, ", float[16] b", "m = Mul (f, c)  y = Add (m, b)", "y = Gemm (x, v, b)")
        for k in (0, 1)
    ),
    Pattern(
        "LSTM", "dynamic", 1,
        """(float[5,2,6] x) => (y)
        <int8[1,6,32] w, float[1,32] s, int8[1,32] z, int8[1,8,32] r, float[1,32] s2>""",
        """y = com.microsoft.DynamicQuantizeLSTM <hidden_size : int = 8>
        (x, w, r, , , , , , s, z, s2, z)""",
        """f = Cast <to : int = 1> (w)  v = Mul (f, s)  t = Transpose <perm : ints = [0,2,1]> (v)
        f2 = Cast <to : int = 1> (r)  v2 = Mul (f2, s2)  t2 = Transpose <perm : ints = [0,2,1]> (v2)
        y = LSTM <hidden_size : int = 8> (x, t, t2)""",
        _RECURRENT,
    ),
    *(
        _blocked(op_type, axis, bits)
        for op_type, axis in (("MatMul", 1), ("Gemm", 1), ("Gemm", 0))
        for bits in (8, 4, 2)
    ),
    _stored("Conv", 0, ("1,4,8,8", "8,4,3,3", "8,1,1,1"), "Conv (x, v)"),
    _stored("ConvTranspose", 1, ("1,4,8,8", "4,8,3,3", "1,8,1,1"), "ConvTranspose (x, v)"),
    _stored("ConvTranspose", 0, ("1,4,8,8", "4,4,3,3", "4,1,1,1"),
            "ConvTranspose <group : int = 2> (x, v)"),
    _stored("MatMul", -1, ("4,32", "32,16", "1,16"), "MatMul (x, v)"),
    _stored("Gemm", 0, ("4,32", "16,32", "16,1"), "Gemm <transB : int = 1> (x, v)"),
    _stored("Gemm", 1, ("4,32", "32,16", "1,16"), "Gemm (x, v)"),
    *(_stored_recurrent(op, gates) for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))),
    Pattern(
        "Gather", "weight-only", 0,
        "(float[3] x) => (y) <uint8[50,32] w, float[50,2] s>",
        """i = Cast <to : int = 7> (x)
        y = com.microsoft.GatherBlockQuantized <bits : int = 4, block_size : int = 32,
        gather_axis : int = 0, quantize_axis : int = 1> (w, i, s)""",
        """i = Cast <to : int = 7> (x)  f = Cast <to : int = 1> (w)
        l = Constant <value_ints : ints = [-1]> ()  e = Unsqueeze (f, l)
        p = Constant <value_floats : floats = [1.0, 16.0]> ()
        r = Constant <value_float : float = 16.0> ()  o = Constant <value_float : float = 8.0> ()
        h = Div (e, p)  g = Floor (h)  d = Mod <fmod : int = 1> (g, r)  c = Sub (d, o)
        n = Constant <value_ints : ints = [50, 2, 32]> ()  q = Reshape (c, n)
        u = Unsqueeze (s, l)  m = Mul (q, u)
        k = Constant <value_ints : ints = [50, 64]> ()  v = Reshape (m, k)  y = Gather (v, i)""",
        _EXACT,
    ),
    Pattern(
        "Gather", "storage", 0,
        "(float[3] x) => (y) <int8[50,16] w, float[50,1] s>",
        """i = Cast <to : int = 7> (x)  q = Gather (w, i)  c = Gather (s, i)
        f = Cast <to : int = 1> (q)  y = Mul (f, c)""",
        """i = Cast <to : int = 7> (x)  f = Cast <to : int = 1> (w)  v = Mul (f, s)
        y = Gather (v, i)""",
        _EXACT,
    ),
)  # fmt: skip


def _model(pattern: Pattern, body: str) -> bytes:
    parsed = onnx.parser.parse_model(f"{_HEADER} {pattern.signature} {{ {body} }}")
    for info in parsed.graph.value_info:
        array = _drawn(info)
        parsed.graph.initializer.append(numpy_helper.from_array(array, info.name))
    del parsed.graph.value_info[:]
    content: bytes = parsed.SerializeToString()
    return content


def _drawn(info: onnx.ValueInfoProto) -> NDArray[Any]:
    tensor = info.type.tensor_type
    shape = [d.dim_value for d in tensor.shape.dim]
    rng = np.random.default_rng([*info.name.encode()])
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if info.name.startswith("z"):
        return np.zeros(shape, dtype)
    if dtype in _DRAWN:
        return rng.integers(*_DRAWN[dtype], shape).astype(dtype)
    return rng.uniform(0.001, 0.003, shape).astype(dtype)


def _output(content: bytes, optimization: Literal["all", "none"]) -> NDArray[np.float64]:
    session = make_session(content, threads=1, optimization=optimization)
    shape = session.handle.get_inputs()[0].shape
    # A vector holds row numbers of a table, everything else is an activation.
    drawn = np.random.default_rng(0).standard_normal(shape)
    x = np.array([3, 7, 3]) if len(shape) == 1 else drawn
    return next(iter(session.run({"x": x.astype(np.float32)}).values())).astype(np.float64)


def _optimized(content: bytes, folder: Path) -> onnx.GraphProto:
    path = folder / "optimized.onnx"
    make_session(content, threads=1, optimized_path=path)
    return onnx.load(path, load_external_data=False).graph


def test_every_row_has_a_pattern() -> None:
    rows = {(r.op_type, r.method, r.weight_axis) for r in ORT_CPU.rows if r.method != "static"}
    assert rows == {(p.op_type, p.method, p.axis) for p in PATTERNS}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_kernels(pattern: Pattern, tmp_path: Path) -> None:
    row = next(
        r
        for r in ORT_CPU.rows
        if (r.op_type, r.method, r.weight_axis) == (pattern.op_type, pattern.method, pattern.axis)
    )
    graph = _optimized(_model(pattern, pattern.body), tmp_path)
    constants = {tensor.name for tensor in graph.initializer}
    kernels = [f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node]
    if row.kernels:
        assert set(kernels) & set(row.kernels)
    else:
        assert pattern.op_type in {node.op_type for node in graph.node}
    assert not [n.op_type for n in graph.node if set(n.input) <= constants]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values(pattern: Pattern) -> None:
    actual = _output(_model(pattern, pattern.body), "all")
    truth = _output(_model(pattern, pattern.truth), "none")
    assert actual.shape == truth.shape
    assert np.linalg.norm(actual - truth) <= pattern.error * np.linalg.norm(truth)
    assert np.linalg.norm(truth) > 0


def _session_of_blocks(bits: int, size: int) -> None:
    bytes_per_block = max(1, size * bits // 8)
    parsed = onnx.parser.parse_model(f"""{_HEADER} (float[4,{size}] x) => (y) {{
        y = com.microsoft.MatMulNBits <K : int = {size}, N : int = 16, bits : int = {bits},
        block_size : int = {size}, accuracy_level : int = 4> (x, w, s) }}""")
    w = np.zeros((16, 1, bytes_per_block), np.uint8)
    parsed.graph.initializer.append(numpy_helper.from_array(w, "w"))
    parsed.graph.initializer.append(numpy_helper.from_array(np.ones((16, 1), np.float32), "s"))
    make_session(parsed.SerializeToString(), threads=1)


def test_the_widths_and_blocks_of_the_row_are_those_of_the_kernel() -> None:
    row = next(r for r in ORT_CPU.rows if (r.method, r.op_type) == ("weight-only", "MatMul"))
    for bits in row.bits:
        if bits == kernel_bits(bits):
            for size in row.blocks:
                _session_of_blocks(bits, size)
        else:
            with pytest.raises(OctavoError):
                _session_of_blocks(bits, 32)
    for size in (8, 48):
        with pytest.raises(OctavoError):
            _session_of_blocks(4, size)
