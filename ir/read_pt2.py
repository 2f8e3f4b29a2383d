"""Load a `.pt2` file without running anything that the file says.

`torch.export.load` unpickles sample inputs, custom objects and old weights, evaluates symbolic
expressions as Python, and turns names into generated code. So everything of that kind is checked
first, through the same archive reader, and a file that needs more than plain tensors, ATen
operators and arithmetic on sizes is refused.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
from typing import TYPE_CHECKING, Any, Final

from octavo.ir.errors import ModelError, OctavoError, UnsafeModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram
    from torch.export.pt2_archive import PT2ArchiveReader

_MEMBER = re.compile(
    r"archive_(format|version)|byteorder|\.data/\w+|extra/.*"
    r"|models/\w+\.json|data/sample_inputs/\w+\.pt"
    r"|data/(weights|constants)/(weight_\d+|tensor_\d+|\w+_config\.json)"
)
_NAME = re.compile(r"\w*")
_OPERATOR = re.compile(
    r"torch\.ops(\.(?!__)\w+){2,3}|torch\.sym_\w+|math\.[a-z]+\d*"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs"
    r"|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|lshift|rshift)"
)
_TREE = re.compile(r"[\w\s\"\\\[\]{}:,.]*")
_SYMPY: Final = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs"),
    *("floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "oo", "inf"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv", "PythonMod", "Where"),
    *("ModularIndexing", "CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt"),
    *("RoundDecimal", "ToFloat", "PowByNatural", "FloatPow", "LShift", "RShift", "Identity"),
}
_ARITHMETIC: Final = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop),
)


def load_pt2(path: Path) -> ExportedProgram:
    """The exported program in a `.pt2` file.

    Raises UnsafeModel for content that could run code, ModelError for anything else that torch
    cannot load.
    """
    from torch.export.pt2_archive import PT2ArchiveReader, _package

    try:
        with PT2ArchiveReader(str(path)) as archive:
            _check(archive, path)
        programs = _package.load_pt2(str(path)).exported_programs
    except OctavoError:
        raise
    except Exception as error:  # torch raises anything from KeyError to SerializeError here
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise ModelError(
            "torch cannot load the exported program",
            where=str(path),
            why=reason,
            hint="write it again with torch.export.save of this torch version",
        ) from error
    if len(programs) != 1:
        raise ModelError(f"the archive holds {len(programs)} programs, not one", where=str(path))
    (program,) = programs.values()
    # Guards are Python source that torch would execute on the first call of the module.
    program._guards_code = []
    return program


def _check(archive: PT2ArchiveReader, path: Path) -> None:
    names: list[str] = archive.archive_file.get_all_records()
    for name in names:
        if not _MEMBER.fullmatch(name):
            raise _refused(path, f"it holds '{name}', which is more than a graph and its tensors")
        if name.endswith(".json"):
            content = json.loads(archive.read_string(name))
            _check_json(content, path, name)
            if name.endswith("_config.json"):
                _check_sizes(archive, content["config"], name, path)
        elif name.endswith(".pt"):
            _check_pickle(archive.read_bytes(name), path, name)


def _check_json(content: object, path: Path, member: str) -> None:
    for key, value in _pairs(content):
        allowed = _RULES.get(key)
        if allowed is not None and not allowed(value):
            raise _refused(path, f"'{member}' has {key} = {str(value)[:80]!r}")


def _check_sizes(
    archive: PT2ArchiveReader, config: Mapping[str, Any], member: str, path: Path
) -> None:
    """An empty record stands for a tensor without elements; torch would allocate any size."""
    folder = member.rpartition("/")[0]
    for name, payload in config.items():
        record = f"{folder}/{payload['path_name']}"
        elements = math.prod(size["as_int"] for size in payload["tensor_meta"]["sizes"])
        if elements and archive.archive_file.get_record_size(record) == 0:
            raise ModelError(
                f"tensor '{name}' has {elements} elements and no data", where=str(path)
            )


def _check_pickle(content: bytes, path: Path, member: str) -> None:
    import pickle

    import torch

    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, f"'{member}' unpickles more than tensors") from error


def _pairs(content: object) -> Iterator[tuple[str, object]]:
    """Every key with its value, at any depth."""
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _is_arithmetic(value: object) -> bool:
    """Whether an expression only computes with sizes; torch gives it to `eval` through sympy."""
    try:
        tree = ast.parse(str(value), mode="eval")
    except SyntaxError:
        return False
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return (
        all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree))
        and all(isinstance(call, ast.Name) and call.id in _SYMPY for call in calls)
        and all(_NAME.fullmatch(text) for text in texts if isinstance(text, str))
    )


def _matches(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: value is None or bool(pattern.fullmatch(str(value)))


_RULES: Final[Mapping[str, Callable[[object], bool]]] = {
    "use_pickle": lambda value: value is False,
    "target": _matches(_OPERATOR),
    "as_operator": _matches(_OPERATOR),
    "expr_str": _is_arithmetic,
    "name": _matches(_NAME),
    "forward_arg_names": lambda value: all(map(_matches(_NAME), value or ())),  # type: ignore[call-overload]
    "in_spec": _matches(_TREE),
    "out_spec": _matches(_TREE),
}


def _refused(path: Path, why: str) -> UnsafeModel:
    return UnsafeModel(
        "the .pt2 file is refused: loading it could run code",
        where=str(path),
        why=why,
        hint="read the module itself, or the ExportedProgram, if you trust its author",
    )
