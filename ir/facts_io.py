"""Facts on disk: `facts.json` for the structure, `facts.npz` for the arrays, no pickle.

A dataclass is `{"is": name, "fields": {…}}`, a mapping `{"map": {…}}`, an array
`{"array": key of the npz}`, a tuple a list. Only dataclasses of `facts` and `quant` are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.ir import facts as fact_types
from octavo.ir import quant as quant_types
from octavo.ir.arrays_io import read_arrays, write_arrays
from octavo.ir.errors import UsageError
from octavo.ir.facts import Fact

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[np.generic]"]
_TYPES: dict[str, type] = {
    name: kind
    for module in (fact_types, quant_types)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def write_facts(facts: Mapping[type[Fact], Fact], folder: Path) -> None:
    """Write all facts of a model into a folder, the same bytes for the same facts."""
    arrays: Arrays = {}
    structure = [_encode(facts[kind], arrays) for kind in sorted(facts, key=lambda k: k.__name__)]
    text = json.dumps(structure, indent=1) + "\n"
    (folder / "facts.json").write_text(text, encoding="utf-8")
    write_arrays(folder / "facts.npz", arrays)


def read_facts(folder: Path) -> dict[type[Fact], Fact]:
    """The facts that `write_facts` wrote; UsageError where the files are anything else."""
    try:
        structure = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        arrays = read_arrays(folder / "facts.npz")
        read = _decode(structure, arrays)
        if not (isinstance(read, tuple) and all(isinstance(fact, Fact) for fact in read)):
            raise TypeError("no list of facts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = "the facts cannot be read"
        raise UsageError(
            message, where=str(folder), why=f"{type(error).__name__}: {error}"
        ) from None
    return {type(fact): fact for fact in read}


def _encode(value: Any, arrays: Arrays) -> object:
    if dataclasses.is_dataclass(value):
        fields = {
            f.name: _encode(getattr(value, f.name), arrays) for f in dataclasses.fields(value)
        }
        return {"is": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"map": {key: _encode(item, arrays) for key, item in value.items()}}
    if isinstance(value, np.ndarray):
        key = f"a{len(arrays)}"
        arrays[key] = value
        return {"array": key}
    if isinstance(value, tuple):
        return [_encode(item, arrays) for item in value]
    return value


def _decode(entry: Any, arrays: Mapping[str, NDArray[np.generic]]) -> Any:
    match entry:
        case {"is": str(name), "fields": dict(fields)}:
            decoded = {key: _decode(item, arrays) for key, item in fields.items()}
            return _TYPES[name](**decoded)
        case {"map": dict(items)}:
            return {key: _decode(item, arrays) for key, item in items.items()}
        case {"array": str(key)}:
            return arrays[key]
        case list():
            return tuple(_decode(item, arrays) for item in entry)
        case _:
            return entry
