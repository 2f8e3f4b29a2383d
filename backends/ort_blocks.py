"""Kernels that read blocks of low-bit codes: MatMulNBits, and GatherBlockQuantized for lookups.

Both read the same bytes, so that a tied embedding and output layer are stored once: the one
takes `[N, blocks, bytes]`, the other a reshape to `[N, bytes]`, which folds at load.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import insert, replace
from octavo.backends.ort_packing import (
    emit,
    fake_behind,
    plain_codes,
    plain_shape,
    scale_of,
    stem,
)
from octavo.backends.ort_rewrites import MICROSOFT, linear_tail
from octavo.ir.fake_quant import constant, params_of
from octavo.ir.packing import (
    block_parts,
    block_steps,
    blocks_shape,
    kernel_bits,
    pack_blocks,
    pack_zero_points,
    sizes_name,
)
from octavo.ir.quant import PerBlock

# Activations in 8 bits: the fast kernel.
ACCURACY_LEVEL = 4


def blocked_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`MatMulNBits`: the weight as `[N, K/block]` blocks of 8-, 4- or 2-bit codes."""
    fake, _ = fake_behind(node.inputs[1])
    packed, scale, zeros = _blocks(graph, fake, node)
    granularity, bits = _granularity(fake), params_of(fake).spec.bits
    shape = plain_shape(fake)
    attributes = {
        "K": shape[granularity.axis],
        "N": shape[1 - granularity.axis],
        "bits": kernel_bits(bits),
        "block_size": granularity.size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    tail, bias = linear_tail(node)
    inputs = [node.inputs[0], packed, scale, zeros]
    if bias is not None:
        inputs += [None, _vector(graph, bias)]
    replace(graph, tail, "MatMulNBits", inputs, attributes, MICROSOFT, node.name)


def portable_matmul(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """A DequantizeLinear of blocks, which the runtime makes `MatMulNBits`, and others read."""
    fake, _ = fake_behind(node.inputs[1])
    params, name, granularity = params_of(fake), stem(fake), _granularity(fake)
    codes = plain_codes(fake, params).astype(params.spec.onnx_type.numpy())
    inputs = [
        constant(graph, f"{name}_q", codes),
        scale_of(graph, node, name, params.scale, params.spec),
    ]
    attributes = {"axis": granularity.axis, "block_size": granularity.size}
    made = insert(graph, node, "DequantizeLinear", inputs, f"{name}_dq", attributes)
    node.replace_input_with(1, made.outputs[0])


def blocked_gather(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """`GatherBlockQuantized`: only the rows that are looked up are dequantized."""
    fake, _ = fake_behind(node.inputs[0])
    packed, scale, zeros = _blocks(graph, fake, node)
    size, bits = _granularity(fake).size, params_of(fake).spec.bits
    rows, columns = plain_shape(fake)
    flat = (rows, -1)
    sizes = constant(graph, sizes_name(flat), np.array(flat, np.int64))
    data = insert(graph, node, "Reshape", [packed, sizes], f"{stem(fake)}_rows").outputs[0]
    attributes = {
        "bits": kernel_bits(bits), "block_size": size, "gather_axis": 0, "quantize_axis": 1,
    }  # fmt: skip
    inputs = [data, node.inputs[1], scale, zeros]
    if columns % size == 0:
        replace(graph, node, "GatherBlockQuantized", inputs, attributes, MICROSOFT)
        return
    whole = f"{node.outputs[0].name}_whole"
    found = insert(graph, node, "GatherBlockQuantized", inputs, whole, attributes, MICROSOFT)
    name, found.name = found.name, node.name
    ends = [
        constant(graph, sizes_name((end,)), np.array([end], np.int64)) for end in (0, columns, -1)
    ]
    replace(graph, node, "Slice", [found.outputs[0], *ends], name=name)


def _granularity(fake: onnx_ir.Node) -> PerBlock:
    granularity = params_of(fake).spec.granularity
    assert isinstance(granularity, PerBlock)
    return granularity


def _blocks(
    graph: onnx_ir.Graph, fake: onnx_ir.Node, before: onnx_ir.Node
) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value | None]:
    """Of a weight, made once: bytes `[N, blocks, bytes]`, scales `[N, blocks]`, zero points.

    Without zero points the kernel takes codes to be offset by half their range.
    """
    known: dict[Any, tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value | None]] = (
        graph.meta.setdefault("octavo.blocks", {})
    )
    if fake.name not in known:
        params, name = params_of(fake), stem(fake)
        codes, scales, zeros = plain_codes(fake, params), params.scale, params.zero_point
        granularity, bits = _granularity(fake), params.spec.bits
        if granularity.axis == 0:
            codes, scales, zeros = codes.T, scales.T, zeros.T
        packed = pack_blocks(codes, bits, granularity.size)
        rows, columns = codes.shape
        made = block_steps(blocks_shape(rows, columns, bits, granularity.size), bits)
        value = emit(graph, before, packed, block_parts(bits), made, f"{name}_q")
        scale = scale_of(graph, before, name, np.ascontiguousarray(scales), params.spec)
        zero = None
        if not params.spec.signed:
            zero = constant(graph, f"{name}_zeros", pack_zero_points(zeros, bits))
        known[fake.name] = value, scale, zero
    return known[fake.name]


def _vector(graph: onnx_ir.Graph, bias: onnx_ir.Value) -> onnx_ir.Value:
    """A constant bias as a vector; Gemm also takes one of shape `[1, N]`."""
    assert bias.const_value is not None
    if len(bias.const_value.shape) == 1:
        return bias
    return constant(graph, f"{bias.name}_vector", bias.const_value.numpy().reshape(-1))
