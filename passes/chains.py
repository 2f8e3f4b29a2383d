"""Chains: a node with what its integer kernel absorbs (a constant bias Add, then Relu or Clip)."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.facts import QuantizedInput, Ranges
from octavo.passes.clipping import step_of
from octavo.passes.rewrite import only_reader, scalar

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.model import Model
    from octavo.ir.quant import QuantSpec
    from octavo.ir.target import KernelRow, Target
    from octavo.passes.base import PassContext

# A Softmax that is told its inputs in steps of half a nat gives chances that are off by a quarter.
_COARSEST = 0.5


@final
@dataclass(frozen=True)
class Chain:
    """The unit of a static decision; `members` are in order, head first.

    `operands` are the values its kernel reads as activations, constants included.
    `nonnegative` and `clip_high` describe the absorbed activation.
    """

    head: onnx_ir.Node
    row: KernelRow
    members: tuple[onnx_ir.Node, ...]
    operands: tuple[onnx_ir.Value, ...]
    nonnegative: bool = False
    clip_high: float | None = None

    @property
    def output(self) -> onnx_ir.Value:
        return self.members[-1].outputs[0]

    @property
    def outputs(self) -> tuple[onnx_ir.Value, ...]:
        """All values the chain hands on; only data movement (Split) has more than one."""
        return (self.output,) if len(self.members) > 1 else tuple(self.head.outputs)


def find_chains(model: Model, target: Target) -> Mapping[str, Chain]:
    """Chains by the name of their head, for every top-level node with a static kernel."""
    chains: dict[str, Chain] = {}
    absorbed: set[str] = set()
    for node in model.graph:
        name = node.name or ""
        row = target.support(node, "static").row
        if row is None or name in absorbed:
            continue
        chain = _chain(node, row, target)
        if any(_from_constants(value, row) for value in chain.operands):
            continue
        absorbed.update(member.name or "" for member in chain.members[1:])
        chains[name] = chain
    return {name: chain for name, chain in chains.items() if name not in absorbed}


def static_values(model: Model, target: Target) -> list[str]:
    """Names of the activations that a static kernel of the target could read or write."""
    chains = find_chains(model, target)
    values = (v for c in chains.values() for v in (*c.operands, *c.outputs))
    return list(dict.fromkeys(v.name or "" for v in values if v.const_value is None))


def float8_values(model: Model, target: Target) -> list[str]:
    """Names of the activations that a float8 kernel of the target could read."""
    rows = ((node, target.support(node, "float8").row) for node in model.graph)
    read = (node.inputs[k] for node, row in rows if row is not None for k in row.operands)
    values = (v for v in read if v is not None and v.const_value is None)
    return list(dict.fromkeys(v.name or "" for v in values))


def calibrated(chain: Chain, ranges: Ranges) -> bool:
    """Whether every activation that the chain's kernel reads or writes has a range."""
    values = (*chain.operands, *chain.outputs)
    return all(v.const_value is not None or v.name in ranges.by_value for v in values)


def static_chains(model: Model, ctx: PassContext, kept: Container[str]) -> Mapping[str, Chain]:
    """Chains that may be static: calibrated, of no kept node, touching no quantized value.

    Without calibrated ranges there is none, which a note says.
    """
    ranges, known = model.find(Ranges), model.find(QuantizedInput)
    if ranges is None:
        ctx.remark("note", "", "no calibrated ranges: no static integer kernels")
        return {}
    chains, coarse = find_chains(model, ctx.target), set[str]()
    for name, step in coarse_logits(chains, ranges, ctx.target.activation_grid).items():
        coarse.add(name)
        text = f"float: 8 bits would tell a Softmax its inputs in steps of {step:.2g}"
        ctx.remark("missed", name, text, step=step)
    quantized = set(known.by_value) if known is not None else set()
    return {
        name: chain
        for name, chain in chains.items()
        if not any(m.name in kept for m in chain.members)
        and calibrated(chain, ranges)
        and quantized.isdisjoint(v.name for v in (*chain.operands, *chain.outputs))
        and coarse.isdisjoint(v.name for v in _quantized(chain))
    }


def _quantized(chain: Chain) -> tuple[onnx_ir.Value, ...]:
    """What a kernel cannot read or write as floats."""
    return chain.operands if chain.row.output == "either" else (*chain.operands, *chain.outputs)


def coarse_logits(chains: Mapping[str, Chain], ranges: Ranges, grid: QuantSpec) -> dict[str, float]:
    """Values that end in a Softmax with too wide a range for 8 bits, and the step they would get.

    A mask added to scores does that: it is far below them, and the scores share one step.
    """
    found: dict[str, float] = {}
    for chain in reversed(list(chains.values())):
        reads = chain.operands[0].name or "" if chain.operands else ""
        moved = chain.row.same_params and any(v.name in found for v in chain.outputs)
        if reads in ranges.by_value and (moved or chain.head.op_type == "Softmax"):
            known = ranges.by_value[reads]
            step = step_of(grid, known.low, known.high)
            if step > _COARSEST:
                found[reads] = step
    return found


def bias_add(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The Add of a constant vector that alone reads a MatMul's output."""
    reader = only_reader(node.outputs[0])
    if reader is None or node.op_type != "MatMul" or reader.op_type != "Add" or reader.domain:
        return None
    other = next((v for v in reader.inputs if v is not node.outputs[0]), None)
    if other is None or other.const_value is None:
        return None
    sizes = [d for d in other.const_value.shape if d != 1]
    columns = node.inputs[1].shape[-1] if node.inputs[1] and node.inputs[1].shape else None
    vector = sizes == [columns] and other.const_value.shape[-1] == columns
    return reader if vector else None


def _chain(head: onnx_ir.Node, row: KernelRow, target: Target) -> Chain:
    members = [head]
    if row.weights and (add := bias_add(head)) is not None:
        members.append(add)
    indices = range(len(head.inputs)) if row.variadic else row.operands
    operands = tuple(v for k in indices if (v := head.inputs[k]) is not None)
    operands = _without_fused(head, operands, target)
    if row.same_params:
        return Chain(head, row, tuple(members), operands)
    activation = only_reader(members[-1].outputs[0])
    bounds = _saturation(activation, target)
    if activation is None or bounds is None:
        return Chain(head, row, tuple(members), operands)
    return Chain(head, row, (*members, activation), operands, True, bounds)


def _without_fused(
    head: onnx_ir.Node, operands: tuple[onnx_ir.Value, ...], target: Target
) -> tuple[onnx_ir.Value, ...]:
    """The operands of a sum but the one whose kernel computes the sum as well."""
    if head.op_type != "Add":
        return operands
    for value in operands:
        made = value.producer()
        if made is not None and made.op_type in target.fused_sums and only_reader(value) is head:
            return tuple(other for other in operands if other is not value)
    return operands


def _from_constants(operand: onnx_ir.Value, row: KernelRow) -> bool:
    """Whether an operand is a weight in disguise, which activation parameters fit badly."""
    if operand.const_value is not None:
        return row.same_params
    producer = operand.producer()
    return producer is not None and all(
        v is None or v.const_value is not None for v in producer.inputs
    )


def _saturation(node: onnx_ir.Node | None, target: Target) -> float | None:
    """The upper bound of an activation a quantizer can express, infinity for Relu."""
    if node is None or node.domain or node.op_type not in target.fused_activations:
        return None
    if node.op_type == "Relu":
        return float("inf")
    if len(node.inputs) < 2 or scalar(node.inputs[1]) != 0.0:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return float("inf")
    return scalar(node.inputs[2])
