"""Spatial conditions beside the images: label maps, depth maps, edges and drawings, cut as the image is cut.

A sample's `condition` is what `VQConditionProcessor` makes of the same window: of a segmentation the labels, int64
`(h, w)`, -1 where a pixel has none, which `condition_values` turns into one channel for each label; of the others
float32 `(1 or 3, h, w)` in [-1, 1].
"""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import IMAGE_PROCESSOR_NAME

from ...images import pixels_to_tensor
from ...models.autoencoders.image_processing_vq_condition import VQConditionProcessor, picture_values
from .columns import CONDITION
from .image_decoding import ANY_PATH, BrokenImageError, PathRules, Window, decode_image, open_source, size_of


# how a map is scaled: ids and edges have no values in between
_RESAMPLE = {
    "segmentation": Image.Resampling.NEAREST,
    "edges": Image.Resampling.NEAREST,
    "depth": Image.Resampling.BILINEAR,
    "pose": Image.Resampling.BICUBIC,
    "image": Image.Resampling.BICUBIC,
}


class ConditionReader:
    """Reads the condition of an image: from a column, or by an annotator from the pixels that the model sees.

    Args:
        processor: says which condition it is, and what its ids or values mean.
        annotator: `list of images -> list of conditions`, in place of the column.
    """

    def __init__(self, processor: VQConditionProcessor, annotator: Callable | None = None):
        self.processor = processor
        self.annotator = annotator

    def decode(self, source: Any, image: Image.Image | np.ndarray, rules: PathRules = ANY_PATH) -> np.ndarray | None:
        """The whole map `(H, W, channels)` that belongs to `image`, with its own ids or values; None with an
        annotator.

        Raises:
            BrokenImageError: it cannot be read, or has not the proportions of the image.
        """
        if self.annotator is not None:
            return None
        values = _as_array(open_source(source, rules), self.processor.condition)
        (height, width), (image_height, image_width) = values.shape[:2], size_of(image)
        # a map of half the size may have lost half a pixel
        if abs(height * image_width - width * image_height) > max(image_height, image_width):
            raise BrokenImageError(
                f"the conditioning image has {width}x{height} pixels, not the proportions of its image, "
                f"{image_width}x{image_height}"
            )
        return values

    def cut(self, values: np.ndarray, window: Window) -> np.ndarray:
        """The window of a whole map, with the map's own ids or values."""
        return window.cut(values, _RESAMPLE[self.processor.condition])

    def read(self, values: np.ndarray | None, pixels: np.ndarray, window: Window) -> torch.Tensor:
        """The condition of the window.

        Args:
            values: from `decode`.
            pixels: uint8 `(height, width, 3 or 1)`, what the window shows of the image.

        Raises:
            ValueError: an id that is no label, or values that are out of range.
        """
        if self.annotator is not None:
            shown = pixels[:, ::-1] if window.is_flipped else pixels  # an edge does not depend on the flip
            shown = Image.fromarray(np.ascontiguousarray(shown[..., 0] if shown.shape[-1] == 1 else shown))
            (part,) = self.annotator([shown.convert("RGB")])
            part = part[:, ::-1] if window.is_flipped else part
        else:
            part = self.cut(values, window)
            part = part[..., 0] if part.shape[-1] == 1 else part
        size = dict(zip(("height", "width"), window.size, strict=True))
        part = np.ascontiguousarray(part)
        if self.processor.condition == "segmentation":
            return self.processor.labels([part], size)[0]
        return self.processor.preprocess([part], size).pixel_values[0]


def _as_array(image: Image.Image | np.ndarray, condition: str) -> np.ndarray:
    """`(H, W, 1)` of ids (int32) or values (float32), or uint8 `(H, W, 3)` of colours."""
    if isinstance(image, Image.Image) and condition in ("depth", "edges"):
        try:
            image = picture_values(image, condition)
        except ValueError as error:
            raise BrokenImageError(f"a conditioning image of {condition} has one channel: {error}") from error
    elif isinstance(image, Image.Image):
        has_colours = image.mode not in ("L", "P", "1", "F") and not image.mode.startswith("I")
        image = image.convert("RGB") if condition in ("pose", "image") or has_colours else image
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    channels = values.shape[-1] if values.ndim == 3 else 0
    if channels not in (1, 3) or not values.size:
        raise BrokenImageError(f"a conditioning image has shape (H, W), (H, W, 1) or (H, W, 3), got {values.shape}")
    if channels == 3 and condition in ("depth", "edges"):
        if (values != values[..., :1]).any():
            raise BrokenImageError(f"a conditioning image of {condition} has one channel, got colours")
        values = values[..., :1]
    if values.shape[-1] == 3:
        return values.astype(np.uint8)
    is_whole = np.issubdtype(values.dtype, np.integer) or values.dtype == bool
    return values.astype(np.int32 if condition == "segmentation" and is_whole else np.float32)


def decode_pair(
    row: dict, channels: int, rules: PathRules, reader: ConditionReader | None
) -> tuple[Image.Image | np.ndarray, np.ndarray | None]:
    """The image of a row and, with a reader, the whole map of its condition.

    Raises:
        BrokenImageError: one of them cannot be read.
    """
    image = decode_image(row["image"], channels, rules)
    return image, None if reader is None else reader.decode(row.get(CONDITION), image, rules)


def seen_through(
    window: Window, image: Image.Image | np.ndarray, values: np.ndarray | None, reader: ConditionReader | None
) -> dict:
    """`pixel_values` and, with a reader, `condition` of the window on what `decode_pair` gives."""
    pixels = window.cut(image)
    sample = {"pixel_values": pixels_to_tensor(pixels)}
    return sample if reader is None else {**sample, "condition": reader.read(values, pixels, window)}


def build_reader(
    processor: VQConditionProcessor | None, column: str | None, edge_sigma: float = 2.0
) -> ConditionReader | None:
    """The reader of conditions that `processor` describes; None without one.

    Args:
        column: of the data set; edges without one are found in the images by Canny's method.
        edge_sigma: of the Gaussian there, in pixels of the size that the model sees.

    Raises:
        ValueError: a column without a processor, or another condition without a column.
    """
    if processor is None:
        if column is not None:
            raise ValueError(f"conditioning_image_column={column!r} needs a condition tokenizer, or a `condition`.")
        return None
    if column is not None:
        return ConditionReader(processor)
    if processor.condition != "edges":
        raise ValueError(f"conditioning_image_column must name a column for condition {processor.condition!r}.")
    from ...pipelines.annotators import EdgeAnnotator

    return ConditionReader(processor, EdgeAnnotator(edge_sigma))


def check_mirrored(processor: VQConditionProcessor | None, name: str) -> None:
    """A ValueError that names the argument if mirrored images would have a condition that means something else."""
    if processor is not None and processor.condition == "pose":
        raise ValueError(
            f"{name}=True mirrors a drawn pose, whose colours then call the left arm the right one, and a drawing has "
            "no keypoints left to swap: set it to false, or draw the poses of mirrored pictures into the data."
        )


def condition_values(condition: torch.Tensor, processor: VQConditionProcessor) -> torch.FloatTensor:
    """The pixel values `(B, C, h, w)` for a condition tokenizer of a batch of conditions, see the module's
    docstring.
    """
    if processor.condition != "segmentation":
        return condition
    known = condition >= 0
    one_hot = F.one_hot(condition.clamp(min=0), processor.num_labels).movedim(-1, 1)
    return one_hot.float() * known[:, None]


def load_condition_processor(folder: str | PathLike) -> VQConditionProcessor:
    """The processor of a condition tokenizer: with it, in a folder or a repository of the Hub, or in the folder
    `condition_processor` of the pipeline whose part the tokenizer is.

    Raises:
        ValueError: none, or another processor, lies there.
    """
    of_pipeline = Path(folder).parent / "condition_processor"
    alone = Path(folder).is_dir() and not (Path(folder) / IMAGE_PROCESSOR_NAME).exists()
    try:
        return VQConditionProcessor.from_pretrained(str(of_pipeline if alone and of_pipeline.is_dir() else folder))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`condition_tokenizer`={str(folder)!r} must have a {VQConditionProcessor.__name__} beside it, as "
            f"train_vqgan.py --condition … saves one: {error}"
        ) from error


__all__ = [
    "ConditionReader",
    "build_reader",
    "check_mirrored",
    "condition_values",
    "decode_pair",
    "load_condition_processor",
    "seen_through",
]
