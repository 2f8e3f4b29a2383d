"""Bytes of tensors and nodes in a file, by the encoding of protocol buffers.

A field is a tag of one byte, its length where it is no number, and its content; numbers take a
byte per 7 bits (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_TYPE_FIELD_BYTES = 2
_ATTRIBUTE_TYPE_FIELD_BYTES = 3


def tensor_bytes(shape: Sequence[int], data_bytes: int, name_bytes: int) -> int:
    """An initializer of a graph: its dimensions, type, name and `data_bytes` of raw data."""
    dims = sum(1 + _number_bytes(size) for size in shape)
    body = dims + _TYPE_FIELD_BYTES + _field_bytes(name_bytes) + _field_bytes(data_bytes)
    return _field_bytes(body)


def node_bytes(
    op_type: str,
    inputs: Sequence[int],
    name_bytes: int,
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> int:
    """A node with names of `inputs` bytes, called as its one output is, with whole attributes."""
    names = [*inputs, name_bytes, name_bytes, len(op_type), *([len(domain)] if domain else [])]
    body = sum(map(_field_bytes, names))
    for name, value in (attributes or {}).items():
        number = 1 + _number_bytes(value) + _ATTRIBUTE_TYPE_FIELD_BYTES
        body += _field_bytes(_field_bytes(len(name)) + number)
    return _field_bytes(body)


def half_bytes(shape: Sequence[int], name_bytes: int) -> int:
    """A float16 initializer, and the Cast that makes the float32 value of that name of it."""
    stored = name_bytes + len("_f16")
    tensor = tensor_bytes(shape, 2 * math.prod(shape), stored)
    return tensor + node_bytes("Cast", [stored], name_bytes, {"to": 1})


def _number_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _field_bytes(content_bytes: int) -> int:
    return 1 + _number_bytes(content_bytes) + content_bytes
