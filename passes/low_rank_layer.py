"""Layers as two thinner layers: which forms there are, what they cost, and their numbers.

- `matrix`: a MatMul or Gemm of K inputs and N outputs becomes K → r → N.
- `channel`: a convolution becomes the same one with r outputs, then one of 1x1.
- `spatial`: a 2-D convolution becomes one of kh x 1 with r outputs, then one of 1 x kw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.ir.moments import shrunk
from octavo.passes.low_rank import Spectrum, relative_error
from octavo.passes.weight_matrix import WeightMatrix, why_no_matrix

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.moments import Moment

    Float64 = NDArray[np.float64]
    Array = NDArray[np.generic]

FormKind = Literal["matrix", "channel", "spatial"]


@final
@dataclass(frozen=True)
class Form:
    """One way to write a layer as two.

    `full` is the rank from which on nothing is lost. `per_rank` are multiplications per position
    of the output and unit of rank, `whole` those of the layer as it is.
    """

    kind: FormKind
    full: int
    per_rank: int
    whole: int

    @property
    def break_even(self) -> float:
        """The rank at which the two cost what the one does."""
        return self.whole / self.per_rank

    def rank(self, share: float, multiple: int) -> int:
        """The multiple nearest to a share of the break-even rank, at least one of them.

        0 where no multiple makes the layer cheaper.
        """
        wanted = max(1, round(share * self.break_even / multiple)) * multiple
        while wanted >= self.break_even:
            wanted -= multiple
        return max(wanted, 0)


@final
@dataclass(frozen=True)
class LayerFactors:
    """The numbers of two layers that stand for one.

    `first` and `second` are weights as the operators read them. `product` is the weight that
    they are together, in the shape of the constant, and `shift` `[N]` what the bias gains.
    `error` is ‖(W - W')·X - shift‖² / ‖W·X‖².
    """

    form: Form
    rank: int
    first: Float64
    second: Float64
    product: NDArray[np.float32]
    shift: Float64 | None
    error: float


@final
@dataclass(frozen=True)
class LowRankLayer:
    """A linear node that can be factored, with what is known of its inputs.

    `second` and `mean` are those of `passes/low_rank.py`.
    """

    node: onnx_ir.Node
    weight: NDArray[np.float32]
    second: Float64 | None = None
    mean: Float64 | None = None

    @staticmethod
    def of(
        node: onnx_ir.Node, weight: NDArray[np.float32], moment: Moment | None, biased: bool
    ) -> LowRankLayer:
        """A layer with what its moment tells; `biased` says that its bias can take up a mean."""
        if moment is None or not biased:
            second = None if moment is None else moment.matrix()[0].astype(np.float64)
            return LowRankLayer(node, weight, second)
        centred = moment.measured() - np.einsum("gi,gj->gij", moment.mean, moment.mean)
        second = shrunk(centred, moment.samples)[0].astype(np.float64)
        return LowRankLayer(node, weight, second, moment.mean[0].astype(np.float64))

    @cached_property
    def matrix(self) -> WeightMatrix:
        """Where rows and columns lie in the constant."""
        return WeightMatrix.of(self.node, 1)

    @cached_property
    def rows(self) -> Float64:
        """The weight as `[N, K]`."""
        return np.asarray(self.matrix.rows(self.weight)[0], np.float64)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the weight as a matrix: that of the forms `matrix` and `channel`."""
        return Spectrum.of(self.rows, self.second, self.mean)

    @property
    def forms(self) -> tuple[Form, ...]:
        """All forms of the node."""
        count, width = self.rows.shape
        kind: FormKind = "channel" if self.node.op_type == "Conv" else "matrix"
        low = Form(kind, min(count, width), count + width, count * width)
        if kind == "matrix" or len(self.weight.shape) != 4 or 1 in self.weight.shape[2:]:
            return (low,)
        _, channels, height, across = self.weight.shape
        stride = self.node.attributes.get_ints("strides", [1, 1])[1]
        first, second = channels * height, count * across
        # The first convolution has not yet taken the steps of the second.
        whole = count * width
        return low, Form("spatial", min(first, second), first * stride + second, whole)

    def error(self, form: Form, rank: int) -> float:
        """The relative error of a rank, without the weights where they are not needed for it."""
        if form.kind == "spatial":
            return self.factors(form, rank).error
        return self.spectrum.error(rank)

    def rank_for(self, form: Form, energy: float) -> int:
        """The least rank that keeps the share `energy` of the output's power."""
        if form.kind != "spatial":
            return self.spectrum.rank_for(energy)
        low, high = 1, form.full
        while low < high:
            middle = (low + high) // 2
            if self.error(form, middle) <= 1 - energy:
                high = middle
            else:
                low = middle + 1
        return low

    def factors(self, form: Form, rank: int) -> LayerFactors:
        """Both weights at a rank."""
        if form.kind == "spatial":
            return self._spatial(form, rank)
        found = self.spectrum.factors(rank)
        first, second = self._as_read(found.left, found.right)
        return self._made(form, rank, first, second, found.product)

    def _as_read(self, left: Float64, right: Float64) -> tuple[Float64, Float64]:
        rank, shape = right.shape[0], self.weight.shape
        if self.node.op_type == "Conv":
            blank = (1,) * (len(shape) - 2)
            return right.reshape(rank, *shape[1:]), left.reshape(*left.shape, *blank)
        if self.node.attributes.get_int("transB", 0):
            return right, left
        return right.T, left.T

    def _made(
        self, form: Form, rank: int, first: Float64, second: Float64, product: Float64
    ) -> LayerFactors:
        shift = None if self.mean is None else (self.rows - product) @ self.mean
        error = relative_error(self.rows, product, self.second, self.mean)
        restored = self.matrix.restore(product[None])
        return LayerFactors(form, rank, first, second, restored, shift, error)

    def _spatial(self, form: Form, rank: int) -> LayerFactors:
        """The better of the plain SVD of [C·kh, N·kw] and one whitened by C·kh inputs.

        Where moments are known, the second layer is then fitted by least squares.
        """
        count, channels, height, across = self.weight.shape
        kernel = self.rows.reshape(count, channels * height, across)
        tall = kernel.transpose(0, 2, 1).reshape(count * across, channels * height)
        moments = (None,) if self.second is None else (None, self._marginal())
        found = [
            self._made(form, rank, *self._spatial_weights(tall, moment, rank)) for moment in moments
        ]
        return min(found, key=lambda made: made.error)

    def _marginal(self) -> Float64:
        """C of the inputs of one column of the kernel, `[C·kh, C·kh]`, mean over columns."""
        assert self.second is not None
        _, channels, height, across = self.weight.shape
        width = channels * height
        wide = self.second.reshape(width, across, width, across)
        return np.asarray(np.einsum("ajbj->ab", wide) / across)

    def _spatial_weights(
        self, tall: Float64, moment: Float64 | None, rank: int
    ) -> tuple[Float64, Float64, Float64]:
        """First and second kernel, and the product `[N, K]`."""
        count, channels, height, across = self.weight.shape
        made = Spectrum.of(tall, moment).factors(rank)
        second = made.left.reshape(count, across, rank).transpose(0, 2, 1)
        if self.second is not None:
            second = self._fitted(made.right, second)
        product = np.einsum("nrj,rc->ncj", second, made.right).reshape(self.rows.shape)
        first = made.right.reshape(rank, channels, height, 1)
        return first, second.reshape(count, rank, 1, across), product

    def _fitted(self, right: Float64, second: Float64) -> Float64:
        """The second kernel `[N, r, kw]` that loses least of the output, given the first.

        Normal equations of W·X ≈ H·(B·X), where B `[r·kw, K]` is the first layer at every column.
        """
        assert self.second is not None
        across, width = self.weight.shape[3], len(self.second)
        basis = np.einsum("rc,jk->rjck", right, np.eye(across)).reshape(-1, width)
        seen = basis @ self.second
        normal = seen @ basis.T
        normal += np.eye(len(normal)) * (1e-9 * np.trace(normal) / len(normal) + 1e-30)
        # Fitting what the SVD leaves keeps it where no column says otherwise.
        left = self.rows - second.reshape(len(second), -1) @ basis
        gain: Float64 = np.linalg.solve(normal, seen @ left.T).T
        return second + gain.reshape(second.shape)


def why_not_factored(node: onnx_ir.Node) -> str:
    """Why a linear node has no low-rank form, "" where it has one."""
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return f"{node.op_type} has no low-rank form here"
    if reason := why_no_matrix(node, 1):
        return reason
    matrix = WeightMatrix.of(node, 1)
    if matrix.groups == 1:
        return "" if math.prod(matrix.shape) else "an empty weight"
    if matrix.shape[1] == 1:
        return "a depthwise convolution mixes no channels: there is no rank to lower"
    return "a grouped convolution: its groups are thin already"
