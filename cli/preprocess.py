"""How an image file becomes a model input; text form `size=224,mean=127,std=128,layout=nchw`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np

from octavo.ir.errors import CalibrationError, UnknownName, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

Layout = Literal["nchw", "nhwc"]
Color = Literal["rgb", "bgr", "gray"]
Resize = Literal["fit", "crop", "stretch"]
Pixels = Literal["float32", "uint8"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "layout": get_args(Layout),
    "color": get_args(Color),
    "resize": get_args(Resize),
    "dtype": get_args(Pixels),
}
_EXAMPLE = "size=224,mean=127,std=128,layout=nchw,color=rgb,resize=fit,background=white"


@final
@dataclass(frozen=True)
class Preprocess:
    """Resize, order channels, then `(pixel - mean) / std` with pixels from 0 to 255.

    `size` is (height, width), None for the model's or else the image's own. `resize`: `fit` keeps
    the whole image on a `background`, `crop` fills the size and cuts the rest, `stretch` ignores
    the aspect. Transparent pixels show the background. `dtype=uint8` rounds, for models that
    normalise inside.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout = "nchw"
    color: Color = "rgb"
    resize: Resize = "fit"
    background: str = "white"
    dtype: Pixels = "float32"

    @staticmethod
    def parse(text: str) -> Preprocess:
        """`size=224` or `224x160` (height x width); `mean=127` or one per channel, `1;2;3`."""
        values: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in Preprocess.__dataclass_fields__:
                raise UnknownName("--preprocess key", key, Preprocess.__dataclass_fields__)
            if not equals or not value:
                message = f"--preprocess '{part}' has no value"
                raise UsageError(message, hint=f"for instance {_EXAMPLE}")
            values[key] = _parsed(key, value)
        return Preprocess(**values)

    @property
    def channels(self) -> int:
        return 1 if self.color == "gray" else 3

    def load(self, path: Path) -> NDArray[np.generic]:
        """One image, `[1, C, H, W]` or `[1, H, W, C]`; CalibrationError where it is unreadable."""
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = np.asarray(self._composed(image), np.float32)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            message = f"the image {path.name} cannot be read"
            raise CalibrationError(message, where=str(path), why=str(error)) from error
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        pixels = (pixels - mean) / std
        if self.layout == "nchw":
            pixels = pixels.transpose(2, 0, 1)
        if self.dtype == "uint8":
            return np.ascontiguousarray(np.clip(np.rint(pixels[None]), 0, 255), np.uint8)
        return np.ascontiguousarray(pixels[None], np.float32)

    def _composed(self, image: Image.Image) -> Image.Image:
        """The image on its background, resized, in the mode of `color`."""
        from PIL import Image

        resized = self._resized(image.convert("RGBA"))
        width, height = resized.size if self.size is None else self.size[::-1]
        canvas = Image.new("RGBA", (width, height), self.background)
        left, top = (width - resized.width) // 2, (height - resized.height) // 2
        canvas.alpha_composite(resized, (max(left, 0), max(top, 0)), (max(-left, 0), max(-top, 0)))
        return canvas.convert("L" if self.color == "gray" else "RGB")

    def _resized(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        if self.size is None:
            return image
        height, width = self.size
        ratios = width / image.width, height / image.height
        if self.resize != "stretch":
            ratio = min(ratios) if self.resize == "fit" else max(ratios)
            width, height = (max(1, round(side * ratio)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def _parsed(key: str, value: str) -> Any:
    where = f"--preprocess {key}={value}"
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise UnknownName("value", value, _CHOICES[key], where=where)
        return value
    if key == "background":
        return _color(value, where)
    try:
        if key == "size":
            return _size(value)
        numbers = tuple(float(number) for number in value.split(";"))
    except ValueError:
        message = f"'{value}' is not a {key}"
        raise UsageError(message, where=where, hint=f"for instance {_EXAMPLE}") from None
    if len(numbers) not in (1, 3) or (key == "std" and 0 in numbers):
        message = f"{key} is one number or three, and std is not zero"
        raise UsageError(message, where=where)
    return numbers


def _size(value: str) -> tuple[int, int]:
    sides = [int(side) for side in value.split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1 or max(sides) > 1 << 14:
        raise ValueError(value)
    return sides[0], sides[-1]


def _color(value: str, where: str) -> str:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(value)
    except ValueError:
        raise UnknownName("color", value, ImageColor.colormap, where=where) from None
    return value
