"""Texts of gensim's test data and the fonts that pages are set in."""

from __future__ import annotations

import bz2
import re
from functools import cache
from html import unescape
from pathlib import Path

from PIL import ImageFont
from task import package_folder

_SHORT, _NESTED, _MARKUP = 200, 4, re.compile(r"[{}|=\[\]]")
FONTS = Path("/usr/share/fonts/truetype/dejavu")


def text(name: str, encoding: str = "utf-8") -> str:
    """A corpus that lies in the gensim wheel, whole."""
    return (package_folder("gensim") / "test" / "test_data" / name).read_text(encoding)


def news() -> str:
    """300 stories of ABC news, 2000 and 2001: what is scored."""
    return text("lee_background.cor")


def other_news() -> str:
    """50 short documents of the Lee similarity study: what is calibrated on."""
    return text("lee.cor", "latin-1")


@cache
def articles() -> tuple[str, ...]:
    """Paragraphs of an encyclopedia without their markup: what language models calibrate on."""
    folder = package_folder("gensim") / "test" / "test_data"
    path = next(folder.glob("enwiki-latest-pages-articles1*shortened.bz2"))
    with bz2.open(path, "rt", encoding="utf-8") as file:
        pages = re.findall(r"<text[^>]*>(.*?)</text>", file.read(), re.DOTALL)
    lines = (line.strip() for page in pages for line in _plain(page).splitlines())
    return tuple(s for s in lines if len(s) > _SHORT and s[0].isalpha() and not _MARKUP.search(s))


def _plain(page: str) -> str:
    """The text of a page; what its links show stays."""
    text = unescape(unescape(page))
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", "", text, flags=re.DOTALL)
    for _ in range(_NESTED):
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|.*?\|\}", "", text, flags=re.DOTALL)
    text = re.sub(r"\[\[(?:File|Image|Category)[^\]]*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    return re.sub(r"'{2,}|<[^>]+>", "", text)


def fonts(*, monospaced: bool) -> list[Path]:
    """Font files in the order of their names; FileNotFoundError when none is installed."""
    found = [p for p in sorted(FONTS.glob("*.ttf")) if monospaced or "Mono" not in p.name]
    if not found:
        message = f"no fonts in {FONTS}: apt-get install fonts-dejavu-core fonts-dejavu-extra"
        raise FileNotFoundError(message)
    return found


def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    return ImageFont.truetype(str(path), size)
