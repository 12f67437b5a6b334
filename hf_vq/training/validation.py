"""What a tokenizer's training run does at a validation."""

import torch
from torch.utils.data import DataLoader

from ..evaluation.evaluate import evaluate_tokenizer
from .data.image_datasets import collate


@torch.no_grad()
def validate_tokenizer(run, model, dataset, perceptual=None, num_pictures: int = 24) -> dict[str, float]:
    """The figures of `evaluate_tokenizer` on a validation set, and a picture: originals, each with its reconstruction.

    Those of several codebooks have their number at the end of the name.

    Args:
        run (`TrainingRun`): writes the picture.
        model: the tokenizer itself, not a distributed wrapper.
        dataset: map-style, with `pixel_values` `(3, H, W)` in [-1, 1].
        perceptual: a distance with a `name`, see `hf_vq.training.objectives.perceptual`.
        num_pictures: how many images, from the first on, the picture shows.
    """
    images = torch.stack([dataset[i]["pixel_values"] for i in range(min(num_pictures, len(dataset)))]).to(run.device)
    reconstructions = model.decode(model.encode(images).quantized, quantize=False).sample.clamp(-1, 1)
    pairs = torch.stack([images, reconstructions], dim=1).flatten(0, 1)
    run.log_images("reconstructions", pairs, columns=12)
    loader = DataLoader(dataset, batch_size=64, collate_fn=collate)
    figures = evaluate_tokenizer(model, loader, perceptual, progress=False)
    for number, codebook in enumerate(figures.pop("codebooks", [])):
        figures.update({f"{name}_{number}": value for name, value in codebook.items()})
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}
