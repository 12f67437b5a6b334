"""``hf-vq encode``, ``decode`` and ``reconstruct``: images to codes and back, a batch at a time."""

import argparse
import json
from pathlib import Path

from .sources import ImageBatches, announce, check_output_file, check_picture, load_tokenizer, write_image


def reconstruct(options: argparse.Namespace) -> int:
    """Writes one picture, images above their reconstructions, and prints how close they are; returns how many
    failed.
    """
    import torch

    from ..evaluation.pictures import labelled_rows
    from ..evaluation.reconstruction import psnr
    from ..images import to_pil

    check_picture(options.output)
    model = load_tokenizer(options)
    batches, figures, originals, samples = ImageBatches(options, model), [], [], []
    for paths, pixel_values in batches:
        with torch.no_grad():
            sample = model.decode(model.encode(pixel_values).latents).sample.float().clamp(-1, 1)
        pixel_values = pixel_values.float().clamp(-1, 1)
        for path, value in zip(paths, psnr(sample, pixel_values).tolist(), strict=True):
            figures.append({"image": str(path), "psnr": value})
            if not options.json:
                print(f"{path}: PSNR {value:.2f} dB")
        room = options.max_pictures - len(originals)
        originals += to_pil(pixel_values[:room])
        samples += to_pil(sample[:room])
    mean = sum(figure["psnr"] for figure in figures) / len(figures)
    columns = [slice(start, start + 8) for start in range(0, len(originals), 8)]
    rows = [(name, images[part]) for part in columns for name, images in _named(originals, samples)]
    write_image(labelled_rows(rows), options.output, announce=not options.json)
    if options.json:
        announce(options, {"images": figures, "mean_psnr": mean, "skipped": batches.skipped})
        return batches.skipped
    if len(figures) > 1:
        print(f"mean over {len(figures)} images: PSNR {mean:.2f} dB")
    if len(figures) > len(originals):
        print(f"the sheet shows the first {len(originals)} of {len(figures)} images")
    return batches.skipped


def _named(originals: list, samples: list) -> list[tuple[str, list]]:
    return [("original", originals), ("reconstruction", samples)]


def encode(options: argparse.Namespace) -> int:
    """Writes the indices of images to a safetensors file; returns how many images failed."""
    import torch
    from safetensors.torch import save_file

    check_output_file(options.output)
    model = load_tokenizer(options)
    batches, files, parts = ImageBatches(options, model), [], []
    for paths, pixel_values in batches:
        with torch.no_grad():
            indices = model.encode(pixel_values).indices
        indices = tuple(level.cpu() for level in (indices if isinstance(indices, tuple) else (indices,)))
        if parts and indices[0].shape[1:] != parts[0][0].shape[1:]:
            raise ValueError(
                f"`IMAGE`: {paths[0]} has {tuple(indices[0].shape[1:])} codes and {files[0]} "
                f"{tuple(parts[0][0].shape[1:])}; one file holds grids of one size (`--size`)."
            )
        files += paths
        parts.append(indices)
    tensors = {
        name: torch.cat(levels).contiguous()
        for name, levels in zip(_level_names(model), zip(*parts, strict=True), strict=True)
    }
    metadata = {"model": options.model, "images": json.dumps([str(path) for path in files])}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.output, metadata=metadata)
    shapes = {name: list(codes.shape) for name, codes in tensors.items()}
    lines = [
        f"{options.output}: {name} {tuple(codes.shape)}, {codes.unique().numel()} different codes"
        for name, codes in tensors.items()
    ]
    announce(options, {"output": str(options.output), "shapes": shapes, "skipped": batches.skipped}, lines)
    return batches.skipped


def decode(options: argparse.Namespace) -> None:
    """Writes one image for each grid of indices in a file of `encode`."""
    import torch

    from ..images import images_as

    if options.output.is_file():
        raise ValueError(f"`--output` must be a folder, got the file {str(options.output)!r}.")
    model = load_tokenizer(options)
    levels, names = _read_indices(options.indices, model)
    count, files = len(levels[0]), []
    for start in range(0, count, options.batch_size):
        batch = tuple(level[start : start + options.batch_size].long().to(model.device) for level in levels)
        with torch.no_grad():
            sample = model.decode_indices(batch[0] if len(batch) == 1 else batch).sample
        for number, image in enumerate(images_as((sample.float() / 2 + 0.5).clamp(0, 1), "pil"), start):
            stem = Path(names[number]).stem if len(names) == count else "image"
            files.append(str(options.output / f"{number:04d}-{stem}.png"))
            write_image(image, Path(files[-1]), announce=not options.json)
    if options.json:
        announce(options, {"files": files})


def _level_names(model) -> list[str]:
    """The names of a tokenizer's indices in a file, those of a hierarchy from top to bottom."""
    count = len(model.config.downsample_factors)
    return ["indices"] if count == 1 else [f"indices_{level}" for level in range(count)]


def _read_indices(path: Path, model) -> tuple[list, list[str]]:
    """The indices of each level, and the files that they were made from; ValueErrors where they do not fit the
    model.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from ..models.checked_loading import check_safetensors

    names = _level_names(model)
    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            for name in names:
                if name not in file.keys():
                    raise ValueError(f"`{path}` must hold a tensor `{name}`, got {sorted(file.keys())}.")
            indices = [file.get_tensor(name) for name in names]
            listed = (file.metadata() or {}).get("images", "[]")
    except SafetensorError as error:
        raise ValueError(f"`{path}` must be a safetensors file: {error}.") from error
    try:
        images = json.loads(listed)
    except ValueError:
        images = None
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"`{path}` must list its images in its metadata as JSON texts, got {listed[:60]!r}.")
    codes = model.config.num_embeddings
    shape = "(B, h, w, depth)" if model.config.quantizer == "residual" else "(B, h, w)"
    for name, level in zip(names, indices, strict=True):
        is_whole = level.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
        wrong = level.ndim != shape.count(",") + 1 or level.numel() == 0 or not is_whole
        if wrong or level.long().min() < 0 or level.long().max() >= codes:
            raise ValueError(f"`{name}` must be whole numbers {shape} below {codes}, the size of the codebook.")
        if len(level) != len(indices[0]):
            raise ValueError(f"`{name}` must be of {len(indices[0])} images as `{names[0]}` is, got {len(level)}.")
    return indices, images
