"""One sweep over the calibration data that leaves the second moments of every weight's operand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.arrays_io import StoredArray
from octavo.ir.calibration import first_samples, samples_of
from octavo.ir.errors import CalibrationError
from octavo.ir.facts import Fact
from octavo.ir.moments import Moment, Moments, weight_key
from octavo.ir.reference import Reference
from octavo.passes.base import Pass
from octavo.passes.read_values import value_reader
from octavo.passes.weight_matrix import WeightMatrix, operand, why_no_matrix
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Array = NDArray[np.generic]

# Columns per entry of a column that are enough, all samples together.
_COLUMNS_PER_ENTRY = 32
_LEAST_PER_SAMPLE = 32
# Columns of several feeds wait together, so that sums on disk are read and written rarely.
_WAITING_BYTES = 64 << 20
# Sums of up to this size together stay in memory until all feeds are through.
_KEPT_BYTES = 192 << 20
# As many rows are summed in float32 before their sum joins the float64 one.
_ROWS_AT_ONCE = 8192


@final
@dataclass(frozen=True)
class CollectMoments(Pass):
    """Sum X·Xᵀ and X of what every weight multiplies.

    **What it does.** Runs the float model on the calibration data and, for every weight that is a
    matrix, sums the outer products of its columns: im2col patches of a convolution, per group;
    rows of what a MatMul or Gemm reads; inputs and states of an LSTM or GRU. Weights that
    multiply the same columns share one moment.
    **Why.** ‖ΔW·X‖² = tr(ΔW·C·ΔWᵀ): rounding, repair and pruning of a layer need no other data.
    **When it does not apply.** No calibration data: a note, and no moments. Embeddings multiply
    nothing.
    **Cost and accuracy.** One float inference and one product per layer. Of every sample at most
    `rows` random columns count, and fewer where 32 columns per entry are reached without. Sums
    are float64 and lie on disk, so memory is bounded.
    """

    name = "collect-moments"
    produces = (Moments,)
    preserves = (Fact,)

    rows: int = 512
    samples: int = 512

    def run(self, model: Model, ctx: PassContext) -> Model:
        if ctx.calibration is None:
            ctx.remark("note", "", "no calibration data: no moments")
            return model.with_fact(Moments({}))
        reference = model.find(Reference)
        source = reference.model if reference is not None else model
        wanted = _quantized(model) or quantizable(model, ctx)
        moments = collected(source, ctx, wanted, ctx.calibration, self.rows, self.samples)
        ctx.count("moments", len({id(m) for m in moments.by_weight.values()}))
        ctx.count("weights", len(moments.by_weight))
        return model.with_fact(moments)


def collected(
    model: Model,
    ctx: PassContext,
    weights: Iterable[tuple[str, int]],
    batches: Batches,
    rows: int = 512,
    samples: int = 512,
) -> Moments:
    """Moments of the operands of some weights of `model`, given as node name and input index.

    `rows` columns of each of the first `samples` samples count. Raises CalibrationError that
    names the node where an operand is not finite.
    """
    nodes = {node.name or "": node for node in model.graph}
    wanted = [(nodes[name], index) for name, index in weights if name in nodes]
    probes = _probes(ctx, wanted)
    folder = Path(tempfile.mkdtemp(prefix="moments-", dir=ctx.workdir))
    kept = sum(probe.matrix.groups * probe.matrix.width**2 * 8 for probe in probes) <= _KEPT_BYTES
    sums = [_Sum(probe, folder / f"{k}.npy", kept) for k, probe in enumerate(probes)]
    if sums:
        _sweep(model, ctx, batches, sums, (rows, samples))
    found: dict[str, Moment] = {}
    for total in sums:
        if not total.samples:
            ctx.remark("missed", total.probe.value, "the calibration data leaves it empty")
            continue
        found |= dict.fromkeys(total.probe.weights, total.moment())
    return Moments(found)


@final
@dataclass(frozen=True)
class _Probe:
    """A value, how its columns are read, and the weights that multiply them."""

    value: str
    matrix: WeightMatrix
    weights: list[str]


def _probes(ctx: PassContext, weights: Iterable[tuple[onnx_ir.Node, int]]) -> list[_Probe]:
    by_columns: dict[object, _Probe] = {}
    for node, index in weights:
        reason = why_no_matrix(node, index)
        if reason:
            ctx.remark("missed", node.name or "", f"no moments: {reason}")
            continue
        matrix, value = WeightMatrix.of(node, index), operand(node, index).name or ""
        probe = by_columns.setdefault((value, matrix.reading), _Probe(value, matrix, []))
        probe.weights.append(weight_key(node.name or "", index))
    return list(by_columns.values())


def _sweep(
    model: Model,
    ctx: PassContext,
    batches: Batches,
    sums: Sequence[_Sum],
    limits: tuple[int, int],
) -> None:
    rows, samples = limits
    read = value_reader(model, ctx.evaluator, (total.probe.value for total in sums))
    count = max(1, min(samples, batches.samples))
    waiting = done = 0
    for seed, feed in enumerate(first_samples(batches, samples)):
        found = read(feed)
        for total in sums:
            limit = enough_columns(total.probe.matrix.width, count, rows) * samples_of(feed)
            waiting += total.add(found[total.probe.value], limit, seed)
            if waiting > _WAITING_BYTES:
                _settle(sums)
                waiting = 0
        done += samples_of(feed)
        ctx.progress("moments", done, count)
    _settle(sums)


def enough_columns(width: int, samples: int, rows: int = 512) -> int:
    """Columns of length `width` to draw from each of some samples, at most `rows`."""
    enough = -(-_COLUMNS_PER_ENTRY * width // samples)
    return min(rows, max(_LEAST_PER_SAMPLE, enough))


def _settle(sums: Iterable[_Sum]) -> None:
    for total in sums:
        total.settle()


@final
@dataclass
class _Sum:
    """Σ x·xᵀ, Σ x, and columns that are not in them yet; `kept` in memory or in a file."""

    probe: _Probe
    path: Path
    kept: bool
    total: NDArray[np.float64] | None = None
    first: NDArray[np.float64] | None = None
    samples: int = 0
    waiting: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, x: Array, limit: int, seed: int) -> int:
        """Bytes of the columns of `x` that now wait."""
        if not x.size:
            return 0
        if not math.isfinite(float(x.max()) + float(x.min())):
            raise _not_finite(self.probe)
        columns = self.probe.matrix.columns(x, limit, seed)
        if not columns.size:
            return 0
        self.waiting.append(columns)
        return columns.nbytes

    def settle(self) -> None:
        """Add what waits to the sums."""
        if not self.waiting:
            return
        columns = np.concatenate(self.waiting, axis=1)
        self.waiting.clear()
        total = self._sum(columns)
        for part in _parts(columns):
            total += np.matmul(part.transpose(0, 2, 1), part)
        if self.kept:
            self.total = total
        else:
            np.save(self.path, total)
        first = columns.sum(axis=1, dtype=np.float64)
        self.first = first if self.first is None else self.first + first
        self.samples += columns.shape[1]

    def _sum(self, columns: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sum so far, zeros at first."""
        if not self.samples:
            groups, _, width = columns.shape
            return np.zeros((groups, width, width))
        read: NDArray[np.float64] = np.load(self.path) if self.total is None else self.total
        return read

    def moment(self) -> Moment:
        """The moment of all columns, which now lies in the file in float32."""
        assert self.first is not None
        total = np.load(self.path) if self.total is None else self.total
        np.save(self.path, (total / self.samples).astype(np.float32))
        self.total = None
        mean = (self.first / self.samples).astype(np.float32)
        return Moment(StoredArray(self.path), mean, self.samples)


def _parts(columns: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, columns.shape[1], _ROWS_AT_ONCE):
        yield columns[:, start : start + _ROWS_AT_ONCE]


def _quantized(model: Model) -> list[tuple[str, int]]:
    """The weights that are read through a FakeQuant."""
    readers = (reader for found in weight_quantizers(model) for reader in found.readers)
    return [(node.name or "", index) for node, index in readers]


def quantizable(model: Model, ctx: PassContext) -> list[tuple[str, int]]:
    """The weights that the target could store in fewer bits."""
    rows = ((node, ctx.target.support(node, "storage").row) for node in model.graph)
    return [(n.name or "", index) for n, row in rows if row is not None for index in row.weights]


def _not_finite(probe: _Probe) -> CalibrationError:
    node = probe.weights[0].rpartition(":")[0]
    return CalibrationError(
        f"what the node '{node}' reads is not finite on the calibration data",
        where=f"value '{probe.value}'",
        why="the float model overflows or divides by zero on this input",
        hint="check --preprocess and the data, or leave the sample out",
    )
