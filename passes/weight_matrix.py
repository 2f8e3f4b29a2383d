"""Weights as matrices: which entries multiply which inputs, whatever operator they belong to.

A weight is `groups` matrices `[N, K]`: N rows give the outputs, K entries of a row multiply one
column of inputs, so that `output = rows @ columnsᵀ` per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.constants import constant_behind
from octavo.ir.errors import UsageError
from octavo.ir.fake_quant import DOMAIN
from octavo.ir.quant import PerAxis, PerBlock, PerTensor, QuantParams
from octavo.passes.window import Window, drawn

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.quant import Granularity, QuantSpec

    Array = NDArray[np.generic]
    Float32 = NDArray[np.float32]
    Index = NDArray[np.int64]

_RECURRENT = ("LSTM", "GRU", "RNN")


@final
@dataclass(frozen=True)
class Cells:
    """Which scale belongs to which entry: blocks of columns within rows.

    `index` has shape `[groups, N, blocks]` and holds positions in the flattened scale; `block`
    has shape `[K]` and holds the block of every column.
    """

    index: Index
    block: Index

    @cached_property
    def shared(self) -> bool:
        """Whether rows share scales."""
        return np.unique(self.index).size < self.index.size

    def spread(self, array: NDArray[np.generic]) -> Array:
        """Numbers in the shape of the granularity as `[groups, N, blocks]`."""
        return np.asarray(array.reshape(-1)[self.index])

    def gathered(self, spread: Array, shape: tuple[int, ...]) -> Array:
        """`[groups, N, blocks]` back in the shape of the granularity; sharers hold the same."""
        flat = np.empty(math.prod(shape), spread.dtype)
        flat[self.index] = spread
        return flat.reshape(shape)


@final
@dataclass(frozen=True)
class WeightMatrix:
    """Where rows and columns lie in a constant of `shape`, and how the operator reads inputs.

    `row_axes` and `column_axes` are the constant's axes. The matrices of a ConvTranspose give
    what one input adds to every output of its window.
    """

    op_type: str
    shape: tuple[int, ...]
    groups: int
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    window: Window | None = None
    turned: bool = False
    previous: bool = False
    directions: tuple[bool, ...] = ()

    @staticmethod
    def of(node: onnx_ir.Node, index: int) -> WeightMatrix:
        """The geometry of the constant that is read as input `index`, also through a FakeQuant.

        Raises UsageError with the reason where a weight is not a matrix.
        """
        reason = why_no_matrix(node, index)
        if reason:
            raise UsageError(f"the weight of '{node.name}' is not a matrix", why=reason)
        shape = _shape(node.inputs[index])
        rank, attributes = len(shape), node.attributes
        match node.op_type:
            case "Conv":
                groups, window = attributes.get_int("group", 1), Window.of(node, shape[2:])
                return WeightMatrix("Conv", shape, groups, (0,), _axes(1, rank), window)
            case "ConvTranspose":
                return WeightMatrix("ConvTranspose", shape, 1, _axes(1, rank), (0,))
            case "MatMul":
                return WeightMatrix("MatMul", shape, 1, (1,), (0,))
            case "Gemm":
                rows = 1 - attributes.get_int("transB", 0)
                turned = bool(attributes.get_int("transA", 0))
                return WeightMatrix("Gemm", shape, 1, (rows,), (1 - rows,), turned=turned)
            case _:
                backwards = _directions(node)
                return WeightMatrix(
                    node.op_type, shape, shape[0], (0, 1), (2,), None,
                    previous=index == 2, directions=backwards,
                )  # fmt: skip

    @property
    def reading(self) -> tuple[object, ...]:
        """What `columns` depends on: equal for weights that multiply the same columns."""
        channels_last = self.op_type != "ConvTranspose"
        how = self.groups, self.width, self.window, self.turned, channels_last
        return (*how, self.previous, self.directions)

    @property
    def rows_per_group(self) -> int:
        return math.prod(self.shape[k] for k in self.row_axes) // max(self.groups, 1)

    @property
    def width(self) -> int:
        """K, the length of a row."""
        return math.prod(self.shape[k] for k in self.column_axes)

    def rows(self, array: Array) -> Float32:
        """A constant as `[groups, N, K]`."""
        turned = array.transpose(*self.row_axes, *self.column_axes)
        shape = (self.groups, self.rows_per_group, self.width)
        return np.ascontiguousarray(turned, np.float32).reshape(shape)

    def some_rows(self, array: Array, most: int) -> Float32:
        """About `most` rows of every group, evenly spread; others are not copied."""
        every = max(1, self.rows_per_group // most)
        if every == 1 or self.groups > 1 or len(self.row_axes) > 1:
            return self.rows(array)[:, ::every]
        turned = array.transpose(*self.row_axes, *self.column_axes)[::every]
        return np.ascontiguousarray(turned, np.float32).reshape(1, len(turned), self.width)

    def restore(self, rows: NDArray[np.floating]) -> Float32:
        """`[groups, N, K]` as the constant."""
        order = (*self.row_axes, *self.column_axes)
        turned = rows.reshape([self.shape[k] for k in order])
        back = turned.transpose([order.index(k) for k in range(len(order))])
        return np.ascontiguousarray(back, np.float32)

    def columns(self, x: Array, limit: int = 0, seed: int = 0) -> Float32:
        """What the rows multiply, of an operand as `operand` names it: `[groups, samples, K]`.

        Of more than `limit` samples (0: no limit), a random `limit` drawn with `seed` remain.
        """
        if self.window is not None:
            return self.window.columns(np.asarray(x, np.float32), self.groups, limit, seed)
        if self.op_type in _RECURRENT:
            return self._steps(x, limit, seed)
        if self.op_type == "ConvTranspose":
            x = np.moveaxis(x, 1, -1)
        flat = (x.T if self.turned else x).reshape(-1, self.width)
        return np.ascontiguousarray(flat[drawn(len(flat), limit, seed)], np.float32)[None]

    def cells(self, granularity: Granularity) -> Cells:
        """The scale of every row and block of columns."""
        match granularity:
            case PerTensor():
                sizes: dict[int, int] = {}
            case PerAxis(axis):
                sizes = {axis % len(self.shape): 1}
            case PerBlock(axis, size):
                sizes = dict.fromkeys(range(len(self.shape)), 1)
                sizes[axis % len(self.shape)] = size
        counts = {a: -(-self.shape[a] // size) for a, size in sizes.items()}
        of_row = self._positions(self.row_axes, sizes, counts)
        of_column = self._positions(self.column_axes, sizes, counts)
        blocks, block = np.unique(of_column, return_inverse=True)
        by_row = of_row.reshape(self.groups, self.rows_per_group, 1)
        return Cells(by_row + blocks, np.asarray(block, np.int64))

    def scales(self, params: QuantParams) -> tuple[Float32, NDArray[np.int32], Cells]:
        """Scale and zero point as `[groups, N, blocks]`, and what they belong to."""
        cells = self.cells(params.spec.granularity)
        scale = np.asarray(cells.spread(params.scale), np.float32)
        return scale, np.asarray(cells.spread(params.zero_point), np.int32), cells

    def params(self, spec: QuantSpec, scale: Array, zero_point: Array) -> QuantParams:
        """Parameters of the constant from those of rows and blocks, the inverse of `scales`."""
        cells, shape = self.cells(spec.granularity), scale_shape(spec.granularity, self.shape)
        wide = np.asarray(cells.gathered(scale, shape), np.float32)
        return QuantParams(spec, wide, np.asarray(cells.gathered(zero_point, shape), np.int32))

    def _positions(
        self, axes: tuple[int, ...], sizes: dict[int, int], counts: dict[int, int]
    ) -> Index:
        """The share of some axes in the position of a scale, flattened over these axes."""
        total = np.zeros([1] * len(axes), np.int64)
        for at, axis in enumerate(axes):
            known = axis in sizes
            stride = math.prod(count for a, count in counts.items() if a > axis)
            steps = np.arange(self.shape[axis]) // sizes[axis] * stride if known else 0
            along = [-1 if k == at else 1 for k in range(len(axes))]
            total = total + np.broadcast_to(steps, self.shape[axis]).reshape(along)
        return np.asarray(total.reshape(-1), np.int64)

    def _steps(self, x: Array, limit: int, seed: int) -> Float32:
        """Inputs of every step, or the states that the steps before left (zeros left out)."""
        by_direction = []
        for direction, backwards in enumerate(self.directions):
            earlier = slice(1, None) if backwards else slice(None, -1)
            steps = x[earlier, direction] if self.previous else x
            flat = steps.reshape(-1, self.width)
            by_direction.append(flat[drawn(len(flat), limit, seed)])
        return np.ascontiguousarray(np.stack(by_direction), np.float32)


def why_no_matrix(node: onnx_ir.Node, index: int) -> str:
    """Why input `index` of a node is not a matrix that multiplies its operand, "" where it is."""
    value = node.inputs[index] if index < len(node.inputs) else None
    shape = _shape(value)
    if value is None or not shape:
        return "the weight is not a constant array"
    match node.op_type:
        case "Conv" if index == 1:
            return ""
        case "ConvTranspose" if index == 1:
            grouped = node.attributes.get_int("group", 1) != 1
            return "a grouped ConvTranspose" if grouped else ""
        case "MatMul" | "Gemm" if index == 1:
            return "" if len(shape) == 2 else f"a weight of rank {len(shape)}"
        case "LSTM" | "GRU" | "RNN" if index in (1, 2):
            return _why_no_steps(node, index)
        case "Gather":
            return "an embedding multiplies nothing"
    return f"input {index} of {node.op_type} does not multiply an operand"


def operand(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """The value that the weight read as input `index` multiplies.

    Recurrent weights multiply the states of the steps before, which the node itself returns.
    """
    value = node.outputs[0] if node.op_type in _RECURRENT and index == 2 else node.inputs[0]
    assert value is not None
    return value


def scale_shape(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a constant of `shape`."""
    match granularity:
        case PerTensor():
            return ()
        case PerAxis(axis):
            return (shape[axis],)
        case PerBlock(axis, size):
            axis %= len(shape)
            return (*shape[:axis], -(-shape[axis] // size), *shape[axis + 1 :])


def _why_no_steps(node: onnx_ir.Node, index: int) -> str:
    if node.attributes.get_int("layout", 0):
        return "a recurrent operator whose first axis is the batch"
    if index == 2 and not node.outputs[0].name:
        return "the states of the steps are not an output"
    return ""


def _directions(node: onnx_ir.Node) -> tuple[bool, ...]:
    """Which directions of a recurrent operator run backwards."""
    match node.attributes.get_string("direction", "forward"):
        case "bidirectional":
            return (False, True)
        case "reverse":
            return (True,)
    return (False,)


def _axes(first: int, rank: int) -> tuple[int, ...]:
    return tuple(range(first, rank))


def _shape(value: onnx_ir.Value | None) -> tuple[int, ...]:
    """The shape of a constant, of one behind a FakeQuant, or of one read through a Transpose."""
    made = value.producer() if value is not None else None
    if made is not None and made.domain == DOMAIN:
        return _shape(made.inputs[0])
    table = made.inputs[0] if made is not None and made.op_type == "Transpose" else None
    if table is not None and table.producer() is not None:
        return _shape(table)[::-1]
    tensor = constant_behind(value)
    if value is None or tensor is None:
        return ()
    shape = tuple(int(d) for d in tensor.shape.numpy())
    return shape if value.const_value is not None else shape[::-1]
