"""Lower a planned model to the graph ONNX Runtime runs with integer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.backends import ort_rewrites as rewrites
from octavo.backends.ort_target import MICROSOFT, ORT_CPU
from octavo.ir.artifact import Artifact, PlannedNode
from octavo.ir.facts import Choice, Placement, Plan
from octavo.ir.fake_quant import DOMAIN, OPTION, declare_functions
from octavo.ir.model import PROVENANCE, Model
from octavo.ir.verify import verify
from octavo.ir.write import write

if TYPE_CHECKING:
    import onnx_ir


def lower(model: Model, path: Path) -> Artifact:
    """Write the lowered model to `path`; the given model is not changed.

    Raises VerificationFailed when the result is not well-formed.
    """
    own = model.clone()
    rewrite(own)
    planned = tuple(_planned(model, own))
    _strip(own)
    verify(own, after_pass="lowering to ort-cpu")
    write(own, path)
    return Artifact(path, ORT_CPU.name, planned)


def rewrite(own: Model) -> None:
    """Replace every octavo node of a model by what ONNX Runtime fuses."""
    graph = own.graph
    placement = own.find(Placement) or Placement({}, {}, {})
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type != "FakeQuantDynamic":
            _rewrite_fake_quant(graph, node)
    for node in list(graph):
        option = node.metadata_props.get(OPTION, "").partition(":")[0]
        if option == "dynamic":
            form = rewrites.dynamic_lstm if node.op_type == "LSTM" else rewrites.integer_matmul
            form(graph, node)
        elif option == "weight-only":
            rewrites.blocked_matmul(graph, node)
        elif option == "static":
            _integer_bias(graph, node, placement)
    _drop_unused(own)


def _rewrite_fake_quant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    value = fake.inputs[0]
    assert value is not None
    if value.const_value is None:
        rewrites.quantize_activation(graph, fake)
        return
    options = {
        u.node.metadata_props.get(OPTION, "").partition(":")[0] for u in fake.outputs[0].uses()
    }
    if options == {"storage"}:
        rewrites.store_constant(graph, fake)
    elif options == {"static"}:
        rewrites.quantize_constant(graph, fake)


def _integer_bias(graph: onnx_ir.Graph, node: onnx_ir.Node, placement: Placement) -> None:
    """Only a linear node whose float output nobody quantizes needs its bias in int32."""
    if node.op_type not in ("MatMul", "Gemm"):
        return
    members = [n for n in graph if placement.fused.get(n.name or "") == node.name]
    tail = members[-1] if members else node
    if any(use.node.op_type == "QuantizeLinear" for use in tail.outputs[0].uses()):
        return
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        rewrites.quantize_bias(graph, node, 2, node)
    add = next((n for n in members if n.op_type == "Add"), None)
    if add is not None:
        index = next(k for k, v in enumerate(add.inputs) if v is not None and v.const_value)
        rewrites.quantize_bias(graph, add, index, node)


def _drop_unused(own: Model) -> None:
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(own.ir)
    declare_functions(own.ir)
    if any(node.domain == MICROSOFT for node in own.graph.all_nodes()):
        own.ir.opset_imports[MICROSOFT] = 1
    own.graph.sort()


def _planned(model: Model, lowered: Model) -> Iterator[PlannedNode]:
    """One row per decision, and one per node that a decision's kernel absorbs."""
    plan = model.find(Plan) or Plan({}, "")
    placement = model.find(Placement) or Placement({}, {}, {})
    nodes = {node.name or "": node for node in lowered.graph}
    tails: dict[str, str] = {}
    for node in model.graph:
        head = placement.fused.get(node.name or "", node.name or "")
        tails[head] = node.outputs[0].name or ""
    sources = {node.name or "": node for node in model.graph}
    for name, choice in plan.by_node.items():
        source = sources[name]
        kernels = _kernels(source, choice)
        stored, original = _weight_bytes(source, nodes.get(name))
        yield PlannedNode(
            name, source.op_type, str(choice.option), choice.reason, tails.get(name, ""),
            kernels, stored, original, "", dict(choice.seconds),
        )  # fmt: skip
    for name, head in placement.fused.items():
        option = str(plan.by_node[head].option)
        op_type = sources[name].op_type
        reason = f"absorbed by {head}"
        yield PlannedNode(name, op_type, option, reason, tails[head], (), 0, 0, head)


def _kernels(node: onnx_ir.Node, choice: Choice) -> tuple[str, ...]:
    if choice.option.method in ("float", "storage"):
        return ()
    row = next(
        r
        for r in ORT_CPU.rows
        if (r.op_type, r.method) == (node.op_type, choice.option.method)
        and bool(r.weights) == (choice.option.weight is not None)
    )
    return row.kernels


def _weight_bytes(source: onnx_ir.Node, lowered: onnx_ir.Node | None) -> tuple[int, int]:
    """Bytes of the constants a node reads, as emitted and in the source."""
    return _constant_bytes(lowered) if lowered else 0, _source_bytes(source)


def _source_bytes(node: onnx_ir.Node) -> int:
    total = 0
    for value in node.inputs:
        made = value.producer() if value is not None else None
        if made is not None and made.domain == DOMAIN:
            value = made.inputs[0]
        if value is not None and value.const_value is not None:
            total += value.const_value.nbytes
    return total


def _constant_bytes(node: onnx_ir.Node, depth: int = 4) -> int:
    total = 0
    for value in node.inputs:
        if value is None:
            continue
        made = value.producer()
        if value.const_value is not None:
            total += value.const_value.nbytes
        elif made is not None and depth and made.op_type in _UNPACKERS:
            total += _constant_bytes(made, depth - 1)
    return total


_UNPACKERS = ("DequantizeLinear", "Cast", "Mul", "Gather", "MatMulInteger")


def _strip(own: Model) -> None:
    """Leave out what only the compiler needs: inferred shapes and octavo's own metadata."""
    kept = {id(v) for v in (*own.graph.inputs, *own.graph.outputs)}
    for node in own.graph.all_nodes():
        for key in (OPTION, PROVENANCE):
            node.metadata_props.pop(key, None)
        for value in node.outputs:
            if id(value) not in kept and node.graph is own.graph:
                value.shape, value.type = None, None
