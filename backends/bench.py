"""Latency of model files against each other, and the feeds to run them with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.backends.ort_session import environment, make_session
from octavo.ir.artifact import Bench, BenchRow
from octavo.ir.errors import UnknownName, UsageError
from octavo.ir.memory import release_memory

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.backend import Session
    from octavo.ir.calibration import Feed
    from octavo.ir.model import Model

_IMAGE_SIZE = 224
_SEQUENCE_LENGTH = 32
_FEWEST_ROUNDS = 9
_GOOD_ENOUGH = 0.01
_LARGE_BYTES = 256 << 20
# Reading through these does not change which rows of a table an index selects.
_INDEX_OPS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")


def bench(
    files: Sequence[Path],
    feed: Feed,
    *,
    threads: int = 1,
    rounds: int = 200,
    warm_up: int = 3,
    seconds_limit: float = 1.0,
    sessions: Callable[[Path], Session] | None = None,
    described: str = "",
) -> Bench:
    """Time every file once per round, in an order that rotates; the first is the reference.

    Stops after `rounds`, after `seconds_limit` (not before three rounds), or as soon as every
    median ratio is known to 1 % (McGill, Tukey, Larsen 1978: half a notch). `sessions` loads a
    file (default: ONNX Runtime), `described` says with what. Files of more than 256 MB together
    are timed one after the other, so that only one of them is in memory.
    """
    if not files:
        message = "no file to time"
        raise UsageError(message)

    def load(file: Path) -> Callable[[], None]:
        session = sessions(file) if sessions else make_session(file, threads=threads)
        return session.bound({name: feed[name] for name in session.inputs if name in feed})

    if sum(map(file_bytes, files)) > _LARGE_BYTES:
        share = seconds_limit / len(files)
        seconds = _one_by_one(load, files, rounds, warm_up, share)
    else:
        seconds = _rounds([load(file) for file in files], rounds, warm_up, seconds_limit)
    rows = tuple(_row(file, k, seconds) for k, file in enumerate(files))
    described = described or environment(threads)
    return Bench(rows, threads, len(seconds), feed_shapes(feed), described)


def untimed(files: Sequence[Path], feed: Feed, threads: int, described: str) -> Bench:
    """Bytes of files that nothing here can time; `described` says why."""
    rows = tuple(BenchRow(str(file), file_bytes(file), 0.0, 0.0, 0.0, 0.0) for file in files)
    return Bench(rows, threads, 0, feed_shapes(feed), described)


def _one_by_one(
    load: Callable[[Path], Callable[[], None]],
    files: Sequence[Path],
    rounds: int,
    warm_up: int,
    seconds_limit: float,
) -> NDArray[np.float64]:
    """Seconds `[round, file]`, as many rounds as the file with the fewest has."""
    columns = []
    for file in files:
        columns.append(_rounds([load(file)], rounds, warm_up, seconds_limit)[:, 0])
        release_memory()
    fewest = min(map(len, columns))
    return np.stack([column[:fewest] for column in columns], axis=1)


def _rounds(
    calls: Sequence[Callable[[], None]], rounds: int, warm_up: int, seconds_limit: float
) -> NDArray[np.float64]:
    """Seconds `[round, file]`."""
    begin = time.perf_counter()
    for done in range(warm_up):
        if done and time.perf_counter() - begin > seconds_limit / 4:
            break
        for call in calls:
            call()
    begin, measured = time.perf_counter(), list[list[float]]()
    while len(measured) < rounds:
        order = [(k + len(measured)) % len(calls) for k in range(len(calls))]
        timed = {k: _seconds(calls[k]) for k in order}
        measured.append([timed[k] for k in range(len(calls))])
        late = time.perf_counter() - begin > seconds_limit
        if len(measured) >= 3 and (late or _settled(np.array(measured))):
            break
    return np.array(measured)


def _seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _settled(seconds: NDArray[np.float64]) -> bool:
    """Whether the medians of all ratios to the first file are known well enough."""
    count, files = seconds.shape
    # Checking costs more than a short run; powers of two keep it rare.
    if count < _FEWEST_ROUNDS or (count & (count - 1) and count % 16):
        return False
    ratios = seconds if files == 1 else seconds[:, :1] / seconds[:, 1:]
    low, middle, high = np.percentile(ratios, (25, 50, 75), axis=0)
    return bool(np.all(1.57 * (high - low) / np.sqrt(count) < _GOOD_ENOUGH * middle))


def _row(file: Path, index: int, seconds: NDArray[np.float64]) -> BenchRow:
    low, middle, high = np.percentile(seconds[:, index], (10, 50, 90))
    speed = float(np.median(seconds[:, 0] / seconds[:, index]))
    return BenchRow(str(file), file_bytes(file), float(middle), float(low), float(high), speed)


def file_bytes(path: Path) -> int:
    """Bytes of a model file with its external data."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    size = path.stat().st_size
    # A file this large holds its weights itself, and parsing it would double them in memory.
    if size > _LARGE_BYTES:
        return size
    graph = onnx.load(path, load_external_data=False).graph
    names = {ExternalDataInfo(t).location for t in graph.initializer if uses_external_data(t)}
    return size + sum((path.parent / name).stat().st_size for name in names)


def feed_shapes(feed: Feed) -> dict[str, str]:
    """What a feed holds, by input: `float32[1, 3, 224, 224]`."""
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in feed.items()}


def random_feed(
    model: Model, shapes: Mapping[str, Sequence[int]] | None = None, seed: int = 0
) -> dict[str, NDArray[np.generic]]:
    """A feed for every graph input, the same for the same model, shapes and seed.

    Declared sizes are kept. A dynamic one comes from `shapes`, else it is 1 in front, 224 in an
    image, 0 where its name says "past", 32 otherwise; one name gets one size. Integers that look
    up a table stay inside it, masks are ones. Raises UsageError for a shape that does not fit.
    """
    shapes = shapes or {}
    inputs = {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}
    for name in shapes:
        if name not in inputs:
            raise UnknownName("input", name, inputs)
    sizes: dict[str, int] = {}
    for name, given in shapes.items():
        sizes |= _symbols(inputs[name], given)
    rng = np.random.default_rng(seed)
    feed: dict[str, NDArray[np.generic]] = {}
    for name, value in inputs.items():
        shape = tuple(shapes.get(name) or _shape(value, sizes))
        feed[name] = _array(value, shape, rng)
    return feed


def _symbols(value: onnx_ir.Value, given: Sequence[int]) -> dict[str, int]:
    """The sizes of symbolic dimensions that a given shape fixes."""
    declared = value.shape
    if declared is None:
        return {}
    wrong = len(given) != len(declared) or any(
        size < 0 or (isinstance(d, int) and d != size)
        for d, size in zip(declared, given, strict=False)
    )
    if wrong:
        message = f"shape {list(given)} does not fit input '{value.name}'"
        raise UsageError(message, why=f"the model declares {declared}")
    pairs = zip(declared, given, strict=True)
    return {str(d.value): size for d, size in pairs if not isinstance(d, int)}


def _shape(value: onnx_ir.Value, sizes: dict[str, int]) -> Iterator[int]:
    if value.shape is None:
        message = f"input '{value.name}' declares no shape"
        raise UsageError(message, hint="give its shape")
    dims = list(value.shape)
    for index, dim in enumerate(dims):
        if isinstance(dim, int):
            yield dim
            continue
        symbol = str(dim.value) if dim.value else f"{value.name}.{index}"
        yield sizes.setdefault(symbol, _default_size(symbol, index, dims))


def _default_size(symbol: str, index: int, dims: Sequence[object]) -> int:
    if index == 0:
        return 1
    if "past" in symbol:
        return 0
    channels_last = dims[-1] in (1, 3, 4)
    if len(dims) != 4 or (not channels_last and not _maybe_channels(dims[1])):
        return _SEQUENCE_LENGTH
    return 3 if index == 1 and not channels_last else _IMAGE_SIZE


def _maybe_channels(dim: object) -> bool:
    return not isinstance(dim, int) or dim in (1, 3, 4)


def _array(
    value: onnx_ir.Value, shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.generic]:
    if value.dtype is None or value.dtype.name == "STRING":
        message = f"no default feed for input '{value.name}' of type {value.dtype}"
        raise UsageError(message, hint="give a feed")
    dtype = value.dtype.numpy()
    rows = _table_rows(value, 6)
    if "mask" in (value.name or "").lower() or value.dtype.name == "BOOL":
        return np.ones(shape, dtype)
    if rows is None and value.dtype.is_floating_point():
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, min(rows or 2, 1000), shape).astype(dtype)


def _table_rows(value: onnx_ir.Value, depth: int) -> int | None:
    """Rows of the smallest table that the value, reshaped or cast, is an index of."""
    found: list[int | None] = []
    for use in value.uses() if depth else ():
        node, table = use.node, use.node.inputs[0]
        if node.op_type == "Gather" and use.idx == 1 and table is not None and table.shape:
            size = table.shape[node.attributes.get_int("axis", 0)]
            found.append(size if isinstance(size, int) else None)
        elif node.op_type in _INDEX_OPS and use.idx == 0:
            found.append(_table_rows(node.outputs[0], depth - 1))
    return min((rows for rows in found if rows is not None), default=None)
