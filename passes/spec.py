"""The text form of passes and pipelines: `canonicalize,calibrate{method=percentile}`.

A value is an int, a float, true/false, none, or a string; strings with any of `{},=;"`, blanks
or control characters are written as JSON strings. A tuple is its items separated by `;`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from octavo.ir.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from octavo.passes.base import Pass

_STRING = r'"(?:[^"\\]|\\.)*"'
_PASS = re.compile(rf'\s*([A-Za-z][\w-]*)\s*(?:\{{((?:[^{{}}"]|{_STRING})*)\}})?\s*(,|$)')
_OPTION = re.compile(rf'\s*([A-Za-z][\w-]*)\s*=\s*((?:{_STRING}|[^,"])*?)\s*(?:,|$)')
_ITEM = re.compile(rf"{_STRING}|[^;]+")
_PLAIN = re.compile(r"(?!none$)[^{},=;\"\s\\\x00-\x1f\x7f-\x9f]+")


def parse_passes(text: str, registry: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """The passes a text names; errors carry a caret under the character that is wrong."""
    passes: list[Pass] = []
    position = 0
    while position < len(text):
        match = _PASS.match(text, position)
        if match is None:
            raise _syntax(text, position)
        name, options, separator = match.groups()
        if name not in registry:
            raise UnknownName("pass", name, registry, where=_caret(text, match.start(1)))
        passes.append(_build(registry[name], options or ""))
        position = match.end()
        if separator == "," and position >= len(text):
            raise _syntax(text, len(text))
    if not passes:
        message = "the pipeline is empty"
        raise UsageError(message, hint="name at least one pass, for instance canonicalize")
    return tuple(passes)


def format_pass(pass_: Pass) -> str:
    """The text that parses back to the pass; options at their default are left out."""
    shown = []
    for option in dataclasses.fields(_dataclass(type(pass_))):
        value = getattr(pass_, option.name)
        if value != option.default:
            shown.append(f"{_kebab(option.name)}={_format(value)}")
    return pass_.name + ("{" + ",".join(shown) + "}" if shown else "")


def format_passes(passes: Iterable[Pass]) -> str:
    """The text that parses back to the passes."""
    return ",".join(map(format_pass, passes))


def options_of(pass_type: type[Pass]) -> dict[str, tuple[str, str]]:
    """Option names with the text of their type and default."""
    hints = _hints(pass_type)
    return {
        _kebab(f.name): (_type_text(hints[f.name]), _format(f.default))
        for f in dataclasses.fields(_dataclass(pass_type))
    }


def _build(pass_type: type[Pass], text: str) -> Pass:
    hints = _hints(pass_type)
    known = {_kebab(f.name): f.name for f in dataclasses.fields(_dataclass(pass_type))}
    values: dict[str, object] = {}
    position = 0
    while position < len(text):
        match = _OPTION.match(text, position)
        if match is None:
            raise _syntax(text, position)
        key, value = match.groups()
        if key not in known:
            raise UnknownName(f"option of {pass_type.name}", key, known)
        where = f"{pass_type.name}{{{key}={value}}}"
        values[known[key]] = _convert(value, hints[known[key]], where)
        position = match.end()
    return pass_type(**values)


def _convert(text: str, hint: object, where: str) -> object:
    if get_origin(hint) in (types.UnionType, typing.Union):
        if text == "none" and type(None) in get_args(hint):
            return None
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return tuple(_convert(part, item, where) for part in _ITEM.findall(text))
    if get_origin(hint) is Literal:
        choices = [str(c) for c in get_args(hint)]
        if text not in choices:
            raise UnknownName("value", text, choices, where=where)
        return get_args(hint)[choices.index(text)]
    return _scalar(text, hint, where)


def _scalar(text: str, hint: object, where: str) -> object:
    try:
        if hint is bool:
            return {"true": True, "false": False}[text]
        if hint is int:
            return int(text)
        if hint is float:
            return float(text)
        return json.loads(text) if text.startswith('"') else text
    except (KeyError, ValueError):
        message = f"'{text}' is not {_type_text(hint)}"
        raise UsageError(message, where=where) from None


def _format(value: object) -> str:
    if isinstance(value, tuple):
        return ";".join(map(_format, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    text = repr(value) if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _type_text(hint: object) -> str:
    if get_origin(hint) is Literal:
        return "|".join(str(c) for c in get_args(hint))
    if get_origin(hint) in (types.UnionType, typing.Union):
        return "|".join(_type_text(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return _type_text(get_args(hint)[0]) + ";…"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _hints(pass_type: type[Pass]) -> dict[str, object]:
    """Types of the options alone; other annotations may name what only checkers import."""
    annotations = {f.name: f.type for f in dataclasses.fields(_dataclass(pass_type))}
    holder = types.SimpleNamespace(__annotations__=annotations)
    return typing.get_type_hints(holder, globalns=vars(sys.modules[pass_type.__module__]))


def _dataclass(pass_type: type[Pass]) -> typing.Any:
    return pass_type


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _caret(text: str, position: int) -> str:
    return f"{text}\n{' ' * position}^"


def _syntax(text: str, position: int) -> UsageError:
    return UsageError(
        "the pipeline text cannot be read",
        where=_caret(text, position),
        hint="write passes as name{option=value,…}, separated by commas",
    )
