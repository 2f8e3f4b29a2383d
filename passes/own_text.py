"""A language model writes its own calibration text, as LLM-QAT does (arXiv 2305.17888)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from octavo.ir.errors import CalibrationError
from octavo.passes.token_feeds import drawn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.passes.token_feeds import Feed, Ids, Run
    from octavo.passes.token_inputs import TokenInputs

_GREEDY = 4
_ROWS = 8
_SHORTEST = 8


@final
@dataclass(frozen=True)
class OwnText:
    """Texts of `length` tokens: a random word, then greedy for a few, then by the model's chances.

    The exported graph runs on all tokens so far, or on the last one where it has a cache. The
    first output of `run` is read as logits, `[B, T, tokens]`, the last position behind all tokens.
    """

    inputs: TokenInputs
    words: Ids
    begin: tuple[int, ...]
    length: int
    run: Run

    def write(
        self,
        count: int,
        rng: np.random.Generator,
        seconds: float,
        progress: Callable[[int, int], None],
    ) -> tuple[list[Feed], bool]:
        """Feeds of texts, and whether the clock cut them; at least as many as are written at once.

        Raises CalibrationError where the model gives no finite logits.
        """
        batch = self.inputs.fixed_batch or _ROWS
        rounds = -(-count // batch)
        feeds: list[Feed] = []
        begun, late = time.monotonic(), False
        for done in range(rounds):
            if feeds and time.monotonic() - begun > seconds:
                return feeds, True

            def step(length: int, done: int = done) -> None:
                progress(done * self.length + length, rounds * self.length)

            share = seconds * (done + 1) / rounds
            ids, cut = self._texts(batch, rng, begun + share, step)
            feeds += self._whole(ids)
            late = late or cut
        return feeds, late

    def _texts(
        self, batch: int, rng: np.random.Generator, deadline: float, step: Callable[[int], None]
    ) -> tuple[Ids, bool]:
        first = rng.choice(self.words, (batch, 1))
        begin = np.broadcast_to(np.array(self.begin, np.int64), (batch, len(self.begin)))
        ids = np.concatenate([begin, first], 1)
        writer = _Writer(self.inputs, self.run)
        while ids.shape[1] < self._most:
            if ids.shape[1] >= _SHORTEST and time.monotonic() > deadline:
                return ids, True
            logits = writer.next_logits(ids)[:, self.words]
            greedy = ids.shape[1] <= len(self.begin) + _GREEDY
            chosen = logits.argmax(-1) if greedy else drawn(logits, rng)
            ids = np.concatenate([ids, self.words[chosen][:, None]], 1)
            step(ids.shape[1])
        return ids, False

    @property
    def _most(self) -> int:
        return min(self.length, self.inputs.fixed_length or self.length)

    def _whole(self, ids: Ids) -> list[Feed]:
        """What finished texts are fed as: padded to a fixed length, with an empty cache.

        One by one where the graph allows it, as a large model's values of several take memory.
        """
        writer = _Writer(self.inputs, self.run)
        rows = [ids] if self.inputs.fixed_batch else np.split(ids, len(ids))
        return [writer.feed(row, {}) for row in rows]


@final
@dataclass
class _Writer:
    """Logits of the next token; `cache` holds what the model wants to see again."""

    inputs: TokenInputs
    run: Run
    cache: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    known: int = 0

    def next_logits(self, ids: Ids) -> NDArray[np.generic]:
        """Of what follows each row, `[B, tokens]`."""
        pasts = [name for name, role in self.inputs.roles.items() if role == "past"]
        new = ids[:, self.known :] if pasts else ids
        outputs = self.run(self.feed(new, self.cache, self.known))
        logits, *rest = outputs.values()
        if pasts:
            present = [array for array in rest if array.ndim >= 3][: len(pasts)]
            self.cache = dict(zip(pasts, present, strict=True))
            self.known = ids.shape[1]
        found = logits[:, new.shape[1] - 1 if self.inputs.fixed_length else -1]
        self.require_finite(found)
        return found

    def require_finite(self, logits: NDArray[np.generic]) -> None:
        """CalibrationError where nothing can be read from logits."""
        if not np.isfinite(logits).all():
            message = "the model gives logits that are not finite on its own text"
            raise CalibrationError(message, where=self.inputs.model.source.name)

    def feed(self, ids: Ids, cache: Mapping[str, NDArray[np.generic]], known: int = 0) -> Feed:
        """Inputs for new tokens behind `known` ones."""
        batch, length = ids.shape
        width = self.inputs.fixed_length or length
        padded = np.pad(ids, ((0, 0), (0, width - length)))
        mask = np.broadcast_to(np.arange(width) < length, (batch, width)).astype(np.int64)
        made = self.inputs.feed(padded, mask)
        for value in self.inputs.model.graph.inputs:
            name, role = value.name or "", self.inputs.roles[value.name or ""]
            if role == "past":
                made[name] = cache[name] if name in cache else _empty(value, batch)
            elif known and role == "mask":
                made[name] = np.ones((batch, known + length), made[name].dtype)
            elif known and role == "positions":
                made[name] = (made[name].astype(np.int64) + known).astype(made[name].dtype)
        return made


def is_causal(inputs: TokenInputs, run: Run, words: Ids, rng: np.random.Generator) -> bool:
    """Whether what stands behind a token leaves its logits alone, tried on two short texts.

    Raises CalibrationError for logits that are not finite.
    """
    length = inputs.fixed_length or _SHORTEST
    batch = inputs.fixed_batch or 1
    ids = rng.choice(words, (batch, length))
    other = ids.copy()
    other[:, -1] = np.where(ids[:, -1] == words[0], words[-1], words[0])
    writer = _Writer(inputs, run)
    first, second = (next(iter(run(writer.feed(each, {})).values())) for each in (ids, other))
    writer.require_finite(first)
    before, after = (np.asarray(array, np.float64) for array in (first, second))
    apart = np.abs(before[:, :-1] - after[:, :-1]).max(initial=0.0)
    scale = np.abs(before).max(initial=0.0)
    return bool(apart <= 1e-4 * scale)


def empty_feed(inputs: TokenInputs, words: Ids) -> Feed:
    """One short text of given words, with an empty cache."""
    length, batch = inputs.fixed_length or len(words), inputs.fixed_batch or 1
    return _Writer(inputs, lambda feed: {}).feed(np.resize(words, (batch, length)), {})


def _empty(value: object, batch: int) -> NDArray[np.generic]:
    """A cache that holds nothing yet."""
    import onnx_ir

    assert isinstance(value, onnx_ir.Value)
    dims = list(value.shape) if value.shape is not None else []
    free = [k for k, dim in enumerate(dims) if k and not isinstance(dim, int)]
    sizes = [
        dim if isinstance(dim, int) else 0 if k in free else batch for k, dim in enumerate(dims)
    ]
    return np.zeros(sizes, np.float32 if value.dtype is None else value.dtype.numpy())


def text_logits(inputs: TokenInputs, outputs: Mapping[str, NDArray[np.generic]]) -> bool:
    """Whether the first output holds one number per token of the vocabulary and position."""
    first = next(iter(outputs.values()), None)
    return first is not None and first.ndim == 3 and first.shape[-1] == inputs.rows
