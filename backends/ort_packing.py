"""The codes of a constant as the file holds them, unpacked by operators that fold at load.

Embeddings too become an int8 table when the model loads: looking up packed rows and unpacking
those measured 2 to 10 times slower per run (GatherBlockQuantized, byte tables), and the table
takes a quarter of the float one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_of, insert, unique
from octavo.ir.fake_quant import constant, params_of
from octavo.ir.mapped import reading
from octavo.ir.packing import pack, parts, sizes_name, steps
from octavo.ir.quant import QuantParams, quantize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.packing import Step
    from octavo.ir.quant import QuantSpec


def codes_of(
    graph: onnx_ir.Graph, fake: onnx_ir.Node, order: tuple[int, ...] | None = None
) -> onnx_ir.Value:
    """The int8 or uint8 codes of the constant that a FakeQuant reads, with axes in `order`.

    Quantizers of one constant that make the same codes share them.
    """
    params = params_of(fake)
    codes = plain_codes(fake, params)
    if order is not None:
        codes = np.ascontiguousarray(codes.transpose(order))
    digest = hashlib.sha256(codes.tobytes()).digest()
    key = (input_of(fake, 0).name, params.spec.dtype, codes.shape, digest)
    known: dict[Any, onnx_ir.Value] = graph.meta.setdefault("octavo.codes", {})
    if key not in known:
        name = f"{stem(fake)}_q" if order is None else f"{stem(fake)}_qt"
        known[key] = _emit(graph, fake, codes, params.spec, name)
    return known[key]


def stem(fake: onnx_ir.Node) -> str:
    """What names derived from a constant begin with: its own, numbered from its second quantizer.

    Readers that want other axes or methods each have a quantizer of a shared weight.
    """
    value = input_of(fake, 0)
    fakes = [use.node for use in value.uses() if use.node.domain == fake.domain]
    number = fakes.index(fake)
    return f"{value.name}#{number}" if number else value.name or ""


def plain_codes(fake: onnx_ir.Node, params: QuantParams) -> NDArray[np.int8 | np.uint8]:
    """The codes of the constant that a FakeQuant reads, a byte each."""
    tensor = input_of(fake, 0).const_value
    assert tensor is not None
    return reading(tensor, lambda array: quantize(array, params))


def plain_shape(fake: onnx_ir.Node) -> tuple[int, ...]:
    """The shape of the constant that a FakeQuant reads."""
    tensor = input_of(fake, 0).const_value
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def _emit(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    codes: NDArray[np.int8 | np.uint8],
    spec: QuantSpec,
    name: str,
) -> onnx_ir.Value:
    """Packed constants and the nodes from them to `name`; one constant where a code is a byte."""
    made = steps(codes.shape, spec)
    packed = pack(codes, spec)
    if not made:
        return constant(graph, unique(graph, name), packed[0])
    values: dict[str, onnx_ir.Value] = {}
    for index, (part, array) in enumerate(zip(parts(spec), packed, strict=True)):
        values[f"part{index}"] = constant(graph, unique(graph, f"{name}{index}"), array)
        if part.native is None:
            values[f"table{index}"] = constant(graph, part.table_name, part.table)
    for step in made:
        last = step is made[-1]
        values[step.output] = _add(graph, before, step, values, name if last else "")
    return values[made[-1].output]


def _add(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    step: Step,
    values: dict[str, onnx_ir.Value],
    name: str,
) -> onnx_ir.Value:
    """One step as a node; its name is short unless it is given: a file holds each several times."""
    inputs = [
        values[given]
        if isinstance(given, str)
        else constant(graph, sizes_name(given), np.array(given, np.int64))
        for given in step.inputs
    ]
    attributes = {} if step.to is None else {"to": int(step.to)}
    number: int = graph.meta.setdefault("octavo.unpacking", 0)
    graph.meta["octavo.unpacking"] = number + 1
    node = insert(graph, before, step.op_type, inputs, name or f"unpack{number}", attributes)
    return node.outputs[0]
