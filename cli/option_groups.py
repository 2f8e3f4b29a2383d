"""Options that several commands share, as a dataclass parameter that is spelled out."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable

Command = Callable[..., None]


def spelled_out(command: Command) -> Command:
    """A command in which each field of a dataclass parameter is an option of its own.

    Field annotations and defaults become those of the options; fields need distinct names.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, typing.Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def spelled(**given: object) -> None:
        built = {
            name: group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **built)

    ordered = sorted(parameters, key=lambda p: p.default is not inspect.Parameter.empty)
    spelled.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    spelled.__annotations__ = {p.name: p.annotation for p in ordered}
    return spelled


def _options(group: typing.Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
