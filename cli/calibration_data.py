"""Calibration data: opened, checked against the model once, and streamed in feeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeGuard, final

import numpy as np

from octavo.cli.calibration_sources import Entry, Items, open_items
from octavo.cli.model_inputs import Array, Inputs, item_bytes, joined, leading
from octavo.cli.synthetic_data import SYNTHETIC, self_made
from octavo.ir.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.cli.preprocess import Preprocess
    from octavo.ir.calibration import Batches
    from octavo.ir.model import Model

Feed = dict[str, Array]

_FEW = 8
_SAMPLES_PER_FEED = 8
# Larger feeds cost more page faults than they save calls.
_FEED_BYTES = 5 << 19
# Outputs of a language model hold a number per token and word: they are kept to be compared.
_OUTPUT_BYTES = 64 << 20
# Checked items stay in memory up to this size; what is larger is read again for each sweep.
_KEPT_BYTES = 256 << 20


@final
@dataclass(frozen=True)
class CalibrationData:
    """Checked feeds of calibration data, in a fixed order, with what a user should know of them."""

    items: Items
    indices: tuple[int, ...]
    inputs: Inputs
    samples: int
    sha256: str
    labels: Array | None
    warnings: tuple[str, ...]
    kept: tuple[Feed, ...] | None = None

    @property
    def origin(self) -> str:
        """Where the data comes from: real, or what octavo calls data it made."""
        return self.items.origin

    def __iter__(self) -> Iterator[Feed]:
        if self.kept is not None:
            return _grouped(self.kept, self.inputs)
        entries = self.items.read(self.indices)
        return _grouped((self.inputs.fit(e.item, e.where) for e in entries), self.inputs)


def load_calibration(
    spec: object,
    model: Model,
    preprocess: Preprocess | None = None,
    limit: int = 512,
    seed: int = 0,
) -> Batches:
    """Open calibration data and check every sample against the model's inputs.

    `spec` is an .npz by input name (first axis: samples), a folder of .npy or .npz (one sample or
    feed each) or of images, `module:function`, or from Python a mapping of arrays, an array, an
    iterable of feeds, or `Batches`; `synthetic` makes it from the model. More than `limit` samples
    are drawn from by `seed`. Raises CalibrationError, or UnknownName for names the model does not
    have.
    """
    if _is_batches(spec):
        return spec
    if isinstance(spec, str) and spec == SYNTHETIC:
        return self_made(model, seed)
    inputs = Inputs.of(model)
    items = open_items(spec, preprocess and _sized(preprocess, inputs), limit)
    indices = _drawn(items.count, limit, seed)
    survey = _Survey()
    feeds = _grouped(survey.check(items.read(indices), inputs), inputs)
    samples = sum(leading(feed) for feed in feeds)
    if samples == 0:
        raise _no_samples(survey.samples, inputs)
    labels = None if items.labels is None else items.labels[list(indices)][:samples]
    return CalibrationData(
        items,
        indices,
        inputs,
        samples,
        hashlib.sha256(b"".join(survey.digests)).hexdigest(),
        labels,
        (*inputs.notes, *survey.warnings(samples)),
        survey.kept,
    )


@final
@dataclass
class _Survey:
    """What one reading of all items tells."""

    digests: list[bytes] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    kept: tuple[Feed, ...] | None = ()

    def check(self, entries: Iterable[Entry], inputs: Inputs) -> Iterator[Feed]:
        """The items, made to fit the model, observed on their way."""
        kept: list[Feed] = []
        for entry in entries:
            item = inputs.fit(entry.item, entry.where)
            self._observe(item, entry.where)
            if self.bytes <= _KEPT_BYTES:
                kept.append(item)
            yield item
        self.kept = tuple(kept) if self.bytes <= _KEPT_BYTES else None

    def _observe(self, item: Feed, where: str) -> None:
        self.digests.append(_item_digest(item))
        self.samples += leading(item)
        self.bytes += item_bytes(item)
        floats = [array for array in item.values() if array.dtype.kind == "f"]
        if floats and all(array.min() == array.max() for array in floats):
            self.constant.append(where)

    def warnings(self, used: int) -> Iterator[str]:
        if used < self.samples:
            yield f"{self.samples - used} samples do not fill a batch and are left out"
        if used < _FEW:
            yield f"only {used} samples: ranges from fewer than {_FEW} are not reliable"
        count = len(self.digests)
        if count > 1 and len(set(self.digests)) == 1:
            yield f"all {count} samples are identical"
        elif self.constant:
            some = ", ".join(self.constant[:3]) + (", …" if len(self.constant) > 3 else "")
            yield f"{len(self.constant)} of {count} samples are constant: {some}"


def _grouped(items: Iterable[Feed], inputs: Inputs) -> Iterator[Feed]:
    """Feeds of as many samples as the model wants; an incomplete last one of a fixed size goes."""
    fixed = inputs.batch
    waiting: list[Feed] = []
    for item in (part for whole in items for part in _divided(whole, inputs)):
        if waiting and (_full(waiting, item, inputs) or _shape(item) != _shape(waiting[0])):
            if fixed is None or _count(waiting) == fixed:
                yield joined(waiting)
            waiting = []
        waiting.append(item)
    if waiting and (fixed is None or _count(waiting) == fixed):
        yield joined(waiting)


def _divided(item: Feed, inputs: Inputs) -> Iterator[Feed]:
    """A feed that is larger than feeds are made, in parts of samples."""
    most = _most(item, inputs)
    if inputs.batch is not None or not inputs.joinable or leading(item) <= most:
        yield item
        return
    size = max(1, min(_SAMPLES_PER_FEED, most))
    for start in range(0, leading(item), size):
        yield {name: array[start : start + size] for name, array in item.items()}


def _full(waiting: Sequence[Feed], item: Feed, inputs: Inputs) -> bool:
    count = _count(waiting)
    if inputs.batch is not None or not inputs.joinable:
        return count >= (inputs.batch or 1)
    return count + leading(item) > min(_SAMPLES_PER_FEED, _most(item, inputs))


def _most(item: Feed, inputs: Inputs) -> int:
    """Samples like those of an item that a feed may hold for its bytes and those of outputs."""
    limits = ((_FEED_BYTES, item_bytes(item)), (_OUTPUT_BYTES, inputs.output_bytes(item)))
    return min(limit * leading(item) // max(taken, 1) for limit, taken in limits)


def _count(items: Sequence[Feed]) -> int:
    return sum(leading(item) for item in items)


def _shape(item: Feed) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape[1:] for array in item.values())


def _item_digest(item: Feed) -> bytes:
    digest = hashlib.sha256()
    for name, array in item.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _sized(preprocess: Preprocess, inputs: Inputs) -> Preprocess:
    """The model's own image size where none was asked for."""
    dims = next((i.dims for i in inputs.by_name.values() if i.dims and len(i.dims) == 4), None)
    if preprocess.size is not None or dims is None:
        return preprocess
    height, width = dims[2:] if preprocess.layout == "nchw" else dims[1:3]
    if isinstance(height, int) and isinstance(width, int):
        return replace(preprocess, size=(height, width))
    return preprocess


def _drawn(count: int, limit: int, seed: int) -> tuple[int, ...]:
    if count <= limit:
        return tuple(range(count))
    chosen = np.random.default_rng(seed).choice(count, limit, replace=False)
    return tuple(sorted(chosen.tolist()))


def _is_batches(spec: object) -> TypeGuard[Batches]:
    return all(hasattr(spec, name) for name in ("samples", "sha256", "labels", "__iter__"))


def _no_samples(found: int, inputs: Inputs) -> CalibrationError:
    if found == 0:
        return CalibrationError("the calibration data holds no samples")
    return CalibrationError(
        f"the calibration data holds {found} samples",
        why=f"the model takes batches of {inputs.batch}",
        hint="give more samples, or export the model with a dynamic batch axis",
    )
