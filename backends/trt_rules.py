"""The rules of TensorRT 11 that a file can be held against without it.

From NvInfer.h 11, from the documents, and from what the parser of TensorRT for RTX 1.7 refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from octavo.backends.trt_operators import COMPILE, REFUSED
from octavo.backends.trt_quantizers import quantizer_findings
from octavo.backends.trt_target import NEWEST_IR_VERSION, NEWEST_OPSET, PART_OF
from octavo.ir.conformance import Finding
from octavo.ir.read_onnx import read_verbatim

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir

    from octavo.ir.target import Target

_MICROSOFT = "com.microsoft"
_QUANTIZE = ("QuantizeLinear", "DequantizeLinear")
_HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")


def broken_rules(path: Path, target: Target) -> list[Finding]:
    """Every rule that a file breaks, in the order of its nodes.

    Raises ModelError for what is no ONNX file, an engine among them.
    """
    sparse = _sparse_initializers(path)
    model = read_verbatim(path).ir
    functions = {key[:2] for key in model.functions}
    found = [*_versions(model), *sparse]
    for node in model.graph.all_nodes():
        found += _operator(node, functions)
    found += quantizer_findings(model.graph, PART_OF[target.name])
    found += _float32(model.graph)
    return found


def _sparse_initializers(path: Path) -> list[Finding]:
    """Reading makes them dense, so they are looked for before."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        return []
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError):  # reading says what is wrong
        return []
    reason = "the parser does not register sparse initializers"
    fix = "store the tensor dense; 2:4 patterns are found by --sparsity=enable"
    return [
        Finding("sparse-initializer", tensor.values.name, reason, fix)
        for tensor in graph.sparse_initializer
    ]


def _versions(model: onnx_ir.Model) -> Iterator[Finding]:
    opset = model.opset_imports.get("", 0)
    if opset > NEWEST_OPSET:
        reason = f"opset {opset}, TensorRT 11 reads up to {NEWEST_OPSET}"
        yield Finding("opset", "", reason, f"export with opset {NEWEST_OPSET} or less")
    if model.ir_version > NEWEST_IR_VERSION:
        reason = f"IR version {model.ir_version}, TensorRT 11 reads up to {NEWEST_IR_VERSION}"
        yield Finding("ir-version", "", reason, f"write IR version {NEWEST_IR_VERSION} or less")


def _operator(node: onnx_ir.Node, functions: set[tuple[str, str]]) -> Iterator[Finding]:
    name = node.name or (node.outputs[0].name if node.outputs else "") or ""
    if (node.domain, node.op_type) in functions:
        return
    if node.op_type in REFUSED:
        why, fix = REFUSED[node.op_type]
        yield Finding("operator", name, f"{node.op_type}: {why}", fix)
    elif node.domain not in ("", "ai.onnx") and node.op_type not in _QUANTIZE:
        reason = f"{node.domain}::{node.op_type} is no standard operator"
        fix = "export it as standard operators, or build with a plugin of that name"
        if node.domain == _MICROSOFT:
            fix = f"{COMPILE}: it writes standard operators (ort-cpu: --portable)"
        yield Finding("operator", name, reason, fix)
    elif node.domain == _MICROSOFT:
        reason = f"{node.domain}::{node.op_type} parses, and standard Q and DQ do as well"
        fix = "write the standard operator: other versions may not know this one"
        yield Finding("operator", name, reason, fix, error=False)


def _float32(graph: onnx_ir.Graph) -> list[Finding]:
    """Weighted operators that read float32: nothing is made float16 for them."""
    for node in graph:
        weight = node.inputs[1] if node.op_type in _HEAVY and len(node.inputs) > 1 else None
        made = weight.producer() if weight is not None else None
        if made is not None and made.op_type == "DequantizeLinear":
            weight = made.inputs[1]
        if weight is None or weight.dtype is None or weight.dtype.name != "FLOAT":
            continue
        reason = f"{node.op_type} is given float32, and TensorRT 11 computes as given"
        fix = f"make it float16: {COMPILE}, or convert the file"
        number = sum(_reads_float32(n) for n in graph)
        first = f"{reason}; so are {number - 1} more" if number > 1 else reason
        return [Finding("float32", node.name or "", first, fix, error=False)]
    return []


def _reads_float32(node: onnx_ir.Node) -> bool:
    if node.op_type not in _HEAVY or len(node.inputs) < 2:
        return False
    weight = node.inputs[1]
    made = weight.producer() if weight is not None else None
    if made is not None and made.op_type == "DequantizeLinear":
        weight = made.inputs[1]
    return weight is not None and weight.dtype is not None and weight.dtype.name == "FLOAT"
