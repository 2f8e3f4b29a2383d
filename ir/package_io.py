"""The folder that `octavo package` writes: what a device needs, and nothing to decide there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from octavo.ir.errors import VerificationFailed

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE, ORT_MODEL, KERNELS = "package.json", "model.ort", "required_operators_and_types.config"
_FORMAT = "octavo package 1"


@final
@dataclass(frozen=True)
class PackedTensor:
    """One array of the probe: raw little-endian bytes in `file`, relative to the folder.

    `dtype` is numpy's name, `shape` a list of sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@final
@dataclass(frozen=True)
class Package:
    """What a packaged model needs to run as it was proved.

    `processor` is where the file may run: a machine class (`x86_64`), or one processor where its
    weights are laid out for that. `session_options` must be set when it is loaded.
    `reduced_build` builds a runtime that holds the kernels of this model only.
    """

    source_sha256: str
    runtime: str
    processor: str
    session_options: Mapping[str, str]
    inputs: tuple[PackedTensor, ...]
    outputs: tuple[PackedTensor, ...]
    reduced_build: str
    model: str = ORT_MODEL

    def write(self, folder: Path) -> None:
        """Write package.json."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        (folder / PACKAGE).write_text(text + "\n", encoding="utf-8")


def is_package(path: Path) -> bool:
    """Whether a path is a folder that `octavo package` filled."""
    return (path / PACKAGE).is_file()


def read_package(folder: Path) -> Package:
    """What `Package.write` wrote; VerificationFailed where it is damaged."""
    path = folder / PACKAGE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            message = f'it does not say "format": "{_FORMAT}"'
            raise ValueError(message)
        inputs, outputs = (_tensors(content.pop(role)) for role in ("inputs", "outputs"))
        return Package(**content, inputs=inputs, outputs=outputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise VerificationFailed(f"{PACKAGE} is damaged", where=str(path), why=why) from None


def _tensors(content: Any) -> tuple[PackedTensor, ...]:
    return tuple(PackedTensor(**{**row, "shape": tuple(row["shape"])}) for row in content)
