"""Lower a planned model to the graph ONNX Runtime runs with integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.backends import ort_blocks as blocks
from octavo.backends import ort_layout as layout
from octavo.backends import ort_rewrites as rewrites
from octavo.backends.ort_levels import store_levels
from octavo.backends.ort_packing import behind, halve_constant
from octavo.backends.ort_target import MICROSOFT, ORT_CPU, TARGETS
from octavo.ir.artifact import Artifact, PlannedNode
from octavo.ir.errors import UsageError
from octavo.ir.facts import Choice, HalfConstants, Placement, Plan, Portable
from octavo.ir.fake_quant import DOMAIN, OPTION, declare_functions
from octavo.ir.levels import OP_TYPE
from octavo.ir.model import PROVENANCE, Model
from octavo.ir.verify import verify
from octavo.ir.write import write

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.target import KernelRow, Target

    Form = Callable[[onnx_ir.Graph, onnx_ir.Node], None]


def lower(model: Model, path: Path, target: str = ORT_CPU.name) -> Artifact:
    """Write the lowered model to `path`; the given model is not changed.

    Raises UsageError for a weight that the planned kernel cannot read, VerificationFailed when the
    result is not well-formed.
    """
    described = TARGETS[target]
    check_weights(model, described)
    own = model.clone()
    explicit = rewrite(own)
    return write_lowered(model, own, explicit, path, described, _session_options(model))


def write_lowered(
    model: Model,
    own: Model,
    explicit: Mapping[str, str],
    path: Path,
    target: Target,
    session_options: Mapping[str, str],
) -> Artifact:
    """Write what `rewrite` made of a clone `own` of the planned model, and say what became of it.

    Raises VerificationFailed when the result is not well-formed.
    """
    planned = tuple(_planned(model, own, explicit, target))
    _strip(own)
    verify(own, after_pass=f"lowering to {target.name}")
    write(own, path)
    return Artifact(path, target.name, planned, session_options)


def _session_options(model: Model) -> dict[str, str]:
    """What the kernels that the plan names rest on, where the file itself does not say it."""
    plan = model.find(Plan) or Plan({}, "")
    blocked = any(c.option.method == "weight-only" for c in plan.by_node.values())
    # A standard node of blocks has no attribute for how exactly the fused kernel multiplies.
    fused = blocked and model.find(Portable) is not None
    return {"session.qdq_matmulnbits_accuracy_level": str(blocks.ACCURACY_LEVEL)} if fused else {}


def check_weights(model: Model, target: Target) -> None:
    """Refuse a plan whose weights the planned kernels cannot read; raises UsageError."""
    plan = model.find(Plan) or Plan({}, "")
    for node in model.graph:
        choice = plan.by_node.get(node.name or "")
        if choice is None or choice.option.weight is None:
            continue
        row = _row(node, choice, target)
        why = f"{target.name} has no {choice.option.method} kernel for {node.op_type}"
        why = row.refusal(choice.option.weight) if row is not None else why
        if why:
            message = f"no kernel of {target.name} runs the option '{choice.option}'"
            raise UsageError(message, where=f"node '{node.name}'", why=why)


def rewrite(own: Model) -> dict[str, str]:
    """Replace every octavo node of a model by what ONNX Runtime runs.

    Returns, for the nodes whose kernel is written out, the value that kernel computes.
    """
    graph = own.graph
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == OP_TYPE]:
        store_levels(graph, node)
    fakes = [n for n in graph if n.domain == DOMAIN and n.op_type != "FakeQuantDynamic"]
    for fake in fakes:
        if not _is_constant(fake):
            rewrites.quantize_activation(graph, fake)
            if fake.graph is graph:
                graph.remove(fake, safe=True)
    portable = own.find(Portable) is not None
    explicit = dict(_write_kernels(graph, portable)) | dict(_move_pixels(graph))
    for fake in fakes:
        if _is_constant(fake):
            _rewrite_constant(graph, fake)
    _drop_unused(own)
    halved = own.find(HalfConstants)
    for name in halved.names if halved is not None else ():
        if name in graph.initializers:
            halve_constant(graph, graph.initializers[name], graph[0])
    return explicit


def _write_kernels(graph: onnx_ir.Graph, portable: bool) -> Iterator[tuple[str, str]]:
    """Kernels that no fusion would find, written as the runtime's own operators."""
    for node in list(graph):
        form = _kernel_form(node)
        if portable:
            form = _portable_form(form)
        if form is not None:
            linear = form not in (rewrites.dynamic_lstm, blocks.blocked_gather)
            tail = rewrites.linear_tail(node)[0] if linear else node
            yield node.name or "", tail.outputs[0].name or ""
            form(graph, node)


def _portable_form(form: Form | None) -> Form | None:
    """The same in standard operators, whose fusion the runtime finds."""
    if form is blocks.blocked_matmul:
        return blocks.portable_matmul
    return rewrites.portable_matmul if form is rewrites.static_matmul else None


def _move_pixels(graph: onnx_ir.Graph) -> Iterator[tuple[str, str]]:
    for node in list(graph):
        if node.op_type in ("Resize", "DepthToSpace") and _method(node) == "static":
            codes = layout.move_pixels(graph, node)
            if codes is not None:
                yield node.name or "", codes


def _kernel_form(node: onnx_ir.Node) -> Form | None:
    option = _method(node)
    if option == "dynamic":
        return rewrites.dynamic_lstm if node.op_type == "LSTM" else rewrites.dynamic_matmul
    if option == "weight-only":
        return blocks.blocked_gather if node.op_type == "Gather" else blocks.blocked_matmul
    if option == "static" and node.op_type in ("MatMul", "Gemm") and _reads_weight(node):
        tail, _ = rewrites.linear_tail(node)
        return None if _quantized_later(tail.outputs[0]) else rewrites.static_matmul
    return None


def _reads_weight(node: onnx_ir.Node) -> bool:
    fake, _ = behind(node.inputs[1])
    return fake is not None and fake.domain == DOMAIN and _is_constant(fake)


def _quantized_later(value: onnx_ir.Value) -> bool:
    """Whether the output is quantized, at once or behind the activation a quantizer absorbs."""
    readers = [use.node for use in value.uses()]
    behind = readers[0] if len(readers) == 1 and readers[0].op_type in _ABSORBED else None
    if behind is not None:
        readers += [use.node for use in behind.outputs[0].uses()]
    return any(reader.op_type == "QuantizeLinear" for reader in readers)


def _method(node: onnx_ir.Node) -> str:
    return node.metadata_props.get(OPTION, "").partition(":")[0]


def _is_constant(fake: onnx_ir.Node) -> bool:
    return fake.inputs[0] is not None and fake.inputs[0].const_value is not None


def _rewrite_constant(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> None:
    """The form of a weight for every method that still reads its FakeQuant."""
    readers = list(_readers(fake))
    forms = {"storage": rewrites.store_constant, "static": rewrites.quantize_constant}
    for method, form in forms.items():
        found = [reader for reader in readers if _method(reader.node) == method]
        if found:
            form(graph, fake, found)


def _readers(fake: onnx_ir.Node) -> Iterator[rewrites.Reader]:
    for use in fake.outputs[0].uses():
        if use.node.op_type == "Transpose" and not _method(use.node):
            for behind in use.node.outputs[0].uses():
                yield rewrites.Reader(behind.node, behind.idx, turned=True)
        else:
            yield rewrites.Reader(use.node, use.idx)


def _drop_unused(own: Model) -> None:
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(own.ir)
    declare_functions(own.ir)
    if any(node.domain == MICROSOFT for node in own.graph.all_nodes()):
        own.ir.opset_imports[MICROSOFT] = 1
    own.graph.sort()


def _planned(
    model: Model, lowered: Model, explicit: Mapping[str, str], target: Target
) -> Iterator[PlannedNode]:
    """One row per decision, and one per node that a decision's kernel absorbs."""
    plan = model.find(Plan) or Plan({}, "")
    placement = model.find(Placement) or Placement({}, {}, {})
    nodes = {node.name or "": node for node in lowered.graph}
    tails: dict[str, str] = {}
    for node in model.graph:
        head = placement.fused.get(node.name or "", node.name or "")
        tails[head] = node.outputs[0].name or ""
    tails |= explicit
    sources = {node.name or "": node for node in model.graph}
    for name, choice in plan.by_node.items():
        source = sources[name]
        moved = source.op_type in ("Resize", "DepthToSpace") and name in explicit
        kernels = layout.KERNELS if moved else _kernels(source, choice, target)
        stored, original = _weight_bytes(source, nodes.get(name))
        yield PlannedNode(
            name, source.op_type, str(choice.option), choice.reason, tails.get(name, ""),
            kernels, stored, original, "", dict(choice.seconds),
        )  # fmt: skip
    for name, head in placement.fused.items():
        op_type, output = sources[name].op_type, sources[name].outputs[0].name or ""
        if op_type in _ABSORBED and head in explicit:
            yield PlannedNode(name, op_type, "float", "its input stays float", output, (), 0, 0)
            continue
        option, reason = str(plan.by_node[head].option), f"absorbed by {head}"
        yield PlannedNode(name, op_type, option, reason, tails[head], (), 0, 0, head)


def _kernels(node: onnx_ir.Node, choice: Choice, target: Target) -> tuple[str, ...]:
    row = _row(node, choice, target)
    return row.kernels if row is not None and choice.option.method != "storage" else ()


def _row(node: onnx_ir.Node, choice: Choice, target: Target) -> KernelRow | None:
    """A row for a node that is quantized already: its conditions held when it was chosen."""
    wanted = (node.op_type, choice.option.method)
    rows = (r for r in target.rows if (r.op_type, r.method) == wanted)
    return next((r for r in rows if bool(r.weights) == (choice.option.weight is not None)), None)


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


def _constant_bytes(node: onnx_ir.Node) -> int:
    """Bytes of the constants a node reads, as they are or unpacked; those of shared tables not."""
    total = 0
    seen: set[str] = set()
    waiting = list(node.inputs)
    while waiting:
        value = waiting.pop()
        if value is None or (name := value.name or "") in seen:
            continue
        seen.add(name)
        made = value.producer()
        if value.const_value is not None and not name.startswith("table_"):
            total += value.const_value.nbytes
        elif made is not None and made.op_type in _UNPACKERS:
            waiting += made.inputs
    return total


_ABSORBED = ORT_CPU.fused_activations
_UNPACKERS = (
    "DequantizeLinear", "Cast", "Mul", "Gather", "GatherElements", "Reshape", "Slice", "BitwiseOr",
    "Transpose", "Sub",
)  # fmt: skip


# What passes note for each other; folding leaves up to kilobytes on a constant.
_NOTES = (OPTION, PROVENANCE, "pkg.onnxscript.optimizer.folded_from")


def _strip(own: Model) -> None:
    """Leave out what only the compiler needs: inferred shapes and octavo's own metadata."""
    kept = {id(v) for v in (*own.graph.inputs, *own.graph.outputs)}
    for node in own.graph.all_nodes():
        for key in _NOTES:
            node.metadata_props.pop(key, None)
        for value in node.outputs:
            if id(value) not in kept and node.graph is own.graph:
                value.shape, value.type = None, None
    for value in own.graph.initializers.values():
        for key in _NOTES:
            value.metadata_props.pop(key, None)
        if id(value) not in kept:
            value.shape, value.type = None, None
