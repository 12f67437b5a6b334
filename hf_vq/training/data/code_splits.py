"""The codes of a training and a validation set, and the names of their classes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from ..checkpointing import preserved_random_state
from .box_conditions import BoxConditions, BoxSettings
from .columns import NO_LABEL
from .conditions import check_mirrored
from .coordinate_crops import CoordinateCrops, CropSettings
from .image_datasets import DataArguments, load_image_dataset
from .indices_cache import CONDITION_CODES, IndicesDataset, load_indices, write_indices


if TYPE_CHECKING:
    from ..run import TrainingRun

logger = logging.getLogger(__name__)


def load_code_splits(
    run: "TrainingRun",
    data: DataArguments,
    tokenizer: nn.Module,
    random_flip: bool,
    several_levels: bool = False,
    condition_tokenizer: nn.Module | None = None,
    condition_processor: VQConditionProcessor | None = None,
    crops: CropSettings | None = None,
    boxes: BoxSettings | None = None,
    try_model: Callable[[dict[str, list[int]]], nn.Module] | None = None,
) -> tuple[dict[str, IndicesDataset], list[str] | None]:
    """Encodes the data sets "train" and "validation", once, into `output_dir/indices`, and opens the codes.

    Args:
        run (`TrainingRun`): with the output folder; every process calls this.
        data: the images, which are read without augmentation.
        tokenizer: on the run's device, in eval mode.
        random_flip: train on the codes of the mirrored image in half of the cases.
        several_levels: whether the caller takes the codes of a hierarchical tokenizer, a grid for each level.
        condition_tokenizer, condition_processor: also encode each image's condition, as `condition_codes`.
        crops: encode random crops of the training images and the centre crops of the others, with their coordinates as
            `condition_codes`.
        boxes: also write the ids of each image's boxes, as `condition_codes`; `data` carries their column.
        try_model: makes the prior for grids of codes of these sizes, by column; called before anything is read, so
            that what cannot be made is refused then.

    Returns:
        The data sets by split, and the names of the classes, if they have names.

    Raises:
        ValueError: an augmentation that codes, which are written once, cannot have; a tokenizer of several levels
            where one is wanted, or of several codes a position.
    """
    check_single_codes("tokenizer", tokenizer)
    levels = len(tokenizer.config.downsample_factors)
    if levels > 1 and not several_levels:
        raise ValueError(
            f"tokenizer: it must have one level of codes, got a {type(tokenizer).__name__} with {levels}; "
            "examples/pixelcnn trains a prior for each level."
        )
    if crops is not None and (data.crop != "random" or data.streaming):
        raise ValueError(
            f"crop={data.crop!r} and streaming={data.streaming}: coordinates are those of random crops that are "
            'written once, which needs crop="random" and streaming=False.'
        )
    if data.random_flip or (data.crop != "center" and crops is None):
        raise ValueError(
            f"random_flip={data.random_flip} and crop={data.crop!r} have no effect on codes that are written "
            "once: leave them out, and use random_flip_codes=True for mirrored images, or condition='coordinates' for "
            "random crops."
        )
    if random_flip:
        check_mirrored(condition_processor, "random_flip_codes")
    data.check_multiple_of(max(tokenizer.config.downsample_factors))
    conditions = {"condition_processor": condition_processor}
    if condition_tokenizer is not None:
        check_condition_tokenizer(condition_tokenizer, condition_processor)
        data.check_multiple_of(condition_tokenizer.config.downsample_factor)
        conditions["condition_tokenizer"] = condition_tokenizer
    if try_model is not None:
        make_on_meta(try_model, code_grids(data.size, tokenizer, condition_tokenizer, crops is not None))
    arguments = run.arguments
    codes, class_names = {}, None
    for split in ("train", "validation"):
        images = load_image_dataset(
            data if crops is None and boxes is None else replace(data, cache_images=False),
            split,
            class_names=class_names,
            channels=tokenizer.config.in_channels,
            condition_processor=condition_processor,
        )
        class_names = images.class_names if split == "train" else class_names
        folder = run.output_dir / "indices" / split
        flip = random_flip and split == "train"
        if crops is not None:
            images = CoordinateCrops(images, crops, "random" if split == "train" else "center", flip)
        elif boxes is not None:
            images = BoxConditions(images, boxes, flip)
        write_indices(tokenizer, images, folder, flip=flip, num_workers=arguments.dataloader_num_workers, **conditions)
        codes[split] = load_indices(
            folder,
            tokenizer,
            random_flip=flip,
            seed=arguments.seed,
            caption_column=data.caption_column,
            condition_tokenizer=condition_tokenizer,
        )
    return codes, class_names


def code_grids(
    size: Sequence[int],
    tokenizer: nn.Module,
    condition_tokenizer: nn.Module | None = None,
    has_coordinates: bool = False,
) -> dict[str, list[int]]:
    """The sizes of the grids of codes of images of `size`, by their columns."""
    factors = tokenizer.config.downsample_factors
    names = ["indices"] if len(factors) == 1 else [f"indices_{level}" for level in range(len(factors))]
    grids = {name: [side // factor for side in size] for name, factor in zip(names, factors, strict=True)}
    if condition_tokenizer is not None:
        grids[CONDITION_CODES] = [side // condition_tokenizer.config.downsample_factor for side in size]
    elif has_coordinates:
        grids[CONDITION_CODES] = grids["indices"]
    return grids


def make_on_meta(make: Callable[..., Any], *arguments: Any) -> None:
    """Makes a model without memory, to see whether its settings can be: they are wrong before hours of encoding."""
    with preserved_random_state(), torch.device("meta"):
        make(*arguments)


def check_single_codes(name: str, tokenizer: nn.Module) -> None:
    """A ValueError for a tokenizer, the argument `name`, of several codes a position."""
    if tokenizer.config.quantizer == "residual":
        raise ValueError(
            f"`{name}` must have one code at each position, got a {type(tokenizer).__name__} with "
            "quantizer='residual': no prior reads its several codes."
        )


def check_condition_tokenizer(tokenizer: nn.Module, processor: VQConditionProcessor) -> None:
    """A ValueError unless `tokenizer` has one code a position of one grid, and the channels of `processor`."""
    check_single_codes("condition_tokenizer", tokenizer)
    levels = len(tokenizer.config.downsample_factors)
    if levels > 1:
        raise ValueError(f"`condition_tokenizer` must have one level of codes, got {levels}.")
    if tokenizer.config.in_channels != processor.num_channels:
        raise ValueError(
            f"`condition_tokenizer` must take the {processor.num_channels} channels of its processor, got "
            f"{tokenizer.config.in_channels}."
        )


def count_classes(
    splits: dict, class_names: list[str] | None, label_column: str | None, allow_missing: bool = False
) -> int:
    """
    How many classes a conditional model needs: as many as there are names, or one more than the highest training
        label.

    Args:
        splits: data sets by name, "train" among them; their `labels` are arrays of all labels, or None (as those of a
            stream, which has none).
        class_names: names of the classes, where they have any.
        label_column: where the labels come from; None if there are none.
        allow_missing: whether labels may be -1, which stands for none.

    Returns:
        0 without a label column.

    Raises:
        ValueError: labels of a split that are out of range, or a stream's that have no names.
    """
    if label_column is None:
        return 0
    labels = {split: getattr(dataset, "labels", None) for split, dataset in splits.items()}
    if class_names is None and labels["train"] is None:
        raise ValueError(
            f"label_column={label_column!r}: the classes of a stream need names, from which their number follows."
        )
    if allow_missing:
        labels = {split: values if values is None else values[values != NO_LABEL] for split, values in labels.items()}
    empty = [split for split, values in labels.items() if values is not None and not len(values)]
    if empty:
        raise ValueError(f"label_column={label_column!r}: no row of the {empty[0]} data has a label.")
    count = len(class_names) if class_names is not None else int(labels["train"].max()) + 1
    for split, values in labels.items():
        if values is not None and (values.min() < 0 or values.max() >= count):
            raise ValueError(
                f"label_column: the {split} labels are {values.min()} to {values.max()}, not within 0 to {count - 1}."
            )
    _warn_of_untrained_classes(labels, class_names)
    return count


def _warn_of_untrained_classes(labels: dict, class_names: list[str] | None) -> None:
    if any(values is None for values in labels.values()):
        return
    seen = set(labels["train"].tolist())
    unseen = sorted({number for values in labels.values() for number in values.tolist()} - seen)
    if unseen:
        names = [number if class_names is None else class_names[number] for number in unseen]
        logger.warning(
            "No image of the classes %s is trained on, but validation has some: a slice of data that are sorted by "
            "their classes holds few of them. validation_share draws the validation images at random.",
            names,
        )


def training_inputs(
    prior: nn.Module,
    indices: torch.LongTensor,
    labels: torch.LongTensor | None,
    condition_codes: torch.LongTensor | None = None,
) -> dict:
    """What an autoregressive prior's `forward` takes in training; a label of -1 is the null class.

    Args:
        prior: with `prepare_inputs`.
        indices: codes `(B, h, w)`.
        labels: classes `(B,)`, or None.
        condition_codes: codes `(B, h', w')` of the conditions, or None.
    """
    if condition_codes is not None:
        return prior.prepare_inputs(indices, condition_codes)
    if labels is None:
        return prior.prepare_inputs(indices)
    inputs = prior.prepare_inputs(indices, labels.clamp(min=0))
    missing = (labels == NO_LABEL).to(inputs["input_ids"].device)
    null = prior.config.null_class_token_id
    inputs["input_ids"][:, 0] = torch.where(missing, null, inputs["input_ids"][:, 0])
    return inputs


__all__ = ["check_condition_tokenizer", "check_single_codes", "count_classes", "load_code_splits", "training_inputs"]
