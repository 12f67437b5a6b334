"""Image data sets for training: a Hub id, a folder of images, parquet, a saved data set, or a stream.

```python
dataset = load_image_dataset(DataArguments("examples/data/emoji-64", label_column="category"), "train", augment=True)
dataset[0]                  # {"pixel_values": float32 (3, H, W) in [-1, 1], "label": int}
dataset.class_names         # ["Smileys & Emotion", ...]
dataset.sample(0, epoch=3)  # with the augmentation of epoch 3: a function of (seed, epoch, index) alone
```

An image that cannot be read is replaced by the next one that can, named in a warning, and listed in `dataset.broken`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from ...images import pixels_to_tensor
from .image_decoding import BrokenImageError, BrokenImages, crop_and_flip, decode_image, resize_shorter_side


if TYPE_CHECKING:
    import datasets

_STREAMED_VALIDATION_ROWS = 1000


@dataclass
class DataArguments:
    """Which images to train on, and how they are prepared."""

    dataset_name_or_path: str = field(
        metadata={"help": "Hub id, folder of images, folder with parquet files, or folder written by save_to_disk."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": 'Split to train on; slices as in "train[5%:]" too.'})
    validation_split: str = field(default="validation", metadata={"help": 'Split to validate on, or "train[:5%]".'})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column: str | None = field(default=None, metadata={"help": 'Column that holds the classes; "none": no.'})
    extra_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Further columns (captions, for example) that samples carry as they are."},
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Leave out the rows that have a value in a column, written column=value, such as style=google."
        },
    )
    resolution: int = field(default=64, metadata={"help": "Side of the square images that the model sees."})
    crop: str = field(default="center", metadata={"help": "Crop of training images.", "choices": ["center", "random"]})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    max_samples: int | None = field(default=None, metadata={"help": "Use only the first so many samples of a split."})
    cache_images: bool = field(default=False, metadata={"help": "Keep the resized images in memory, as uint8."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; nothing is downloaded."})
    shuffle_block: int = field(
        default=1000, metadata={"help": "Streaming: samples are shuffled within blocks of this size, held in memory."}
    )

    def __post_init__(self):
        if self.label_column is not None and self.label_column.lower() == "none":  # a command line has no other None
            self.label_column = None
        if self.crop not in ("center", "random"):
            raise ValueError(f'crop={self.crop!r}: it must be "center" or "random".')
        for name in ("resolution", "shuffle_block", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        if self.streaming and self.cache_images:
            raise ValueError(
                "cache_images=True keeps the data set in memory, which streaming=True avoids: choose one."
            )


def load_image_dataset(
    arguments: DataArguments,
    split: str = "train",
    augment: bool = False,
    seed: int = 0,
    class_names: list[str] | None = None,
):
    """Opens one split as `ImageDataset`, or as `StreamingImageDataset` where `arguments.streaming` is set.

    Of the validation split of a stream, the first 1000 rows (or `max_samples`) are read into memory, undecoded, and given
    as an `ImageDataset`.

    Args:
        arguments (`DataArguments`): the data set.
        split (`str`): `"train"` or `"validation"` (the splits that the arguments name), or any split's own name.
        augment (`bool`): random crop and flip as the arguments say; without it, a centre crop and no flip.
        seed (`int`): of the augmentation, and of a stream's order.
        class_names (`list[str]`, *optional*): number the classes in this order, as the training split does (give its
            `class_names`); without it, classes that are strings are numbered in the order of the split's own names.

    Raises:
        ValueError: the data set, the split or a column is not there, a class is not among `class_names`, or a value to
            exclude does not exist.
    """
    name = {"train": arguments.train_split, "validation": arguments.validation_split}.get(split, split)
    rows = open_rows(arguments, name)
    rows, class_names = _prepare_columns(rows, arguments, class_names)
    options = {
        "resolution": arguments.resolution,
        "crop": arguments.crop if augment else "center",
        "random_flip": arguments.random_flip and augment,
        "seed": seed,
        "class_names": class_names,
    }
    if arguments.streaming and split == "validation":
        import datasets

        few = list(rows.take(arguments.max_samples or _STREAMED_VALIDATION_ROWS))
        return ImageDataset(datasets.Dataset.from_list(few, features=rows.features), **options)
    if arguments.streaming:
        from .streaming import StreamingImageDataset

        if arguments.max_samples is not None:
            rows = rows.take(arguments.max_samples)
        return StreamingImageDataset(rows, shuffle_block=arguments.shuffle_block, **options)
    if arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    return ImageDataset(rows, cache_images=arguments.cache_images, **options)


def open_rows(arguments: DataArguments, split: str) -> "datasets.Dataset | datasets.IterableDataset":
    """The rows of one split as `datasets` gives them, with every column."""
    import datasets

    source, streaming = arguments.dataset_name_or_path, arguments.streaming
    folder = Path(source).expanduser()
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return _open_saved(folder, split, streaming)
        if folder.is_dir():
            parquet = any(path.name != "metadata.parquet" for path in folder.rglob("*.parquet"))
            kind = "parquet" if parquet else "imagefolder"
            return datasets.load_dataset(kind, data_dir=str(folder), split=split, streaming=streaming)
        if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(f"dataset_name_or_path={source!r} is neither a folder nor a Hub id.")
        return datasets.load_dataset(source, arguments.dataset_config_name, split=split, streaming=streaming)
    except (KeyError, ValueError) as error:
        if "split" in str(error).lower():
            raise ValueError(f"dataset_name_or_path={source!r} has no split {split!r}: {error}") from error
        raise


def _open_saved(folder: Path, split: str, streaming: bool):
    import datasets

    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split in splits:
        rows = splits[split]
    else:  # "train[:5%]", or a name that is not there, which to_absolute refuses
        lengths = {name: len(rows) for name, rows in splits.items()}
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        rows = datasets.concatenate_datasets(
            [splits[part.splitname].select(range(part.from_, part.to)) for part in slices]
        )
    return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows


def _exclude(rows, conditions: list[str]):
    """Without the rows that meet a condition "column=value"; a class is given by its name."""
    import datasets

    excluded: dict[str, set[str]] = {}
    for condition in conditions:
        column, separator, value = condition.partition("=")
        if not separator:
            raise ValueError(f"exclude={condition!r}: it must be written column=value.")
        excluded.setdefault(column, set()).add(value)
    for column, values in excluded.items():
        if column not in rows.features:
            raise ValueError(f"exclude: the data set has no column {column!r}; it has {sorted(rows.features)}.")
        names = getattr(rows.features[column], "names", None)
        if names is not None and not values <= set(names):
            raise ValueError(
                f"exclude: {sorted(values - set(names))} are not among the classes {names} of {column!r}."
            )
        is_kept = partial(_differs, excluded=values, names=names)
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.filter(is_kept, input_columns=column)
        else:
            rows = rows.select([i for i, value in enumerate(rows[column][:]) if is_kept(value)])
    return rows


def _differs(value, excluded: set[str], names: list[str] | None) -> bool:
    return str(value if names is None else names[value]) not in excluded


def _prepare_columns(rows, arguments: DataArguments, class_names: list[str] | None = None):
    """Keeps the image column, undecoded, as `image`, the label column, as integers, as `label`, and the extra ones."""
    import datasets

    if rows.features is None:  # a stream of a format without a schema: the first rows tell
        rows = rows._resolve_features()
    features = rows.features
    wanted = {arguments.image_column: "image"}
    if arguments.label_column is not None:
        wanted[arguments.label_column] = "label"
    wanted.update({column: column for column in arguments.extra_columns})
    for column in wanted:
        if column not in features:
            raise ValueError(f"the data set has no column {column!r}; it has {sorted(features)}.")
    if len(set(wanted.values())) < len(wanted):
        raise ValueError(f"extra_columns={arguments.extra_columns} may not contain 'image' or 'label'.")

    rows = rows.cast_column(arguments.image_column, datasets.Image(decode=False))
    rows = _exclude(rows, arguments.exclude).select_columns(list(wanted))
    if arguments.label_column is None:
        class_names = None
    else:
        column = arguments.label_column
        rows, class_names = _integer_labels(rows, column, features[column], class_names)
    for column, name in wanted.items():
        if column != name:
            rows = rows.rename_column(column, name)
    return rows, class_names


def _integer_labels(rows, column: str, feature, class_names: list[str] | None):
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        if class_names is not None and feature.names != class_names:
            raise ValueError(
                f"label_column={column!r} has the classes {feature.names}: they must be {class_names}, in this order."
            )
        return rows, list(feature.names)
    dtype = getattr(feature, "dtype", None)
    if dtype == "string" and isinstance(rows, datasets.Dataset):
        if class_names is None:
            rows = rows.class_encode_column(column)
            return rows, list(rows.features[column].names)
        unknown = sorted(set(rows.unique(column)) - {None, *class_names})
        if unknown:
            raise ValueError(
                f"label_column={column!r} holds {unknown}: the classes of the training data are {class_names}."
            )
        return rows.cast_column(column, datasets.ClassLabel(names=class_names)), class_names
    if dtype == "bool" or str(dtype).startswith(("int", "uint")):
        return rows, None
    raise ValueError(
        f"label_column={column!r} holds {feature}: it must hold ClassLabel, bool, integers, or strings when not streaming."
    )


class ImageDataset(Dataset):
    """Map-style images.

    Args:
        rows (`datasets.Dataset`): columns `image` (undecoded), optionally `label`, and others that samples carry along.
        resolution (`int`): the side of the square images.
        crop (`str`): `"center"` or `"random"`.
        random_flip (`bool`): mirror half of the images.
        cache_images (`bool`): decode and resize all images now and keep them as uint8, about `3·resolution²` bytes each.
        seed (`int`): the augmentation of a sample is drawn from `(seed, epoch, index)`.
        class_names (`list[str]`, *optional*): names of the labels.

    Attributes:
        broken (`BrokenImages`): the broken images met so far in this process.
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        resolution: int,
        crop: str = "center",
        random_flip: bool = False,
        cache_images: bool = False,
        seed: int = 0,
        class_names: list[str] | None = None,
    ):
        self.rows = rows
        self.resolution = resolution
        self.crop = crop
        self.random_flip = random_flip
        self.seed = seed
        self.class_names = class_names
        self.labels = np.asarray(rows["label"][:]) if "label" in rows.column_names else None
        self.broken = BrokenImages()
        extra = [column for column in rows.column_names if column not in ("image", "label")]
        self._extra = rows.select_columns(extra) if extra else None
        self._cache = None
        if cache_images:
            self._cache = [self._decode(index) for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> dict:
        """One image as it is seen in `epoch`; in place of a broken one, the next that can be read.

        Returns:
            `dict`: `pixel_values` float32 `(3, resolution, resolution)` in [-1, 1]; `label` (`int`) if there are labels;
            the extra columns; `broken_images` (a tuple of names) only if broken images were passed over.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: the data set has the images 0 to {len(self) - 1}.")
        passed = []
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            pixels = self._pixels(candidate)
            if pixels is not None:
                break
            passed.append(self.name_of(candidate))
        else:
            raise ValueError(f"none of the {len(self)} images of the data set can be read; the first: {passed[0]}.")
        is_random = self.crop == "random" or self.random_flip
        generator = np.random.default_rng((self.seed, epoch, index)) if is_random else None
        pixels = crop_and_flip(pixels, self.resolution, self.crop, self.random_flip, generator)
        sample = {"pixel_values": pixels_to_tensor(pixels), **self._fields(candidate)}
        if passed:
            sample["broken_images"] = tuple(passed)
        return sample

    def read(self, index: int) -> dict | None:
        """The centre crop of one image with its other fields, or `None` if it is broken."""
        pixels = self._pixels(index)
        if pixels is None:
            return None
        pixels = crop_and_flip(pixels, self.resolution, "center", False, None)
        return {"pixel_values": pixels_to_tensor(pixels), **self._fields(index)}

    def _pixels(self, index: int) -> np.ndarray | None:
        return self._cache[index] if self._cache is not None else self._decode(index)

    def _fields(self, index: int) -> dict:
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        return {**label, **(self._extra[index] if self._extra is not None else {})}

    def name_of(self, index: int) -> str:
        """The image's path where the data set has it, and its row."""
        path = (self.rows[index]["image"] or {}).get("path")
        return f"{path} (row {index})" if path else f"row {index}"

    def _decode(self, index: int) -> np.ndarray | None:
        try:
            return resize_shorter_side(decode_image(self.rows[index]["image"]), self.resolution)
        except BrokenImageError as error:
            self.broken.add(self.name_of(index), error)
            return None


def collate(samples: list[dict]) -> dict:
    """Stacks samples to a batch: tensors and numbers become tensors, `broken_images` are joined, the rest are lists."""
    batch = {}
    for key in {key: None for sample in samples for key in sample}:
        values = [sample[key] for sample in samples if key in sample]
        if key == "broken_images":
            batch[key] = [name for names in values for name in names]
        elif isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], (bool, int, float, np.number)):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def pixel_variance(dataset, samples: int = 1000) -> float:
    """Variance of the pixels of the first images about their mean."""
    pixels = torch.stack([dataset[i]["pixel_values"] for i in range(min(samples, len(dataset)))])
    return float(pixels.var())
