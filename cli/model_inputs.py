"""What a model's inputs accept, and how one calibration item is made to fit them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from octavo.ir.errors import CalibrationError, UnknownName

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model

Array = np.ndarray[Any, Any]
Item = Mapping[str, Array]
LABELS = ("label", "labels")


@final
@dataclass(frozen=True)
class Input:
    """A graph input: `dims` holds sizes, symbol names, or None; None where the rank is unknown."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dims = "…" if self.dims is None else ", ".join(str(d or "?") for d in self.dims)
        return f"{self.dtype} [{dims}]"


@final
@dataclass(frozen=True)
class Inputs:
    """All inputs of a model, by name; `notes` gathers what had to be adapted, each once.

    `outputs` are those of the model.
    """

    by_name: Mapping[str, Input]
    outputs: tuple[Input, ...] = ()
    notes: dict[str, None] = field(default_factory=dict)

    @staticmethod
    def of(model: Model) -> Inputs:
        values = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
        outputs = tuple(map(_described, model.graph.outputs))
        return Inputs({str(v.name): _described(v) for v in values}, outputs)

    def output_bytes(self, item: Item) -> int:
        """Bytes of the outputs for an item as far as shapes tell; unknown sizes count as 1."""
        sizes: dict[int | str | None, int] = {}
        for name, array in item.items():
            sizes.update(zip(self.by_name[name].dims or (), array.shape, strict=False))
        return sum(
            output.dtype.itemsize
            * math.prod(d if isinstance(d, int) else sizes.get(d, 1) for d in output.dims or ())
            for output in self.outputs
        )

    @property
    def batch(self) -> int | None:
        """Samples that a feed must hold; None where the model leaves it open."""
        leading = self._leading()
        fixed = leading.pop() if len(leading) == 1 else None
        return fixed if isinstance(fixed, int) and fixed > 0 else None

    @property
    def joinable(self) -> bool:
        """Whether items can be put together along the first axis of every input."""
        return not any(isinstance(dim, int) for dim in self._leading()) or self.batch is not None

    def _leading(self) -> set[int | str | None]:
        # A scalar has no axis to join along, like a size that is fixed beside open ones.
        return {None if i.dims is None else next(iter(i.dims), 0) for i in self.by_name.values()}

    def fit(self, item: Item | Array, where: str) -> dict[str, Array]:
        """The item with the names, ranks and dtypes the model wants.

        Raises CalibrationError or UnknownName that say which input of which item does not fit.
        """
        named = self._named(item, where)
        fitted = {n: self._fitted(self.by_name[n], a, where) for n, a in named.items()}
        self._check_symbols(fitted, where)
        return {name: fitted[name] for name in self.by_name}

    def _named(self, item: Item | Array, where: str) -> Item:
        if not isinstance(item, Mapping):
            item = {"": np.asarray(item)}
        item = {k: v for k, v in item.items() if k in self.by_name or k not in LABELS}
        if len(item) == len(self.by_name) == 1 and item.keys() != self.by_name.keys():
            ((given, array),), (name,) = item.items(), self.by_name
            if given:
                self.notes[f"'{given}' is taken as the model's only input '{name}'"] = None
            return {name: array}
        for name in item:
            if name not in self.by_name:
                kind = "calibration input" if name else "calibration input without a"
                raise UnknownName(kind, name or "name", self.by_name, where=where)
        for name in self.by_name:
            if name not in item:
                message = f"the calibration data lacks the input '{name}'"
                known = ", ".join(item) or "nothing"
                raise CalibrationError(message, where=where, why=f"it has {known}")
        return item

    def _fitted(self, wanted: Input, array: Array, where: str) -> Array:
        where = f"input '{wanted.name}' of {where}"
        array = self._cast(wanted, np.asarray(array), where)
        if wanted.dims is None:
            return array
        if array.ndim == len(wanted.dims) - 1:
            array = array[None]
        if array.ndim != len(wanted.dims) or any(
            isinstance(dim, int) and dim != size
            for dim, size in zip(wanted.dims[1:], array.shape[1:], strict=True)
        ):
            message = f"the shape {list(array.shape)} does not fit"
            raise CalibrationError(message, where=where, why=f"the model takes {wanted}")
        if array.size == 0:
            message = "the sample is empty"
            raise CalibrationError(message, where=where, why=f"its shape is {list(array.shape)}")
        return array

    def _cast(self, wanted: Input, array: Array, where: str) -> Array:
        given = array.dtype
        if given != wanted.dtype:
            array = _converted(wanted, array, where)
            self.notes[f"input '{wanted.name}' is cast from {given} to {wanted.dtype}"] = None
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            message = "the calibration data holds NaN or infinite values"
            raise CalibrationError(message, where=where)
        return array

    def _check_symbols(self, item: Item, where: str) -> None:
        """Dimensions with one symbol have one size in an item."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, array in item.items():
            for dim, size in zip(self.by_name[name].dims or (), array.shape, strict=False):
                if isinstance(dim, str) and sizes.setdefault(dim, (size, name))[0] != size:
                    known, first = sizes[dim]
                    message = f"'{dim}' is {known} in '{first}' and {size} in '{name}'"
                    raise CalibrationError(message, where=where)


def _converted(wanted: Input, array: Array, where: str) -> Array:
    """Value-preserving for integers, rounding for floats, refused where meaning is lost."""
    kinds = array.dtype.kind, wanted.dtype.kind
    if kinds in {("f", "f"), ("i", "f"), ("u", "f"), ("b", "f")}:
        with np.errstate(over="ignore"):
            return array.astype(wanted.dtype)
    if kinds[0] in "iub" and kinds[1] in "iu":
        cast = array.astype(wanted.dtype)
        if np.array_equal(cast, array):
            return cast
        why = f"some values do not fit {wanted.dtype}"
    else:
        why = f"the model takes {wanted}"
    message = f"the dtype {array.dtype} does not fit"
    raise CalibrationError(message, where=where, why=why, hint="save the data in that dtype")


def _described(value: onnx_ir.Value) -> Input:
    return Input(str(value.name), _dtype(value), _dims(value))


def _dtype(value: onnx_ir.Value) -> np.dtype[Any]:
    if value.dtype is None:
        return np.dtype(np.float32)
    # Strings have no numpy dtype of their own in onnx.
    return np.dtype(object) if value.dtype.name == "STRING" else value.dtype.numpy()


def _dims(value: onnx_ir.Value) -> tuple[int | str | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape.dims)


def item_bytes(item: Item) -> int:
    """Bytes of all arrays of one item."""
    return sum(array.nbytes for array in item.values())


def leading(item: Item) -> int:
    """How many samples an item holds: the size of its first axis."""
    shape: tuple[int, ...] = next(iter(item.values())).shape
    return shape[0] if shape else 1


def joined(items: list[dict[str, NDArray[np.generic]]]) -> dict[str, NDArray[np.generic]]:
    """Items of equal sample shape as one feed."""
    if len(items) == 1:
        return items[0]
    return {name: np.concatenate([item[name] for item in items]) for name in items[0]}
