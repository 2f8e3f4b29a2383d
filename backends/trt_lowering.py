"""Lower a planned model to the graph that TensorRT builds with int8 kernels.

Q and DQ with signed or float8 codes and no zero point but 0 in front of weighted operators, codes
in front of a DQ as weights, float16 for all else: TensorRT 11 computes in the types it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_of, insert, replace
from octavo.backends.trt_commands import build_files
from octavo.backends.trt_half import compute_in_half
from octavo.backends.trt_surgery import operate
from octavo.ir.artifact import Artifact, PlannedNode
from octavo.ir.errors import UsageError
from octavo.ir.facts import Choice, Placement, Plan, Ranges
from octavo.ir.fake_quant import DOMAIN, OPTION, constant, declare_functions, params_of
from octavo.ir.float4 import stored_parts
from octavo.ir.mapped import reading
from octavo.ir.model import PROVENANCE, Model
from octavo.ir.quant import PerAxis, PerBlock, quantize
from octavo.ir.verify import verify
from octavo.ir.write import write

if TYPE_CHECKING:
    from octavo.ir.quant import QuantParams
    from octavo.ir.target import KernelRow, Target

# The first that has float4 numbers.
_FLOAT4_OPSET = 23
_NOTES = (OPTION, PROVENANCE, "pkg.onnxscript.optimizer.folded_from")


def lower(model: Model, path: Path, target: Target) -> Artifact:
    """Write the lowered model to `path`; the given model is not changed.

    Raises UsageError for an option that the target has no kernel for, VerificationFailed when
    the result is not well-formed.
    """
    _check_plan(model, target)
    own = model.clone()
    graph = own.graph
    for fake in [node for node in graph if node.domain == DOMAIN]:
        _rewrite(graph, fake)
    _drop_unused(own)
    compute_in_half(graph, own.find(Ranges))
    graph.sort()
    _strip(own)
    verify(own, after_pass=f"lowering to {target.name}")
    write(own, path)
    operate(path)
    planned = tuple(_planned(model, own, target))
    return Artifact(path, target.name, planned, beside=build_files(model, target))


def _check_plan(model: Model, target: Target) -> None:
    """Refuse what the plan wants and the target has no kernel for."""
    plan = model.find(Plan) or Plan({}, "")
    for node in model.graph:
        choice = plan.by_node.get(node.name or "")
        if choice is None or choice.option.method == "float":
            continue
        row = _row(node, choice, target)
        weight = choice.option.weight
        why = f"{target.name} has no {choice.option.method} kernel for {node.op_type}"
        if row is not None and weight is not None:
            why = row.refusal(weight)
        if row is None or (why and weight is not None):
            message = f"no kernel of {target.name} runs the option '{choice.option}'"
            hint = "compile for this target from the start: plans of other targets do not fit"
            raise UsageError(message, where=f"node '{node.name}'", why=why, hint=hint)


def _row(node: onnx_ir.Node, choice: Choice, target: Target) -> KernelRow | None:
    """A row for a node that is quantized already: its conditions held when it was chosen."""
    wanted = (node.op_type, choice.option.method)
    rows = (r for r in target.rows if (r.op_type, r.method) == wanted)
    return next((r for r in rows if bool(r.weights) == (choice.option.weight is not None)), None)


def _rewrite(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    value = input_of(fake, 0)
    if fake.op_type in ("FakeQuantHalf", "FakeQuantLevels"):
        # All floats become float16, and levels are codes of int8 already.
        onnx_ir.convenience.replace_all_uses_with(
            fake.outputs, [value], replace_graph_outputs=False
        )
    elif value.const_value is not None:
        _quantized_constant(graph, fake)
    else:
        _quantized_activation(graph, fake)


def _quantized_activation(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """`x → Q → DQ`; the zero point says of which type the codes are."""
    value, params = input_of(fake, 0), params_of(fake)
    dtype, stem = params.spec.onnx_type, f"{value.name}{'_f8' if params.spec.float8 else ''}"
    scale = constant(graph, f"{stem}_scale", params.scale)
    zero = constant(graph, f"{stem}_zero_point", np.zeros((), dtype.numpy()))
    codes = insert(graph, fake, "QuantizeLinear", [value, scale, zero], f"{stem}_q")
    codes.outputs[0].type = onnx_ir.TensorType(dtype)
    name = f"{stem}_dq"
    replace(graph, fake, "DequantizeLinear", [codes.outputs[0], scale, zero], name=name)


def _quantized_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """Codes as an initializer that feeds the DQ directly, as TensorRT wants them."""
    value, params = input_of(fake, 0), params_of(fake)
    tensor = value.const_value
    assert tensor is not None
    codes = reading(tensor, lambda array: quantize(array, params))
    stem = fake.name or value.name or ""
    dtype = params.spec.onnx_type
    name = f"{stem}_codes"
    stored = onnx_ir.Value(
        name=name,
        shape=onnx_ir.Shape(codes.shape),
        type=onnx_ir.TensorType(dtype),
        const_value=onnx_ir.Tensor(codes.astype(dtype.numpy()), dtype, name=name),
    )
    graph.register_initializer(stored)
    attributes = _axis_attributes(params)
    if params.spec.float4:
        scale, made = _float8_scale(graph, fake, params, stem), f"{stem}_fq"
        graph.opset_imports[""] = max(graph.opset_imports[""], _FLOAT4_OPSET)
    else:
        scale, made = constant(graph, f"{stem}_dq_scale", params.scale), f"{stem}_dq"
    replace(graph, fake, "DequantizeLinear", [stored, scale], attributes, name=made)


def _float8_scale(
    graph: onnx_ir.Graph, fake: onnx_ir.Node, params: QuantParams, stem: str
) -> onnx_ir.Value:
    """Float8 scales of blocks, that are dequantized themselves by one float32 number."""
    codes, unit = stored_parts(params.scale)
    inputs = constant(graph, f"{stem}_scales", codes), constant(graph, f"{stem}_unit", unit)
    return insert(graph, fake, "DequantizeLinear", inputs, f"{stem}_block_scales").outputs[0]


def _axis_attributes(params: QuantParams) -> dict[str, int]:
    match params.spec.granularity:
        case PerAxis(axis):
            return {"axis": axis}
        case PerBlock(axis, size):
            return {"axis": axis, "block_size": size}
    return {}


def _drop_unused(own: Model) -> None:
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(own.ir)
    declare_functions(own.ir)


def _strip(own: Model) -> None:
    """Leave out what only the compiler needs: inferred shapes and octavo's own metadata."""
    kept = {id(v) for v in (*own.graph.inputs, *own.graph.outputs)}
    values = list(own.graph.initializers.values())
    for node in own.graph.all_nodes():
        for key in _NOTES:
            node.metadata_props.pop(key, None)
        values += node.outputs if node.graph is own.graph else ()
    for value in values:
        for key in _NOTES:
            value.metadata_props.pop(key, None)
        if id(value) not in kept and value.const_value is None:
            value.shape, value.type = None, None


def _planned(model: Model, lowered: Model, target: Target) -> Iterator[PlannedNode]:
    """One row per decision, and one per node that a decision's kernel absorbs."""
    plan = model.find(Plan) or Plan({}, "")
    placement = model.find(Placement) or Placement({}, {}, {})
    sources = {node.name or "": node for node in model.graph}
    now = {node.name or "": node for node in lowered.graph}
    tails = {name: node.outputs[0].name or "" for name, node in sources.items()}
    for name, head in placement.fused.items():
        tails[head] = sources[name].outputs[0].name or ""
    for name, choice in plan.by_node.items():
        node = sources[name]
        row = _row(node, choice, target)
        stored, original = _bytes(now.get(name)), _bytes(node)
        yield PlannedNode(
            name, node.op_type, str(choice.option), choice.reason, tails[name],
            row.kernels if row else (), stored, original, "", dict(choice.seconds),
        )  # fmt: skip
    for name, head in placement.fused.items():
        option, reason = str(plan.by_node[head].option), f"absorbed by {head}"
        yield PlannedNode(name, sources[name].op_type, option, reason, tails[head], (), 0, 0, head)


def _bytes(node: onnx_ir.Node | None) -> int:
    """Bytes of the constants that a node reads, directly or dequantized."""
    return sum(_stored_bytes(value) for value in (node.inputs if node is not None else ()))


def _stored_bytes(value: onnx_ir.Value | None) -> int:
    """Bytes of a constant, or of those that it is dequantized from."""
    made = value.producer() if value is not None else None
    if made is None:
        tensor = value.const_value if value is not None else None
        return tensor.nbytes if tensor is not None else 0
    dequantizes = made.op_type == "DequantizeLinear"
    count = 2 if dequantizes else 1 if made.domain == DOMAIN or made.op_type == "Cast" else 0
    return sum(map(_stored_bytes, made.inputs[:count]))
