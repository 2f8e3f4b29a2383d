"""The codes of a constant as the file holds them, unpacked by operators that fold at load.

Embeddings with a scale per row become an int8 table when the model loads, a quarter of the float
one; those with blocks stay packed (`ort_blocks`), at 2 to 3 times the microseconds of a lookup.
"""

from __future__ import annotations

import hashlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from octavo.backends.ort_edits import input_of, insert, unique
from octavo.ir.errors import UsageError
from octavo.ir.fake_quant import constant, params_of
from octavo.ir.kernel_codes import block_arrays, kernel_steps
from octavo.ir.mapped import reading
from octavo.ir.packing import pack, parts, sizes_name
from octavo.ir.quant import QuantParams, quantize, turned_params

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from octavo.ir.packing import Part, Step
    from octavo.ir.quant import Codes, QuantSpec

_LARGEST_HALF = float(np.finfo(np.float16).max)


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
        params = turned_params(params) if params.spec.multiples else params
    parts_of = codes, *block_arrays(params).values()
    digests = [hashlib.sha256(array.tobytes()).digest() for array in parts_of]
    key = (input_of(fake, 0).name, params.spec.dtype, codes.shape, *digests)
    known: dict[Any, onnx_ir.Value] = graph.meta.setdefault("octavo.codes", {})
    if key not in known:
        name = f"{stem(fake)}_q" if order is None else f"{stem(fake)}_qt"
        known[key] = _emit(graph, fake, codes, params, name)
    return known[key]


def stem(fake: onnx_ir.Node) -> str:
    """What names derived from a constant begin with: its own, numbered from its second quantizer.

    Readers that want other axes or methods each have a quantizer of a shared weight.
    """
    value = input_of(fake, 0)
    fakes = [use.node for use in value.uses() if use.node.domain == fake.domain]
    number = fakes.index(fake)
    return f"{value.name}#{number}" if number else value.name or ""


def plain_codes(fake: onnx_ir.Node, params: QuantParams) -> Codes:
    """The codes of the constant that a FakeQuant reads, a byte each."""
    tensor = input_of(fake, 0).const_value
    assert tensor is not None
    return reading(tensor, lambda array: quantize(array, params))


def plain_shape(fake: onnx_ir.Node) -> tuple[int, ...]:
    """The shape of the constant that a FakeQuant reads."""
    tensor = input_of(fake, 0).const_value
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def turned_codes(graph: onnx_ir.Graph, fake: onnx_ir.Node) -> onnx_ir.Value:
    """The transposed codes of a matrix that others read as it is, turned at load."""
    codes = codes_of(graph, fake)
    return insert(graph, fake, "Transpose", [codes], f"{stem(fake)}_qt").outputs[0]


def fake_behind(value: onnx_ir.Value | None) -> tuple[onnx_ir.Node, bool]:
    """The FakeQuant of a weight, and whether a Transpose turns what it makes."""
    fake, turned = behind(value)
    assert fake is not None
    return fake, turned


def behind(value: onnx_ir.Value | None) -> tuple[onnx_ir.Node | None, bool]:
    """What makes a value, and whether a Transpose turns it."""
    made = value.producer() if value is not None else None
    if made is None or made.op_type != "Transpose" or made.domain:
        return made, False
    source = made.inputs[0]
    return None if source is None else source.producer(), True


def scale_of(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    name: str,
    array: NDArray[np.float32],
    spec: QuantSpec,
) -> onnx_ir.Value:
    """A constant scale, in float16 with a Cast that folds at load where the spec says so.

    Readers that want it in different shapes share one, reshaped at load.
    """
    name = f"{name}_scale"
    known: dict[Any, onnx_ir.Value] = graph.meta.setdefault("octavo.scales", {})
    found = known.get(name)
    if found is None and not spec.half_scales:
        found = constant(graph, name, array)
    elif found is None:
        half = constant(graph, f"{name}_f16", array.astype(np.float16))
        found = insert(graph, before, "Cast", [half], name, {"to": 1}).outputs[0]
        found.shape = half.shape
    known[name] = found
    assert found.shape is not None
    if tuple(found.shape) == array.shape:
        return found
    key = name, array.shape
    if key not in known:
        sizes = constant(graph, sizes_name(array.shape), np.array(array.shape, np.int64))
        made = insert(graph, before, "Reshape", [found, sizes], f"{name}_{array.ndim}")
        known[key] = made.outputs[0]
    return known[key]


def halve_constant(
    graph: onnx_ir.Graph, value: onnx_ir.Value, before: onnx_ir.Node
) -> onnx_ir.Value | None:
    """Store a float constant as float16 behind a Cast, if float16 holds all its numbers.

    Returns what the Cast makes in its place.
    """
    tensor, name = value.const_value, value.name or ""
    if tensor is None:
        return None
    array = tensor.numpy()
    bounded = np.clip(array, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
    if not np.array_equal(bounded.astype(np.float32), array):
        return None
    half = constant(graph, f"{name}_f16", bounded)
    cast = onnx_ir.node("Cast", [half], {"to": 1}, name=name)
    graph.insert_before(before, cast)
    onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    del graph.initializers[name]
    cast.outputs[0].name = name
    return cast.outputs[0]


def _emit(
    graph: onnx_ir.Graph, before: onnx_ir.Node, codes: Codes, params: QuantParams, name: str
) -> onnx_ir.Value:
    """Packed constants and the nodes from them to `name`; one constant where a code is a byte."""
    spec = params.spec
    try:
        packed = pack(codes, spec)
    except ValueError as error:
        message = f"a weight is not stored as {spec}"
        raise UsageError(message, where=f"constant '{name}'", why=str(error)) from None
    made = kernel_steps(codes.shape, spec)
    return emit(graph, before, packed, parts(spec), made, name, block_arrays(params))


def emit(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    packed: Sequence[NDArray[Any]],
    stored: Sequence[Part],
    made: Sequence[Step],
    name: str,
    others: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> onnx_ir.Value:
    """Constants of the stored parts, and the steps from them to a value called `name`.

    Without steps, the one constant that is stored. What follows the parts is a codebook; steps
    read `others` by their names.
    """
    if not made:
        return constant(graph, unique(graph, name), packed[0])
    values: dict[str, onnx_ir.Value] = {}
    for index, (part, array) in enumerate(zip(stored, packed, strict=False)):
        values[f"part{index}"] = constant(graph, unique(graph, f"{name}{index}"), array)
        if part.native is None:
            values[f"table{index}"] = constant(graph, part.table_name, part.table)
    if len(packed) > len(stored):
        values["codebook"] = constant(graph, unique(graph, f"{name}_codes"), packed[-1])
    for label, array in others.items():
        values[label] = constant(graph, unique(graph, f"{name}_{label}"), array)
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
    name = name or short_name(graph)
    return insert(graph, before, step.op_type, inputs, name, attributes).outputs[0]


def short_name(graph: onnx_ir.Graph) -> str:
    """A name for what an unpacking graph makes on the way."""
    number: int = graph.meta.setdefault("octavo.unpacking", 0)
    graph.meta["octavo.unpacking"] = number + 1
    return f"unpack{number}"
