"""Weights whose every channel has its own few numbers: `w[n, k] = levels[n, index[n, k]]`.

Binary coding (BCQ) is the case in which the numbers of a channel are all sums of ±α and an offset
(UniQuanF, "Unifying Uniform and Binary-coding Quantization", equation 2); α = 2^(k-2-i) · scale
gives the codes of k bits. They are multiplied as floats: a runtime looks them up at load.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from octavo.ir.errors import UsageError
from octavo.ir.fake_quant import DOMAIN, constant, declare_functions
from octavo.ir.file_bytes import node_bytes, tensor_bytes
from octavo.ir.packing import codebook_size, packed_bytes, signed_indices
from octavo.ir.quant import Entry, QuantSpec, signed_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.model import Model

OP_TYPE = "FakeQuantLevels"
# Names and the nodes that unpack, look up and reshape.
_NODE_BYTES = 600
_EXACT = 1 << 24


def binary_levels(alpha: NDArray[np.float32], offset: NDArray[np.float32]) -> NDArray[np.float32]:
    """All `Σ ±alpha[n, i] + offset[n]` as `[N, 2^k]` of `alpha [N, k]` and `offset [N]`.

    Bit i of a column's number, the highest first, is the sign of `alpha[:, i]`.
    """
    bits = alpha.shape[1]
    places = np.arange(bits)[::-1]
    signs = 2 * (np.arange(1 << bits)[:, None] >> places & 1) - 1
    levels: NDArray[np.float32] = alpha @ signs.T.astype(np.float32) + offset[:, None]
    return levels


def binary_parts(
    levels: NDArray[np.float32],
) -> tuple[NDArray[np.float16], NDArray[np.float16]] | None:
    """The float16 alpha and offset from which `binary_levels` made levels, `None` where none did.

    Their sums are exact in float32 whatever the order: all are multiples of one number, and less
    than 2^24 of it.
    """
    bits = levels.shape[1].bit_length() - 1
    if levels.shape[1] != 1 << bits:
        return None
    alone = 1 << np.arange(bits)[::-1]
    alpha = (levels[:, alone] - levels[:, :1]) / 2
    offset = levels[:, 0] + alpha.sum(axis=1)
    with np.errstate(over="ignore"):
        halves = alpha.astype(np.float16), offset.astype(np.float16)
    parts = np.concatenate([halves[0], halves[1][:, None]], axis=1)
    if not np.all(np.isfinite(parts)):
        return None
    least = np.spacing(np.where(parts == 0, np.float16(1), np.abs(parts))).astype(np.float64)
    sums = np.abs(parts).sum(axis=1, dtype=np.float64)
    made = binary_levels(*(half.astype(np.float32) for half in halves))
    exact = np.all(sums < _EXACT * least.min(axis=1)) and np.array_equal(made, levels)
    return halves if exact else None


def sign_table(bits: int) -> NDArray[np.float32]:
    """What `alpha` and `offset`, side by side, are multiplied with for the table of their levels.

    `[bits + 1, entries]`, the entries where `stored_levels` puts them.
    """
    slots = signed_indices(bits)
    table = np.zeros((bits + 1, codebook_size(bits)), np.float32)
    every = np.eye(bits + 1, dtype=np.float32)
    table[:, slots] = binary_levels(every[:, :bits], every[:, bits])
    return table


def nearest_levels(
    weight: NDArray[np.float32], levels: NDArray[np.float32], axis: int
) -> NDArray[np.int64]:
    """The index of the level of its channel that is nearest to each number, the lowest in a tie."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    found = np.empty(rows.shape, np.int64)
    for row, own, indices in zip(rows, levels, found, strict=True):
        order = np.argsort(own, kind="stable")
        bounds = (own[order][1:] + own[order][:-1]) / 2
        indices[:] = order[np.searchsorted(bounds, row)]
    return _back(found, weight.shape, axis)


def level_weight(
    indices: NDArray[np.int64], levels: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    """The numbers that indices stand for, in the shape of `indices`."""
    rows = np.moveaxis(indices, axis, 0).reshape(indices.shape[axis], -1)
    found: NDArray[np.float32] = np.take_along_axis(levels, rows, axis=1)
    return _back(found, indices.shape, axis)


def set_levels(
    model: Model, fake: onnx_ir.Node, levels: NDArray[np.float32], axis: int
) -> onnx_ir.Node:
    """Let the reader of a FakeQuant read numbers of `levels [N, 2^k]` instead of its grid.

    Every number of the constant becomes its channel's nearest level. Returns the new node.
    """
    value = fake.inputs[0]
    assert value is not None
    assert value.const_value is not None
    weight = value.const_value.numpy()
    bits = max(1, math.ceil(math.log2(levels.shape[1])))
    levels = np.asarray(levels, np.float32)
    rounded = level_weight(nearest_levels(weight, levels, axis), levels, axis)
    graph, name = model.graph, fake.name or ""
    inputs = [
        constant(graph, f"{name}_rounded", rounded), constant(graph, f"{name}_levels", levels),
    ]  # fmt: skip
    node = onnx_ir.node(
        OP_TYPE, inputs, {"axis": axis, "bits": bits}, domain=DOMAIN, name=f"{name}_leveled"
    )
    node.outputs[0].name = f"{name}_leveled"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.insert_after(fake, node)
    onnx_ir.convenience.replace_all_uses_with(fake.outputs[0], node.outputs[0])
    read = [value.name or "" for value in fake.inputs if value is not None]
    graph.remove(fake, safe=True)
    for unread in (n for n in read if n in graph.initializers and not _is_read(graph, n)):
        del graph.initializers[unread]
    declare_functions(model.ir)
    return node


def _is_read(graph: onnx_ir.Graph, name: str) -> bool:
    value = graph.initializers[name]
    return bool(value.uses()) or value.is_graph_output() or value.is_graph_input()


def levels_of(node: onnx_ir.Node) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a FakeQuantLevels reads: the weight, and the levels of its channels."""
    return _constant_of(node, 0), _constant_of(node, 1)


def reset_levels(
    node: onnx_ir.Node, weight: NDArray[np.float32], levels: NDArray[np.float32]
) -> None:
    """Let a FakeQuantLevels read others; the numbers of `weight` are levels of their channels."""
    for index, array in enumerate((weight, levels)):
        value = node.inputs[index]
        assert value is not None
        value.const_value = onnx_ir.Tensor(np.asarray(array, np.float32), name=value.name)


def _constant_of(node: onnx_ir.Node, index: int) -> NDArray[np.float32]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def stored_levels(
    weight: NDArray[np.float32], levels: NDArray[np.float32], axis: int, bits: int
) -> tuple[NDArray[np.int8], NDArray[np.float32], int]:
    """Signed indices in the matrix form that is stored, the table they index, and along what axis.

    `[N, rest]` and `[N, entries]` where the channels come first, `[rest, N]` and `[entries, N]`
    where they come last. Raises UsageError where they are in the middle.
    """
    before, after = math.prod(weight.shape[:axis]), math.prod(weight.shape[axis + 1 :])
    if before > 1 and after > 1:
        message = "levels belong to the first or the last axis of a weight"
        raise UsageError(message, why=f"axis {axis} of shape {weight.shape} is neither")
    slots = signed_indices(bits)
    codes = slots[nearest_levels(weight, levels, axis)].astype(np.int8)
    table = np.zeros((len(levels), codebook_size(bits)), np.float32)
    table[:, slots[: levels.shape[1]]] = levels
    if before > 1:
        return codes.reshape(before, -1), np.ascontiguousarray(table.T), 0
    return codes.reshape(len(levels), -1), table, 1


def level_bytes(shape: tuple[int, ...], axis: int, bits: int, *, half: bool) -> int:
    """Bytes of the indices and levels of a weight in a file, within those of its nodes' names."""
    entries = shape[axis] * codebook_size(bits)
    table = tensor_bytes((shape[axis], codebook_size(bits)), entries * (2 if half else 4), 24)
    codes = tensor_bytes((1,), packed_bytes(shape, QuantSpec(signed_type(bits))), 24)
    return codes + table + node_bytes("GatherElements", [24, 24], 24, {"axis": 1}) + _NODE_BYTES


def _back(rows: NDArray[Entry], shape: tuple[int, ...], axis: int) -> NDArray[Entry]:
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))
