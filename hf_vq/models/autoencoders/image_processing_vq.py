"""Images to the `pixel_values` of a tokenizer, and its samples back to images."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)

from ...argument_checks import check_integer
from ...images import array_to_pil, array_to_pixels, covering_size, resize_and_crop, to_channels
from ..checked_loading import CheckedProcessorMixin


class VQImageProcessor(CheckedProcessorMixin, PilBackend):
    """Scaled until it covers the crop, cropped at the centre, values to [-1, 1].

    The same steps as training's: bicubic with antialiasing, transparency laid on white, EXIF orientation applied.

    Args:
        size: side of the output, an `int` (or `{"shortest_edge": int}`) for squares, or `(height, width)` (or
            `{"height": int, "width": int}`). The crop is of that size unless `crop_size` says otherwise.
            `do_resize=False, do_center_crop=False` keeps the images as they are.
        num_channels: of the output: 1 (grey), 3 (RGB), 4 (RGBA), or any number for arrays that have it.
        kwargs: as in every image processor of transformers.

    Called with a Pillow image, an array or tensor (uint8, or float in [0, 1]; channels first or last), a path or URL,
    or a list of them; returns `pixel_values`, float32 `(B, num_channels, H, W)`, by default as a list of arrays, with
    `return_tensors="pt"` as a tensor.
    """

    model_input_names = ["pixel_values"]
    size = {"shortest_edge": 256}
    crop_size = {"height": 256, "width": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_mean = IMAGENET_STANDARD_MEAN  # 0.5 each, as is the deviation: [0, 1] becomes [-1, 1]
    image_std = IMAGENET_STANDARD_STD
    num_channels = 3

    def __init__(self, num_channels: int = 3, **kwargs: Any):
        num_channels = check_integer("num_channels", num_channels, minimum=1)
        if num_channels != 3:
            kwargs = {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels, **kwargs}
        super().__init__(**_with_crop_size(kwargs))
        self.num_channels = num_channels

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Any):
        images = (
            [_with_channels(image) for image in images]
            if isinstance(images, (list, tuple))
            else _with_channels(images)
        )
        return super().preprocess(images, *args, **_with_crop_size(kwargs))

    def process_image(self, image: Any, do_convert_rgb: bool = True, input_data_format: Any = None, **kwargs: Any):
        """One input to uint8 `(num_channels, height, width)`; a picture's own channels with `do_convert_rgb=False`."""
        if not isinstance(image, Image.Image):
            if self.num_channels not in (1, 3, 4):
                return np.moveaxis(array_to_pixels(image, self.num_channels, input_data_format), -1, 0)
            image = array_to_pil(image, input_data_format)
        image = ImageOps.exif_transpose(image)
        pixels = np.asarray(to_channels(image, self.num_channels) if do_convert_rgb else image)
        return np.moveaxis(pixels if pixels.ndim == 3 else pixels[..., None], -1, 0)

    def _preprocess(self, images, do_resize, size, resample, do_center_crop, crop_size, **kwargs):
        if do_resize and do_center_crop and size.shortest_edge and not size.longest_edge:
            window = crop_size.height, crop_size.width
            images = [self._cover_and_crop(image, size.shortest_edge, window, resample) for image in images]
            do_resize = do_center_crop = False
        batch = super()._preprocess(images, do_resize, size, resample, do_center_crop, crop_size, **kwargs)
        if not all(np.isfinite(values).all() for values in batch.pixel_values):
            raise ValueError("`image_mean`, `image_std` and `rescale_factor` must give finite values, got nan or inf.")
        return batch

    def _cover_and_crop(self, image, shortest_edge: int, window: tuple[int, int], resample) -> np.ndarray:
        """The centre of one image `(C, H, W)`, scaled to its shortest edge, or more where that leaves the window
        bare.
        """
        sizes = [covering_size(image.shape[1:], sides) for sides in ((shortest_edge, shortest_edge), window)]
        resized = max(sizes)
        corner = tuple((resized[axis] - window[axis]) // 2 for axis in (0, 1))
        return np.moveaxis(resize_and_crop(np.moveaxis(image, 0, -1), resized, corner, window, resample), -1, 0)

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any = None, **kwargs: Any):
        if size.shortest_edge and not size.longest_edge:  # to the nearest pixel; the base class rounds down
            height, width = covering_size(image.shape[1:], (size.shortest_edge, size.shortest_edge))
            size = type(size)(height=height, width=width)
        return super().resize(image, size, resample=resample, **kwargs)

    def postprocess(self, sample: torch.Tensor, output_type: str = "pil"):
        """Samples `(B, num_channels, H, W)` in [-1, 1] (clipped) to images.

        Returns:
            "pil": a list of Pillow images (1, 3 or 4 channels); "np": float32 `(B, H, W, num_channels)` in [0, 1];
            "pt": float32 `(B, num_channels, H, W)` in [0, 1].
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'`output_type` must be "pil", "np" or "pt", got {output_type!r}.')
        if not torch.is_tensor(sample) or sample.ndim != 4 or sample.shape[1] != self.num_channels:
            shape = tuple(sample.shape) if hasattr(sample, "shape") else type(sample).__name__
            raise ValueError(f"`sample` must be a tensor of shape (B, {self.num_channels}, H, W), got {shape}.")
        if output_type == "pil" and self.num_channels not in (1, 3, 4):
            raise ValueError(f'`output_type` must be "np" or "pt" for {self.num_channels} channels, got "pil".')
        images = (sample.detach().float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return images
        images = np.rint(images * 255).astype(np.uint8)
        return [Image.fromarray(pixels[..., 0] if self.num_channels == 1 else pixels) for pixels in images]


def _with_channels(image):
    """An array `(H, W)` as `(H, W, 1)`; anything else as it is."""
    return image[..., None] if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2 else image


def _with_crop_size(kwargs: dict) -> dict:
    """`size` by its shortest edge, and `crop_size` that follows it when only `size` is given."""
    size = kwargs.get("size")
    if size is None or kwargs.get("crop_size") is not None:
        return kwargs
    sides = None
    if isinstance(size, int):
        sides = size, size
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        sides = tuple(size)
    elif isinstance(size, dict) and set(size) == {"shortest_edge"}:
        sides = size["shortest_edge"], size["shortest_edge"]
    elif isinstance(size, dict) and set(size) == {"height", "width"}:
        sides = size["height"], size["width"]
    if sides is None or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            '`size` must be an int, (height, width), {"shortest_edge": int} or {"height": int, "width": int} unless '
            f"`crop_size` is given, got {size!r}."
        )
    return {**kwargs, "size": {"shortest_edge": min(sides)}, "crop_size": {"height": sides[0], "width": sides[1]}}


__all__ = ["VQImageProcessor"]
