"""Encoded images to uint8 RGB arrays of one size, with Pillow."""

import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...images import to_rgb


logger = logging.getLogger(__name__)


class BrokenImageError(ValueError):
    """An image that cannot be read; the message says why."""


class BrokenImages(dict):
    """The images that could not be read: name → reason. Each is named in one warning when it is first met."""

    def add(self, name: str, error: BrokenImageError) -> None:
        if name not in self:
            logger.warning("Skipped the broken image %s (%s).", name, error)
            self[name] = str(error)


def decode_image(source) -> Image.Image:
    """Reads one image as an upright RGB picture, transparency laid on white, 16-bit values scaled to 8.

    Args:
        source: what `datasets.Image(decode=False)` gives, a dict with `bytes` and `path`, one of them `None`; or the
            encoded bytes, a path, or a Pillow image.

    Raises:
        BrokenImageError: whatever the reason that it cannot be read.
    """
    if isinstance(source, dict):
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise BrokenImageError("the row holds no image")
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, Path)):
            with open(source, "rb") as file:
                image = Image.open(io.BytesIO(file.read()))
        else:
            image = Image.open(io.BytesIO(source))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BrokenImageError("not an image of a known format") from error
    except Exception as error:  # decoders fail in many ways (OSError, SyntaxError, struct.error, zlib.error, ...)
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def resize_shorter_side(image: Image.Image, resolution: int) -> np.ndarray:
    """Scales the shorter side to `resolution`, antialiased (bicubic), and returns uint8 `(height, width, 3)`."""
    width, height = image.size
    shorter = min(width, height)
    if shorter != resolution:
        size = (
            max(resolution, round(width * resolution / shorter)),
            max(resolution, round(height * resolution / shorter)),
        )
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.array(image)


def crop_and_flip(
    pixels: np.ndarray, resolution: int, crop: str, flip: bool, generator: np.random.Generator | None
) -> np.ndarray:
    """A square of `resolution` out of uint8 `(height, width, 3)`.

    Args:
        crop: `"center"`, or `"random"`, uniformly from `generator`.
        flip: mirror half of the images, by `generator`.
    """
    height, width = pixels.shape[:2]
    top, left = (height - resolution) // 2, (width - resolution) // 2
    if crop == "random":
        top = int(generator.integers(height - resolution + 1))
        left = int(generator.integers(width - resolution + 1))
    pixels = pixels[top : top + resolution, left : left + resolution]
    return pixels[:, ::-1] if flip and generator.random() < 0.5 else pixels
