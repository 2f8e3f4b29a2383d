"""The tokens that a text model reads: how many, which are special, what frames a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from octavo.ir.errors import CalibrationError

# The largest tokenizers have a quarter of a million tokens, in less than 40 MB.
_MOST_BYTES = 256 << 20
_PAD = ("[PAD]", "<pad>", "<|pad|>")
_MASK = ("[MASK]", "<mask>")
_UNUSED = re.compile(r"\[unused\d+\]|<unused\d+>|<extra_id_\d+>|<\|reserved_special_token_\d+\|>")
_BRACKETED = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK|BOS|EOS)\]|</?(s|unk|pad|mask)>")


@final
@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens; `begin` and `end` frame a text, `special` ones never stand inside it."""

    size: int
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()
    pad: int = 0
    mask: int | None = None

    def fitted(self, rows: int, where: str) -> Vocabulary:
        """The vocabulary for an embedding of `rows` rows; CalibrationError where it is another's.

        Embeddings are padded to a handy number of rows, but never by much.
        """
        if self.size <= rows <= self.size + max(self.size // 8, 128):
            return self
        raise CalibrationError(
            f"the tokenizer has {self.size} tokens, the model's embedding {rows} rows",
            where=where,
            hint="give the tokenizer the model was trained with",
        )


def read_vocabulary(path: Path) -> Vocabulary:
    """From a tokenizer.json, or a vocab.txt with one token a line; CalibrationError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _unreadable(path, "it is larger than 256 MB")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _of_json(json.loads(text))
        return _of_lines(text.splitlines())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, str(error)) from None


def _of_json(content: Any) -> Vocabulary:
    stored = content["model"]["vocab"]
    listed = isinstance(stored, list)
    ids = {str(row[0]): k for k, row in enumerate(stored)} if listed else dict(stored)
    added = content.get("added_tokens") or ()
    ids |= {str(token["content"]): int(token["id"]) for token in added}
    marked = {int(token["id"]) for token in added if token.get("special")}
    begin, end = _frame(content.get("post_processor") or {})
    return _vocabulary(ids, marked | set(begin) | set(end), begin, end)


def _of_lines(lines: list[str]) -> Vocabulary:
    ids = {token: k for k, token in enumerate(lines)}
    marked = {k for token, k in ids.items() if _BRACKETED.fullmatch(token)}
    begin = tuple(ids[name] for name in ("[CLS]",) if name in ids)
    end = tuple(ids[name] for name in ("[SEP]",) if name in ids)
    return _vocabulary(ids, marked, begin, end)


def _vocabulary(
    ids: Mapping[str, int], marked: set[int], begin: tuple[int, ...], end: tuple[int, ...]
) -> Vocabulary:
    unused = {k for token, k in ids.items() if _UNUSED.fullmatch(token)}
    pad = next((ids[name] for name in _PAD if name in ids), 0)
    mask = next((ids[name] for name in _MASK if name in ids), None)
    size = max(ids.values(), default=-1) + 1
    if size == 0:
        raise ValueError("it holds no tokens")
    return Vocabulary(size, begin, end, frozenset(marked | unused), pad, mask)


def _frame(processor: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and behind one text."""
    kind = processor.get("type")
    if kind == "Sequence":
        found = [_frame(inner) for inner in processor["processors"]]
        return next((frame for frame in found if any(frame)), ((), ()))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (int(processor["cls"][1]),), (int(processor["sep"][1]),)
    if kind != "TemplateProcessing":
        return (), ()
    ids = processor["special_tokens"]
    parts = [_template_ids(piece, ids) for piece in processor["single"]]
    at = parts.index(None) if None in parts else len(parts)
    return tuple(_flat(parts[:at])), tuple(_flat(parts[at + 1 :]))


def _template_ids(piece: Mapping[str, Any], ids: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The ids that a piece of a template stands for; None for the text itself."""
    if "Sequence" in piece:
        return None
    return tuple(int(token) for token in ids[piece["SpecialToken"]["id"]]["ids"])


def _flat(parts: list[tuple[int, ...] | None]) -> Iterator[int]:
    for part in parts:
        yield from part or ()


def _unreadable(path: Path, why: str) -> CalibrationError:
    message = "the tokenizer cannot be read"
    hint = "give a tokenizer.json of the tokenizers library, or a vocab.txt"
    return CalibrationError(message, where=str(path), why=why, hint=hint)
