"""Encoded images to uint8 pixels of one size, with Pillow; what of a data set's paths may be opened."""

import io
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...argument_checks import check_integer
from ...images import array_to_pixels, covering_size, is_elongated, resize, resize_and_crop, to_channels


logger = logging.getLogger(__name__)

# what fsspec, with `datasets` imported, reads a file out of: "zip://cat/1.png::https://host/images.zip"
_CONTAINERS = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")


class BrokenImageError(ValueError):
    """An image that cannot be read; the message says why."""


class BrokenImages(dict):
    """The images that could not be read: name → reason. Each is named in one warning when it is first met."""

    def add(self, name: str, error: BrokenImageError) -> None:
        if name not in self:
            logger.warning("Skipped the broken image %s (%s).", name, error)
            self[name] = str(error)


@dataclass(frozen=True)
class PathRules:
    """Which paths of a data set's rows are opened: rows come from strangers, and name any file or address.

    Args:
        protocols: of addresses, such as `https://…`; archives on top of them are read too.
        folders: local files must lie in one of these, links followed; None: anywhere. Only regular files are opened.
        root: the folder that relative paths start from, if the file is there; else from the working directory.
        max_bytes: longer files are not read.
    """

    protocols: tuple[str, ...] = ("http", "https", "hf")
    folders: tuple[str, ...] | None = None
    root: str | None = None
    max_bytes: int = 2**28

    def read(self, path: str) -> bytes:
        """The contents of a file.

        Raises:
            BrokenImageError: the rules forbid it.
            OSError: and what else a file system raises.
        """
        *containers, last = path.split("::")
        if "://" in last and last.split("://")[0] in _CONTAINERS and not containers:
            raise BrokenImageError(f"{path} names no archive: zip://FILE::ARCHIVE")
        for container in containers:
            if container.split("://")[0] not in _CONTAINERS:
                raise BrokenImageError(f"{container.split('://')[0]}:// is not read in {path}")
        last = last.removeprefix("file://")
        if "://" not in last:
            last = self._checked_file(last)
        elif last.split("://")[0] not in self.protocols:
            known = ", ".join(f"{protocol}://" for protocol in self.protocols) or "none"
            raise BrokenImageError(f"{last.split('://')[0]}:// is not an address of this data set ({known})")
        with _open("::".join([*containers, last])) as file:
            data = file.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise BrokenImageError(f"longer than {self.max_bytes} bytes")
        return data

    def _checked_file(self, path: str) -> str:
        if self.root is not None and not os.path.isabs(path) and os.path.exists(os.path.join(self.root, path)):
            path = os.path.join(self.root, path)
        real = os.path.realpath(path)
        if self.folders is not None and not any(Path(real).is_relative_to(folder) for folder in self.folders):
            raise BrokenImageError(f"{path} is a local file, which rows of this data set may not name")
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise BrokenImageError(f"{path} is not a regular file")
        return real


def _open(path: str):
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    if path.startswith("zip://"):  # whose table of contents is read once, not for every image
        inner, _, archive = path.removeprefix("zip://").partition("::")
        return _zip_archive(archive, os.getpid()).open(inner, "rb")
    return fsspec.open(path, "rb").open()


@lru_cache(maxsize=8)
def _zip_archive(archive: str, process: int):
    """An open archive; each process has its own, for a file's position is shared with a forked one."""
    import fsspec

    return fsspec.core.url_to_fs(f"zip://::{archive}")[0]


ANY_PATH = PathRules()


def decode_image(source: Any, channels: int = 3, rules: PathRules = ANY_PATH) -> Image.Image | np.ndarray:
    """Reads one image, upright, with 8 bits a channel: 16-bit values are scaled, transparency is laid on white.

    Args:
        source: what `datasets.Image(decode=False)` gives, a dict with `bytes` and `path`, one of them `None`; or the
            encoded bytes, a path or address, a Pillow image, or an array (see `array_to_pixels`), nested lists too.
        channels: 1 (grey), 3 (RGB), 4 (RGBA), or any other number, of which the sources are arrays.
        rules: which paths may be opened.

    Returns:
        A Pillow image of mode L, RGB or RGBA; of an array uint8 `(H, W, channels)`.

    Raises:
        BrokenImageError: whatever the reason that it cannot be read.
    """
    source = open_source(source, rules)
    try:
        if isinstance(source, np.ndarray):
            is_whole = np.issubdtype(source.dtype, np.integer) and source.size and 0 <= source.min()
            is_whole = is_whole and source.max() < 256
            return array_to_pixels(source.astype(np.uint8) if is_whole else source, channels)
        return to_channels(source, channels)
    except Exception as error:  # as below
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def open_source(source: Any, rules: PathRules = ANY_PATH) -> Image.Image | np.ndarray:
    """What `decode_image` takes, as a Pillow image of its own mode, upright, or an array.

    Raises:
        BrokenImageError: whatever the reason that it cannot be read.
    """
    if isinstance(source, dict):
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise BrokenImageError("the row holds no image")
    try:
        if isinstance(source, (np.ndarray, list)):
            return np.asarray(source)
        if isinstance(source, Image.Image):
            image = source
        else:
            data = rules.read(str(source)) if isinstance(source, (str, Path)) else source
            image = Image.open(io.BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image)
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError("not an image of a known format") from error
    except Exception as error:  # decoders fail in many ways (OSError, SyntaxError, struct.error, zlib.error, ...)
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def named(source: Any, row: str) -> str:
    """What an image is called: its path, where the data set has it, and its row."""
    path = source.get("path") if isinstance(source, dict) else None
    return f"{path} ({row})" if path else row


def as_size(resolution: int | Sequence[int]) -> tuple[int, int]:
    """`(height, width)` of a side, or of `[height, width]`.

    Raises:
        ValueError: it is neither.
    """
    sides = list(resolution) if isinstance(resolution, (list, tuple)) else [resolution]
    if not 1 <= len(sides) <= 2:
        raise ValueError(f"resolution={resolution}: it must be a side, or a height and a width.")
    return tuple(check_integer("resolution", side, minimum=1) for side in (sides * 2)[:2])


def shrink(image: Image.Image | np.ndarray, size: Sequence[int]) -> Image.Image | np.ndarray:
    """What `crop_and_flip` needs of an image, and no more: resized until it covers `size`, unless it is elongated."""
    resized = covering_size(size_of(image), size)
    return image if is_elongated(resized, size) else resize(image, resized)


@dataclass(frozen=True)
class Window:
    """What is seen of an image: `size` at `corner` of the image resized to `resized`, mirrored or not.

    All are `(height, width)`, of the corner `(top, left)`.
    """

    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    is_flipped: bool = False

    def cut(self, image: Image.Image | np.ndarray, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
        """The window out of an image, or of a map that belongs to it, as uint8 `(height, width, channels)`."""
        pixels = resize_and_crop(image, self.resized, self.corner, self.size, resample)
        return pixels[:, ::-1] if self.is_flipped else pixels


def choose_window(
    image: Image.Image | np.ndarray,
    size: Sequence[int],
    crop: str = "center",
    flip: bool = False,
    generator: np.random.Generator | None = None,
    shorter_side: int | None = None,
) -> Window:
    """A window of `size` on an image that is scaled until it covers `size`.

    Args:
        image: as from `decode_image`, or from `shrink`, which gives the same.
        size: `(height, width)`.
        crop: `"center"`, or `"random"`, uniformly from `generator`.
        flip: mirror half of the images, by `generator`.
        shorter_side: scale the image's shorter side to so many pixels instead, at least the sides of `size`.
    """
    height, width = size
    resized = covering_size(size_of(image), size if shorter_side is None else (shorter_side, shorter_side))
    corner = (resized[0] - height) // 2, (resized[1] - width) // 2
    if crop == "random":
        corner = int(generator.integers(resized[0] - height + 1)), int(generator.integers(resized[1] - width + 1))
    return Window(resized, corner, (height, width), bool(flip and generator.random() < 0.5))


def crop_and_flip(
    image: Image.Image | np.ndarray,
    size: Sequence[int],
    crop: str = "center",
    flip: bool = False,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """The pixels uint8 `(height, width, channels)` of the window that `choose_window` gives, antialiased (bicubic)."""
    return choose_window(image, size, crop, flip, generator).cut(image)


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """`(height, width)`."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
