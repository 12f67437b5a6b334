"""Image data sets for training: a Hub id, a folder of images, parquet, a saved data set, or a stream.

```python
dataset = load_image_dataset(DataArguments("examples/data/emoji-64", label_column="category"), "train", augment=True)
dataset[0]                  # {"pixel_values": float32 (3, H, W) in [-1, 1], "label": int}
dataset.class_names         # ["Smileys & Emotion", ...]
dataset.sample(0, epoch=3)  # with the augmentation of epoch 3: a function of (seed, epoch, index) alone
```

An image that cannot be read is replaced by the next one that can, named in a warning, and listed in `dataset.broken`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...argument_checks import check_real
from ...distributed import share_of_process, union_over_processes
from ...models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from .columns import CONDITION, NO_LABEL, class_names_of, draw_caption, prepare_columns, without_gaps
from .conditions import ConditionReader, build_reader, check_mirrored, decode_pair, seen_through
from .image_decoding import (
    ANY_PATH,
    BrokenImageError,
    BrokenImages,
    PathRules,
    Window,
    as_size,
    choose_window,
    named,
    shrink,
    size_of,
)
from .sources import open_rows, path_rules


if TYPE_CHECKING:
    import datasets

_STREAMED_VALIDATION_ROWS = 1000
_DEFAULT_RESOLUTION = 64


@dataclass
class DataArguments:
    """Which images to train on, and how they are prepared."""

    dataset_name_or_path: str = field(
        metadata={
            "help": "Hub id; folder, file, pattern or address of images, zip, parquet, tar "
            "(WebDataset), jsonl or csv; or a "
            "folder written by save_to_disk."
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": 'Split to train on; slices as in "train[5%:]" too.'})
    validation_split: str = field(default="validation", metadata={"help": 'Split to validate on, or "train[:5%]".'})
    validation_share: float | None = field(
        default=None,
        metadata={
            "help": "In place of a validation split: hold out this share of the training split, such as 0.05, drawn "
            "at random, the same in every run."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    conditioning_image_column: str | None = field(
        default=None, metadata={"help": "Column of the images' label maps, depth maps, edges or drawings."}
    )
    edge_sigma: float = field(
        default=2.0,
        metadata={"help": "Edges without a column: the Gaussian of Canny's method, in pixels at `resolution`."},
    )
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
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, in order; without, in the order of the data."}
    )
    missing_condition: str = field(
        default="error",
        metadata={
            "help": "What a training row without label or caption is: an error, or the null condition.",
            "choices": ["error", "null"],
        },
    )
    resolution: list[int] | None = field(
        default=None,
        metadata={
            "help": "Side of the square images that the model sees, or HEIGHT WIDTH; 64, and for a prior that of its "
            "tokenizer, if not given."
        },
    )
    crop: str = field(default="center", metadata={"help": "Crop of training images.", "choices": ["center", "random"]})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    max_samples: int | None = field(default=None, metadata={"help": "Use only the first so many samples of a split."})
    cache_images: bool = field(default=False, metadata={"help": "Keep the resized images in memory, as uint8."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; nothing is downloaded."})
    shuffle_block: int = field(
        default=1000, metadata={"help": "Streaming: samples are shuffled within blocks of this size, held in memory."}
    )

    caption_column = None  # of `CaptionedDataArguments`

    def __post_init__(self):
        for name in ("label_column", "conditioning_image_column"):
            if getattr(self, name) is not None and getattr(self, name).lower() == "none":
                setattr(self, name, None)  # a command line has no other None
        if self.crop not in ("center", "random"):
            raise ValueError(f'crop={self.crop!r}: it must be "center" or "random".')
        if self.missing_condition not in ("error", "null"):
            raise ValueError(f'missing_condition={self.missing_condition!r}: it must be "error" or "null".')
        self.edge_sigma = check_real("edge_sigma", self.edge_sigma, above=0)
        if self.validation_share is not None:
            check_real("validation_share", self.validation_share, above=0, below=1)
            if self.streaming:
                raise ValueError(
                    f"validation_share={self.validation_share}: a stream is read in one order, and nothing can be "
                    "drawn from it; give a validation_split."
                )
        if self.conditioning_image_column is not None and self.conditioning_image_column == self.image_column:
            raise ValueError(
                f"conditioning_image_column={self.conditioning_image_column!r}: it must differ from image_column."
            )
        for name in ("shuffle_block", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        self._has_resolution = self.resolution is not None
        self._set_resolution(self.resolution if self._has_resolution else _DEFAULT_RESOLUTION)
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names={self.class_names}: the names must differ.")
        if self.streaming and self.cache_images:
            raise ValueError(
                "cache_images=True keeps the data set in memory, which streaming=True avoids: choose one."
            )

    def _set_resolution(self, resolution: int | Sequence[int]) -> None:
        self.size = as_size(resolution)
        self.resolution = self.size[0] if self.size[0] == self.size[1] else self.size

    def default_resolution(self, resolution: int | Sequence[int]) -> None:
        """Takes a model's `resolution` where none was given."""
        if not self._has_resolution:
            self._set_resolution(resolution)

    @property
    def validation_name(self) -> str:
        """What a card calls the validation images."""
        if self.validation_share is None:
            return self.validation_split
        return f"{100 * self.validation_share:g} % of {self.train_split}, at random"

    @property
    def carried_columns(self) -> list[str]:
        """The columns that samples carry as they are, with the captions'."""
        return list(dict.fromkeys([*self.extra_columns, *filter(None, [self.caption_column])]))

    def check_multiple_of(self, factor: int) -> None:
        """Refuses a size that a model with `factor` pixels per code, in each direction, cannot take."""
        if any(side % factor for side in self.size):
            raise ValueError(
                f"resolution={self.resolution}: its sides must be multiples of {factor}, the model's pixels per code."
            )


@dataclass
class CaptionedDataArguments(DataArguments):
    """Images that may have captions."""

    caption_column: str | None = field(
        default=None,
        metadata={"help": "Column of captions, for text conditions; of a list, one is drawn in every epoch."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.caption_column is not None and self.label_column is not None:
            raise ValueError("caption_column and label_column: give the one that is the condition.")


def load_image_dataset(
    arguments: DataArguments,
    split: str = "train",
    augment: bool = False,
    seed: int = 0,
    class_names: list[str] | None = None,
    channels: int = 3,
    condition_processor: VQConditionProcessor | None = None,
):
    """Opens one split as `ImageDataset`, or as `StreamingImageDataset` where `arguments.streaming` is set.

    Of the validation split of a stream, the first 1000 rows (or `max_samples`) are read into memory, undecoded, and
    given as an `ImageDataset`.

    Args:
        arguments (`DataArguments`): the data set.
        split (`str`): `"train"` or `"validation"` (the splits that the arguments name), or any split's own name.
        augment (`bool`): random crop and flip as the arguments say; without it, a centre crop and no flip.
        seed (`int`): of the augmentation, and of a stream's order.
        class_names (`list[str]`, *optional*): number the classes in this order, as the training split does (give its
            `class_names`); without it, classes that are strings are numbered as `arguments.class_names`, or in the
            order of the split's own names.
        channels (`int`): of the images: 1 (grey), 3 (RGB), 4 (RGBA), or those of a column of arrays.
        condition_processor (`VQConditionProcessor`, *optional*): samples have a `condition` too, as it reads the
            column `conditioning_image_column`, or edges of the images where there is none.

    Raises:
        ValueError: the data set, the split or a column is not there, a class is not among `class_names`, a value to
            exclude does not exist, or a row lacks its label or caption.
    """
    if augment and arguments.random_flip:
        check_mirrored(condition_processor, "random_flip")
    reader = build_reader(condition_processor, arguments.conditioning_image_column, arguments.edge_sigma)
    if arguments.validation_share is not None and split in ("train", "validation"):
        rows = open_rows(arguments, arguments.train_split)
        if class_names is None:  # a class may be drawn whole
            class_names = class_names_of(rows, arguments)
        rows = divided(rows, arguments.validation_share)[split]
    else:
        name = {"train": arguments.train_split, "validation": arguments.validation_split}.get(split, split)
        rows = open_rows(arguments, name)
    rows, class_names = prepare_columns(rows, arguments, class_names, keep_gaps=split == "train")
    options = {
        "resolution": arguments.size,
        "channels": channels,
        "caption_column": arguments.caption_column,
        "rules": path_rules(arguments.dataset_name_or_path),
        "crop": arguments.crop if augment else "center",
        "random_flip": arguments.random_flip and augment,
        "seed": seed,
        "class_names": class_names,
        "condition_reader": reader,
    }
    if arguments.streaming and split == "validation":
        import datasets

        few = list(rows.take(arguments.max_samples or _STREAMED_VALIDATION_ROWS))
        kept = datasets.Dataset.from_list(few, features=rows.features)
        return ImageDataset(without_gaps(kept, arguments, "label", keep=False), **options)
    if arguments.streaming:
        from .streaming import StreamingImageDataset

        if arguments.max_samples is not None:
            rows = rows.take(arguments.max_samples)
        return StreamingImageDataset(
            rows,
            shuffle_block=arguments.shuffle_block,
            allow_missing=arguments.missing_condition == "null",
            **options,
        )
    if arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    return ImageDataset(rows, cache_images=arguments.cache_images, **options)


def divided(rows: "datasets.Dataset", share: float) -> dict[str, "datasets.Dataset"]:
    """The rows that are trained on, and the `share` that is drawn, the same for the same number of rows, to validate.

    Raises:
        ValueError: nothing is left for one of the two.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise ValueError(f"validation_share={share}: of {len(rows)} images it leaves {count} to validate on.")
    order = np.random.default_rng(0).permutation(len(rows))
    return {"validation": rows.select(np.sort(order[:count])), "train": rows.select(np.sort(order[count:]))}


class ImageDataset(Dataset):
    """Map-style images.

    Args:
        rows (`datasets.Dataset`): columns `image` (undecoded), optionally `label`, and others that samples carry
            along.
        resolution (`int` or pair): the side of the square images, or `(height, width)`.
        crop (`str`): `"center"` or `"random"`.
        random_flip (`bool`): mirror half of the images.
        cache_images (`bool`): decode and resize all images now and keep them as uint8, a byte for each pixel and
            channel.
        seed (`int`): the augmentation of a sample is drawn from `(seed, epoch, index)`.
        class_names (`list[str]`, *optional*): names of the labels.
        channels (`int`): of the images.
        caption_column (`str`, *optional*): a column of captions, or of lists of captions, of which one is drawn.
        rules (`PathRules`): which paths of the rows may be opened.
        condition_reader (`ConditionReader`, *optional*): reads the condition of each image.

    Attributes:
        labels (`np.ndarray` or `None`): all labels; -1 where a row has none.
        broken (`BrokenImages`): the broken images met so far in this process.
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        resolution: int | Sequence[int],
        crop: str = "center",
        random_flip: bool = False,
        cache_images: bool = False,
        seed: int = 0,
        class_names: list[str] | None = None,
        channels: int = 3,
        caption_column: str | None = None,
        rules: PathRules = ANY_PATH,
        condition_reader: ConditionReader | None = None,
    ):
        self.rows = rows
        self.condition_reader = condition_reader
        self.size = as_size(resolution)
        self.channels = channels
        self.caption_column = caption_column
        self.rules = rules
        self.crop = crop
        self.random_flip = random_flip
        self.seed = seed
        self.class_names = class_names
        self.labels = None
        if "label" in rows.column_names:
            labels = rows["label"][:]
            self.labels = np.asarray([NO_LABEL if label is None else label for label in labels])
        self.broken = BrokenImages()
        extra = [column for column in rows.column_names if column not in ("image", "label", CONDITION)]
        self._extra = rows.select_columns(extra) if extra else None
        self._cache = None
        if cache_images:
            pairs = (self._decode(index) for index in range(len(rows)))
            self._cache = [pair if pair is None else self._smallest(*pair) for pair in pairs]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> dict:
        """One image as it is seen in `epoch`; in place of a broken one, the next that can be read.

        Returns:
            `dict`: `pixel_values` float32 `(channels, height, width)` in [-1, 1]; `condition`, of the same window, if
            there are conditions, see `hf_vq.training.data.conditions`; `label` (`int`) if there are labels; the extra
            columns, of the captions one; `broken_images` (a tuple of names) only if broken images were passed over.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: the data set has the images 0 to {len(self) - 1}.")
        passed = []
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            pair = self._pair(candidate)
            if pair is not None:
                break
            passed.append(self.name_of(candidate))
        else:
            raise ValueError(f"none of the {len(self)} images of the data set can be read; the first: {passed[0]}.")
        is_random = self.crop == "random" or self.random_flip
        generator = np.random.default_rng((self.seed, epoch, index)) if is_random else None
        window = choose_window(pair[0], self.size, self.crop, self.random_flip, generator)
        sample = {**seen_through(window, *pair, self.condition_reader), **self._fields(candidate)}
        if self.caption_column is not None:
            sample[self.caption_column] = draw_caption(sample[self.caption_column], self.seed, epoch, index)
        if passed:
            sample["broken_images"] = tuple(passed)
        return sample

    def readable(self) -> "ImageDataset":
        """The images that can be read and no other, found by reading all; several processes share the work."""
        own = {index for index in share_of_process(range(len(self))) if self._pair(index) is None}
        broken = union_over_processes(own)
        if not broken:
            return self
        kept = [index for index in range(len(self)) if index not in broken]
        if not kept:
            raise ValueError(f"none of the {len(self)} images of the data set can be read.")
        found = copy.copy(self)
        found.rows = self.rows.select(kept)
        found.labels = None if self.labels is None else self.labels[kept]
        found._extra = None if self._extra is None else self._extra.select(kept)
        found._cache = None if self._cache is None else [self._cache[index] for index in kept]
        return found

    def read(self, index: int, choose: Callable[[Any], Window] | None = None) -> dict | None:
        """One image with its other fields, all its captions too, or `None` if it is broken.

        Args:
            index: of the row.
            choose: the window that is seen of the decoded image; by default the centre crop.
        """
        pair = self._pair(index)
        if pair is None:
            return None
        window = choose_window(pair[0], self.size) if choose is None else choose(pair[0])
        return {**seen_through(window, *pair, self.condition_reader), **self._fields(index)}

    def _pair(self, index: int) -> tuple | None:
        """An image and the whole map of its condition, or None in its place; None where one of them is broken."""
        return self._cache[index] if self._cache is not None else self._decode(index)

    def _fields(self, index: int) -> dict:
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        return {**label, **(self._extra[index] if self._extra is not None else {})}

    def name_of(self, index: int) -> str:
        """The image's path where the data set has it, and its row."""
        return named(self.rows[index]["image"], f"row {index}")

    def _smallest(self, image, values) -> tuple:
        """What is kept of an image and its condition: their crops, where they are always the same ones."""
        window = choose_window(image, self.size)
        if self.crop == "random":
            image = np.asarray(shrink(image, self.size))
            window = Window(size_of(image), (0, 0), size_of(image))
        pixels = window.cut(image if isinstance(image, Image.Image) or image.ndim == 3 else image[..., None])
        return pixels, None if values is None else self.condition_reader.cut(values, window)

    def _decode(self, index: int) -> tuple | None:
        row = self.rows[index]
        try:
            return decode_pair(row, self.channels, self.rules, self.condition_reader)
        except BrokenImageError as error:
            self.broken.add(self.name_of(index), error)
            return None


def collate(samples: list[dict]) -> dict:
    """Stacks samples to a batch: tensors and numbers become tensors, `broken_images` are joined, the rest are
    lists.
    """
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


def pixel_variance(dataset: Dataset, samples: int = 1000) -> float:
    """Variance of the pixels of the first images about their mean."""
    pixels = torch.stack([dataset[i]["pixel_values"] for i in range(min(samples, len(dataset)))])
    return float(pixels.var())
