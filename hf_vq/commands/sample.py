"""``hf-vq sample``."""

import argparse
import inspect

from .sources import device, load, write_image


IMAGES = ("condition_image", "image", "mask_image")


def sample(options: argparse.Namespace) -> None:
    """Writes a sheet of new images, a row for each class or prompt."""
    import torch
    from PIL import Image

    from ..cli import SAMPLING_OPTIONS
    from ..evaluation.pictures import labelled_rows

    pipeline = load(options.pipeline)
    if not callable(pipeline) or not hasattr(pipeline, "components"):
        raise ValueError(f"`{options.pipeline}` is not a pipeline, but a {type(pipeline).__name__}.")
    labels = [int(label) if label.isdigit() else label for label in options.class_label or []]
    given = {"class_labels": labels or None, "prompt": options.prompt}
    given |= {name: getattr(options, name) for name in (*IMAGES, *SAMPLING_OPTIONS)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in inspect.signature(type(pipeline).__call__).parameters:
            flag = {"class_labels": "class-label"}.get(name, name.replace("_", "-"))
            raise ValueError(f"`--{flag}` has no meaning for a {type(pipeline).__name__}.")
    for name in IMAGES:
        if name in given:
            try:
                with Image.open(given[name]) as image:
                    image.load()
            except Exception as error:  # decoders fail in many ways
                flag = name.replace("_", "-")
                raise ValueError(f"`--{flag}` must be an image file, got {str(given[name])!r}: {error}") from error
            given[name] = image
    pipeline.to(device(options))
    generator = None if options.seed is None else torch.Generator().manual_seed(options.seed)
    images = pipeline(**given, num_images_per_prompt=options.num_images, generator=generator).images
    rows = [images[start : start + options.num_images] for start in range(0, len(images), options.num_images)]
    write_image(
        labelled_rows(list(zip(map(str, labels or options.prompt or [""]), rows, strict=True))), options.output
    )
