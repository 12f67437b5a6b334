"""Images to the `pixel_values` of a tokenizer, and its samples back to images."""

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)

from ...images import array_to_pil, to_rgb


class VQImageProcessor(PilBackend):
    """Shorter side to `size`, centre crop, values to [-1, 1].

    The same steps as training's: bicubic with antialiasing, transparency laid on white, EXIF orientation applied.

    Args:
        size: side of the output, an `int` (or `{"shortest_edge": int}`); the crop is the square of that side unless
            `crop_size` says otherwise. `do_resize=False, do_center_crop=False` keeps the images as they are.
        kwargs: as in every image processor of transformers.

    Called with a Pillow image, an array or tensor (uint8, or float in [0, 1]; channels first or last), a path or URL,
    or a list of them; returns `pixel_values`, float32 `(B, 3, H, W)`, by default as a list of arrays, with
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

    def __init__(self, **kwargs):
        super().__init__(**_with_crop_size(kwargs))

    def preprocess(self, images, *args, **kwargs):
        return super().preprocess(images, *args, **_with_crop_size(kwargs))

    def process_image(self, image, do_convert_rgb=True, input_data_format=None, **kwargs):
        """One input to uint8 `(channels, height, width)`, three channels with `do_convert_rgb`."""
        if not isinstance(image, Image.Image):
            image = array_to_pil(image, input_data_format)
        image = ImageOps.exif_transpose(image)
        pixels = np.asarray(to_rgb(image) if do_convert_rgb else image)
        return np.moveaxis(pixels if pixels.ndim == 3 else pixels[..., None], -1, 0)

    def resize(self, image, size, resample=None, **kwargs):
        if size.shortest_edge and not size.longest_edge:  # to the nearest pixel; the base class rounds down
            height, width = image.shape[1:]
            scale = size.shortest_edge / min(height, width)
            size = type(size)(height=round(height * scale), width=round(width * scale))
        return super().resize(image, size, resample=resample, **kwargs)

    def postprocess(self, sample: torch.Tensor, output_type: str = "pil"):
        """Samples `(B, 3, H, W)` in [-1, 1] (clipped) to images.

        Returns:
            "pil": a list of Pillow images; "np": float32 `(B, H, W, 3)` in [0, 1]; "pt": float32 `(B, 3, H, W)` in [0, 1].
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'`output_type` must be "pil", "np" or "pt", got {output_type!r}.')
        if not torch.is_tensor(sample) or sample.ndim != 4 or sample.shape[1] != 3:
            shape = tuple(sample.shape) if hasattr(sample, "shape") else type(sample).__name__
            raise ValueError(f"`sample` must be a tensor of shape (B, 3, H, W), got {shape}.")
        images = (sample.detach().float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return images
        return [Image.fromarray(pixels) for pixels in np.rint(images * 255).astype(np.uint8)]


def _with_crop_size(kwargs: dict) -> dict:
    """`crop_size` follows `size` when only `size` is given."""
    size = kwargs.get("size")
    if size is None or kwargs.get("crop_size") is not None:
        return kwargs
    if isinstance(size, int):
        side = size
    elif isinstance(size, dict) and set(size) == {"shortest_edge"}:
        side = size["shortest_edge"]
    else:
        raise ValueError(
            f'`size` must be an int or {{"shortest_edge": int}} unless `crop_size` is given, got {size!r}.'
        )
    return {**kwargs, "crop_size": {"height": side, "width": side}}


__all__ = ["VQImageProcessor"]
