"""Removing units is the same as zeroing all weights that belong to them, on whole networks.

Zeroing touches constants alone, so that what it computes needs no analysis of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir
import pytest

from octavo.backends.ort_session import OrtEvaluator
from octavo.ir.axis_groups import AxisGroup, alternatives, axis_groups
from octavo.ir.calibration import Feed
from octavo.ir.errors import UsageError
from octavo.ir.extract import values_by_name
from octavo.ir.model import Model
from octavo.ir.read import read
from octavo.ir.remove_units import remove_units
from octavo.ir.verify import verify
from octavo.passes.base import PassContext
from octavo.passes.canonicalize import Canonicalize

SHIPPED = ("fashion_resnet", "fashion_mobile", "fashion_vit", "fashion_lstm")
PUBLIC = sorted((Path.home() / ".cache" / "octavo" / "models").glob("*/model.onnx"))
# Outputs in float32, summed in another order: relative to the largest, and where that is tiny.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
# Decoders pass numbers of 25,000 along, whose rounding is seen in all others.
PUBLIC_RELATIVE = 1e-3
Units = Mapping[str, Sequence[int]]


@pytest.mark.parametrize("name", SHIPPED)
def test_removing_is_zeroing_on_shipped_models(name: str, pass_context: PassContext) -> None:
    model = canonical(read(Path(str(files("octavo.models"))) / f"{name}.onnx"), pass_context)
    groups = axis_groups(model).by_name()
    assert groups
    rng = np.random.default_rng(0)
    for group in groups.values():
        check(model, {group.name: picked(group, rng)}, groups, rng)


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.parent.name)
def test_removing_is_zeroing_on_public_models(path: Path, pass_context: PassContext) -> None:
    model = canonical(read(path), pass_context)
    groups = axis_groups(model).by_name()
    assert groups
    rng = np.random.default_rng(0)
    every = list(groups.values())
    for group in every[:: -(-len(every) // 8)]:
        check(model, {group.name: picked(group, rng)}, groups, rng, PUBLIC_RELATIVE)


@pytest.mark.parametrize("seed", range(40))
def test_removing_is_zeroing_on_random_graphs(seed: int) -> None:
    model = RandomNetwork(seed).model()
    groups = axis_groups(model).by_name()
    rng = np.random.default_rng(seed)
    for group in groups.values():
        check(model, {group.name: picked(group, rng)}, groups, rng)
    together: dict[str, Sequence[int]] = {}
    for name, group in groups.items():
        if not any(alternatives(group, groups[other]) for other in together):
            together[name] = picked(group, rng)
    if together:
        check(model, together, groups, rng)


def test_random_graphs_have_groups_of_every_kind() -> None:
    found = [axis_groups(RandomNetwork(seed).model()) for seed in range(40)]
    kinds = {group.kind for groups in found for group in groups.groups}
    assert kinds == {"channels", "heads", "dimensions"}


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_vit"])
def test_removed_units_change_what_the_model_computes(name: str, pass_context: PassContext) -> None:
    """Otherwise zeroing and removing would agree on a graph that ignores them."""
    model = canonical(read(Path(str(files("octavo.models"))) / f"{name}.onnx"), pass_context)
    groups = axis_groups(model).by_name()
    rng = np.random.default_rng(0)
    for group in groups.values():
        units = {group.name: picked(group, rng)}
        fed = feed(model, rng)
        before, after = (run(m, fed) for m in (model, zeroed(model, units, groups)))
        assert any(np.abs(before[k] - after[k]).max() > 1e-3 for k in before)


CASES = {
    # Whole groups of a grouped convolution, or the same channels of each.
    "grouped": (
        "(float[N,3,8,8] x) => (float[N,5,8,8] y)",
        """h = Conv <kernel_shape = [1, 1]> (x, w_12x3x1x1)
           g = Conv <kernel_shape = [1, 1], group = 3> (h, w_6x4x1x1)
           y = Conv <kernel_shape = [1, 1]> (g, w_5x6x1x1)""",
        {"": 3, "#2": 2, "#3": 4},
    ),
    # The half that is cut off of a split has no reader, and goes with what it was cut from.
    "split": (
        "(float[N,4] x) => (float[N,3] y)",
        """h = MatMul (x, w_4x8)
           a, b = Split <axis = 1, num_outputs = 2> (h)
           s = Sigmoid (b)
           g = Mul (a, s)
           y = MatMul (g, w_4x3)""",
        {"": 4},
    ),
    # Softmax over the channels: nothing can go.
    "softmax": (
        "(float[N,4] x) => (float[N,3] y)",
        "h = MatMul (x, w_4x8)  s = Softmax (h)  y = MatMul (s, w_8x3)",
        {},
    ),
    # A mean over channels that a Sigmoid keeps away from zero.
    "mean": (
        "(float[N,4] x) => (float[N,1] y)",
        "h = MatMul (x, w_4x8)  s = Sigmoid (h)  y = ReduceMean (s, axes)",
        {},
    ),
    "zero mean": (
        "(float[N,4] x) => (float[N,1] y)",
        "h = MatMul (x, w_4x8)  s = Tanh (h)  y = ReduceMean (s, axes)",
        {"": 8},
    ),
    # A body of If reads the channels.
    "capture": (
        "(float[N,4] x, bool c) => (float[N,3] y)",
        """h = MatMul (x, w_4x8)
           r = If (c) <then_branch = t () => (float[N,8] a) { a = Relu (h) },
                       else_branch = e () => (float[N,8] b) { b = Neg (h) }>
           y = MatMul (r, w_8x3)""",
        {},
    ),
    # A size that is read as a number.
    "size": (
        "(float[N,4] x) => (float[N,3] y)",
        """h = MatMul (x, w_4x8)
           n = Shape <start = 1, end = 2> (h)
           f = Cast <to = 1> (n)
           d = Div (h, f)
           y = MatMul (d, w_8x3)""",
        {},
    ),
    # A shape that copies the size of what shrinks for what does not.
    "copied": (
        "(float[N,8] x) => (float[N,3] y)",
        """h = MatMul (x, w_8x8)
           n = Shape (h)
           u = Reshape (x, n)
           g = MatMul (h, w_8x5)
           v = MatMul (u, w_8x5_b)
           s = Add (g, v)
           y = MatMul (s, w_5x3)""",
        {"": 8, "/1": 5},
    ),
    "embedding": (
        "(int64[N,S] x) => (float[N,S,3] y)",
        """h = Gather (w_9x6, x)
           q = Pow (h, two)
           m = ReduceMean (q, axes)
           r = Sqrt (m)
           d = Div (h, r)
           y = MatMul (d, w_6x3)""",
        {"": 6},
    ),
    "ones": (
        "(float[N,4] x) => (float[N,3] y)",
        "h = MatMul (x, w_4x1)  y = MatMul (h, w_1x3)",
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_of_single_graphs(name: str) -> None:
    head, body, expected = CASES[name]
    model = parsed(head, body)
    found = axis_groups(model)
    assert sorted(group.units for group in found.groups) == sorted(expected.values())
    rng = np.random.default_rng(0)
    for group in found.groups:
        check(model, {group.name: picked(group, rng)}, found.by_name(), rng)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("softmax", "the rest would share what it takes away"),
        ("mean", "it sums values that are not zero where their weights are"),
        ("capture", "the body of a If reads or gives it"),
        ("size", "its size is read by"),
        ("ones", "nothing would be left of"),
    ],
)
def test_refusals_say_why(name: str, reason: str) -> None:
    head, body, _ = CASES[name]
    refused = axis_groups(parsed(head, body)).refused
    assert any(reason in refusal.reason for refusal in refused)


def test_a_head_that_shares_the_embedding_is_no_product_of_activations() -> None:
    text = "h = Gather (w_9x6, x)  t = Transpose (w_9x6)  y = MatMul (h, t)"
    (group,) = axis_groups(parsed("(int64[N,S] x) => (float[N,S,9] y)", text)).groups
    assert (group.kind, group.units) == ("channels", 6)


def test_graph_outputs_and_unknown_operators_stay() -> None:
    text = "h = MatMul (x, w_4x8)  i = NonZero (h)  y = MatMul (h, w_8x3)"
    found = axis_groups(parsed("(float[N,4] x) => (float[N,3] y, int64[2,M] i)", text))
    assert not found.groups
    reasons = {refusal.layer: refusal.reason for refusal in found.refused}
    assert list(reasons.values()) == [
        "there is no rule for operator NonZero",
        "it is an axis of the graph output 'y'",
    ]


def test_nothing_becomes_empty_and_alternatives_exclude_each_other(
    pass_context: PassContext,
) -> None:
    source = read(Path(str(files("octavo.models"))) / "fashion_vit.onnx")
    model = canonical(source, pass_context)
    groups = axis_groups(model).by_name()
    heads = next(group for group in groups.values() if group.kind == "heads")
    other = next(g for g in groups.values() if g.kind == "dimensions" and alternatives(g, heads))
    with pytest.raises(UsageError, match="nothing would be left"):
        remove_units(model.clone(), groups, {heads.name: range(heads.units)})
    with pytest.raises(UsageError, match="both divide axis"):
        remove_units(model.clone(), groups, {heads.name: [0], other.name: [0]})


def canonical(model: Model, pass_context: PassContext) -> Model:
    return Canonicalize().run(model.clone(), pass_context)


def picked(group: AxisGroup, rng: np.random.Generator) -> list[int]:
    count = int(rng.integers(1, group.units))
    return sorted(rng.choice(group.units, count, replace=False).tolist())


def check(
    model: Model,
    units: Units,
    groups: Mapping[str, AxisGroup],
    rng: np.random.Generator,
    relative: float = RELATIVE,
) -> None:
    smaller = model.clone()
    remove_units(smaller, groups, units)
    verify(smaller, after_pass="remove")
    fed = feed(model, rng)
    expected, found = run(zeroed(model, units, groups), fed), run(smaller, fed)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        largest = float(np.abs(array).max()) if array.size else 0.0
        assert float(np.abs(found[name] - array).max()) <= relative * largest + ABSOLUTE


def zeroed(model: Model, units: Units, groups: Mapping[str, AxisGroup]) -> Model:
    own = model.clone()
    values = values_by_name(own)
    for name, some in units.items():
        for unit in some:
            for member in groups[name].unit(unit):
                value = values.get(member.tensor)
                if value is None or value.const_value is None:
                    continue
                array = np.array(value.const_value.numpy())
                if array.dtype.kind == "f":
                    np.moveaxis(array, member.axis, 0)[member.indices] = 0
                    value.const_value = onnx_ir.tensor(array, name=value.name)
    return own


def run(model: Model, fed: Feed) -> dict[str, np.ndarray]:
    return dict(OrtEvaluator(threads=1).load(model)(fed))


def feed(model: Model, rng: np.random.Generator) -> Feed:
    fed = {}
    for value in model.graph.inputs:
        dims = list(value.shape or ())
        image = len(dims) == 4
        free = [3, 7, 64, 64] if image else [3, 7, 5]
        shape = [d if isinstance(d, int) else free[k] for k, d in enumerate(dims)]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        if dtype.kind == "f":
            fed[value.name or ""] = rng.standard_normal(shape).astype(dtype)
        elif "mask" in (value.name or "") or dtype.kind == "b":
            fed[value.name or ""] = np.ones(shape, dtype)
        else:
            fed[value.name or ""] = rng.integers(0, 9, shape).astype(dtype)
    return fed


CONSTANTS = {"axes": np.array([-1]), "two": np.float32(2)}


def parsed(head: str, body: str) -> Model:
    """A model from ONNX text; `w_4x8` are seeded weights of that shape."""
    import re

    names = sorted(set(re.findall(r"\bw_\d[\dx]*(?:_[a-z])?\b", body)))
    names += [name for name in CONSTANTS if re.search(rf"\b{name}\b", body)]
    text = f'<ir_version: 10, opset_import: ["" : 21]> case {head} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(len(body))
    for name in names:
        array = CONSTANTS.get(name)
        if array is None:
            shape = [int(d) for d in name.split("_")[1].split("x")]
            array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return read(proto)


class RandomNetwork:
    """Images through random layers, then tokens through attention or a recurrence."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def model(self) -> Model:
        value, channels = "x", 3
        for _ in range(int(self.rng.integers(2, 6))):
            names = ("conv", "depthwise", "residual", "concat", "gate", "shuffle", "pad", "slice")
            value, channels = getattr(self, f"_{self.rng.choice(names)}")(value, channels)
        tail = self.rng.choice(("pool", "tokens", "recurrent"))
        value = getattr(self, f"_{tail}")(value, channels)
        graph = onnx.helper.make_graph(
            [*self.nodes, onnx.helper.make_node("Identity", [value], ["y"])],
            "random",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 6, 6])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            self.weights,
        )
        opset = [onnx.helper.make_opsetid("", 21)]
        return read(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10))

    def _op(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: object) -> str:
        names = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        node = onnx.helper.make_node(op, inputs, names, f"n{len(self.nodes)}", **attributes)
        self.nodes.append(node)
        return names[0]

    def _weight(self, *shape: int) -> str:
        array = self.rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
        return self._constant(array.astype(np.float32))

    def _constant(self, array: np.ndarray) -> str:
        self.weights.append(onnx.numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def _active(self, value: str) -> str:
        return self._op(str(self.rng.choice(("Relu", "Sigmoid", "Tanh", "HardSwish"))), [value])

    def _conv(self, value: str, channels: int) -> tuple[str, int]:
        groups = int(self.rng.choice([g for g in (1, 2, 3) if channels % g == 0]))
        out = groups * int(self.rng.integers(2, 6))
        weight = self._weight(out, channels // groups, 3, 3)
        inputs = [value, weight, self._weight(out)]
        made = self._op("Conv", inputs, group=groups, pads=[1, 1, 1, 1])
        if self.rng.random() < 0.5:
            scale, shift, mean = (self._weight(out) for _ in range(3))
            variance = self._constant(self.rng.uniform(0.5, 2, out).astype(np.float32))
            made = self._op("BatchNormalization", [made, scale, shift, mean, variance])
        return self._active(made), out

    def _depthwise(self, value: str, channels: int) -> tuple[str, int]:
        times = int(self.rng.integers(1, 3))
        weight = self._weight(channels * times, 1, 3, 3)
        made = self._op("Conv", [value, weight], group=channels, pads=[1, 1, 1, 1])
        return self._active(made), channels * times

    def _residual(self, value: str, channels: int) -> tuple[str, int]:
        inner, count = self._conv(value, channels)
        back = self._op("Conv", [inner, self._weight(channels, count, 1, 1)])
        return self._op("Add", [value, back]), channels

    def _concat(self, value: str, channels: int) -> tuple[str, int]:
        other, count = self._conv(value, channels)
        return self._op("Concat", [value, other], axis=1), channels + count

    def _gate(self, value: str, channels: int) -> tuple[str, int]:
        pooled = self._op("GlobalAveragePool", [value])
        inner = self._op("Relu", [self._op("Conv", [pooled, self._weight(4, channels, 1, 1)])])
        back = self._op("Conv", [inner, self._weight(channels, 4, 1, 1)])
        return self._op("Mul", [value, self._op("Sigmoid", [back])]), channels

    def _shuffle(self, value: str, channels: int) -> tuple[str, int]:
        if channels % 2:
            return self._conv(value, channels)
        apart = self._constant(np.array([0, 2, channels // 2, 6, 6]))
        whole = self._constant(np.array([0, channels, 6, 6]))
        wide = self._op("Reshape", [value, apart])
        turned = self._op("Transpose", [wide], perm=[0, 2, 1, 3, 4])
        return self._op("Reshape", [turned, whole]), channels

    def _pad(self, value: str, channels: int) -> tuple[str, int]:
        pads = self._constant(np.array([0, 1, 0, 0, 0, 2, 0, 0]))
        return self._op("Pad", [value, pads]), channels + 3

    def _slice(self, value: str, channels: int) -> tuple[str, int]:
        if channels < 4:
            return self._conv(value, channels)
        ends = [self._constant(np.array([k])) for k in (1, channels, 1)]
        return self._op("Slice", [value, *ends]), channels - 1

    def _pool(self, value: str, channels: int) -> str:
        row = self._op("Flatten", [self._op("AveragePool", [value], kernel_shape=[3, 3])])
        return self._op("Gemm", [row, self._weight(5, channels * 16)], transB=1)

    def _tokens(self, value: str, channels: int) -> str:
        """Two heads of three, on what a Reshape of computed sizes gives."""
        size = self._op("Shape", [value], start=0, end=2)
        target = self._op("Concat", [size, self._constant(np.array([-1]))], axis=0)
        tokens = self._op("Transpose", [self._op("Reshape", [value, target])], perm=[0, 2, 1])
        shape = self._constant(np.array([0, 0, 2, 3]))
        heads = []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            part = self._op("MatMul", [tokens, self._weight(channels, 6)])
            part = self._op("Add", [part, self._weight(6)])
            heads.append(self._op("Transpose", [self._op("Reshape", [part, shape])], perm=perm))
        scores = self._op("Softmax", [self._op("MatMul", heads[:2])])
        mixed = self._op("Transpose", [self._op("MatMul", [scores, heads[2]])], perm=[0, 2, 1, 3])
        joined = self._op("Reshape", [mixed, self._constant(np.array([0, 0, 6]))])
        return self._op("MatMul", [joined, self._weight(6, 4)])

    def _recurrent(self, value: str, channels: int) -> str:
        """Rows of the image as steps, both directions, and a product with what they leave."""
        op, gates = [("LSTM", 4), ("GRU", 3), ("RNN", 1)][int(self.rng.integers(3))]
        steps = self._op(
            "Transpose",
            [self._op("ReduceSum", [value, self._constant(np.array([3]))], keepdims=0)],
            perm=[2, 0, 1],
        )
        inputs = [steps, self._weight(2, gates * 5, channels), self._weight(2, gates * 5, 5)]
        inputs.append(self._weight(2, 2 * gates * 5))
        made = self._op(op, inputs, hidden_size=5, direction="bidirectional")
        turned = self._op("Transpose", [made], perm=[0, 2, 1, 3])
        joined = self._op("Reshape", [turned, self._constant(np.array([0, 0, -1]))])
        return self._op("MatMul", [joined, self._weight(10, 4)])
