"""The codes of a training and a validation set, and the names of their classes."""

from torch import nn

from .image_datasets import DataArguments, load_image_dataset
from .indices_cache import IndicesDataset, load_indices, write_indices


def load_code_splits(
    run, data: DataArguments, tokenizer: nn.Module, random_flip: bool, several_levels: bool = False
) -> tuple[dict[str, IndicesDataset], list[str] | None]:
    """Encodes the data sets "train" and "validation", once, into `output_dir/indices`, and opens the codes.

    Args:
        run (`TrainingRun`): with the output folder; every process calls this.
        data: the images, which are read without augmentation.
        tokenizer: on the run's device, in eval mode.
        random_flip: train on the codes of the mirrored image in half of the cases.
        several_levels: whether the caller takes the codes of a hierarchical tokenizer, a grid for each level.

    Returns:
        The data sets by split, and the names of the classes, if they have names.

    Raises:
        ValueError: an augmentation that codes, which are written once, cannot have; a tokenizer of several levels where
            one is wanted.
    """
    levels = len(tokenizer.config.downsample_factors)
    if levels > 1 and not several_levels:
        raise ValueError(
            f"tokenizer: it must have one level of codes, got a {type(tokenizer).__name__} with {levels}; "
            "examples/pixelcnn trains a prior for each level."
        )
    if data.random_flip or data.crop != "center":
        raise ValueError(
            f"random_flip={data.random_flip} and crop={data.crop!r} have no effect on codes that are written "
            "once: leave them out, and use random_flip_codes=True for mirrored images."
        )
    arguments = run.arguments
    codes, class_names = {}, None
    for split in ("train", "validation"):
        images = load_image_dataset(data, split, class_names=class_names)
        class_names = images.class_names if split == "train" else class_names
        folder = run.output_dir / "indices" / split
        flip = random_flip and split == "train"
        write_indices(tokenizer, images, folder, flip=flip, num_workers=arguments.dataloader_num_workers)
        codes[split] = load_indices(folder, tokenizer, random_flip=flip, seed=arguments.seed)
    return codes, class_names


__all__ = ["load_code_splits"]
