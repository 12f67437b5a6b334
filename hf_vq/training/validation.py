"""Validation: each process measures its share of the set, and a tokenizer's figures are these."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..distributed import share_of_process
from ..evaluation.agreement import LabelAgreement
from ..evaluation.codebook import CodebookCounts
from ..evaluation.evaluate import evaluate_tokenizer
from ..evaluation.inspection import codebook_atlas
from ..images import pixels_to_tensor
from ..models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from .data.conditions import condition_values
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
    figures = evaluate_tokenizer(model, run.until_signal(validation_loader(dataset)), perceptual, progress=False)
    for number, codebook in enumerate(figures.pop("codebooks", [])):
        figures.update({f"{name}_{number}": value for name, value in codebook.items()})
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def draw_atlas(run: "TrainingRun", tokenizer: nn.Module, dataset: Dataset, num_images: int = 256) -> None:
    """Draws what each code stands for, see `codebook_atlas`, of each level: `atlas` among the run's pictures, and so
    in the card.

    A codebook of more than 1024 codes is too large to look at, and has none; nor have images that are not RGB.

    Args:
        run (`TrainingRun`): writes the pictures.
        tokenizer: what was trained.
        dataset: map-style, with `pixel_values` `(3, H, W)` in [-1, 1].
        num_images: how many images, from the first on, are searched for each code.
    """
    config = tokenizer.config
    if config.num_embeddings > 1024 or config.in_channels != 3:
        return
    levels = range(len(config.downsample_factors))
    rows = Subset(dataset, range(min(num_images, len(dataset))))
    for level in levels:
        batches = DataLoader(rows, batch_size=64, collate_fn=collate)
        atlas = np.array(codebook_atlas(tokenizer, batches, level=level, progress=False).convert("RGB"))
        name = "atlas" if len(levels) == 1 else f"atlas_{level}"
        run.log_images(name, torch.from_numpy(atlas).permute(2, 0, 1)[None] / 127.5 - 1, columns=1)


class ConditionsAlone(Dataset):
    """The conditions of a map-style data set of pairs, as the `pixel_values` of their tokenizer, and nothing else."""

    def __init__(self, dataset: Dataset, processor: VQConditionProcessor):
        self.dataset, self.processor = dataset, processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": condition_values(self.dataset[index]["condition"][None], self.processor)[0]}


@torch.no_grad()
def validate_segmentation(
    run: "TrainingRun", model: nn.Module, dataset: Dataset, processor: VQConditionProcessor, num_pictures: int = 24
) -> dict[str, float]:
    """`mean_iou` and `pixel_accuracy` of decoded label maps, the codebook's figures, and a picture of both.

    Args:
        run (`TrainingRun`): writes the picture.
        model: the tokenizer itself, not a distributed wrapper.
        dataset: map-style, whose samples have a `condition`, see `hf_vq.training.data.conditions`.
        processor: of the label maps.
        num_pictures: how many of them, from the first on, the picture shows.
    """

    def decoded(labels: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
        indices = model.encode(condition_values(labels.to(run.device), processor)).indices
        return model.decode_indices(indices).sample, indices

    if run.is_main_process:
        labels = torch.stack([dataset[i]["condition"] for i in range(min(num_pictures, len(dataset)))])
        rows = [processor.postprocess(values) for values in (condition_values(labels, processor), decoded(labels)[0])]
        pairs = [pixels_to_tensor(np.asarray(picture)) for pair in zip(*rows, strict=True) for picture in pair]
        run.log_images("reconstructions", torch.stack(pairs), columns=12)
    agreement, counts = LabelAgreement(processor.num_labels), CodebookCounts(model.config.num_embeddings)
    for batch in run.until_signal(validation_loader(dataset)):
        logits, indices = decoded(batch["condition"])
        agreement.update(logits.argmax(dim=1), batch["condition"])
        counts.update(indices)
    statistics = counts.compute()
    return {
        **{name: value for name, value in agreement.compute().items() if name != "iou"},
        "codebook_perplexity": float(statistics.perplexity),
        "codebook_usage": float(statistics.usage),
    }
