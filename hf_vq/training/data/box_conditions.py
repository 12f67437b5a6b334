"""The bounding boxes of a data set's objects as condition ids, for priors that are conditioned on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from ...models.priors.bounding_boxes import BoundingBoxTokenizer, ObjectBox
from .image_datasets import DataArguments, ImageDataset
from .image_decoding import Window, choose_window, size_of
from .sources import open_rows


if TYPE_CHECKING:
    import datasets

BOX_FORMATS = ("xywh", "xyxy")
_LABELS = ("category", "category_id", "label")


@dataclass(frozen=True)
class BoxSettings:
    """
    Where boxes are read, and which ids they become.

    Args:
        column: of the data set: for each picture a dict of lists `{"bbox": [...], "category": [...]}`, as `datasets`
            gives a sequence of objects, or a list of dicts; `category_id` or `label` name the class as well.
        box_format: "xywh", left, top, width and height, as in COCO, or "xyxy", the corners; in pixels of the picture.
        tokenizer: makes the ids.
        class_names: of the objects, where the data set has them.
    """

    column: str
    box_format: str
    tokenizer: BoundingBoxTokenizer
    class_names: tuple[str, ...] | None = None


def box_settings(
    data: DataArguments, column: str, box_format: str, num_classes: int | None, max_objects: int, num_tokens: int
) -> BoxSettings:
    """How the boxes of a data set are read, once its columns are known.

    Args:
        data: the data set, whose training split is opened.
        column, box_format: see [`BoxSettings`].
        num_classes: of the objects; not needed where their classes have names.
        max_objects, num_tokens: see [`BoundingBoxTokenizer`].

    Raises:
        ValueError: no such column, no objects in it, or classes that are neither named nor counted.
    """
    if data.streaming:
        raise ValueError("streaming=True: boxes are read of a data set in memory or on the disk, set it to false.")
    features = open_rows(data, data.train_split).features
    if column not in features:
        raise ValueError(f"boxes_column={column!r}: the data set has no such column; it has {sorted(features)}.")
    fields = _fields_of(features[column])
    name = next((name for name in _LABELS if name in fields), None)
    if name is None or "bbox" not in fields:
        raise ValueError(
            f"boxes_column={column!r} must hold objects with `bbox` and `category`, got {sorted(fields) or 'others'}."
        )
    names = getattr(getattr(fields[name], "feature", fields[name]), "names", None)
    if names is not None and num_classes not in (None, len(names)):
        raise ValueError(f"num_box_classes={num_classes}: {column!r} has {len(names)} classes with names.")
    if names is None and num_classes is None:
        raise ValueError(f"num_box_classes must be given: the classes in {column!r} have no names to count.")
    count = len(names) if names is not None else num_classes
    tokenizer = BoundingBoxTokenizer(count, max_objects, num_tokens)
    return BoxSettings(column, box_format, tokenizer, None if names is None else tuple(names))


def _fields_of(feature: Any) -> Mapping[str, Any]:
    """The fields of an object, of a dict of lists or a list of dicts."""
    feature = getattr(feature, "feature", feature)
    feature = feature[0] if isinstance(feature, list) and feature else feature
    return feature if isinstance(feature, Mapping) else {}


class BoxConditions(Dataset):
    """
    The images of a data set with the ids of their boxes in place of the column of objects: a sample has
    `condition_codes`, int64 `(condition_length,)`. Boxes are those within the centre crop that the model sees. Of more
    objects than there is place for, the largest stay.

    Args:
        images: the data set; its samples carry the column.
        settings: how boxes are read.
        flip: also give `condition_codes_flipped`, those of the mirrored picture.
    """

    def __init__(self, images: ImageDataset, settings: BoxSettings, flip: bool = False):
        self.images, self.settings, self.flip = images, settings, flip
        self.rows: datasets.Dataset = images.rows
        self.class_names, self.labels = images.class_names, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, index: int) -> str:
        """The image's path where the data set has it, and its row."""
        return self.images.name_of(index)

    def read(self, index: int) -> dict | None:
        """One image, or `None` if it is broken.

        Raises:
            ValueError: boxes that are none, or classes out of range, naming the column and the row.
        """
        seen: dict[str, Any] = {}

        def choose(image: Any) -> Window:
            seen["size"], seen["window"] = size_of(image), choose_window(image, self.images.size)
            return seen["window"]

        sample = self.images.read(index, choose)
        if sample is None:
            return None
        try:
            objects = read_objects(sample.pop(self.settings.column), seen["size"], self.settings.box_format)
            window = seen["window"]
            (height, width), (top, left) = window.resized, window.corner
            crop = (left / width, top / height, window.size[1] / width, window.size[0] / height)
            objects = _largest(objects, crop, self.settings.tokenizer.max_objects)
            sample["condition_codes"] = self.settings.tokenizer.encode(objects, crop)
            if self.flip:
                sample["condition_codes_flipped"] = self.settings.tokenizer.encode(objects, crop, flip=True)
        except ValueError as error:
            raise ValueError(f"boxes_column={self.settings.column!r}, {self.name_of(index)}: {error}") from error
        return sample


def read_objects(objects: Any, size: tuple[int, int], box_format: str) -> list[ObjectBox]:
    """The objects of a picture, with boxes as shares of it; what lies beyond its borders is cut off, and objects
    without an area within them are left out.

    Args:
        objects: see [`BoxSettings`].
        size: height and width of the picture in pixels.
        box_format: "xywh" or "xyxy".

    Raises:
        ValueError: no objects, a box that has not four finite numbers, or as many boxes as classes are not there.
    """
    if objects is None:
        return []
    if not isinstance(objects, Mapping):
        objects = {key: [one.get(key) for one in objects] for key in (objects[0] if len(objects) else ())}
    labels = next((objects[name] for name in _LABELS if name in objects), [])
    boxes = objects.get("bbox", [])
    if len(labels) != len(boxes):
        raise ValueError(f"as many classes as boxes must be given, got {len(labels)} and {len(boxes)}.")
    height, width = size
    read = []
    for label, box in zip(labels, boxes, strict=True):
        values = np.asarray(box, dtype=float)
        if values.shape != (4,) or not np.isfinite(values).all():
            raise ValueError(f"`bbox` must be four finite numbers, got {box}.")
        left, top, right, bottom = values
        if box_format == "xywh":
            right, bottom = left + right, top + bottom
        elif right < left or bottom < top:
            raise ValueError(f"`bbox` must be left, top, right, bottom for box_format='xyxy', got {box}.")
        left, right = np.clip([left, right], 0, width) / width
        top, bottom = np.clip([top, bottom], 0, height) / height
        if right > left and bottom > top:
            read.append(ObjectBox(label, tuple(map(float, (left, top, right - left, bottom - top)))))
    return read


def _largest(objects: list[ObjectBox], crop: tuple[float, ...], count: int) -> list[ObjectBox]:
    """Those with the largest areas within the crop, in the order in which they are given."""
    areas = [_area_within(one.box, crop) for one in objects]
    kept = sorted(range(len(objects)), key=lambda place: -areas[place])[:count]
    return [objects[place] for place in sorted(kept) if areas[place] > 0]


def _area_within(box: tuple[float, ...], crop: tuple[float, ...]) -> float:
    sides = (
        min(box[axis] + box[axis + 2], crop[axis] + crop[axis + 2]) - max(box[axis], crop[axis]) for axis in (0, 1)
    )
    return float(np.prod([max(side, 0.0) for side in sides]))


__all__ = ["BOX_FORMATS", "BoxConditions", "BoxSettings", "box_settings", "read_objects"]
