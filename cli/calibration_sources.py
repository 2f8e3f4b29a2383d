"""Where calibration items come from: archives, folders, images, a Python function, arrays."""

from __future__ import annotations

import importlib
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, final, get_args

import numpy as np

from octavo.cli.model_inputs import LABELS, Array, Item
from octavo.cli.preprocess import IMAGE_SUFFIXES
from octavo.ir.errors import CalibrationError
from octavo.ir.synthetic import Origin

if TYPE_CHECKING:
    from octavo.cli.preprocess import Preprocess

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@final
@dataclass(frozen=True)
class Entry:
    """One item with what to call it in a message."""

    where: str
    item: Item | Array


@final
@dataclass(frozen=True)
class Items:
    """`count` items that `read` yields for sorted indices, one in memory at a time.

    `labels` has one entry per item; `rereadable` is False where a second read may differ.
    `origin` is what octavo calls data that it made itself.
    """

    count: int
    read: Callable[[Sequence[int]], Iterator[Entry]]
    labels: Array | None = None
    rereadable: bool = True
    origin: str = "real"


def open_items(spec: object, preprocess: Preprocess | None, limit: int) -> Items:
    """The items a path, `module:function`, mapping, array or iterable names."""
    if isinstance(spec, str | Path):
        return _from_text(str(spec), preprocess, limit)
    if isinstance(spec, Mapping):
        return _from_arrays({str(name): np.asarray(array) for name, array in spec.items()})
    if isinstance(spec, np.ndarray):
        return _from_arrays({"": spec})
    if isinstance(spec, Iterable):
        return _from_iterable(spec, limit, "the iterable")
    message = f"calibration data cannot be read from {type(spec).__name__}"
    raise CalibrationError(
        message, hint="give a path, arrays by input name, or an iterable of feeds"
    )


def _from_text(text: str, preprocess: Preprocess | None, limit: int) -> Items:
    path = Path(text)
    if path.is_dir():
        return _from_folder(path, preprocess)
    if path.is_file() and path.suffix == ".npz":
        return _from_archive(path)
    if path.is_file() and path.suffix == ".npy":
        return _from_arrays({"": _load(path)})
    if path.exists():
        message = f"calibration data cannot be read from a {path.suffix or 'plain'} file"
        hint = "give an .npz, a folder of .npy, .npz or images, or module:function"
        raise CalibrationError(message, where=text, hint=hint)
    if _FUNCTION.fullmatch(text):
        return _from_iterable(_call(text), limit, text)
    message = "there is no such calibration data"
    raise CalibrationError(message, where=text, hint="a file, a folder, or module:function")


def _from_arrays(arrays: Mapping[str, Array]) -> Items:
    """Samples along the first axis of each array."""
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    labels = next((np.asarray(arrays[k]) for k in LABELS if k in arrays), None)
    count = _same_count(counts, "the arrays")

    def read(indices: Sequence[int]) -> Iterator[Entry]:
        for index in indices:
            yield Entry(f"sample {index}", {name: array[index] for name, array in arrays.items()})

    return Items(count, read, labels)


def _from_archive(path: Path) -> Items:
    """Samples along the first axis of each member, read in order and not all at once."""
    with _archive(path) as archive:
        origin = _origin(archive)
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        counts = {}
        for name in names:
            with archive.open(name) as member:
                shape = _Rows(member, f"{path}: {name}").shape
                counts[name.removesuffix(".npy")] = shape[0] if shape else 0
    count = _same_count(counts, str(path))
    label = next((name for name in LABELS if name in counts), None)
    labels = _load(path, label) if label else None

    def read(indices: Sequence[int]) -> Iterator[Entry]:
        with _archive(path) as archive:
            members = {n.removesuffix(".npy"): _Rows(archive.open(n), str(path)) for n in names}
            for index in indices:
                item = {name: rows.row(index) for name, rows in members.items()}
                yield Entry(f"sample {index} of {path.name}", item)

    return Items(count, read, labels, origin=origin)


def _origin(archive: zipfile.ZipFile) -> str:
    """What `octavo synthesize` left in the archive's comment."""
    tool, _, origin = archive.comment.decode(errors="replace").partition(" ")
    return origin if tool == "octavo" and origin in get_args(Origin) else "real"


class _Rows:
    """Rows of an .npy stream by increasing index."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self._stream, self._where = stream, where
        try:
            version = np.lib.format.read_magic(stream)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, fortran, self._dtype = header(stream)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(where, error) from None
        if self._dtype.hasobject or fortran:
            why = "it holds pickled objects" if self._dtype.hasobject else "it is in Fortran order"
            raise _unreadable(where, ValueError(why))
        self._next = 0

    def row(self, index: int) -> Array:
        size = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        try:
            self._stream.seek((index - self._next) * size, 1)
            data = self._stream.read(size)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _unreadable(f"sample {index} of {self._where}", error) from error
        if len(data) != size:
            early = ValueError("the file ends early")
            raise _unreadable(f"sample {index} of {self._where}", early)
        self._next = index + 1
        return np.frombuffer(data, self._dtype).reshape(self.shape[1:])


def _from_folder(folder: Path, preprocess: Preprocess | None) -> Items:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kinds: dict[str, list[Path]] = {"npy": [], "npz": [], "images": []}
    for path in files:
        suffix = path.suffix.lower()
        kind = "images" if suffix in IMAGE_SUFFIXES else suffix[1:]
        kinds.get(kind, []).append(path)
    found = [kind for kind, paths in kinds.items() if paths]
    if len(found) != 1:
        message = f"the folder holds {' and '.join(found) or 'no calibration data'}"
        hint = "a folder holds .npy files, .npz files or images, and one kind only"
        raise CalibrationError(message, where=str(folder), hint=hint)
    if found == ["images"]:
        return _from_images(kinds["images"], preprocess, folder)
    paths = kinds[found[0]]

    def read(indices: Sequence[int]) -> Iterator[Entry]:
        for path in (paths[index] for index in indices):
            yield Entry(str(path), _load_all(path) if path.suffix == ".npz" else _load(path))

    return Items(len(paths), read)


def _from_images(paths: list[Path], preprocess: Preprocess | None, folder: Path) -> Items:
    if preprocess is None:
        raise CalibrationError(
            "images need --preprocess",
            where=str(folder),
            why="the model file does not say how its training scaled pixels",
            hint="for instance --preprocess size=224,mean=127,std=128,layout=nchw",
        )

    def read(indices: Sequence[int]) -> Iterator[Entry]:
        for path in (paths[index] for index in indices):
            yield Entry(str(path), preprocess.load(path))

    return Items(len(paths), read)


def _from_iterable(source: Iterable[Any], limit: int, name: str) -> Items:
    """An iterable may give something else the next time, so its items are kept."""
    kept: list[Item | Array] = []
    for item in source:
        if len(kept) == limit:
            break
        kept.append(item if isinstance(item, Mapping) else np.asarray(item))

    def read(indices: Sequence[int]) -> Iterator[Entry]:
        for index in indices:
            yield Entry(f"item {index} of {name}", kept[index])

    return Items(len(kept), read)


def _call(text: str) -> Iterable[Any]:
    """Call the function the user named; modules of the current folder are found first."""
    module_name, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        message = f"the module '{module_name}' cannot be imported"
        raise CalibrationError(message, where=text, why=str(error)) from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        message = f"the module '{module_name}' has no function '{name}'"
        raise CalibrationError(message, where=str(getattr(module, "__file__", text)))
    result = function()
    if not isinstance(result, Iterable):
        message = f"{text} returns {type(result).__name__}, not an iterable of feeds"
        raise CalibrationError(message, where=text)
    return result


def _same_count(counts: Mapping[str, int], where: str) -> int:
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        message = "the arrays hold different numbers of samples"
        raise CalibrationError(message, where=where, why=f"along the first axis: {listed}")
    return next(iter(counts.values()), 0)


def _load(path: Path, key: str = "") -> Array:
    if key:
        return _load_all(path)[key]
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(str(path), error) from error
    return array


def _load_all(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(str(path), error) from error


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(str(path), error) from error
    with archive:
        yield archive


def _unreadable(where: str, error: Exception) -> CalibrationError:
    message = "the calibration data cannot be read"
    hint = "save arrays of plain numbers with numpy.save or numpy.savez"
    return CalibrationError(message, where=where, why=str(error), hint=hint)
