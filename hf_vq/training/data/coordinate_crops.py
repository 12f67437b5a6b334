"""Crops of larger pictures with the ids of their coordinates, for priors that are conditioned on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...models.priors.coordinates import coordinate_ids
from .image_datasets import ImageDataset
from .image_decoding import Window, choose_window


@dataclass(frozen=True)
class CropSettings:
    """
    How crops are cut.

    Args:
        picture_size: the shorter side in pixels that a picture is scaled to before a crop of the data set's
            resolution is cut out of it.
        crops_per_image: random crops of each training image.
        coordinate_scale: the id of coordinate 1; there are so many ids and one more.
        downsample_factor: pixels along a side of a cell, whose mean coordinate is an id.
        seed: of the crops.
    """

    picture_size: int
    crops_per_image: int
    coordinate_scale: int
    downsample_factor: int
    seed: int = 0

    @property
    def condition_vocab_size(self) -> int:
        """Number of ids."""
        return self.coordinate_scale + 1


class CoordinateCrops(Dataset):
    """
    Crops of the images of a data set, those of one image adjacent. A sample has the fields of the image's own, with
    `condition_codes`, int64 `(h', w')`, the crop's coordinates.

    Args:
        images: the data set.
        settings: how crops are cut.
        crop: "random", drawn from `(seed, row, number of the crop)`, or "center", one for each image.
        flip: also give `condition_codes_flipped`, those of the mirrored crop in the mirrored picture.

    Raises:
        ValueError: crops that are larger than the pictures.
    """

    def __init__(self, images: ImageDataset, settings: CropSettings, crop: str, flip: bool = False):
        if settings.picture_size < max(images.size):
            raise ValueError(
                f"picture_size={settings.picture_size}: it must be at least {max(images.size)}, the pixels of a crop."
            )
        self.images, self.settings, self.crop, self.flip = images, settings, crop, flip
        self.number = settings.crops_per_image if crop == "random" else 1
        self.rows, self.class_names = images.rows, images.class_names
        self.labels = None if images.labels is None else images.labels.repeat(self.number)

    def __len__(self) -> int:
        return len(self.images) * self.number

    def name_of(self, index: int) -> str:
        """The image's path where the data set has it, and its row."""
        return self.images.name_of(index // self.number)

    def read(self, index: int) -> dict | None:
        """One crop, or `None` if its image is broken."""
        row, number = divmod(index, self.number)
        window = None

        def choose(image: Any) -> Window:
            nonlocal window
            generator = np.random.default_rng((self.settings.seed, row, number))
            size, side = self.images.size, self.settings.picture_size
            window = choose_window(image, size, self.crop, generator=generator, shorter_side=side)
            return window

        sample = self.images.read(row, choose)
        if sample is None:
            return None
        sample["condition_codes"] = self._ids(window, window.corner)
        if self.flip:
            mirrored = window.resized[1] - window.corner[1] - window.size[1]
            sample["condition_codes_flipped"] = self._ids(window, (window.corner[0], mirrored))
        return sample

    def _ids(self, window: Window, corner: tuple[int, int]) -> torch.LongTensor:
        grid = [side // self.settings.downsample_factor for side in window.size]
        return coordinate_ids(self.settings, window.resized, grid, window.size, corner)


__all__ = ["CoordinateCrops", "CropSettings"]
