"""How well language models predict news: perplexity of tokens, bits per character."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import corpus
import numpy as np
from task import Array, Scores, Task

_WINDOW, _WINDOWS = 256, 12
_CHARACTERS_PER_WINDOW = 2400
_CONTEXT, _CHARACTERS, _BATCH = 40, 4000, 200


def perplexity_task(model: Path) -> Task:
    """`input_ids [1, 256]`, `logits [1, 256, vocabulary]`: 12 windows, each token but the first."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    ids = tokenizer.encode(corpus.news()[: _WINDOWS * _CHARACTERS_PER_WINDOW]).ids
    windows = np.array(ids[: _WINDOWS * _WINDOW], np.int64).reshape(_WINDOWS, 1, _WINDOW)

    def score(outputs: Iterable[Array]) -> Scores:
        pairs = zip(outputs, windows, strict=True)
        nats, hits = _surprise((logits[0, :-1], window[0, 1:]) for logits, window in pairs)
        return {"perplexity": float(np.exp(nats)), "next_token": hits}

    return Task("perplexity", [{"input_ids": w} for w in windows], score, lower_is_better=True)


def characters(text: str, model: Path) -> Array:
    """The ids of all characters of a text that textgenrnn knows."""
    ids = json.loads((model.parent / "vocabulary.json").read_text())
    return np.array([ids[character] for character in text if character in ids], np.int64)


def contexts(ids: Array) -> Array:
    """Every window of 40 characters that another character follows, `[n, 40]`."""
    return np.lib.stride_tricks.sliding_window_view(ids[:-1], _CONTEXT)


def characters_task(model: Path) -> Task:
    """`ids [batch, 40]`, `logits [batch, 465]`: the character after each of 4,000 windows."""
    ids = characters(corpus.news().replace("\n", " "), model)[: _CHARACTERS + _CONTEXT]
    windows, targets = contexts(ids), ids[_CONTEXT:]

    def score(outputs: Iterable[Array]) -> Scores:
        nats, hits = _surprise(zip(outputs, targets.reshape(-1, _BATCH), strict=True))
        return {"bits_per_character": nats / float(np.log(2)), "next_character": hits}

    feeds = [{"ids": batch} for batch in windows.reshape(-1, _BATCH, _CONTEXT)]
    return Task("bits_per_character", feeds, score, lower_is_better=True)


def _surprise(pairs: Iterable[tuple[Array, Array]]) -> tuple[float, float]:
    """Mean negative log-likelihood in nats and share of right guesses, of (logits, targets)."""
    nats, hits, count = 0.0, 0, 0
    for logits, targets in pairs:
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        chosen = np.take_along_axis(shifted, targets[:, None], 1)[:, 0]
        nats += float((np.log(np.exp(shifted).sum(1)) - chosen).sum())
        hits += int((shifted.argmax(1) == targets).sum())
        count += len(targets)
    return nats / count, hits / count
