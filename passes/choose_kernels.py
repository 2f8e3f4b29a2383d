"""Choose for every node the fastest option the target runs, by measured or estimated seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from octavo.ir.constants import constant_behind, matrix_source
from octavo.ir.errors import UsageError
from octavo.ir.facts import FLOAT, Choice, Fact, Option, Plan, Ranges
from octavo.ir.float4 import BLOCK
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantSpec, kernel_blocks, signed_type
from octavo.passes.base import Pass, Statistic
from octavo.passes.chains import bias_add, float8_values, static_chains, static_values
from octavo.passes.groups import weight_row
from octavo.passes.integer_blocks import integer_blocks
from octavo.passes.partition import Edge, Item, integer_side
from octavo.passes.patterns import select
from octavo.passes.stored_once import without_float_copies

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Method
    from octavo.ir.model import Model
    from octavo.ir.target import KernelRow, Target
    from octavo.passes.base import PassContext
    from octavo.passes.chains import Chain

_RECURRENT = ("LSTM", "GRU", "RNN")
# The least part that has kernels of numbers that are not integers.
_FLOATING = {"float8": "tensorrt-sm89", "float4": "tensorrt-sm120"}
_UNPACKING_BYTES = 2000
_BYTE = 8
# Shares of all float seconds that an integer kernel has to save to be worth its error: nothing
# averages that of a graph output, and every quantizer in front of a region adds one.
_OUTPUT_GAIN = 0.02
_QUANTIZER_PRICE = 0.002


@final
@dataclass(frozen=True)
class ChooseKernels(Pass):
    """Decide per node between static and dynamic integer kernels, low-bit storage and float.

    **What it does.** Splits the graph into an integer and a float part so that the sum of node
    seconds and of quantizations at the border is least (a minimum cut), then gives every float
    node the best of dynamic quantization, storage and plain float.
    **Why.** A quantizer around a node whose integer kernel is slow or missing costs time; only
    the whole path tells whether an integer kernel pays.
    With `float8` a node that is not static gets a float8 kernel, with `float4` or `weight-only` one
    that reads blocks, instead of dynamic quantization. `bits` are those of weights in the file;
    kernels multiply bytes, so that fewer are unpacked when the model loads, and cost no time. Below
    6 bits weights are in blocks of `block-size` where rows are several whole ones: a block's scale
    is a multiple of its channel's. Where `weight-only` kernels multiply, that of an output layer,
    and of a table tied to it, is in blocks of `output-block-size`: nothing averages its error.
    **When it does not apply.** No calibrated range (no data): no static option; nor where a mask
    would leave the scores of a Softmax a few of 256 steps. No row in the target's table, a pattern
    in `keep_float`, or too few weights to shrink: float, with the reason.
    **Cost and accuracy.** Changes nothing by itself; the plan is exact for the costs it is given.
    """

    name = "choose-kernels"
    produces = (Plan,)
    preserves = (Fact,)

    static: bool = True
    dynamic: bool = True
    float8: bool = False
    float4: bool = False
    storage: bool = True
    weight_only: bool = False
    recurrent: bool = False
    bits: int = 8
    block_size: int = 32
    output_block_size: int = 0
    keep_float: tuple[str, ...] = ()

    def statistics(self, model: Model, ctx: PassContext) -> tuple[Statistic, ...]:
        """Ranges of every value that a kernel with calibrated operands could read or write."""
        names = static_values(model, ctx.target) if self.static else []
        names += float8_values(model, ctx.target) if self.float8 else []
        return tuple(Statistic("range", name) for name in dict.fromkeys(names))

    def run(self, model: Model, ctx: PassContext) -> Model:
        if not 1 <= self.bits <= _BYTE:
            message = f"weights of {self.bits} bits cannot be stored"
            raise UsageError(message, hint="give choose-kernels{bits=…} from 1 to 8")
        _check_floating(self, model, ctx)
        kept = select(model, self.keep_float)
        chains = static_chains(model, ctx, kept) if self.static else {}
        total = sum(ctx.cost.seconds(node, "float") or 0.0 for node in model.graph)
        other = {n: min(self._seconds(c.head, ctx, total).values()) for n, c in chains.items()}
        integer = integer_side(*_problem(chains, other, total, ctx))
        absorbed = {m.name: c for n, c in chains.items() if n in integer for m in c.members[1:]}
        choices: dict[str, Choice] = {}
        for node in model.graph:
            name = node.name or ""
            if node.name in absorbed:
                continue
            if name in integer:
                choices[name] = self._static(chains[name], node, ctx)
            elif name in kept:
                choices[name] = Choice(FLOAT, f"kept float by '{kept[name]}'")
            elif (choice := self._otherwise(node, name in chains, ctx, total)) is not None:
                choices[name] = choice
        choices = without_float_copies(model, choices, ctx.target)
        for choice in choices.values():
            ctx.count(choice.option.method)
        return model.with_fact(Plan(choices, ctx.cost.source))

    def _otherwise(
        self, node: onnx_ir.Node, candidate: bool, ctx: PassContext, total: float
    ) -> Choice | None:
        """The best option of a node that is not static, `None` for nodes without a choice."""
        support = ctx.target.support(node, "static")
        reason = support.reason if support.row is None else "no calibrated range"
        reason = "slower as an integer kernel here" if candidate else reason
        stored = ctx.target.support(node, "storage").row
        read = ctx.target.support(node, self._method).row if self._method != "dynamic" else None
        packed = stored or read
        seconds = self._seconds(node, ctx, total)
        floating = self._method in _FLOATING
        if packed is None and floating and weight_row(node, ctx.target) is not None:
            return Choice(FLOAT, ctx.target.support(node, self._method).reason)
        if packed is None or not _worth_storing(node, packed):
            small = f"{reason}; too few weights to shrink" if packed else reason
            return Choice(FLOAT, small, _named(seconds)) if packed or candidate else None
        method = min(seconds, key=lambda m: seconds[m])
        if self._embeds_in_blocks(node, ctx):
            method, reason = "weight-only", "few bits in blocks, as a head that is tied to it reads"
        row = ctx.target.support(node, method).row if method != "float" else None
        if row is not None:
            return Choice(self._option(row, node, method, ctx), reason, _named(seconds))
        if stored is None or not self.storage:
            return Choice(FLOAT, reason, _named(seconds))
        return Choice(self._option(stored, node, "storage", ctx), reason, _named(seconds))

    def _embeds_in_blocks(self, node: onnx_ir.Node, ctx: PassContext) -> bool:
        """Whether a table is looked up in blocks: slower, but close with few bits, and shared."""
        if node.op_type != "Gather" or not self.weight_only or self.bits == _BYTE:
            return False
        if ctx.target.support(node, "weight-only").row is None:
            return False
        table = constant_behind(node.inputs[0])
        return table is not None and table.shape.numpy()[1] % self._size(node.inputs[0]) == 0

    def _size(self, weight: onnx_ir.Value | None) -> int:
        """The block size of a weight: that of outputs where a node that computes one reads it."""
        source = matrix_source(weight) or weight
        if source is None or not self.output_block_size:
            return self.block_size
        readers = list(source.consumers())
        readers += [
            n for r in readers if r.op_type == "Transpose" for n in r.outputs[0].consumers()
        ]
        return self.output_block_size if any(map(_is_output, readers)) else self.block_size

    @property
    def _method(self) -> Method:
        """How nodes with weights compute that are neither static nor float."""
        if self.weight_only:
            return "weight-only"
        if self.float4:
            return "float4"
        return "float8" if self.float8 else "dynamic"

    def _seconds(self, node: onnx_ir.Node, ctx: PassContext, total: float) -> dict[Method, float]:
        """Seconds of every option but static that is allowed, `total` being the whole graph's."""
        seconds: dict[Method, float] = {"float": ctx.cost.seconds(node, "float") or 0.0}
        method = self._method
        allowed = self.dynamic and (self.recurrent or node.op_type not in _RECURRENT)
        if self.weight_only:
            allowed = _fills_blocks(node, self._size(_weight(node)))
        integer = ctx.cost.seconds(node, method) if allowed or method in _FLOATING else None
        if integer is None:
            return seconds
        # Nothing averages the error of an output layer: its kernel has to save more. Blocks of few
        # bits lose in the weight whoever multiplies it, and a table that is tied to it is shared.
        rounds = method != "float4" and (not self.weight_only or self.bits == _BYTE)
        least = _OUTPUT_GAIN * total if _is_output(node) and rounds else 0.0
        if seconds["float"] - integer > least:
            seconds[method] = integer
        return seconds

    def _option(
        self, row: KernelRow, node: onnx_ir.Node, method: Method, ctx: PassContext
    ) -> Option:
        if method == "weight-only":
            blocks = PerBlock(1 - row.weight_axis, self._size(node.inputs[row.weights[0]]))
            spec = kernel_blocks(self.bits, blocks, zero_points=ctx.target.zero_points)
            half = self.bits < _BYTE or ctx.target.half_scales
            return Option(method, replace(spec, half_scales=half))
        if method == "dynamic":
            return Option(method, self._multiplied(row, node, ctx.target))
        if method == "float4":
            return Option(
                method, QuantSpec("f4", PerBlock(1 - row.weight_axis, BLOCK), symmetric=True)
            )
        spec = _weight_spec(row, node, self.bits)
        if method == "float8":
            return Option(method, replace(_computed(spec, ctx.target), dtype="f8"))
        return Option(method, spec)

    def _multiplied(self, row: KernelRow, node: onnx_ir.Node, target: Target) -> QuantSpec:
        """The spec of a weight that an integer kernel multiplies, of few bits in blocks."""
        blocks = integer_blocks(row, node, self.bits, self.block_size, target)
        return blocks or _computed(_weight_spec(row, node, self.bits), target)

    def _static(self, chain: Chain, node: onnx_ir.Node, ctx: PassContext) -> Choice:
        weight = self._multiplied(chain.row, node, ctx.target) if chain.row.weights else None
        seconds = {
            str(m): s for m in ("float", "static") if (s := ctx.cost.seconds(node, m)) is not None
        }
        return Choice(Option("static", weight), chain.row.note or "integer kernel", seconds)


def _problem(
    chains: Mapping[str, Chain], other: Mapping[str, float], total: float, ctx: PassContext
) -> tuple[list[Item], list[Edge]]:
    """The cut problem: one item per candidate chain, one edge per value they touch.

    `other` are the seconds of the best option but static, `total` those of the whole graph.
    """
    items = []
    for name, chain in chains.items():
        integer = ctx.cost.seconds(chain.head, "static")
        if integer is not None and chain.output.is_graph_output():
            integer += _OUTPUT_GAIN * total
        members = (ctx.cost.seconds(m, "float") or 0.0 for m in chain.members[1:])
        items.append(Item(name, integer, other[name] + sum(members)))
    owner = {m.name: name for name, chain in chains.items() for m in chain.members}
    edges = []
    values = dict.fromkeys(v for c in chains.values() for v in (*c.operands, *c.outputs))
    for value in values:
        if value.const_value is not None:
            continue
        producer = value.producer()
        made_by = owner.get(producer.name) if producer is not None else None
        free = made_by is not None and chains[made_by].row.output == "either"
        readers: list[str | None] = [owner.get(use.node.name) for use in value.uses()]
        if value.is_graph_output():
            readers.append(None)
        seconds = ctx.cost.boundary_seconds(value)
        back = 0.0 if free else seconds
        quantize = seconds + _QUANTIZER_PRICE * total
        edges.append(Edge(value.name or "", made_by, tuple(readers), quantize, back))
    return items, edges


def _check_floating(wanted: ChooseKernels, model: Model, ctx: PassContext) -> None:
    """Refuse float8 and float4 kernels where the target has none, float8 without ranges."""
    for method, asked in (("float8", wanted.float8), ("float4", wanted.float4)):
        if asked and not any(row.method == method for row in ctx.target.rows):
            hint = (
                "octavo targets show NAME lists the kernels of a target; "
                f"{_FLOATING[method]} has {method} ones"
            )
            raise UsageError(f"{ctx.target.name} has no {method} kernels", hint=hint)
    if wanted.float8 and model.find(Ranges) is None:
        raise UsageError("float8 kernels need calibrated ranges", hint="give --calibration DATA")


def _named(seconds: Mapping[Method, float]) -> dict[str, float]:
    return {str(method): value for method, value in seconds.items()}


def _computed(spec: QuantSpec, target: Target) -> QuantSpec:
    """The spec of a weight that an integer kernel multiplies, in the bits it can take."""
    spec = replace(spec, half_scales=target.half_scales)
    return replace(spec, used_bits=target.weight_bits) if target.weight_bits < spec.bits else spec


def _weight_spec(row: KernelRow, node: onnx_ir.Node, bits: int) -> QuantSpec:
    """One scale per output channel; recurrent weights one per row of every direction."""
    dtype = signed_type(bits)
    weight = node.inputs[row.weights[0]]
    rank = weight.shape.rank() if weight is not None and weight.shape is not None else 0
    if node.op_type in _RECURRENT:
        return QuantSpec(dtype, PerBlock(2, 0), symmetric=True)
    if rank < 2:
        return QuantSpec(dtype, PerTensor(), symmetric=True)
    return QuantSpec(dtype, PerAxis(row.weight_axis % rank), symmetric=True)


def _fills_blocks(node: onnx_ir.Node, size: int) -> bool:
    """Whether the rows of a weight are whole blocks."""
    weight = _weight(node)
    axis = node.attributes.get_int("transB", 0)
    rows = weight.shape[axis or 0] if weight is not None and weight.shape else None
    return isinstance(rows, int) and rows % size == 0


def _weight(node: onnx_ir.Node) -> onnx_ir.Value | None:
    return node.inputs[1] if len(node.inputs) > 1 else None


def _is_output(node: onnx_ir.Node) -> bool:
    """Whether a linear node, with its bias, computes a graph output."""
    return (bias_add(node) or node).outputs[0].is_graph_output()


def _worth_storing(node: onnx_ir.Node, row: KernelRow) -> bool:
    """Whether 3 of 4 bytes saved outweigh the scales, nodes and names that unpack them."""
    saved = -_UNPACKING_BYTES
    for tensor in (constant_behind(node.inputs[k]) for k in row.weights):
        if tensor is not None:
            sizes = tensor.shape.numpy()
            scales = sizes[row.weight_axis % len(sizes)] if len(sizes) > 1 else 1
            saved += 3 * tensor.size - 4 * scales
    return saved > 0
