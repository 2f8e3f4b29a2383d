"""Facts on disk: `facts.json` for the structure, `facts.npz` for the arrays, no pickle.

A dataclass is `{"is": name, "fields": {…}}`, a mapping `{"map": {…}}`, an array
`{"array": key of the npz}`, a tuple a list, a model `{"model": file}` beside a list of its own
facts. Only dataclasses of the modules named here are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.ir import facts as fact_types
from octavo.ir import menu as menu_types
from octavo.ir import moments as moment_types
from octavo.ir import quant as quant_types
from octavo.ir import reference as reference_types
from octavo.ir.arrays_io import StoredArray, read_arrays, write_arrays
from octavo.ir.errors import UsageError
from octavo.ir.facts import Fact
from octavo.ir.model import Model, Source
from octavo.ir.read_onnx import read_verbatim
from octavo.ir.write import write

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL = "model.onnx"
Arrays = dict[str, "NDArray[np.generic]"]
_TYPES: dict[str, type] = {
    name: kind
    for module in (fact_types, menu_types, moment_types, quant_types, reference_types)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def write_facts(facts: Mapping[type[Fact], Fact], folder: Path) -> None:
    """Write all facts of a model into a folder, the same bytes for the same facts."""
    arrays: Arrays = {}
    ordered = sorted(facts, key=lambda kind: kind.__name__)
    structure = [_encode(facts[kind], arrays, folder) for kind in ordered]
    text = json.dumps(structure, indent=1) + "\n"
    (folder / "facts.json").write_text(text, encoding="utf-8")
    write_arrays(folder / "facts.npz", arrays)


def read_facts(folder: Path) -> dict[type[Fact], Fact]:
    """The facts that `write_facts` wrote; UsageError where the files are anything else."""
    try:
        structure = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        arrays = read_arrays(folder / "facts.npz")
        read = _decode(structure, arrays, folder)
        if not (isinstance(read, tuple) and all(isinstance(fact, Fact) for fact in read)):
            raise TypeError("no list of facts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = "the facts cannot be read"
        raise UsageError(
            message, where=str(folder), why=f"{type(error).__name__}: {error}"
        ) from None
    return {type(fact): fact for fact in read}


def _encode(value: Any, arrays: Arrays, folder: Path) -> object:
    if isinstance(value, Model):
        return {"model": _write_model(value, folder), "source": dataclasses.asdict(value.source)}
    if isinstance(value, StoredArray):
        value = value.load()
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: _encode(getattr(value, name), arrays, folder) for name in names}
        return {"is": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"map": {key: _encode(item, arrays, folder) for key, item in value.items()}}
    if isinstance(value, np.ndarray):
        key = f"a{len(arrays)}"
        arrays[key] = value
        return {"array": key}
    if isinstance(value, tuple | list):
        return [_encode(item, arrays, folder) for item in value]
    return value


def _write_model(model: Model, folder: Path) -> str:
    """The name of the folder that holds the model and its facts."""
    name = f"model{sum(1 for _ in folder.glob('model*/'))}"
    (folder / name).mkdir()
    write(model, folder / name / _MODEL)
    write_facts(model.facts, folder / name)
    return name


def _decode(entry: Any, arrays: Mapping[str, NDArray[np.generic]], folder: Path) -> Any:
    match entry:
        case {"model": str(name), "source": dict(source)} if Path(name).name == name:
            model = read_verbatim(folder / name / _MODEL)
            return Model(model.ir, Source(**source), read_facts(folder / name))
        case {"is": str(name), "fields": dict(fields)}:
            decoded = {key: _decode(item, arrays, folder) for key, item in fields.items()}
            return _TYPES[name](**decoded)
        case {"map": dict(items)}:
            return {key: _decode(item, arrays, folder) for key, item in items.items()}
        case {"array": str(key)}:
            return arrays[key]
        case list():
            return tuple(_decode(item, arrays, folder) for item in entry)
        case _:
            return entry
