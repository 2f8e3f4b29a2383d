"""Read mutated models: `python fuzz_reading.py COUNT SEED FOLDER` prints how many were read.

Any exception but OctavoError, more than `SECONDS` for one file, or more than `BYTES` of address
space ends it with a status that is not 0.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

import octavo.models
from octavo.ir.errors import OctavoError
from octavo.ir.read import read
from octavo.ir.write import serialize

SECONDS = 5
SMALL_BYTES = 1 << 19
BYTES = 4 << 30


def convolution(opset: int) -> onnx.ModelProto:
    """Conv, Relu, pooling and a classifier, with weights in Constant and Identity nodes."""
    rng = np.random.default_rng(0)
    kernel = numpy_helper.from_array(rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "k")
    matrix = numpy_helper.from_array(rng.standard_normal((4, 300)).astype(np.float32), "m")
    nodes = [
        helper.make_node("Constant", [], ["kernel"], name="kernel", value=kernel),
        helper.make_node("Identity", ["m"], ["matrix"], name="matrix"),
        helper.make_node("Conv", ["x", "kernel"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("MatMul", ["f", "matrix"], ["l"], name="classify"),
        helper.make_node("Softmax", ["l"], ["y"], name="softmax", axis=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "convolution",
        [value("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["batch", 300])],
        [matrix],
        value_info=[value("c", TensorProto.FLOAT, ["batch", 4, 8, 8])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="octavo"
    )


def branches() -> onnx.ModelProto:
    """A local function, subgraphs, a sparse and an external initializer."""
    value = helper.make_tensor_value_info
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    body = [helper.make_node("Mul", ["a", "a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    function = helper.make_function("local", "NegatedSquare", ["a"], ["c"], body, opsets[:1])
    then = helper.make_graph(
        [helper.make_node("Add", ["h", "w"], ["t"], name="add")],
        "then",
        [],
        [value("t", TensorProto.FLOAT, [2, 3])],
    )
    other = helper.make_graph(
        [helper.make_node("NegatedSquare", ["h"], ["t"], domain="local")],
        "else",
        [],
        [value("t", TensorProto.FLOAT, [2, 3])],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["h"], name="sum", keepdims=0),
        helper.make_node("If", ["flag"], ["i"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Sub", ["i", "s"], ["y"], name="subtract"),
    ]
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(2, np.float32), "s"),
        numpy_helper.from_array(np.array([1, 4], np.int64), "indices"),
        [2, 3],
    )
    graph = helper.make_graph(
        nodes,
        "branches",
        [value("x", TensorProto.FLOAT, [2, 3, "n"]), value("flag", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [2, 3])],
        [external_weight(), numpy_helper.from_array(np.array([2], np.int64), "axes")],
        sparse_initializer=[sparse],
    )
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)


def external_weight() -> TensorProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3])
    weight.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "w.bin"), ("offset", "8"), ("length", "24")):
        weight.external_data.add(key=key, value=text)
    return weight


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return rng.choice((content[:end], content[:begin] + content[end:]))


def change_fields(content: bytes, rng: random.Random) -> bytes:
    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        change_field(rng.choice(messages(model)), rng)
    changed: bytes = model.SerializeToString()
    return changed


def change_nodes(content: bytes, rng: random.Random) -> bytes:
    """Delete, double or move a node, or let it read and write other values."""
    model = onnx.ModelProto.FromString(content)
    nodes = model.graph.node
    index = rng.randrange(len(nodes))
    names = [name for node in nodes for name in (*node.input, *node.output)] + ["nowhere", ""]
    match rng.randrange(4):
        case 0:
            del nodes[index]
        case 1:
            nodes.add().CopyFrom(nodes[index])
        case 2:
            moved = onnx.NodeProto()
            moved.CopyFrom(nodes[index])
            del nodes[index]
            nodes.insert(rng.randrange(len(nodes) + 1), moved)
        case _:
            values = rng.choice([f for f in (nodes[index].input, nodes[index].output) if f])
            values[rng.randrange(len(values))] = rng.choice(names)
    changed: bytes = model.SerializeToString()
    return changed


MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bits,
    cut,
    change_fields,
    change_fields,
    change_nodes,
)
INTEGERS = (0, 1, -1, 2, 7, 16, 99, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63))
TEXTS = ("", "x", "w", "\x00", "../w.bin", "/dev/zero", "99999999999999999999", "Conv", "a" * 5000)


def messages(message: Message) -> list[Message]:
    """A message and all messages in it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            children = value if field.is_repeated else [value]
            found += [inner for child in children for inner in messages(child)]
    return found


def change_field(message: Message, rng: random.Random) -> None:
    """Give one field of a message another value, clear it, or double what it lists."""
    filled = [field for field, _ in message.ListFields()]
    field = rng.choice(filled or list(message.DESCRIPTOR.fields))
    if rng.random() < 0.15:
        field = rng.choice(list(message.DESCRIPTOR.fields))
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if field.is_repeated:
            values = getattr(message, field.name)
            values.add().CopyFrom(rng.choice(values)) if values else values.add()
        else:
            getattr(message, field.name).SetInParent()
    else:
        set_scalar(message, field, rng)


def set_scalar(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    if field.type == FieldDescriptor.TYPE_ENUM:
        value = rng.choice(field.enum_type.values).number
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = rng.choice(TEXTS)
        value = text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        value = rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    else:
        narrow = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32)
        unsigned = field.cpp_type in (
            FieldDescriptor.CPPTYPE_UINT64,
            FieldDescriptor.CPPTYPE_UINT32,
        )
        fits = [
            v for v in INTEGERS if not (narrow and abs(v) >= 1 << 31) and (v >= 0 or not unsigned)
        ]
        value = rng.choice(fits)
    if not field.is_repeated:
        setattr(message, field.name, value)
    elif len(values := getattr(message, field.name)) and rng.random() < 0.7:
        values[rng.randrange(len(values))] = value
    else:
        values.append(value)


def main(count: int, seed: int, folder: Path) -> None:
    (folder / "w.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    sources = [convolution(11), convolution(17), convolution(21), branches()]
    contents: list[bytes] = [model.SerializeToString() for model in sources]
    shipped = Path(octavo.models.__file__).parent.glob("*.onnx")
    contents += [file.read_bytes() for file in sorted(shipped) if file.stat().st_size < SMALL_BYTES]
    path = folder / "model.onnx"
    for content in contents:
        path.write_bytes(content)
        serialize(read(path))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    counts = {True: 0, False: 0}
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        path.write_bytes(rng.choice(MUTATORS)(rng.choice(contents), rng))
        begin = time.perf_counter()
        try:
            serialize(read(path))
            counts[True] += 1
        except OctavoError:
            counts[False] += 1
        except BaseException:
            print(f"mutation {index} of seed {seed}", file=sys.stderr)  # noqa: T201
            raise
        assert time.perf_counter() - begin < SECONDS, f"mutation {index} took too long"
    print(counts[True], counts[False])  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
