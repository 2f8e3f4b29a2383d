"""One sweep over the calibration data that leaves the second moments of every weight's operand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
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
from octavo.passes.groups import weight_row
from octavo.passes.operand_walk import OperandWalk
from octavo.passes.weight_matrix import WeightMatrix, operand, why_no_matrix
from octavo.passes.weight_quantizers import weight_quantizers

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model
    from octavo.passes.base import PassContext

    Array = NDArray[np.generic]
    Float32 = NDArray[np.float32]

# Columns per entry of a column that are enough, all samples together.
_COLUMNS_PER_ENTRY = 32
_LEAST_PER_SAMPLE = 32
# As many rows are summed in float32 before their sum joins the float64 one.
_ROWS_AT_ONCE = 8192
_TINY = 1e-30


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
    Columns much longer than all others are shortened: massive first tokens would hide the rest.
    **Cost and accuracy.** One float inference and one product per layer. Of every sample at most
    `rows` random columns count, and fewer where 32 columns per entry are reached without. The
    model runs from operand to operand: one of them and one float64 sum are in memory at a time.
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
    place = {v.name: at for at, node in enumerate(model.graph) for v in node.outputs}
    probes = _probes(ctx, [(nodes[name], index) for name, index in weights if name in nodes])
    probes.sort(key=lambda probe: place.get(probe.value, -1))
    folder = Path(tempfile.mkdtemp(prefix="moments-", dir=ctx.workdir))
    feeds = tuple(first_samples(batches, samples))
    walk = OperandWalk.of(model, ctx, feeds, [probe.value for probe in probes])
    found: dict[str, Moment] = {}
    for at, probe in enumerate(probes):
        walk.reach(probe.value)
        moment = _moment(probe, walk, rows, folder / f"{at}.npy")
        if at + 1 == len(probes) or probes[at + 1].value != probe.value:
            walk.leave(probe.value)
        if moment is None:
            ctx.remark("missed", probe.value, "the calibration data leaves it empty")
        else:
            found |= dict.fromkeys(probe.weights, moment)
        ctx.progress("moments", at + 1, len(probes))
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


def enough_columns(width: int, samples: int, rows: int = 512) -> int:
    """Columns of length `width` to draw from each of some samples, at most `rows`."""
    enough = -(-_COLUMNS_PER_ENTRY * width // samples)
    return min(rows, max(_LEAST_PER_SAMPLE, enough))


def tempered(columns: Float32) -> Float32:
    """Columns `[groups, samples, K]` times their `tempering`."""
    factor = tempering(columns)
    return columns if np.all(factor == 1) else columns * factor


def tempering(columns: Float32) -> Float32:
    """Factors `[groups, samples, 1]` that leave none longer than twice the 90th percentile.

    The first token of a decoder can be a thousand times as long as any other: unbounded, C would
    say nothing of the others.
    """
    length = np.sqrt(np.einsum("gsk,gsk->gs", columns, columns))[..., None]
    most = 2 * np.quantile(length, 0.9, axis=1, keepdims=True)
    longer = (length > most) & (most > 0)
    found: Float32 = np.where(longer, most / np.maximum(length, _TINY), 1.0).astype(np.float32)
    return found


def _moment(probe: _Probe, walk: OperandWalk, rows: int, path: Path) -> Moment | None:
    """The moment of a value that the walk has reached, with C in a file."""
    matrix, feeds = probe.matrix, walk.walk.feeds
    second = np.zeros((matrix.groups, matrix.width, matrix.width))
    first = np.zeros((matrix.groups, matrix.width))
    count, total = sum(map(samples_of, feeds)), 0
    for at, feed in enumerate(feeds):
        x = walk.walk.read(at, probe.value)
        if not x.size:
            continue
        if not math.isfinite(float(x.max()) + float(x.min())):
            raise _not_finite(probe)
        limit = enough_columns(matrix.width, count, rows) * samples_of(feed)
        columns = tempered(matrix.columns(x, limit, at))
        for start in range(0, columns.shape[1], _ROWS_AT_ONCE):
            part = columns[:, start : start + _ROWS_AT_ONCE]
            second += np.matmul(part.transpose(0, 2, 1), part)
        first += columns.sum(axis=1, dtype=np.float64)
        total += columns.shape[1]
    if not total:
        return None
    np.save(path, (second / total).astype(np.float32))
    return Moment(StoredArray(path), (first / total).astype(np.float32), total)


def _quantized(model: Model) -> list[tuple[str, int]]:
    """The weights that are read through a FakeQuant."""
    readers = (reader for found in weight_quantizers(model) for reader in found.readers)
    return [(node.name or "", index) for node, index in readers]


def quantizable(model: Model, ctx: PassContext) -> list[tuple[str, int]]:
    """The weights that the target could store in fewer bits."""
    rows = ((node, weight_row(node, ctx.target)) for node in model.graph)
    return [(n.name or "", index) for n, row in rows if row is not None for index in row.weights]


def _not_finite(probe: _Probe) -> CalibrationError:
    node = probe.weights[0].rpartition(":")[0]
    return CalibrationError(
        f"what the node '{node}' reads is not finite on the calibration data",
        where=f"value '{probe.value}'",
        why="the float model overflows or divides by zero on this input",
        hint="check --preprocess and the data, or leave the sample out",
    )
