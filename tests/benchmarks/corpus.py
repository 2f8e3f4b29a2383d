"""Texts of gensim's test data and the fonts that pages are set in."""

from __future__ import annotations

from pathlib import Path

from PIL import ImageFont
from task import package_folder

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
