"""Bytes that the weights of a node take in the emitted file, under every option.

Counted are packed codes, scales, and the nodes and names that an option adds, as lowering to ONNX
Runtime writes them; tables and zero points, which all weights share, are counted once per file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.constants import constant_behind, matrix_source
from octavo.ir.file_bytes import node_bytes, tensor_bytes
from octavo.ir.kernel_codes import block_shape, kernel_spec, kernel_steps
from octavo.ir.packing import (
    block_parts,
    block_steps,
    blocks_shape,
    codebook_size,
    kernel_bits,
    packed_bytes,
    parts,
    sizes_name,
    zeros_shape,
)
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, fitted

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Option
    from octavo.ir.packing import Part, Step
    from octavo.ir.quant import QuantSpec

_NAME_BYTES = 24
_UNPACK_NAME_BYTES = len("unpack99")
_ZERO_NAME_BYTES = len("zero_u8_128")
_CODES_NAME, _SCALE_NAME, _HALF_NAME = len("_q"), len("_scale"), len("_scale_f16")
_ZEROS_NAME = len("_zeros")
_BLOCK_NAMES = {"zeros": "_q_zeros", "multiples": "_q_multiples"}
_INT64, _FLOAT32, _FLOAT16 = 8, 4, 2
_MICROSOFT = "com.microsoft"


@final
@dataclass(frozen=True)
class OptionBytes:
    """What an option takes for one weight: `stored` once for all that read it, `read` each."""

    stored: int
    read: int

    @property
    def total(self) -> int:
        return self.stored + self.read


def option_bytes(
    shape: tuple[int, ...],
    option: Option,
    *,
    name_bytes: int = _NAME_BYTES,
    value_bytes: int = _NAME_BYTES,
    op_type: str = "MatMul",
) -> OptionBytes:
    """Bytes of a weight of `shape`, and of the nodes an option adds to the file for it.

    `name_bytes` is the length of the weight's name, `value_bytes` that of the activation a static
    option quantizes, `op_type` that of the node. Tables are not counted: see `table_bytes`.
    """
    if option.weight is None:
        return OptionBytes(tensor_bytes(shape, _FLOAT32 * math.prod(shape), name_bytes), 0)
    spec = fitted(option.weight, shape)
    if spec.half:
        return OptionBytes(_code_bytes(shape, spec, name_bytes), _cast_bytes(name_bytes, 2, 4) + 4)
    if spec.float4:
        return _float4_bytes(shape, spec, name_bytes)
    scales = _scales_shape(shape, kernel_spec(spec))
    scale = _scale_bytes(scales, kernel_spec(spec), name_bytes)
    if option.method == "weight-only":
        codes = _block_bytes(shape, spec, name_bytes) + _zeros_bytes(shape, spec, name_bytes)
        return OptionBytes(codes + scale, _blocked_bytes(shape, spec, name_bytes, op_type))
    codes = _code_bytes(shape, spec, name_bytes)
    match option.method:
        case "static":
            read = _dequantize_bytes(name_bytes) + _site_bytes(value_bytes)
        case "dynamic":
            read = _dynamic_bytes(name_bytes)
        case _ if op_type == "Gather":
            read = _gathered_bytes(name_bytes)
        case _:
            broadcast = 2 * (len(shape) - 1)
            return OptionBytes(codes + scale + broadcast + _storage_bytes(name_bytes), 0)
    return OptionBytes(codes + scale, read)


def weight_bytes(node: onnx_ir.Node, weights: Sequence[int], option: Option) -> int:
    """`option_bytes` of all constants among the inputs `weights` of a node, with its names."""
    return sum(found.total for _, found in each_weight_bytes(node, weights, option))


def each_weight_bytes(
    node: onnx_ir.Node,
    weights: Sequence[int],
    option: Option,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Iterator[tuple[onnx_ir.Value, OptionBytes]]:
    """The constants among the inputs `weights` of a node, as it reads them, with their bytes.

    `shapes` are those of constants that are to have others than they have, by name.
    """
    activations = [
        len(value.name or "")
        for index, value in enumerate(node.inputs)
        if value is not None and index not in weights and value.const_value is None
    ]
    for index in weights:
        value, tensor = node.inputs[index], constant_behind(node.inputs[index])
        if value is not None and tensor is not None:
            source = matrix_source(value)
            name = (value if source is None else source).name or ""
            shape = (shapes or {}).get(name) or tuple(tensor.shape.numpy())
            yield (
                value,
                option_bytes(
                    shape if source is None else shape[::-1],
                    option,
                    name_bytes=len(name),
                    value_bytes=activations[0] if activations else _NAME_BYTES,
                    op_type=node.op_type,
                ),
            )


def table_bytes(options: Iterable[Option]) -> int:
    """Bytes of the tables that the weights of a file share, once each."""
    tables: dict[str, int] = {}
    for option in options:
        if option.weight is None or option.method == "float":
            continue
        blocked = option.method == "weight-only"
        for part in block_parts(option.weight.bits) if blocked else parts(option.weight):
            if part.native is None:
                shape = part.table.shape
                tables[part.table_name] = tensor_bytes(
                    shape, math.prod(shape), len(part.table_name)
                )
    return sum(tables.values())


def scale_count(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Scales of a weight of `shape`."""
    return math.prod(_scales_shape(shape, spec))


def _scales_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    match spec.granularity:
        case PerTensor():
            return ()
        case PerAxis(axis):
            return (shape[axis],)
        case PerBlock(axis, size):
            blocks = -(-shape[axis] // size)
            return (*shape[:axis], blocks, *shape[axis + 1 :])


def _scale_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> int:
    count = math.prod(shape)
    if not spec.half_scales:
        return tensor_bytes(shape, _FLOAT32 * count, name_bytes + _SCALE_NAME)
    half = tensor_bytes(shape, _FLOAT16 * count, name_bytes + _HALF_NAME)
    return half + _cast_bytes(name_bytes, _HALF_NAME, _SCALE_NAME)


def _cast_bytes(name_bytes: int, before: int, after: int) -> int:
    return node_bytes("Cast", [name_bytes + before], name_bytes + after, {"to": 1})


def _code_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> int:
    """The packed codes and the nodes that unpack them."""
    made = kernel_steps(shape, spec)
    if not made:
        return tensor_bytes(shape, packed_bytes(shape, spec), name_bytes + _CODES_NAME)
    total = _unpacked_bytes(shape, parts(spec), made, name_bytes)
    if spec.multiples:
        found = block_shape(shape, spec)
        size = math.ceil(math.prod(found) / 2)
        read = {given for step in made for given in step.inputs}
        names = [name for label, name in _BLOCK_NAMES.items() if label in read]
        total += sum(tensor_bytes(found, size, name_bytes + len(name)) for name in names)
    if spec.index_bits is not None:
        size = codebook_size(spec.index_bits)
        total += tensor_bytes((size,), size, name_bytes + len("_q_codes"))
    return total


def _block_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> int:
    """Whole blocks of codes, and the nodes that make them those of the kernel."""
    blocks = spec.granularity
    assert isinstance(blocks, PerBlock)
    rows, columns, bits = shape[1 - blocks.axis], shape[blocks.axis], spec.bits
    packed = blocks_shape(rows, columns, bits, blocks.size)
    made = block_steps(packed, bits)
    if not made:
        return tensor_bytes(packed, math.prod(packed), name_bytes + _CODES_NAME)
    codes = (rows, packed[1], blocks.size)
    return _unpacked_bytes(codes, block_parts(bits), made, name_bytes)


def _float4_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> OptionBytes:
    """Codes, float8 scales and the number they are multiplied by, with what makes float16 of them.

    As lowering to TensorRT writes them.
    """
    blocks, scales = spec.granularity, _scales_shape(shape, spec)
    assert isinstance(blocks, PerBlock)
    stem = name_bytes + len("_float4")
    stored = {name: stem + len(name) for name in ("_codes", "_scales", "_unit")}
    made = {name: stem + len(name) for name in ("_block_scales", "_fq", "_fq_f16")}
    attributes = {"axis": blocks.axis, "block_size": blocks.size}
    inputs = [stored["_scales"], stored["_unit"]], [stored["_codes"], made["_block_scales"]]
    total = (
        tensor_bytes(shape, math.ceil(math.prod(shape) / 2), stored["_codes"])
        + tensor_bytes(scales, math.prod(scales), stored["_scales"])
        + tensor_bytes((), _FLOAT32, stored["_unit"])
        + node_bytes("DequantizeLinear", inputs[0], made["_block_scales"])
        + node_bytes("DequantizeLinear", inputs[1], made["_fq"], attributes)
        + node_bytes("Cast", [made["_fq"]], made["_fq_f16"], {"to": 1})
    )
    return OptionBytes(total, made["_fq_f16"] - name_bytes)


def _zeros_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> int:
    """Zero points of blocks, which unsigned codes have."""
    blocks = spec.granularity
    assert isinstance(blocks, PerBlock)
    if spec.signed:
        return 0
    found = zeros_shape(shape[1 - blocks.axis], shape[blocks.axis], spec.bits, blocks.size)
    return tensor_bytes(found, math.prod(found), name_bytes + _ZEROS_NAME)


def _unpacked_bytes(
    shape: tuple[int, ...], stored: Sequence[Part], made: Sequence[Step], name_bytes: int
) -> int:
    """Parts of codes of `shape`, and the steps from them."""
    lengths: dict[str, int] = {"codebook": name_bytes + len("_q_codes")}
    lengths |= {label: name_bytes + len(name) for label, name in _BLOCK_NAMES.items()}
    total = 0
    for index, part in enumerate(stored):
        size = part.bytes(math.prod(shape))
        total += tensor_bytes(shape if part.native else (size,), size, name_bytes + 3)
        lengths |= {f"part{index}": name_bytes + 3, f"table{index}": len(part.table_name)}
    for step in made:
        name = name_bytes + 2 if step is made[-1] else _UNPACK_NAME_BYTES
        lengths[step.output] = name
        inputs = [
            lengths[given] if isinstance(given, str) else len(sizes_name(given))
            for given in step.inputs
        ]
        attributes = {} if step.to is None else {"to": int(step.to)}
        total += node_bytes(step.op_type, inputs, name, attributes)
    own_sizes = {s for step in made for s in step.inputs if not isinstance(s, str)} - _COMMON_SIZES
    return total + sum(
        tensor_bytes((len(s),), _INT64 * len(s), len(sizes_name(s))) for s in own_sizes
    )


_COMMON_SIZES = {(-1,), (0,)}


def _blocked_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int, op_type: str) -> int:
    """What MatMulNBits has more than a MatMul, or GatherBlockQuantized than a Gather."""
    blocks = spec.granularity
    assert isinstance(blocks, PerBlock)
    names = [name_bytes + _CODES_NAME, name_bytes + _SCALE_NAME]
    if not spec.signed:
        names.append(name_bytes + _ZEROS_NAME)
    bits = kernel_bits(spec.bits)
    if op_type != "Gather":
        rows, columns = shape[1 - blocks.axis], shape[blocks.axis]
        attributes = {
            "K": columns, "N": rows, "bits": bits, "block_size": blocks.size, "accuracy_level": 4,
        }  # fmt: skip
        return _added("MatMulNBits", names, name_bytes, attributes)
    attributes = {
        "bits": bits, "block_size": blocks.size, "gather_axis": 0, "quantize_axis": 1,
    }  # fmt: skip
    sizes = (shape[0], -1)
    flat = node_bytes("Reshape", [names[0], len(sizes_name(sizes))], name_bytes + len("_rows"))
    ends = tensor_bytes((2,), 2 * _INT64, len(sizes_name(sizes)))
    return flat + ends + _added("GatherBlockQuantized", names, name_bytes, attributes)


def _added(
    op_type: str, inputs: Sequence[int], name_bytes: int, attributes: Mapping[str, int]
) -> int:
    """What a node of the runtime's own has more than the MatMul in whose place it stands."""
    before = node_bytes("MatMul", [name_bytes], name_bytes)
    return node_bytes(op_type, inputs, name_bytes, attributes, _MICROSOFT) - before


def _dequantize_bytes(name_bytes: int) -> int:
    inputs = [name_bytes + 2, name_bytes + 6, _ZERO_NAME_BYTES]
    return node_bytes("DequantizeLinear", inputs, name_bytes + 3, {"axis": 1})


def _site_bytes(value_bytes: int) -> int:
    """Quantizing one activation: Q, DQ and scale."""
    numbers = [value_bytes + 6, _ZERO_NAME_BYTES]
    return (
        node_bytes("QuantizeLinear", [value_bytes, *numbers], value_bytes + 2)
        + node_bytes("DequantizeLinear", [value_bytes + 2, *numbers], value_bytes + 3)
        + tensor_bytes((), _FLOAT32, value_bytes + 6)
    )


def _dynamic_bytes(name_bytes: int) -> int:
    inputs = [name_bytes + 2, name_bytes + 6, 0, _ZERO_NAME_BYTES]
    return _added("DynamicQuantizeMatMul", inputs, name_bytes, {})


def _gathered_bytes(name_bytes: int) -> int:
    """Codes and scales are looked up, cast and multiplied; names are those of the output."""
    ends = _NAME_BYTES + len("_rows"), _NAME_BYTES + len("_row_scales")
    return (
        node_bytes("Gather", [name_bytes + _SCALE_NAME, _NAME_BYTES], ends[1])
        + node_bytes("Cast", [ends[0]], _NAME_BYTES + len("_f32"), {"to": 1})
        + node_bytes("Mul", [_NAME_BYTES + len("_f32"), ends[1]], _NAME_BYTES)
    )


def _storage_bytes(name_bytes: int) -> int:
    """Cast and Mul, whose output has a longer name than the weight that the node read."""
    real = node_bytes("Cast", [name_bytes + 2], name_bytes + 4, {"to": 1})
    return real + node_bytes("Mul", [name_bytes + 4, name_bytes + 6], name_bytes + 3) + 3
