"""``hf-vq show``: pictures of what a tokenizer has learned, or of a run's curves."""

import argparse
from pathlib import Path

from .sources import ImageBatches, load_tokenizer, write_image


def show(options: argparse.Namespace) -> int:
    """Writes the picture `options.what`; returns how many images could not be read."""
    path = options.output or Path(f"{options.what}.png")
    if options.what == "curves":
        from ..evaluation.inspection import loss_curves

        path.parent.mkdir(parents=True, exist_ok=True)
        loss_curves(options.model).savefig(path, dpi=120)
        print(path)
        return 0
    if not options.images:
        raise ValueError(f"`IMAGE` must name at least one file for {options.what!r}, got none.")
    model = load_tokenizer(options)
    batches = ImageBatches(options, model)
    picture = {"atlas": _atlas, "usage": _usage, "indices": _indices, "interpolation": _interpolation}[options.what]
    write_image(picture(model, batches), path)
    return batches.skipped


def _atlas(model, batches: ImageBatches):
    from ..evaluation.inspection import codebook_atlas

    return codebook_atlas(model, ({"pixel_values": values} for _, values in batches), progress=False)


def _usage(model, batches: ImageBatches):
    from ..evaluation.inspection import heat_map, usage_map

    perplexity = usage_map(model, ({"pixel_values": values} for _, values in batches), progress=False)
    print(f"perplexity of the codes at a position: {perplexity.min():.1f} to {perplexity.max():.1f}")
    return heat_map(perplexity)


def _indices(model, batches: ImageBatches):
    import torch

    from ..evaluation.inspection import index_map
    from ..evaluation.pictures import labelled_rows
    from ..images import to_pil

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
    return labelled_rows(rows)


def _interpolation(model, batches: ImageBatches):
    import torch

    from ..evaluation.inspection import interpolate
    from ..evaluation.pictures import labelled_rows

    images = torch.cat([values for _, values in batches])
    if len(images) < 2:
        raise ValueError("`IMAGE` must name two images to interpolate between, got one.")
    return labelled_rows(
        [(space, interpolate(model, *images[:2], space=space).cpu()) for space in ("latent", "index")]
    )
