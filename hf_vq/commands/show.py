"""``hf-vq show``: pictures of what a tokenizer has learned, or of a run's curves."""

import argparse
from pathlib import Path

from ..loading import load
from .sources import ImageBatches, announce, check_picture, device, load_tokenizer, write_image


def show(options: argparse.Namespace) -> int:
    """Writes the picture `options.what`; returns how many images could not be read."""
    path = options.output or Path(f"{options.what}.png")
    check_picture(path)
    if options.samples and options.what != "nearest":
        raise ValueError(f"`--samples` has no meaning for {options.what!r}.")
    if options.what == "curves":
        from ..evaluation.inspection import loss_curves

        path.parent.mkdir(parents=True, exist_ok=True)
        loss_curves(options.model).savefig(path, dpi=120)
        announce(options, {"output": str(path)})
        return 0
    if not options.images:
        raise ValueError(f"`IMAGE` must name at least one file for {options.what!r}, got none.")
    draw = {
        "atlas": _atlas,
        "usage": _usage,
        "indices": _indices,
        "interpolation": _interpolation,
        "nearest": _nearest,
    }[options.what]
    picture, batches, figures = draw(options)
    write_image(picture, path, announce=False)
    lines = [f"{name.replace('_', ' ')}: {low:.3g} to {high:.3g}" for name, (low, high) in figures.items()]
    announce(options, {"output": str(path), **figures, "skipped": batches.skipped}, [*lines, path])
    return batches.skipped


def _tokenizer_and_images(options: argparse.Namespace) -> tuple:
    model = load_tokenizer(options)
    return model, ImageBatches(options, model)


def _atlas(options: argparse.Namespace) -> tuple:
    from ..evaluation.inspection import codebook_atlas

    model, batches = _tokenizer_and_images(options)
    atlas = codebook_atlas(model, ({"pixel_values": values} for _, values in batches), progress=False)
    return atlas, batches, {}


def _usage(options: argparse.Namespace) -> tuple:
    from ..evaluation.inspection import heat_map, usage_map

    model, batches = _tokenizer_and_images(options)
    perplexity = usage_map(model, ({"pixel_values": values} for _, values in batches), progress=False)
    return heat_map(perplexity), batches, {"perplexity_of_a_position": _range(perplexity)}


def _range(values) -> list[float]:
    return [float(values.min()), float(values.max())]


def _indices(options: argparse.Namespace) -> tuple:
    import torch

    from ..evaluation.inspection import index_map
    from ..evaluation.pictures import labelled_rows
    from ..images import to_pil

    model, batches = _tokenizer_and_images(options)
    originals, maps, samples = [], [], []
    for _, values in batches:
        with torch.no_grad():
            indices = model.encode(values).indices
            samples += to_pil(model.decode_indices(indices).sample.float())
        levels = indices if isinstance(indices, tuple) else (indices,)
        finest = levels[-1][..., 0] if levels[-1].ndim == 4 else levels[-1]
        originals += to_pil(values.float())
        maps += index_map(finest, model.config.num_embeddings, values.shape[-1] // finest.shape[-1])
    rows = []
    for start in range(0, len(originals), 8):
        part = slice(start, start + 8)
        rows += [("original", originals[part]), ("codes", maps[part]), ("reconstruction", samples[part])]
    return labelled_rows(rows), batches, {}


def _interpolation(options: argparse.Namespace) -> tuple:
    import torch

    from ..evaluation.inspection import interpolate
    from ..evaluation.pictures import labelled_rows

    model, batches = _tokenizer_and_images(options)
    images = torch.cat([values for _, values in batches])
    if len(images) < 2:
        raise ValueError("`IMAGE` must name two images to interpolate between, got one.")
    rows = [(space, interpolate(model, *images[:2], space=space).cpu()) for space in ("latent", "index")]
    return labelled_rows(rows), batches, {}


def _nearest(options: argparse.Namespace) -> tuple:
    """Samples, each in a row with the images that are closest to it, and how far the first of these is."""
    import copy

    import torch

    from ..evaluation.inspection import TokenizerLatents, nearest_images
    from ..evaluation.pictures import labelled_rows
    from ..images import to_pil

    model = load(options.model)
    tokenizer = getattr(model, "vqvae", model)
    tokenizer.to(device(options)).eval()
    images = ImageBatches(options, tokenizer)
    rows = [{"pixel_values": value.float().cpu()} for _, values in images for value in values]
    if options.samples:
        given = copy.copy(options)
        given.images = options.samples
        samples = torch.cat([values.float() for _, values in ImageBatches(given, tokenizer)])
    elif hasattr(model, "components"):
        generator = torch.Generator().manual_seed(0)
        model.to(device(options))
        samples = model(num_images_per_prompt=8, generator=generator, output_type="pt").images.float() * 2 - 1
    else:
        raise ValueError("`--samples` must name images where `MODEL` is a tokenizer, which draws none, got none.")
    count = min(4, len(rows))
    numbers, distances = nearest_images(samples, rows, TokenizerLatents(tokenizer), count, progress=False)
    pictures = to_pil(torch.stack([row["pixel_values"] for row in rows]))
    sheet = [
        (f"{float(distance[0]):.3g}", [sample, *(pictures[number] for number in near.tolist())])
        for sample, near, distance in zip(to_pil(samples), numbers, distances, strict=True)
    ]
    sheet = labelled_rows(sheet, title="samples, and the images closest to them in latents")
    return sheet, images, {"distance_of_the_closest": _range(distances[:, 0])}
