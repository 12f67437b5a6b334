"""Validation: each process measures its share of the set, and a tokenizer's figures are these."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..distributed import share_of_process
from ..evaluation.evaluate import evaluate_tokenizer
from .data.image_datasets import collate


if TYPE_CHECKING:
    from .run import TrainingRun


def validation_loader(dataset: Dataset, batch_size: int = 64) -> DataLoader:
    """Batches of this process's share of a map-style data set: over all processes, every sample once."""
    rows = share_of_process(range(len(dataset)))
    return DataLoader(Subset(dataset, rows), batch_size=batch_size, collate_fn=collate)


@torch.no_grad()
def validate_tokenizer(
    run: "TrainingRun",
    model: nn.Module,
    dataset: Dataset,
    perceptual: nn.Module | None = None,
    num_pictures: int = 24,
) -> dict[str, float]:
    """The figures of `evaluate_tokenizer` on a validation set, and a picture: originals, each with its reconstruction.

    Those of several codebooks have their number at the end of the name.

    Args:
        run (`TrainingRun`): writes the picture.
        model: the tokenizer itself, not a distributed wrapper.
        dataset: map-style, with `pixel_values` `(3, H, W)` in [-1, 1].
        perceptual: a distance with a `name`, see `hf_vq.training.objectives.perceptual`.
        num_pictures: how many images, from the first on, the picture shows.
    """
    if run.is_main_process:
        images = [dataset[i]["pixel_values"] for i in range(min(num_pictures, len(dataset)))]
        images = torch.stack(images).to(run.device)
        reconstructions = model.decode(model.encode(images).quantized, quantize=False).sample.clamp(-1, 1)
        pairs = torch.stack([images, reconstructions], dim=1).flatten(0, 1)
        run.log_images("reconstructions", pairs, columns=12)
    figures = evaluate_tokenizer(model, validation_loader(dataset), perceptual, progress=False)
    for number, codebook in enumerate(figures.pop("codebooks", [])):
        figures.update({f"{name}_{number}": value for name, value in codebook.items()})
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}
