"""Calibration data of every benchmark, none of it scored. Each writer returns the path to use."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import corpus
import numpy as np
from scores import filetypes, language, lines, pages, sentences, stamps
from task import Array

from octavo.models import shipped

_STAMPS, _KINDS = 64, ("animals", "food", "household")
# Where more stamps are wanted than there are of those kinds.
_FURTHER_KINDS = ("clothes", "hobbies", "plants", "seasonal", "space", "sports", "town", "vehicles")
_LINES, _PAGES, _FILES_PER_TYPE, _CONTEXTS = 64, 8, 3, 128
_SENTENCES, _WORDS, _WINDOWS, _WINDOW = 128, 60, 128, 256
_PHOTOS = (
    "camera.png",
    "coins.png",
    "motorcycle_left.png",
    "gravel.png",
    "grass.png",
    "retina.jpg",
)


def fashion(model: Path, folder: Path) -> Path:
    """The 256 training images that ship with octavo."""
    return shipped("fashion")


def photo_stamps(model: Path, folder: Path, count: int = _STAMPS) -> Path:
    """64 stamps, or `count`, that are not scored: animals, food, household things, then others."""
    scored = {Path(name).name for name in stamps.classes()}
    found = [Path(path) for path in sorted(str(path) for path in stamps.FOLDER.rglob("*.png"))]
    rng, chosen = np.random.default_rng(0), list[Path]()
    for kinds in (_KINDS, _FURTHER_KINDS):
        paths = [path for path in found if any(f"/{kind}/" in str(path) for kind in kinds)]
        paths = [path for path in paths if path.stem not in scored]
        chosen += [paths[k] for k in rng.permutation(len(paths))]
    return _write(folder, input=np.stack([stamps.picture(path) for path in chosen[:count]]))


def text_lines(model: Path, folder: Path) -> Path:
    """64 lines of other news, one file each because their widths differ."""
    words = corpus.other_news().split()
    return _write_each(folder, "x", (line.image for line in lines.lines(words, _LINES, seed=1)))


def text_pages(model: Path, folder: Path) -> Path:
    """Eight pages of other news over other photographs."""
    words = corpus.other_news().split()
    made = pages.pages(words, _PHOTOS, _PAGES, seed=1)
    return _write(folder, x=np.concatenate([page.image for page in made]))


def file_ends(model: Path, folder: Path) -> Path:
    """Three files of every type that has more than the scored ones."""
    how = filetypes.settings(model)
    chosen = [path for group in filetypes.files() for path in group.others[:_FILES_PER_TYPE]]
    return _write(folder, bytes=filetypes.features(chosen, how))


def character_contexts(model: Path, folder: Path) -> Path:
    """128 windows of other news."""
    ids = language.characters(corpus.other_news().replace("\n", " "), model)
    return _write(folder, ids=np.array(list(islice(language.contexts(ids)[::40], _CONTEXTS))))


def sentences_of_articles(model: Path, folder: Path, count: int = _SENTENCES) -> Path:
    """128 beginnings of encyclopedia paragraphs, or `count`, in batches of ten, one file each."""
    found = corpus.articles()
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    texts = [" ".join(found[k].split()[:_WORDS]) for k in chosen]
    for k, feed in enumerate(sentences.tokens(texts, model)):
        kept = {name: feed[name] for name in ("input_ids", "attention_mask")}
        np.savez(folder / f"{k:03d}.npz", allow_pickle=False, **kept)
    return folder


def windows_of_articles(model: Path, folder: Path) -> Path:
    """128 windows of 256 tokens of encyclopedia articles, one file each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    found = corpus.articles()
    order = np.random.default_rng(0).permutation(len(found))
    ids: list[int] = []
    for k in order:
        ids += tokenizer.encode(found[k] + "\n").ids
        if len(ids) >= _WINDOWS * _WINDOW:
            break
    windows = np.array(ids[: _WINDOWS * _WINDOW], np.int64).reshape(_WINDOWS, 1, _WINDOW)
    return _write_each(folder, "input_ids", windows)


def _write(folder: Path, **arrays: Array) -> Path:
    path = folder / "calibration.npz"
    np.savez(path, allow_pickle=False, **arrays)
    return path


def _write_each(folder: Path, name: str, samples: Iterable[Array]) -> Path:
    for k, sample in enumerate(samples):
        np.savez(folder / f"{k:03d}.npz", allow_pickle=False, **{name: sample})
    return folder
