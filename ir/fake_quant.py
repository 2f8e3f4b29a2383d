"""Quantization inside the pipeline: nodes of domain `octavo` that every runtime can execute.

`FakeQuant(x, scale, zero_point)` rounds `x` to its grid and returns floats; scale and zero point
(float32) have a shape that broadcasts against `x`. `FakeQuantBlocks` does so per block of one
axis, on `x` reshaped to `blocked_shape`. `FakeQuantBinary(x, scale, zero_point)` keeps only the
sign; `FakeQuantFloat8`, `FakeQuantFloat4` and `FakeQuantFloat4Blocks` round to float8 and float4
numbers, `FakeQuantHalf(x)` to what float16 holds. `FakeQuantDynamic(x)` finds u8 parameters at run
time. `FakeQuantLevels(x, levels)` says that `x` holds levels (`ir/levels.py`) and changes
nothing. All are also local functions of standard operators, so that the model always runs.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx_ir

from octavo.ir.fake_quant_functions import FUNCTIONS, function
from octavo.ir.mapped import reading
from octavo.ir.quant import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantParams,
    QuantSpec,
    broadcast_params,
    dequantize,
    quantize,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.quant import QuantType

DOMAIN = "octavo"
OPTION = "octavo.option"
# Operators of types with a rounding of their own; those in blocks end like `_BLOCKS`.
_ROUNDINGS = {"s1": "FakeQuantBinary", "f8": "FakeQuantFloat8", "f4": "FakeQuantFloat4"}
_BLOCKS = "Blocks"
# Specs that no form for blocks exists of.
_UNBLOCKED = ("s1", "f8")
_ON_GRIDS = ("FakeQuant", "FakeQuantBlocks", "FakeQuantFloat4Blocks", *_ROUNDINGS.values())
_SPEC = re.compile(
    r"([us]\d|f16|f8|f4)/(?:(tensor)|axis(\d+)|block(\d+)@(\d+)(x)?)(?:#(\d))?(-)?(?:~(\d))?(h)?$"
)


def declare_functions(model: onnx_ir.Model) -> None:
    """Add the local functions that the model's octavo nodes need, and remove the others."""
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in FUNCTIONS:
        model.functions.pop((DOMAIN, name, ""), None)
        if name in used:
            model.functions[DOMAIN, name, ""] = function(name)
    if used:
        model.opset_imports[DOMAIN] = 1
    else:
        model.opset_imports.pop(DOMAIN, None)


def fake_quant_node(
    value: onnx_ir.Value, params: QuantParams, name: str, constants: onnx_ir.Graph
) -> onnx_ir.Node:
    """A FakeQuant of `value`; its scale and zero point become initializers of `constants`.

    Blocks that do not divide their axis, and those of a binary or float8 spec, have their scales
    spread to the shape of `value`, which costs as much memory as `value` does.
    """
    if params.spec.half:
        return _half_node(value, params.spec, name)
    shape = _dims(value)
    blocked = _blocked_shape(params.spec, shape)
    op_type = _ROUNDINGS.get(params.spec.dtype, "FakeQuant")
    if blocked is None:
        whole = _is_whole(params.spec, shape)
        numbers = params.scale, params.zero_point
        scale, zero = numbers if whole else broadcast_params(params, shape)
        extra = []
    else:
        axis = blocked[0]
        scale = np.expand_dims(params.scale, axis + 1)
        zero = np.expand_dims(params.zero_point, axis + 1)
        extra = [constant(constants, f"{name}_blocks", np.array(blocked[1], np.int64))]
        op_type += _BLOCKS
    scale_value = constant(constants, f"{name}_scale", scale.astype(np.float32))
    zero_value = constant(constants, f"{name}_zero_point", zero.astype(np.float32))
    attributes: dict[str, float | str] = {
        "qmin": float(params.spec.qmin),
        "qmax": float(params.spec.qmax),
        "spec": spec_text(params.spec),
    }
    node = onnx_ir.node(
        op_type,
        [value, scale_value, zero_value, *extra],
        attributes=attributes,
        domain=DOMAIN,
        name=name,
    )
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    return node


def _half_node(value: onnx_ir.Value, spec: QuantSpec, name: str) -> onnx_ir.Node:
    attributes = {"spec": spec_text(spec)}
    node = onnx_ir.node("FakeQuantHalf", [value], attributes=attributes, domain=DOMAIN, name=name)
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    return node


def set_rounded(
    graph: onnx_ir.Graph,
    fake: onnx_ir.Node,
    rounded: NDArray[np.float32],
    params: QuantParams | None = None,
) -> None:
    """Let a FakeQuant read `rounded`, in the shape of its constant, and take `params` if given.

    Values that lie on the grid pass the node unchanged, so that the codes of whoever chose them
    are those that are emitted. The constant stays for other readers.
    """
    value = fake.inputs[0]
    assert value is not None
    name = f"{value.name or ''}.{fake.name}" if len(value.uses()) > 1 else value.name or ""
    if params is not None:
        set_params(graph, fake, params)
    if len(value.uses()) > 1:
        fake.replace_input_with(0, constant(graph, name, rounded))
    else:
        value.const_value = _stored(np.asarray(rounded, np.float32), params_of(fake), name)


def _stored(rounded: NDArray[np.float32], params: QuantParams, name: str) -> onnx_ir.TensorProtocol:
    """Numbers of a grid as its codes, which take a quarter of their memory; others as they are."""
    if params.spec.half:
        return onnx_ir.Tensor(rounded, name=name)
    codes = quantize(rounded, params)
    if not np.array_equal(dequantize(codes, params), rounded):
        return onnx_ir.Tensor(rounded, name=name)
    shape = onnx_ir.Shape(rounded.shape)
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(dequantize(codes, params)), onnx_ir.DataType.FLOAT, shape, name=name
    )


def _rounded(params: QuantParams, array: NDArray[np.float32]) -> NDArray[np.float32]:
    return dequantize(quantize(array, params), params)


def fold_quantized_constants(model: onnx_ir.Model) -> None:
    """Replace the FakeQuants of constants by what they make, which numpy tells as a runtime would.

    A runtime that folds them itself keeps what every operator in them makes until it has loaded.
    """
    graph = model.graph
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type in _ON_GRIDS]:
        tensor = node.inputs[0].const_value if node.inputs[0] is not None else None
        if tensor is not None:
            real, made = reading(tensor, partial(_rounded, params_of(node))), node.outputs[0]
            name, made.name = made.name or "", f"{made.name}_before"
            folded = constant(graph, name, real)
            onnx_ir.convenience.replace_all_uses_with(made, folded, replace_graph_outputs=True)
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
    declare_functions(model)


def set_params(graph: onnx_ir.Graph, fake: onnx_ir.Node, params: QuantParams) -> None:
    """Give a FakeQuant of a constant another scale and zero point; the constant stays."""
    value = fake.inputs[0]
    assert value is not None
    fresh = fake_quant_node(value, params, f"{fake.name}_refit", graph)
    for index in (1, 2):
        old, new = fake.inputs[index], fresh.inputs[index]
        assert old is not None
        assert new is not None
        old.const_value, old.shape = new.const_value, new.shape
    for index in range(len(fresh.inputs)):
        made = fresh.inputs[index]
        fresh.replace_input_with(index, None)
        if index and made is not None:
            del graph.initializers[made.name or ""]
    fake.attributes.update(fresh.attributes)


def params_of(node: onnx_ir.Node) -> QuantParams:
    """The parameters a FakeQuant node carries, in the shape of its granularity."""
    spec = parse_spec(node.attributes["spec"].as_string())
    if spec.half:
        return QuantParams(spec, np.ones((), np.float32), np.zeros((), np.int32))
    scale, zero = (_array(node.inputs[k]) for k in (1, 2))
    match spec.granularity:
        case PerTensor():
            shape: tuple[int, ...] = ()
        case PerAxis(_):
            shape = (scale.size,)
        case PerBlock(axis, _) if node.op_type.endswith(_BLOCKS):
            shape = (*scale.shape[: axis + 1], *scale.shape[axis + 2 :])
        case PerBlock(axis, size):
            first = (*[slice(None)] * axis, slice(None, None, size))
            scale, zero = scale[first], zero[first]
            shape = scale.shape
    return QuantParams(spec, scale.reshape(shape), zero.astype(np.int32).reshape(shape))


def constant(graph: onnx_ir.Graph, name: str, array: NDArray[np.generic]) -> onnx_ir.Value:
    """An initializer of `graph`; an existing one of that name must hold the same array."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = onnx_ir.Value(
        name=name,
        shape=onnx_ir.Shape(array.shape),
        type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
        const_value=onnx_ir.Tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def spec_text(spec: QuantSpec) -> str:
    """`s8/axis0`, `-` for a symmetric grid, `~7` where fewer bits are used, `h` for half scales.

    Indices of 4 bits into a table of codes are `s8/axis0#4`, scales of blocks that are multiples of
    their channel's `s4/block64@0x`.
    """
    used = f"~{spec.used_bits}" if spec.used_bits else ""
    return f"{spec}{'-' if spec.symmetric else ''}{used}{'h' if spec.half_scales else ''}"


def parse_spec(text: str) -> QuantSpec:
    """The spec that `spec_text` wrote."""
    match = _SPEC.match(text)
    if match is None:
        message = f"'{text}' is not a quantization spec"
        raise ValueError(message)
    dtype, tensor, axis, size, block_axis, multiples, index, symmetric, used, half = match.groups()
    granularity = (
        PerTensor()
        if tensor
        else PerAxis(int(axis))
        if axis is not None
        else PerBlock(int(block_axis), int(size))
    )
    numbers = (int(number) if number else None for number in (used, index))
    used_bits, index_bits = numbers
    return QuantSpec(
        cast("QuantType", dtype),
        granularity,
        bool(symmetric),
        used_bits,
        bool(half),
        index_bits,
        bool(multiples),
    )


def _blocked_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, list[int]] | None:
    """Where a block is a whole axis, plain broadcasting does; otherwise the axis is split."""
    if not isinstance(spec.granularity, PerBlock) or _is_whole(spec, shape):
        return None
    if spec.dtype in _UNBLOCKED:
        return None
    axis, size = spec.granularity.axis, spec.granularity.size
    if shape[axis] % size:
        return None
    return axis, [*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :]]


def _is_whole(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether a block is a whole axis, so that its scale broadcasts as it is."""
    blocks = spec.granularity
    return isinstance(blocks, PerBlock) and shape[blocks.axis] <= blocks.size


def _dims(value: onnx_ir.Value) -> tuple[int, ...]:
    """Static dims; a per-tensor activation needs none, so unknown ones count as 1."""
    if value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else 1 for d in value.shape.dims)


def _array(value: onnx_ir.Value | None) -> NDArray[np.float32]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)
