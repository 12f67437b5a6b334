"""``hf-vq sample``."""

import argparse
import inspect
import secrets
from typing import Any

from ..loading import load
from .sources import announce, check_call, check_picture, device, read_images, write_image


def sample(options: argparse.Namespace) -> None:
    """Writes a sheet of new images, a row for each class, prompt, condition or image."""
    import torch

    from ..cli import SAMPLING_OPTIONS
    from ..evaluation.pictures import labelled_rows

    check_picture(options.output)
    pipeline = load(options.pipeline)
    if not callable(pipeline) or not hasattr(pipeline, "components"):
        raise ValueError(f"`{options.pipeline}` is not a pipeline, but a {type(pipeline).__name__}.")
    labels = [int(label) if label.isdigit() else label for label in options.class_label or []]
    given = {"class_labels": labels or None, "prompt": options.prompt}
    given |= {name: getattr(options, name) for name in ("condition_image", "image", "mask_image", *SAMPLING_OPTIONS)}
    given = {name: value for name, value in given.items() if value is not None}
    flags = {"class_labels": "class-label"}
    for name in given:
        check_call(pipeline, [name], f"`--{flags.get(name, name.replace('_', '-'))}`")
    if "mask_image" in given and "image" not in given:
        raise ValueError("`--mask-image` needs the `--image` that it is for.")
    varies = "strength" in inspect.signature(type(pipeline).__call__).parameters
    if "image" in given and "mask_image" not in given and not varies:
        raise ValueError(f"`--image` needs `--mask-image`, which says what a {type(pipeline).__name__} paints anew.")
    for name, (_, several) in SAMPLING_OPTIONS.items():
        if several and len(given.get(name, ())) == 1:
            (given[name],) = given[name]
    rows = list(map(str, labels or options.prompt or []))
    for name in ("image", "condition_image"):
        if name in given:
            given[name], names = read_images(given[name], f"--{name.replace('_', '-')}")
            rows = rows if len(rows) > 1 else names
    if "image" in given:
        given |= fitted(pipeline, given)
    pipeline.to(device(options))
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(**given, num_images_per_prompt=options.num_images, generator=generator).images
    parts = [images[start : start + options.num_images] for start in range(0, len(images), options.num_images)]
    rows = rows or [""]
    write_image(labelled_rows(list(zip(rows, parts, strict=True))), options.output, announce=False)
    found = {"output": str(options.output), "rows": rows, "images": len(images), "seed": seed}
    announce(options, found, [options.output])


def fitted(pipeline: Any, given: dict) -> dict:
    """The images that are given, and their masks, scaled and cut to the size of the call, or else of the model.

    Masks are cut as their images are, of which they show the same part.
    """
    import torch
    from PIL import Image

    from ..models.autoencoders.image_processing_vq import VQImageProcessor

    config = pipeline.vqvae.config
    own = getattr(pipeline, "image_size", None) or config.image_size
    size = tuple(given.get(name) or side for name, side in zip(("height", "width"), own, strict=True))
    processor = VQImageProcessor(size=size, num_channels=config.in_channels)
    found = {"image": processor(given["image"], return_tensors="pt").pixel_values}
    if "mask_image" in given:
        masks, _ = read_images(given["mask_image"], "--mask-image")
        each = masks * len(given["image"]) if len(masks) == 1 else masks
        for image, mask in zip(given["image"], each, strict=False):  # the pipeline says how many there must be
            if abs(image.width * mask.height - image.height * mask.width) > max(image.size):
                raise ValueError(
                    f"`--mask-image` must have the shape of its image, {image.width}×{image.height}, got "
                    f"{mask.width}×{mask.height}."
                )
        greys = VQImageProcessor(size=size, num_channels=1, resample=Image.Resampling.BOX)
        found["mask_image"] = (greys(masks, return_tensors="pt").pixel_values >= 0).to(torch.float32)
    return found
