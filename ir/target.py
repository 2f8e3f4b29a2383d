"""What a target can run, as data: rows that say which operator gets which kernel, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from octavo.ir.quant import PerBlock, QuantSpec

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Method

OutputRule = Literal["quantized", "either", "float"]
Tie = Literal["weight", "input", "sum", "concat"]


# Methods whose kernels read blocks alone.
_BLOCKED = ("weight-only", "float4")
# Codes that are floating-point numbers, by the method whose kernels read them.
_FLOATING = {"f8": "float8", "f4": "float4"}
# Widths of unsigned codes that kernels of blocks read, with a zero point for every block.
_WITH_ZEROS = (2, 4)


@final
@dataclass(frozen=True)
class Condition:
    """A named property of a node that a row needs; `holds` must not raise."""

    text: str
    holds: Callable[[onnx_ir.Node], bool]


@final
@dataclass(frozen=True)
class KernelRow:
    """One row: `op_type` compiled by `method` runs as one of `kernels`.

    - `operands`: indices of the inputs that carry activations (quantized by `static`);
    - `operands` is empty for "all inputs" where `variadic` says so;
    - `weights`: indices of the constant weights;
    - `weight_axis`: their output-channel axis, where per-axis parameters go;
    - `bits`: widths of the weights, `blocks`: sizes of blocks that share a scale (0: a whole axis);
    - `bias`: index of the bias input, or `None`;
    - `output`: "quantized" if the kernel exists only with a quantizer on the output, "either"
      if the output may stay float, "float" if it must;
    - `same_params`: the output must have the parameters of operand 0 (data movement);
    - `fixed_range`: the output range that the operator itself defines;
    - `kernels`: `domain::op_type` names the audit accepts, empty for "none, float compute";
    - `speed`: seconds relative to float32 on this target, the analytic prior.
    """

    op_type: str
    method: Method
    kernels: tuple[str, ...]
    operands: tuple[int, ...] = (0,)
    variadic: bool = False
    weights: tuple[int, ...] = ()
    weight_axis: int = 0
    bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    blocks: tuple[int, ...] = ()
    bias: int | None = None
    output: OutputRule = "quantized"
    same_params: bool = False
    fixed_range: tuple[float, float] | None = None
    conditions: tuple[Condition, ...] = ()
    speed: float = 1.0
    note: str = ""

    def refusal(self, spec: QuantSpec) -> str:
        """Why the kernel cannot read a weight of this spec, empty where it can."""
        if spec.half:
            return "" if self.method == "storage" else f"{self.method} {self.op_type} reads codes"
        own = self.method if self.method in _FLOATING.values() else ""
        if _FLOATING.get(spec.dtype, "") != own:
            return f"{self.method} {self.op_type} reads {own or 'integer'} codes"
        if not spec.signed and not (self.method == "weight-only" and spec.bits in _WITH_ZEROS):
            return f"{self.method} {self.op_type} reads signed weights"
        if spec.bits not in self.bits:
            widths = ", ".join(map(str, self.bits))
            return f"{self.method} {self.op_type} reads weights of {widths} bits"
        granularity = spec.granularity
        size = granularity.size if isinstance(granularity, PerBlock) else None
        whole = self.method in ("static", "dynamic") and size != 0
        if size is not None and whole != spec.multiples:
            kind = "multiples of a channel's scale" if whole else "scales of their own"
            return f"{self.method} {self.op_type} reads blocks with {kind}"
        if size in self.blocks or (size is None and self.method not in _BLOCKED):
            return ""
        sizes = f"blocks of {', '.join(map(str, self.blocks))}" if self.blocks else "no blocks"
        return f"{self.method} {self.op_type} reads {sizes}"


@final
@dataclass(frozen=True)
class Support:
    """Whether a target runs a node by a method: the row, or the reason why not."""

    row: KernelRow | None
    reason: str = ""


@final
@dataclass(frozen=True)
class Target:
    """A device and runtime as data; `never` holds the reasons for operators that stay float.

    `ties` says which nodes get one decision together: readers of one weight, projections of one
    input, operands of one sum, operands of one Concat. `unsigned_where_positive` gives signed
    activations that are never negative unsigned codes. `half_scales` says that every scale is
    stored as float16, `half_constants` that what stays float is, `zero_points` that kernels of
    blocks take one beside few bits. A sum fuses into the kernel of an operand that one of
    `fused_sums` makes for it alone, which then needs no quantizer; `fused_quantizers` run inside
    the kernel in front of them. `features` are what the device can run, in words; the rates are
    nominal, for the analytic prior.
    """

    name: str
    runtime: str
    rows: tuple[KernelRow, ...]
    fused_activations: tuple[str, ...]
    activation_dtype: Literal["u8", "s8"]
    weight_bits: int
    opset: int
    ir_version: int
    never: tuple[tuple[str, str], ...] = ()
    ties: tuple[Tie, ...] = ("weight", "input")
    unsigned_where_positive: bool = False
    half_scales: bool = False
    half_constants: bool = False
    zero_points: bool = True
    fused_sums: tuple[str, ...] = ()
    fused_quantizers: bool = False
    features: tuple[str, ...] = ()
    macs_per_second: float = 40e9
    bytes_per_second: float = 8e9

    @property
    def activation_grid(self) -> QuantSpec:
        """The grid that ranges are chosen for and static rounding is measured on.

        It is symmetric where every activation is signed. Unsigned codes where nothing is negative
        have 256 levels, which stand for the signed ones beside them as well.
        """
        signed = self.activation_dtype == "s8" and not self.unsigned_where_positive
        dtype: Literal["u8", "s8"] = "s8" if signed else "u8"
        return QuantSpec(dtype, symmetric=signed, half_scales=self.half_scales)

    def support(self, node: onnx_ir.Node, method: Method) -> Support:
        """The first row for the node and method whose conditions hold."""
        reason = ""
        for row in self.rows:
            if (
                row.method != method
                or row.op_type != node.op_type
                or node.domain not in ("", "ai.onnx")
            ):
                continue
            missing = next((c.text for c in row.conditions if not c.holds(node)), None)
            if missing is None:
                return Support(row)
            reason = reason or f"{self.name} needs: {missing}"
        known = dict(self.never).get(node.op_type)
        return Support(
            None, known or reason or f"{self.name} has no {method} kernel for {node.op_type}"
        )
