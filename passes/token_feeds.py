"""Token sequences in place of text: valid frames, lengths and masks, random words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.ir.vocabulary import Vocabulary
    from octavo.passes.token_inputs import TokenInputs

    Feed = dict[str, NDArray[np.generic]]
    Run = Callable[[Feed], dict[str, NDArray[np.generic]]]
    Ids = NDArray[np.int64]

Prior = Literal["uniform", "ranked", "norm"]
_FEED_SAMPLES = 8
_SHORTEST = 0.25
# Zipf's law with Mandelbrot's shift: the first ranks are less frequent than 1/rank says.
_SHIFT = 2.7


@final
@dataclass(frozen=True)
class TokenFeeds:
    """Sequences of up to `length` tokens of a vocabulary, framed and padded as its texts are.

    `prior` is the chance of a token inside: `uniform`, `ranked` (1 / (id + 2.7): tokenizers number
    tokens by frequency), or `norm` (the norm of its embedding).
    """

    inputs: TokenInputs
    vocabulary: Vocabulary
    length: int
    prior: Prior

    @property
    def words(self) -> Ids:
        """The tokens that may stand inside a text."""
        every = np.arange(self.inputs.rows)
        special = np.fromiter(self.vocabulary.special, np.int64)
        return every[(every < self.vocabulary.size) & ~np.isin(every, special)]

    def chances(self, words: Ids) -> NDArray[np.float64]:
        """Of every word, summing to 1."""
        if self.prior == "ranked":
            weights = 1 / (np.arange(len(words)) + _SHIFT)
        elif self.prior == "norm":
            weights = np.linalg.norm(self.inputs.table[words].astype(np.float64), axis=1)
        else:
            weights = np.ones(len(words))
        found: NDArray[np.float64] = weights / weights.sum()
        return found

    def draw(self, count: int, rng: np.random.Generator) -> Iterator[Feed]:
        """Feeds of a few sequences each, `count` in all."""
        words = self.words
        chances = self.chances(words)
        batch = self.inputs.fixed_batch or _FEED_SAMPLES
        for _ in range(-(-count // batch)):
            lengths = self._lengths(batch, rng)
            width = self.inputs.fixed_length or int(lengths.max())
            ids = np.full((batch, width), self.vocabulary.pad, np.int64)
            for row, length in enumerate(lengths):
                inner = length - len(self.vocabulary.begin) - len(self.vocabulary.end)
                body = rng.choice(words, max(inner, 1), p=chances)
                text = (*self.vocabulary.begin, *body, *self.vocabulary.end)[:width]
                ids[row, : len(text)] = text
            mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
            yield self.inputs.feed(ids, mask)

    def _lengths(self, batch: int, rng: np.random.Generator) -> Ids:
        """Any from a quarter to all of the length; all of it where no mask can hide padding."""
        most = min(self.length, self.inputs.fixed_length or self.length)
        if "mask" not in self.inputs.roles.values():
            return np.full(batch, most)
        least = max(len(self.vocabulary.begin) + len(self.vocabulary.end) + 1, 1)
        return rng.integers(max(least, round(_SHORTEST * most)), most + 1, batch)

    def infilled(self, feed: Feed, run: Run, rounds: int, rng: np.random.Generator) -> Feed:
        """A feed whose words a masked language model has rewritten, a share of them each round."""
        mask = self.vocabulary.mask
        assert mask is not None
        ids: Ids = feed[self.inputs.ids].astype(np.int64)
        words = self.words
        inside = np.isin(ids, words)
        turn = rng.integers(0, rounds, ids.shape)
        for step in range(rounds):
            chosen = inside & (turn == step)
            asked = np.where(chosen, mask, ids)
            held = {**feed, self.inputs.ids: asked.astype(feed[self.inputs.ids].dtype)}
            logits = next(iter(run(held).values()))[chosen][:, words]
            ids[chosen] = words[drawn(logits, rng)]
        return {**feed, self.inputs.ids: ids.astype(feed[self.inputs.ids].dtype)}


def drawn(logits: NDArray[np.generic], rng: np.random.Generator) -> Ids:
    """One class per row of logits, with the chances that they give (Gumbel's maximum)."""
    noise = rng.gumbel(size=logits.shape)
    found: Ids = (logits.astype(np.float64) + noise).argmax(-1)
    return found
