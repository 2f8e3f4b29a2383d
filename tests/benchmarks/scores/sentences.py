"""Sentence embeddings: retrieval, similarity and sentiment on texts of gensim's test data.

Retrieval reacts to compression: 40 words from the start of a story must find 40 from its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import corpus
import numpy as np
from task import Array, Feed, Scores, Task

_LONGEST, _BATCH, _WORDS, _LONG_STORY = 256, 10, 40, 90


def tokens(texts: Sequence[str], model: Path) -> list[Feed]:
    """Texts in batches of ten, each padded to its longest: `input_ids`, `attention_mask`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding()
    feeds: list[Feed] = []
    for k in range(0, len(texts), _BATCH):
        encoded = tokenizer.encode_batch(texts[k : k + _BATCH])
        ids = np.array([e.ids for e in encoded], np.int64)
        mask = np.array([e.attention_mask for e in encoded], np.int64)
        types = np.zeros_like(ids)
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    return feeds


def task(model: Path) -> Task:
    """Four sets of texts: similarity documents, reviews, starts and ends of stories."""
    documents = [line for line in corpus.other_news().split("\n") if line.strip()]
    lines = corpus.text("pang_lee_polarity.cor", "latin-1").splitlines()
    labels, reviews = zip(*(line.split(" ", 1) for line in lines if line.strip()), strict=True)
    stories = [s for line in corpus.news().splitlines() if len(s := line.split()) > _LONG_STORY]
    starts = [" ".join(words[:_WORDS]) for words in stories]
    ends = [" ".join(words[-_WORDS:]) for words in stories]
    texts = (starts, ends, documents, [review.strip() for review in reviews])
    feeds = [feed for group in texts for feed in tokens(group, model)]
    cuts = [0, *accumulate(len(group) for group in texts)]
    positive = np.array(labels) == "__label__pos"

    def score(outputs: Iterable[Array]) -> Scores:
        pairs = zip(outputs, feeds, strict=True)
        vectors = np.concatenate([_embedding(hidden, feed) for hidden, feed in pairs])
        start, end, document, review = (vectors[a:b] for a, b in pairwise(cuts))
        found = (start @ end.T).argmax(1)
        return {
            "retrieval@1": float((found == np.arange(len(found))).mean()),
            "similarity": _similarity(document),
            "sentiment": _sentiment(review, positive),
        }

    return Task("retrieval@1", feeds, score, rows=False)


def _embedding(hidden: Array, feed: Feed) -> Array:
    """The mean of the token vectors that are no padding, of length one."""
    mask = feed["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def _similarity(documents: Array) -> float:
    """Spearman's correlation with how similar people find each pair of documents."""
    from scipy.stats import spearmanr

    people = np.loadtxt(corpus.text("similarities0-1.txt").splitlines())
    pairs = np.triu_indices(len(documents), 1)
    return float(spearmanr((documents @ documents.T)[pairs], people[pairs])[0])


def _sentiment(reviews: Array, positive: Array) -> float:
    """Accuracy of a linear classifier over the embeddings, five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    classifier = LogisticRegression(C=10, max_iter=1000)
    return float(cross_val_score(classifier, reviews, positive, cv=folds).mean())
