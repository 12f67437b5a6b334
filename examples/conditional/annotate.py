"""Add a column of conditions to a data set of images: label maps, depth maps, edges or drawn poses, by a trained
model.

    python examples/conditional/annotate.py --dataset_name_or_path PHOTOS --annotator depth --output PAIRS
    python examples/conditional/annotate.py --dataset_name_or_path PHOTOS --annotator segmentation \\
        --model_id nvidia/segformer-b0-finetuned-ade-512-512 --output PAIRS

Writes OUTPUT/<split>.parquet with the columns of the data set and `conditioning_image`: PNG, of labels 8 or 16 bits,
of depth 16 bits between the map's own minimum and maximum, of edges 0 and 255.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_vq.pipelines.annotators import ANNOTATORS, load_annotator
from hf_vq.training.data.columns import CONDITION
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.data.image_decoding import decode_image
from hf_vq.training.data.sources import MissingSplitError, open_rows, path_rules


def as_picture(condition: np.ndarray | Image.Image, kind: str) -> Image.Image:
    """A condition as a picture that PNG keeps: RGB, or one channel of 8 or 16 bits."""
    if isinstance(condition, Image.Image):
        return condition
    values = np.asarray(condition)
    if kind == "depth":
        low, high = float(values.min()), float(values.max())
        values = np.rint((values - low) / max(high - low, 1e-12) * 65535)
    elif kind == "edges":
        values = values * 255
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"`annotator` must give ids in 0…65535, got {values.min()} to {values.max()}.")
    return Image.fromarray(values.astype(np.uint8 if values.max() < 256 and kind != "depth" else np.uint16))


def annotate(images: list[Image.Image], annotator: Callable, kind: str) -> list[Image.Image]:
    return [as_picture(condition, kind) for condition in annotator(images)]


def open_splits(arguments: DataArguments, names: list[str] | None) -> dict:
    """The rows of these splits; without names, of the training and the validation split, if there is one."""
    splits = {}
    for name in names or ("train", "validation"):
        try:
            splits[name] = open_rows(arguments, name)
        except MissingSplitError:
            if names is not None or name == "train":
                raise
    return splits


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name_or_path", required=True)
    parser.add_argument("--splits", nargs="+", help="(default: those of train and validation that there are)")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--annotator", required=True, choices=sorted(ANNOTATORS))
    parser.add_argument(
        "--model_id", help="a model of that task, on the Hub or in a folder, in place of the default one"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    import datasets

    arguments = DataArguments(args.dataset_name_or_path, image_column=args.image_column)
    splits = open_splits(arguments, args.splits)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    annotator = load_annotator(args.annotator, args.model_id, device)
    rules = path_rules(args.dataset_name_or_path)
    args.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows = rows.cast_column(args.image_column, datasets.Image(decode=False))
        features = datasets.Features({**rows.features, CONDITION: datasets.Image()})

        def add_conditions(batch: dict) -> dict:
            images = [decode_image(source, 3, rules) for source in batch[args.image_column]]
            return {CONDITION: annotate(images, annotator, args.annotator)}

        rows = rows.map(add_conditions, batched=True, batch_size=args.batch_size, features=features)
        rows = rows.cast_column(args.image_column, datasets.Image())
        rows.to_parquet(args.output / f"{split}.parquet")
        print(f"{args.output / split}.parquet: {len(rows)} pairs")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # which says what to change
        sys.exit(f"annotate.py: {error}")
