"""Predicted bytes of one tensor or node against its serialized form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from octavo.ir.facts import FLOAT, Option
from octavo.ir.file_bytes import node_bytes, tensor_bytes
from octavo.ir.option_bytes import option_bytes, table_bytes
from octavo.ir.packing import parts
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantSpec, QuantType


def _graph_bytes(graph: onnx.GraphProto) -> int:
    """Bytes that tensors and nodes add to a graph."""
    return len(graph.SerializeToString()) - len(onnx.GraphProto().SerializeToString())


@pytest.mark.parametrize("shape", [(), (3,), (127, 1), (128, 5, 3, 3), (40_000,)], ids=str)
@pytest.mark.parametrize("name", ["w", "n" * 127, "n" * 128])
def test_a_tensor_takes_what_is_predicted(shape: tuple[int, ...], name: str) -> None:
    tensor = numpy_helper.from_array(np.ones(shape, np.float32), name)
    graph = onnx.GraphProto(initializer=[tensor])
    assert tensor_bytes(shape, 4 * int(np.prod(shape)), len(name)) == _graph_bytes(graph)


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
@pytest.mark.parametrize("attributes", [{}, {"to": 1}, {"K": 300, "bits": 4, "size": 20_000}])
def test_a_node_takes_what_is_predicted(domain: str, attributes: dict[str, Any]) -> None:
    inputs = ["x", "w" * 200, ""]
    node = helper.make_node("Op", inputs, ["out"], "out", domain=domain or None, **attributes)
    predicted = node_bytes("Op", [1, 200, 0], 3, attributes, domain)
    assert predicted == _graph_bytes(onnx.GraphProto(node=[node]))


def _storage(dtype: QuantType) -> Option:
    return Option("storage", QuantSpec(dtype, PerAxis(0), symmetric=True))


def test_fewer_bits_take_fewer_bytes() -> None:
    sizes = [
        option_bytes((512, 512), option).total
        for option in (
            FLOAT,
            *(_storage(d) for d in ("s8", "s7", "s6", "s5", "s4", "s3", "s2", "s1")),
        )
    ]
    assert sizes == sorted(sizes, reverse=True)
    # Codes and scales, and less than 1,500 bytes of names and nodes.
    for bits, size in zip((8, 7, 6, 5, 4, 3, 1.6, 1), sizes[1:], strict=True):
        assert 0 < size - (512 * 512 * bits / 8 + 512 * 4) < 1500


@pytest.mark.parametrize(
    ("granularity", "count"),
    [(PerTensor(), 1), (PerAxis(1), 50), (PerBlock(0, 32), 150), (PerBlock(0, 0), 50)],
)
def test_scales_are_counted(granularity: PerTensor | PerAxis | PerBlock, count: int) -> None:
    one, found = (
        option_bytes((70, 50), Option("storage", QuantSpec("s4", scales, symmetric=True))).total
        for scales in (PerTensor(), granularity)
    )
    # Dimensions and longer length fields.
    assert 0 <= found - one - 4 * (count - 1) <= 7


def test_blocks_are_stored_whole() -> None:
    option = Option("weight-only", QuantSpec("s4", PerBlock(0, 32), symmetric=True))
    sizes = {rows: option_bytes((rows, 100), option).total for rows in (33, 64, 65)}
    assert sizes[33] == sizes[64]
    assert sizes[65] - sizes[64] >= 100 * (16 + 4)


def test_tables_are_counted_once_per_kind() -> None:
    options = [_storage("s3")] * 5 + [_storage("s5"), _storage("s4"), FLOAT]
    kinds = {
        part.table_name: part.table
        for option in options
        if option.weight is not None
        for part in parts(option.weight)
        if part.native is None
    }
    graph = onnx.GraphProto(
        initializer=[numpy_helper.from_array(table, name) for name, table in kinds.items()]
    )
    assert len(kinds) == 3
    assert table_bytes(options) == _graph_bytes(graph)


def test_no_table_is_needed_for_a_kernel_that_reads_blocks() -> None:
    assert (
        table_bytes([Option("weight-only", QuantSpec("s2", PerBlock(0, 32), symmetric=True))]) == 0
    )
