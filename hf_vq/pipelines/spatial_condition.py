"""A label map, depth map, edge map or drawing, or a photo of which an annotator makes one, to codes of a condition."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..images import covering_size, resize_and_crop, to_rgb
from .annotators import annotated, load_annotator
from .vq_pipeline import check_part, onload


def check_condition_parts(condition_tokenizer: Any, condition_processor: Any, config: Any) -> None:
    """A ValueError unless both parts, either of which may be None, fit each other and the prior's config."""
    attributes = ("encode", "config.num_embeddings", "config.in_channels", "config.downsample_factor")
    check_part("condition_tokenizer", condition_tokenizer, attributes, "an image tokenizer (VQGANModel, VQVAEModel)")
    wanted = "a VQConditionProcessor"
    check_part("condition_processor", condition_processor, ("condition", "num_channels", "preprocess"), wanted)
    if condition_tokenizer is None:
        return
    channels = condition_tokenizer.config.in_channels
    if condition_processor is not None and condition_processor.num_channels != channels:
        raise ValueError(
            f"`condition_processor` must give the {channels} channels of `condition_tokenizer`, got "
            f"{condition_processor.num_channels}."
        )
    if config is not None and config.condition_type != "codes":
        raise ValueError(
            f"`condition_tokenizer` needs a prior whose condition_type is 'codes', got {config.condition_type!r}."
        )
    size = condition_tokenizer.config.num_embeddings
    if config is not None and config.condition_vocab_size != size:
        raise ValueError(
            f"`condition_tokenizer` must have the {config.condition_vocab_size} codes that `prior` is conditioned on, "
            f"got {size}."
        )


@torch.no_grad()
def encode_condition(
    pipeline: Any, condition_image: Any, size: tuple[int, int], annotator: str | Callable | None = None
) -> torch.LongTensor:
    """The codes `(B, h', w')` of conditions, on the pipeline's device.

    Args:
        pipeline: has `condition_tokenizer` and `condition_processor`.
        condition_image: what the processor reads, one or a list; with an annotator photos, Pillow images.
        size: height and width of the images that are sampled. What has other proportions is cut around its centre.
        annotator: see [`load_annotator`].

    Raises:
        ValueError: the pipeline lacks the parts, or `condition_image` is no condition.
    """
    tokenizer, processor = pipeline.condition_tokenizer, pipeline.condition_processor
    if tokenizer is None or processor is None:
        raise ValueError(
            "`condition_image` needs a pipeline with `condition_tokenizer` and `condition_processor`; without them "
            "give the codes of the condition as `condition`."
        )
    factor = tokenizer.config.downsample_factor
    if any(side % factor for side in size):
        raise ValueError(
            f"`height` and `width` must be multiples of {factor}, the condition tokenizer's, got {tuple(size)}."
        )
    if annotator is not None:
        photos = condition_image if isinstance(condition_image, (list, tuple)) else [condition_image]
        if not photos or not all(isinstance(photo, Image.Image) for photo in photos):
            raise ValueError("`condition_image` must be PIL images for an `annotator`.")
        loaded = load_annotator(annotator, device=pipeline._execution_device)
        condition_image = annotated(loaded, [_fitted(photo, size) for photo in photos])
    try:
        values = processor.preprocess(condition_image, {"height": size[0], "width": size[1]}).pixel_values
    except ValueError as error:
        raise ValueError(f"`condition_image` is no condition of kind {processor.condition!r}: {error}") from error
    onload(tokenizer)
    values = values.to(pipeline._execution_device, tokenizer.dtype)
    return torch.cat([tokenizer.encode(part).indices for part in values.split(16)])


def _fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A photo as the model sees it, so that edges are found at that size, as in training."""
    photo = to_rgb(ImageOps.exif_transpose(photo))
    resized = covering_size((photo.height, photo.width), size)
    corner = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return Image.fromarray(np.ascontiguousarray(resize_and_crop(photo, resized, corner, size)))


__all__ = ["check_condition_parts", "encode_condition"]
