"""The coordinates of a crop, the condition of priors that are trained on crops (Esser et al. 2021, section 4.2).

Pixel (i, j) of a picture of H×W pixels has the coordinate `(i * W + j) / (H * W)`. A crop's condition is the mean over
each of its cells, times `coordinate_scale`, rounded: ids 0 … `coordinate_scale`.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch


def coordinate_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of the `condition_length` coordinates of a prior, in the proportions of its grid of codes.

    Raises:
        ValueError: no such grid has that many.
    """
    (height, width), length = config.grid_size, config.condition_length
    rows = isqrt(length * height // width)
    columns = length // max(rows, 1)
    if rows * columns != length or rows * width != columns * height:
        raise ValueError(
            f"`condition_length` must be a grid in the proportions of the {height}x{width} codes for coordinates, got "
            f"{length}."
        )
    return rows, columns


def coordinate_ids(
    config: Any,
    picture_size: Sequence[int],
    grid_size: Sequence[int],
    crop_size: Sequence[int] | None = None,
    corner: Sequence[int] = (0, 0),
) -> torch.LongTensor:
    """
    The coordinates of a crop as condition ids, int64 `(h', w')`.

    The original clamps to [0, 1] and rounds; where a prior has fewer ids than that gives, the last one stands for
    those beyond.

    Args:
        config: of the prior, with `coordinate_scale` and `condition_vocab_size`.
        picture_size: height and width of the picture in pixels.
        grid_size: h' and w', the cells of the crop. Where they do not divide its sides, they overlap, as those of
            `torch.nn.functional.interpolate(mode="area")` do.
        crop_size: height and width of the crop, by default the picture's.
        corner: row and column of the crop's first pixel.
    """
    height, width = picture_size
    sides = picture_size if crop_size is None else crop_size
    rows, columns = (
        first + _cell_means(side, cells) for first, side, cells in zip(corner, sides, grid_size, strict=True)
    )
    # the mean over a cell is that of its rows and that of its columns
    coordinates = (rows[:, None] * width + columns) / (height * width)
    ids = (coordinates.clamp(0, 1) * config.coordinate_scale).round().long()
    return ids.clamp(max=config.condition_vocab_size - 1)


def _cell_means(length: int, cells: int) -> torch.DoubleTensor:
    """The mean position, `(cells,)`, of the pixels 0 … `length - 1` that fall on each cell."""
    number = torch.arange(cells, dtype=torch.float64)
    first, end = (number * length / cells).floor(), ((number + 1) * length / cells).ceil()
    return (first + end - 1) / 2


__all__ = ["coordinate_grid", "coordinate_ids"]
