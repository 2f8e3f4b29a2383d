"""Bytes that the weights of a node take in the emitted file, under every option.

Counted are packed codes, scales, and the nodes and names that an option adds, as lowering to ONNX
Runtime writes them; tables and zero points, which all weights share, are counted once per file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from octavo.ir.constants import constant_behind
from octavo.ir.file_bytes import node_bytes, tensor_bytes
from octavo.ir.packing import packed_bytes, parts, sizes_name, steps
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, fitted

if TYPE_CHECKING:
    import onnx_ir

    from octavo.ir.facts import Option
    from octavo.ir.quant import QuantSpec

_NAME_BYTES = 24
_UNPACK_NAME_BYTES = len("unpack99")
_ZERO_NAME_BYTES = len("zero_u8_128")
_INT64, _FLOAT32 = 8, 4


def option_bytes(
    shape: tuple[int, ...],
    option: Option,
    *,
    name_bytes: int = _NAME_BYTES,
    value_bytes: int = _NAME_BYTES,
) -> int:
    """Bytes of a weight of `shape`, and of the nodes an option adds to the file for it.

    `name_bytes` is the length of the weight's name, `value_bytes` that of the activation a static
    option quantizes. Tables are not counted: see `table_bytes`.
    """
    if option.weight is None:
        return tensor_bytes(shape, _FLOAT32 * math.prod(shape), name_bytes)
    spec = fitted(option.weight, shape)
    if option.method == "weight-only":
        return _blocked_bytes(shape, spec, name_bytes)
    scales = _scales(shape, spec)
    scale = tensor_bytes((scales,), _FLOAT32 * scales, name_bytes + 6)
    codes = _code_bytes(shape, spec, name_bytes)
    match option.method:
        case "static":
            return codes + scale + _dequantize_bytes(name_bytes) + _site_bytes(value_bytes)
        case "dynamic":
            return codes + scale + _dynamic_bytes(name_bytes)
        case _:
            broadcast = 2 * (len(shape) - 1)
            return codes + scale + broadcast + _storage_bytes(name_bytes)


def weight_bytes(node: onnx_ir.Node, weights: Sequence[int], option: Option) -> int:
    """`option_bytes` of all constants among the inputs `weights` of a node, with its names."""
    activations = [
        len(value.name or "")
        for index, value in enumerate(node.inputs)
        if value is not None and index not in weights and value.const_value is None
    ]
    total = 0
    for index in weights:
        value, tensor = node.inputs[index], constant_behind(node.inputs[index])
        if value is not None and tensor is not None:
            total += option_bytes(
                tuple(tensor.shape.numpy()),
                option,
                name_bytes=len(value.name or ""),
                value_bytes=activations[0] if activations else _NAME_BYTES,
            )
    return total


def table_bytes(options: Iterable[Option]) -> int:
    """Bytes of the tables that the weights of a file share, once each."""
    tables: dict[str, int] = {}
    for option in options:
        if option.weight is None or option.method in ("weight-only", "float"):
            continue
        for part in parts(option.weight):
            if part.native is None:
                size = len(part.values) ** part.per_byte
                shape = (size, part.per_byte)
                tables[part.table_name] = tensor_bytes(
                    shape, math.prod(shape), len(part.table_name)
                )
    return sum(tables.values())


def _scales(shape: tuple[int, ...], spec: QuantSpec) -> int:
    match spec.granularity:
        case PerTensor():
            return 1
        case PerAxis(axis):
            return shape[axis]
        case PerBlock(axis, size):
            return math.prod(shape) // shape[axis] * -(-shape[axis] // size)


def _code_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> int:
    """The packed codes and the nodes that unpack them."""
    made = steps(shape, spec)
    if not made:
        return tensor_bytes(shape, packed_bytes(shape, spec), name_bytes + 2)
    lengths: dict[str, int] = {}
    total = 0
    for index, part in enumerate(parts(spec)):
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


def _blocked_bytes(shape: tuple[int, ...], spec: QuantSpec, name_bytes: int) -> int:
    """MatMulNBits: whole blocks, their scales, and what its node has more than a MatMul."""
    blocks = spec.granularity
    assert isinstance(blocks, PerBlock)
    scales = _scales(shape, spec)
    data = scales * blocks.size * spec.bits // 8
    columns = math.prod(shape) // shape[blocks.axis]
    packed = (columns, scales // columns, blocks.size * spec.bits // 8)
    attributes = {
        "K": shape[blocks.axis], "N": columns, "bits": spec.bits, "block_size": blocks.size,
        "accuracy_level": 4,
    }  # fmt: skip
    return (
        tensor_bytes(packed, data, name_bytes + 2)
        + tensor_bytes((scales,), _FLOAT32 * scales, name_bytes + 6)
        + _added("MatMulNBits", [name_bytes + 2, name_bytes + 6], name_bytes, attributes)
    )


def _added(
    op_type: str, inputs: Sequence[int], name_bytes: int, attributes: Mapping[str, int]
) -> int:
    """What a node of the runtime's own has more than the MatMul in whose place it stands."""
    before = node_bytes("MatMul", [name_bytes], name_bytes)
    return node_bytes(op_type, inputs, name_bytes, attributes, "com.microsoft") - before


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


def _storage_bytes(name_bytes: int) -> int:
    """Cast and Mul, whose output has a longer name than the weight that the node read."""
    real = node_bytes("Cast", [name_bytes + 2], name_bytes + 4, {"to": 1})
    return real + node_bytes("Mul", [name_bytes + 4, name_bytes + 6], name_bytes + 3) + 3
