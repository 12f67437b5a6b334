"""Objects with bounding boxes as the condition ids of a prior, and back (the scene models of the original VQGAN)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import torch

from ...argument_checks import check_integer, check_real


_FLAGS = ("is_group", "is_occluded", "is_depiction", "is_inside")
WHOLE = (0.0, 0.0, 1.0, 1.0)


class ObjectBox(NamedTuple):
    """An object of a picture.

    Args:
        label: of its class.
        box: `(left, top, width, height)` as shares of the picture's width and height.
        is_group, is_occluded, is_depiction, is_inside: what Open Images says of it.
    """

    label: int
    box: tuple[float, float, float, float]
    is_group: bool = False
    is_occluded: bool = False
    is_depiction: bool = False
    is_inside: bool = False


@dataclass(frozen=True)
class BoundingBoxTokenizer:
    """
    Objects to condition ids `(condition_length,)`: for each its class, its top left and its bottom right corner, and
    after the last one "none" up to `max_objects`. A corner is the nearest point, row by row, of a square lattice of
    `isqrt(num_tokens)` points a side that spans the picture. A class with flags is
    `label + num_classes * (group + 2 * occluded + 4 * depiction + 8 * inside)`. "None" is the last id.

    The original puts the objects into a random order in training, so that any order will do.

    Args:
        num_classes: of the objects.
        max_objects: of a picture.
        num_tokens: ids, the prior's `condition_vocab_size`.
        encode_crop: the last two ids are the corners of the crop that is shown, and boxes are those in the whole
            picture; without it boxes are relative to the crop.
        use_group: the first flag counts.
        use_flags: the three others count.

    Example:

    ```python
    boxes = BoundingBoxTokenizer(num_classes=180, max_objects=30, num_tokens=8192, encode_crop=True)
    pipe(condition=boxes.encode([ObjectBox(16, (0.2, 0.3, 0.5, 0.6))])[None])
    ```
    """

    num_classes: int
    max_objects: int
    num_tokens: int
    encode_crop: bool = False
    use_group: bool = False
    use_flags: bool = False

    def __post_init__(self):
        check_integer("num_classes", self.num_classes, 1)
        check_integer("max_objects", self.max_objects, 1)
        check_integer("num_tokens", self.num_tokens, 4)
        flags = sum(1 << place for place, name in enumerate(_FLAGS) if self._counts(name))
        most = self.num_classes * (flags + 1)
        if most > self.num_tokens - 1:
            raise ValueError(
                f"`num_tokens` must be more than the {most} ids of classes with their flags, got {self.num_tokens}."
            )

    @property
    def condition_length(self) -> int:
        """Number of ids."""
        return 3 * self.max_objects + (2 if self.encode_crop else 0)

    @property
    def none(self) -> int:
        """The id in place of an object that is not there."""
        return self.num_tokens - 1

    @property
    def side(self) -> int:
        """Points of the lattice in a row, and in a column."""
        return isqrt(self.num_tokens)

    def encode(
        self, objects: Sequence[ObjectBox], crop: Sequence[float] | None = None, flip: bool = False
    ) -> torch.LongTensor:
        """
        The ids of a picture's objects, int64 `(condition_length,)`. Those that the crop does not show are left out.

        Args:
            objects: [`ObjectBox`]es, or tuples `(label, box)`.
            crop: what is shown, `(left, top, width, height)` as boxes are; by default the whole picture.
            flip: the crop is mirrored.

        Raises:
            ValueError: more objects than there is place for, a label or a box out of range.
        """
        crop = WHOLE if crop is None else _check_box("crop", crop)
        objects = [ObjectBox(*one) for one in objects]
        if len(objects) > self.max_objects:
            raise ValueError(f"`objects` must be at most {self.max_objects}, got {len(objects)}.")
        ids: list[int] = []
        for one in objects:
            label = check_integer("label", one.label, 0, self.num_classes - 1)
            box = _check_box("box", one.box)
            if _overlap(box, crop):
                shown = _within(box, WHOLE if self.encode_crop else crop)
                ids += [self._class_id(one, label), *self._corners(_mirrored(shown) if flip else shown)]
        ids += [self.none] * (3 * self.max_objects - len(ids))
        if self.encode_crop:
            ids += self._corners(_mirrored(crop) if flip else crop)
        return torch.tensor(ids)

    def decode(self, ids: torch.LongTensor) -> tuple[list[ObjectBox], tuple[float, float, float, float] | None]:
        """The objects of ids `(condition_length,)`, with boxes on the lattice, and the crop, if it is encoded.

        Raises:
            ValueError: another shape, or ids out of range.
        """
        if ids.shape != (self.condition_length,):
            raise ValueError(f"`ids` must have shape ({self.condition_length},), got {tuple(ids.shape)}.")
        values = [check_integer("ids", value, 0, self.num_tokens - 1) for value in ids.tolist()]
        crop = self._box(*values[-2:]) if self.encode_crop else None
        objects = []
        for place in range(0, 3 * self.max_objects, 3):
            kind, first, last = values[place : place + 3]
            if kind != self.none:
                flags, label = divmod(kind, self.num_classes)
                objects.append(ObjectBox(label, self._box(first, last), *self._read_flags(flags)))
        return objects, crop

    def of_crop(self, ids: torch.LongTensor, crop: Sequence[float]) -> torch.LongTensor:
        """
        The ids of a part of the picture that `ids` `(condition_length,)` are of, as a window that moves over a larger
        one needs them. Boxes are known up to the lattice.

        Args:
            crop: `(left, top, width, height)` as boxes are.
        """
        smallest = 1e-6  # both corners of a small object may be one point
        objects = [
            one._replace(box=(*(min(place, 1 - smallest) for place in one.box[:2]), *_at_least(smallest, one.box[2:])))
            for one in self.decode(ids.cpu())[0]
        ]
        return self.encode(objects, crop).to(ids.device)

    def shuffled(self, ids: torch.LongTensor) -> torch.LongTensor:
        """Ids `(B, condition_length)` with the objects of each row in a random order, "none" last, as the original
        has them in training. Torch's global random state is used.
        """
        objects = ids[:, : 3 * self.max_objects].unflatten(1, (self.max_objects, 3))
        is_none = (objects[..., 0] == self.none).float()
        order = (torch.rand(objects.shape[:2]).to(ids.device) + is_none).argsort(dim=1)
        objects = objects.gather(1, order[..., None].expand_as(objects))
        return torch.cat([objects.flatten(1), ids[:, 3 * self.max_objects :]], dim=1)

    def _class_id(self, one: ObjectBox, label: int) -> int:
        flags = sum(bool(getattr(one, name)) << place for place, name in enumerate(_FLAGS) if self._counts(name))
        return label + self.num_classes * flags

    def _read_flags(self, flags: int) -> list[bool]:
        return [self._counts(name) and bool(flags >> place & 1) for place, name in enumerate(_FLAGS)]

    def _counts(self, name: str) -> bool:
        return self.use_group if name == "is_group" else self.use_flags

    def _corners(self, box: Sequence[float]) -> list[int]:
        left, top, width, height = box
        return [self._point(left, top), self._point(left + width, top + height)]

    def _point(self, x: float, y: float) -> int:
        column, row = (round(value * (self.side - 1)) for value in (x, y))
        return row * self.side + column

    def _box(self, first: int, last: int) -> tuple[float, float, float, float]:
        (top, left), (bottom, right) = (
            [place / (self.side - 1) for place in divmod(point, self.side)] for point in (first, last)
        )
        return left, top, right - left, bottom - top


def _check_box(name: str, box: Sequence[float]) -> tuple[float, float, float, float]:
    values = [check_real(name, value, 0, 1) for value in box] if len(box) == 4 else []
    if not values or min(values[2:]) <= 0 or values[0] + values[2] > 1 + 1e-6 or values[1] + values[3] > 1 + 1e-6:
        raise ValueError(
            f"`{name}` must be (left, top, width, height) in shares of the picture, within it, got {tuple(box)}."
        )
    return tuple(values)


def _at_least(smallest: float, sides: Sequence[float]) -> tuple[float, ...]:
    return tuple(max(side, smallest) for side in sides)


def _overlap(box: Sequence[float], other: Sequence[float]) -> bool:
    """Whether both have an area in common."""
    return all(
        min(box[axis] + box[axis + 2], other[axis] + other[axis + 2]) > max(box[axis], other[axis]) for axis in (0, 1)
    )


def _within(box: Sequence[float], crop: Sequence[float]) -> tuple[float, float, float, float]:
    """A box relative to a crop, as in the original: one that is cut at its left or top keeps its size there."""
    left, top = (max(min((box[axis] - crop[axis]) / crop[axis + 2], 1.0), 0.0) for axis in (0, 1))
    return left, top, min(box[2] / crop[2], 1 - left), min(box[3] / crop[3], 1 - top)


def _mirrored(box: Sequence[float]) -> tuple[float, float, float, float]:
    return 1 - (box[0] + box[2]), *box[1:]


__all__ = ["BoundingBoxTokenizer", "ObjectBox"]
