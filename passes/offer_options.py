"""Offer every way to compress each group of nodes that the target executes, with what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.constants import constant_behind
from octavo.ir.errors import UsageError
from octavo.ir.facts import FLOAT, Fact, Option, Portable, Ranges
from octavo.ir.float4 import BLOCK
from octavo.ir.mapped import reading
from octavo.ir.menu import Group, Menu, Offer
from octavo.ir.option_bytes import scale_count
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantSpec,
    fitted,
    kernel_blocks,
    signed_type,
)
from octavo.ir.target import Tie
from octavo.passes.base import Pass, Statistic
from octavo.passes.chains import float8_values, static_chains, static_values
from octavo.passes.fixed_bytes import fixed_bytes
from octavo.passes.groups import find_groups
from octavo.passes.integer_blocks import integer_blocks
from octavo.passes.offer_bytes import offer_bytes
from octavo.passes.patterns import select

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.facts import Method
    from octavo.ir.model import Model
    from octavo.ir.target import KernelRow
    from octavo.passes.base import PassContext
    from octavo.passes.chains import Chain

_INTEGER = ("static", "dynamic")
_RECURRENT = ("LSTM", "GRU", "RNN")
# Wider codes keep their accuracy in the largest blocks.
_WIDE_BITS = 5
_HALF_BITS = 16
_FLOAT_BITS = 32
_FLOAT4_BITS = 4
# Fewer scales than this save less than the node that casts them takes.
_LEAST_SCALES = 64
# A weight is scaled by at most this part of its largest magnitude; float16 below is subnormal.
_LEAST_MAGNITUDE = 127 * 2.0**-14
_CODE_BITS = 8
_PORTABLE_BITS = (8, 4)


@final
@dataclass(frozen=True)
class OfferOptions(Pass):
    """List the options of every decision group, with exact bytes, seconds and bit operations.

    **What it does.** Finds the groups of nodes that must agree, and offers each: float; integer
    kernels with calibrated or run-time activations; float8 kernels; kernels that read float4 or
    low-bit weights; low-bit storage that unpacks when the model loads, for integer or float
    compute, for integer kernels also in blocks of `integer-blocks`, whose scales are whole
    multiples of their channel's. Nodes without weights that an integer kernel exists for are
    offered that kernel.
    **Why.** `allocate` chooses among offers and knows nothing of kernels.
    **When it does not apply.** An option without a row in the target's table, without calibrated
    ranges (static and float8), or on a node that `keep_float` names is not offered. `portable`
    leaves what OpenVINO and TensorRT execute too: float16, int8 weights of static kernels, and 8-
    or 4-bit blocks of MatMul as DequantizeLinear.
    **Cost and accuracy.** Changes nothing by itself.
    """

    name = "offer-options"
    produces = (Menu,)
    preserves = (Fact,)

    bits: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    blocks: tuple[int, ...] = (32, 64, 128)
    integer_blocks: tuple[int, ...] = (64,)
    static: bool = True
    dynamic: bool = True
    float8: bool = True
    float4: bool = True
    weight_only: bool = True
    storage: bool = True
    recurrent: bool = True
    float16: bool = True
    half_scales: bool = True
    portable: bool = False
    keep_float: tuple[str, ...] = ()
    ties: tuple[Tie, ...] = ()

    def statistics(self, model: Model, ctx: PassContext) -> tuple[Statistic, ...]:
        """Ranges of every value that a kernel with calibrated operands could read or write."""
        names = static_values(model, ctx.target) if self.static else []
        names += float8_values(model, ctx.target) if self.float8 else []
        return tuple(Statistic("range", name) for name in dict.fromkeys(names))

    def run(self, model: Model, ctx: PassContext) -> Model:
        if self.portable and not set(_PORTABLE_BITS) & set(self.bits):
            widths = ", ".join(map(str, self.bits))
            message = f"no portable weight has {widths} bits"
            raise UsageError(message, where=self.name, hint="bits=8;4, or portable=false")
        kept = select(model, self.keep_float)
        chains = static_chains(model, ctx, kept) if self.static else {}
        weighted = find_groups(model, ctx.target, self.ties)
        of_node = {node: group.name for group in weighted.values() for node in group.nodes}
        absorbed = {m.name for c in chains.values() for m in c.members[1:]}
        nodes = {node.name or "": node for node in model.graph}
        groups: dict[str, Group] = {}
        for name, node in nodes.items():
            if name in weighted:
                groups[name] = _kept(weighted[name], kept)
            elif name in chains and name not in of_node and name not in absorbed:
                groups[name] = Group(name, (name,), role=node.op_type)
        maker = _Maker(self, ctx, nodes, chains, kept, model.find(Ranges))
        offers = {name: tuple(maker.offers(group)) for name, group in groups.items()}
        offers = {n: found for n, found in offers.items() if n in weighted or len(found) > 1}
        ctx.count("groups", len(offers))
        ctx.count("offers", sum(map(len, offers.values())))
        known = {name: groups[name] for name in offers}
        fixed = fixed_bytes(model, (n for g in weighted.values() for n in g.nodes), ctx.target)
        found = model.with_fact(Menu(known, offers, fixed, ctx.cost.source))
        return found.with_fact(Portable()) if self.portable else found


@dataclass(frozen=True)
class _Maker:
    """Offers of one group after another."""

    request: OfferOptions
    ctx: PassContext
    nodes: Mapping[str, onnx_ir.Node]
    chains: Mapping[str, Chain]
    kept: Mapping[str, str]
    ranges: Ranges | None = None
    largest: dict[str, float] = field(default_factory=dict)

    def offers(self, group: Group) -> Iterator[Offer]:
        """Float first, then what is smaller or faster in some way."""
        seen: set[str] = set()
        for options in self._choices(group):
            offer = self._offer(options)
            if offer is None or (self.request.portable and not self._is_portable(options)):
                continue
            if offer.name not in seen:
                seen.add(offer.name)
                yield offer

    def _is_portable(self, options: Mapping[str, Option]) -> bool:
        """Whether OpenVINO and TensorRT execute what lowering writes for the options."""
        for name, option in options.items():
            spec = option.weight
            if option == FLOAT or spec is None or spec.half:
                continue
            if option.method == "static" and spec.bits == _CODE_BITS:
                continue
            node = self.nodes[name]
            if option.method != "weight-only" or node.op_type != "MatMul":
                return False
            if spec.bits not in _PORTABLE_BITS or not _fills_blocks(node.inputs[1], spec):
                return False
        return True

    def _choices(self, group: Group) -> Iterator[Mapping[str, Option]]:
        yield dict.fromkeys(group.nodes, FLOAT)
        if any(name in self.kept for name in group.nodes):
            return
        for spec in self._specs():
            yield from self._with_spec(group, spec)

    def _specs(self) -> Iterator[tuple[Method, int, int]]:
        """Method, bits, block size (0: one scale per channel)."""
        request = self.request
        allowed: Mapping[Method, bool] = {
            "static": request.static,
            "dynamic": request.dynamic,
            "storage": request.storage,
        }
        if request.storage and request.float16:
            yield ("storage", _HALF_BITS, 0)
        narrow = [bits for bits in request.bits if bits < _WIDE_BITS]
        for method in (name for name, wanted in allowed.items() if wanted):
            yield from ((method, bits, 0) for bits in request.bits)
            stores = method == "storage"
            sizes = request.blocks if stores else request.integer_blocks
            widths = narrow if stores else request.bits
            yield from ((method, bits, size) for bits in widths for size in sizes)
        if request.float8:
            yield ("float8", _CODE_BITS, 0)
        if request.float4:
            yield ("float4", _FLOAT4_BITS, BLOCK)
        for bits in request.bits if request.weight_only else ():
            sizes = request.blocks if bits < _WIDE_BITS else request.blocks[-1:]
            yield from (("weight-only", bits, size) for size in sizes)

    def _with_spec(
        self, group: Group, spec: tuple[Method, int, int]
    ) -> Iterator[Mapping[str, Option]]:
        """The spec on every node of the group; nodes that lack the method store their weight."""
        method, bits, size = spec
        options = {}
        for name in group.nodes:
            option = self._option(self.nodes[name], method, bits, size)
            options[name] = option or self._stored(self.nodes[name], spec)
        if any(option is not None and option.method == method for option in options.values()):
            found = {name: option for name, option in options.items() if option is not None}
            if len(found) == len(options):
                yield found

    def _stored(self, node: onnx_ir.Node, spec: tuple[Method, int, int]) -> Option | None:
        """Storage on the grid that others of its group compute with, where it is that of a row."""
        method, bits, size = spec
        if size and method in _INTEGER:
            return None
        stored = self._option(node, "storage", bits, 0)
        if stored is None or stored.weight is None or method not in _INTEGER:
            return stored
        return replace(stored, weight=self._computed(stored.weight))

    def _option(self, node: onnx_ir.Node, method: Method, bits: int, size: int) -> Option | None:
        if method == "static" and node.name not in self.chains:
            return None
        if node.op_type in _RECURRENT and method == "dynamic" and not self.request.recurrent:
            return None
        # Blocks of weights that are unpacked: nothing else reads those of recurrent nodes.
        if size and method == "storage" and not _has_blocks(node, size):
            return None
        row = self.ctx.target.support(node, method).row
        if size and row is not None and method in _INTEGER:
            spec = integer_blocks(row, node, bits, size, self.ctx.target)
            return Option(method, spec) if spec is not None else None
        if row is None or (method == "float8" and not self._has_range(node, row)):
            return None
        if bits == _HALF_BITS:
            fits = all(self._largest(node.inputs[k]) <= QuantSpec("f16").qmax for k in row.weights)
            return Option(method, QuantSpec("f16")) if fits and row.weights else None
        if not row.weights:
            return Option(method)
        spec = self._spec(row, node, bits, size)
        return None if row.refusal(spec) else Option(method, spec)

    def _has_range(self, node: onnx_ir.Node, row: KernelRow) -> bool:
        known = self.ranges.by_value if self.ranges is not None else {}
        values = (node.inputs[index] for index in row.operands)
        return all(value is not None and value.name in known for value in values)

    def _spec(self, row: KernelRow, node: onnx_ir.Node, bits: int, size: int) -> QuantSpec:
        dtype = "f8" if row.method == "float8" else signed_type(bits)
        weight = node.inputs[row.weights[0]]
        rank = weight.shape.rank() if weight is not None and weight.shape is not None else 0
        if node.op_type in _RECURRENT:
            spec = QuantSpec(dtype, PerBlock(2, size), symmetric=True)
        elif size:
            axis = 1 - row.weight_axis % 2 if node.op_type in ("Gemm", "Gather") else 0
            if row.method == "float4":
                return QuantSpec("f4", PerBlock(axis, size), symmetric=True)
            zeros = self.ctx.target.zero_points and not self.request.portable
            spec = kernel_blocks(bits, PerBlock(axis, size), zero_points=zeros)
        elif rank < 2:
            spec = QuantSpec(dtype, PerTensor(), symmetric=True)
        else:
            spec = QuantSpec(dtype, PerAxis(row.weight_axis % rank), symmetric=True)
        if row.method in _INTEGER:
            spec = self._computed(spec)
        half = self.request.half_scales and self._scales_halve(node, row, spec)
        return replace(spec, half_scales=half or self.ctx.target.half_scales)

    def _computed(self, spec: QuantSpec) -> QuantSpec:
        """The spec of a weight that an integer kernel multiplies, in the bits it can take."""
        least = self.ctx.target.weight_bits
        return replace(spec, used_bits=least) if least < spec.bits else spec

    def _scales_halve(self, node: onnx_ir.Node, row: KernelRow, spec: QuantSpec) -> bool:
        """Whether float16 scales are smaller, and as good."""
        for index in row.weights:
            value, tensor = node.inputs[index], constant_behind(node.inputs[index])
            if value is None or tensor is None:
                return False
            shape = tuple(value.shape.numpy()) if value.shape is not None else ()
            if scale_count(shape, fitted(spec, shape)) < _LEAST_SCALES:
                return False
            if not _LEAST_MAGNITUDE <= self._largest(value) <= QuantSpec("f16").qmax:
                return False
        return True

    def _largest(self, value: onnx_ir.Value | None) -> float:
        """The largest magnitude of a weight."""
        tensor = constant_behind(value)
        name = value.name or "" if value is not None else ""
        if name not in self.largest and tensor is not None:
            self.largest[name] = reading(tensor, _largest_magnitude)
        return self.largest[name]

    def _offer(self, options: Mapping[str, Option]) -> Offer | None:
        """The offer with its costs; `None` where the target has no kernel for it."""
        seconds = bops = 0.0
        for name, option in options.items():
            node = self.nodes[name]
            own = self.ctx.cost.option_seconds(node, option)
            if own is None:
                return None
            seconds += own
            if option.method != "static" and name in self.chains:
                seconds += _float_seconds(self.chains[name].members[1:], self.ctx)
            bops += self.ctx.cost.macs(node) * _bit_operations(option)
        texts = dict.fromkeys(map(str, options.values()))
        integer = all(option.method == "static" for option in options.values())
        size = offer_bytes(self.nodes, options, self.ctx.target)
        return Offer("+".join(texts), options, size, seconds, bops, integer)


def _has_blocks(node: onnx_ir.Node, size: int) -> bool:
    """Whether all rows of a recurrent node's weights are several whole blocks."""
    if node.op_type not in _RECURRENT:
        return False
    shapes = [value.shape.numpy() for value in node.inputs[1:3] if value and value.shape]
    return all(shape[2] > size and shape[2] % size == 0 for shape in shapes)


def _fills_blocks(value: onnx_ir.Value | None, spec: QuantSpec) -> bool:
    """Whether a constant that is read as it is consists of whole blocks."""
    tensor = value.const_value if value is not None else None
    blocks = spec.granularity
    if tensor is None or not isinstance(blocks, PerBlock):
        return False
    return tensor.shape.numpy()[blocks.axis] % blocks.size == 0


def _kept(group: Group, kept: Mapping[str, str]) -> Group:
    """The group, with the pattern that keeps it float as its reason."""
    pattern = next((kept[name] for name in group.nodes if name in kept), None)
    return group if pattern is None else replace(group, reason=f"kept float by '{pattern}'")


def _largest_magnitude(array: NDArray[np.floating]) -> float:
    return float(np.abs(array).max(initial=0.0))


def _float_seconds(nodes: Sequence[onnx_ir.Node], ctx: PassContext) -> float:
    return sum(ctx.cost.option_seconds(node, FLOAT) or 0.0 for node in nodes)


def _bit_operations(option: Option) -> int:
    """Weight bits times activation bits of the multiplications (HAWQ-V3, section 3.4)."""
    if option.method in ("float", "storage") or option.weight is None:
        both = option.method == "static"
        return _CODE_BITS * _CODE_BITS if both else _FLOAT_BITS * _FLOAT_BITS
    activations = _FLOAT_BITS if option.method in ("weight-only", "float4") else _CODE_BITS
    return option.weight.bits * activations
