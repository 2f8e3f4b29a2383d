"""The inputs of a text model by what they hold: token ids, masks, positions, segments, a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from octavo.passes.rewrite import constant

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from octavo.ir.model import Model

Role = Literal["ids", "mask", "positions", "segments", "past", "other"]
# Reading through these does not change which rows of a table an index selects.
_VIEWS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
_DEPTH = 6
# Tables of fewer rows tell kinds of segments apart, not tokens.
_FEW_ROWS = 8


@final
@dataclass(frozen=True)
class TokenInputs:
    """The graph inputs by role, and the embedding that the token ids select rows of."""

    model: Model
    roles: Mapping[str, Role]
    ids: str
    table: NDArray[np.generic]

    @staticmethod
    def of(model: Model) -> TokenInputs | None:
        """None where no whole numbers of an input select rows of a constant table of tokens."""
        inputs = {value.name or "": value for value in model.graph.inputs}
        tables = {name: _table(value) for name, value in inputs.items() if _whole(value)}
        roles = {name: _role(name, value, tables.get(name)) for name, value in inputs.items()}
        ids = [name for name, role in roles.items() if role == "ids"]
        if len(ids) != 1:
            return None
        table = tables[ids[0]]
        assert table is not None
        return TokenInputs(model, roles, ids[0], table)

    @property
    def rows(self) -> int:
        """How many tokens the embedding knows."""
        return len(self.table)

    @property
    def fixed_length(self) -> int | None:
        """The length that the ids must have; None where it is free."""
        shape = self._input(self.ids).shape
        last = shape[-1] if shape is not None and len(shape) else None
        return last if isinstance(last, int) else None

    @property
    def fixed_batch(self) -> int | None:
        """How many texts a feed must hold; None where that is free."""
        shape = self._input(self.ids).shape
        first = shape[0] if shape is not None and len(shape) else None
        return first if isinstance(first, int) else None

    def unknown(self) -> list[str]:
        """Inputs that token ids alone do not fill."""
        return [name for name, role in self.roles.items() if role == "other"]

    def feed(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.generic]]:
        """Everything a model without a cache reads, for ids `[B, T]`; a mask of ones by default."""
        batch, length = ids.shape
        made = {
            "ids": ids,
            "mask": np.ones_like(ids) if mask is None else mask,
            "positions": np.broadcast_to(np.arange(length), (batch, length)),
            "segments": np.zeros_like(ids),
        }
        found: dict[str, NDArray[np.generic]] = {}
        for name, role in self.roles.items():
            if role in made:
                found[name] = made[role].astype(_dtype(self._input(name)))
        return found

    def _input(self, name: str) -> onnx_ir.Value:
        return next(value for value in self.model.graph.inputs if value.name == name)


def rows_selected(value: onnx_ir.Value) -> int | None:
    """How many rows the table has that an input of whole numbers selects from, if it does."""
    table = _table(value) if _whole(value) else None
    return None if table is None else len(table)


def _role(name: str, value: onnx_ir.Value, table: NDArray[np.generic] | None) -> Role:
    lowered = name.lower()
    if "past" in lowered and not _whole(value):
        return "past"
    if "mask" in lowered:
        return "mask"
    if "position" in lowered:
        return "positions"
    if "token_type" in lowered or "segment" in lowered:
        return "segments"
    if table is None:
        return "other"
    return "ids" if len(table) > _FEW_ROWS else "segments"


def _whole(value: onnx_ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _dtype(value: onnx_ir.Value) -> np.dtype[np.generic]:
    return np.dtype(np.int64) if value.dtype is None else value.dtype.numpy()


def _table(value: onnx_ir.Value) -> NDArray[np.generic] | None:
    return next(_tables(value, _DEPTH), None)


def _tables(value: onnx_ir.Value, depth: int) -> Iterator[NDArray[np.generic]]:
    """Constant tables that the value, reshaped or cast, is an index of."""
    for use in value.uses() if depth else ():
        node = use.node
        if node.op_type == "Gather" and use.idx == 1:
            table = constant(node.inputs[0])
            if table is not None and table.ndim == 2 and node.attributes.get_int("axis", 0) == 0:
                yield table
        elif node.op_type in _VIEWS and use.idx == 0:
            yield from _tables(node.outputs[0], depth - 1)
