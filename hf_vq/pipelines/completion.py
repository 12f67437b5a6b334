"""Completion: a part of an image is kept, the rest is drawn anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..argument_checks import check_integer
from ..images import to_pixel_values
from .conditioning import to_mask


@dataclass
class Given:
    """What a call keeps a part of, with what `outpaint` adds to its sides.

    Args:
        size: height and width in pixels.
        codes: int64 `(B, h, w)` of each level, from top to bottom, 0 where they are added; empty where a pipeline has
            none.
        pixels: `(B, C, H, W)` in [-1, 1], 0 where they are added; None where codes were given.
        mask: `(B, 1, H, W)` of pixels, or `(B, 1, h, w)` of the top level's codes, 1 is painted; None where neither a
            mask nor `outpaint` says what is kept.
    """

    size: tuple[int, int]
    codes: tuple[torch.LongTensor, ...]
    pixels: torch.FloatTensor | None
    mask: torch.FloatTensor | None


def read_given(
    config: Any,
    image: Any = None,
    indices: Any = None,
    mask_image: Any = None,
    keep_fraction: float | None = None,
    outpaint: Sequence[int] | None = None,
    read_codes: Callable[[torch.FloatTensor | None, Any, tuple[int, int]], tuple[torch.LongTensor, ...]] | None = None,
) -> Given | None:
    """
    What the arguments of a call say of the image that it completes or varies; None where there is none.

    Args:
        config: of the tokenizer.
        image, indices, mask_image, keep_fraction, outpaint: as in the pipelines' calls.
        read_codes: from pixel values or `indices`, and their height and width in pixels, to the codes of each level;
            without it the pipeline has no codes.

    Raises:
        ValueError: arguments that exclude or need each other, or what is no image, mask or margin.
    """
    if image is not None and indices is not None:
        raise ValueError("Only one of `image` and `indices` can be given.")
    if image is None and indices is None:
        wanted = "an `image` that it is for" if read_codes is None else "an `image`, or `indices`, that it is for"
        names = {"mask_image": mask_image, "keep_fraction": keep_fraction, "outpaint": outpaint}
        for name, value in names.items():
            if value is not None:
                raise ValueError(f"`{name}` needs {wanted}.")
        return None
    if keep_fraction is not None and (mask_image is not None or outpaint is not None):
        raise ValueError(
            "`keep_fraction` excludes `mask_image` and `outpaint`: it says how much is kept, in random places."
        )
    factors = config.downsample_factors
    pixels = None if image is None else to_pixel_values(image, config.in_channels)
    inner = size_of_given(pixels, indices, factors[0])
    grids_of(inner, factors, "image" if indices is None else "indices")
    codes = () if read_codes is None else tuple(read_codes(pixels, indices, inner))
    mask = None if mask_image is None else to_mask(mask_image)
    if mask is not None:
        grid = tuple(side // factors[0] for side in inner)
        if tuple(mask.shape[-2:]) not in (inner, grid):
            raise ValueError(
                f"`mask_image` must have the size {inner} of the images, or {grid} of the codes, got "
                f"{tuple(mask.shape[-2:])}."
            )
    if outpaint is None:
        return Given(inner, codes, pixels, mask)
    margins = check_outpaint(outpaint, factors[0])
    mask = torch.zeros(1, 1, *inner) if mask is None else mask
    mask = pad_to_outpaint(mask, margins, inner[0] // mask.shape[-2], value=1)
    return Given(
        (inner[0] + margins[0] + margins[1], inner[1] + margins[2] + margins[3]),
        # a pipeline without codes has fewer than there are factors
        tuple(pad_to_outpaint(level, margins, factor) for level, factor in zip(codes, factors, strict=bool(codes))),
        None if pixels is None else pad_to_outpaint(pixels, margins),
        mask,
    )


def size_of_given(
    image: torch.FloatTensor | None, indices: Any, downsample_factor: int, outpaint: Sequence[int] | None = None
) -> tuple[int, int] | None:
    """Height and width in pixels of pixel values, or of `indices`, with what `outpaint` adds; None without both."""
    if image is not None:
        height, width = image.shape[-2:]
    elif indices is not None:
        top = indices[0] if isinstance(indices, (tuple, list)) and indices else indices
        # what is no grid of codes is refused where codes are read
        height, width = (side * downsample_factor for side in (0, 0, *getattr(top, "shape", ()))[-2:])
    else:
        return None
    top, bottom, left, right = (0, 0, 0, 0) if outpaint is None else check_outpaint(outpaint, downsample_factor)
    return height + top + bottom, width + left + right


def grids_of(size: Sequence[int], downsample_factors: Sequence[int], name: str | None = None) -> list[tuple[int, int]]:
    """The grids `(h, w)` of each level's codes for images of `size` pixels, or a ValueError that names `name`."""
    for side_name, side in zip(("height", "width"), size, strict=True):
        if side % downsample_factors[0]:
            raise ValueError(
                f"`{name or side_name}` must {'have a ' + side_name + ' that is' if name else 'be'} a multiple of "
                f"{downsample_factors[0]} (the downsample factor), got {side}."
            )
    return [tuple(side // factor for side in size) for factor in downsample_factors]


def check_whole_size(
    given: Given | None, size: Sequence[int] | None, least: Sequence[int], name: str = "image"
) -> tuple[int, int]:
    """
    Height and width in pixels of the images of a call: those of what is given, or `size`, or `least`, the size that
    the prior was trained on.

    Raises:
        ValueError: what is given is smaller than `least`, or has another size than `size`.
    """
    if given is None:
        return tuple(least) if size is None else tuple(size)
    fits = all(side >= low for side, low in zip(given.size, least, strict=True))
    wanted = tuple(least) if not fits else given.size if size is None else tuple(size)
    if wanted != given.size:
        raise ValueError(
            f"`{name}` must be {wanted[0]} high and {wanted[1]} wide, with what `outpaint` adds, got "
            f"{given.size[0]}x{given.size[1]} pixels."
        )
    return wanted


def kept_codes(mask: torch.FloatTensor, grid_size: Sequence[int], downsample_factor: int) -> torch.BoolTensor:
    """
    The codes `(B, h, w)` that a mask keeps: those without a painted pixel.

    Args:
        mask: from `to_mask`, `(B, 1, H, W)` of pixels or `(B, 1, h, w)` of codes; 1 is painted.
        grid_size: `(h, w)`.
        downsample_factor: `H / h`.

    Raises:
        ValueError: a mask of another size.
    """
    grid, size = tuple(grid_size), tuple(mask.shape[-2:])
    pixels = tuple(side * downsample_factor for side in grid)
    if size not in (grid, pixels):
        raise ValueError(
            f"`mask_image` must have the size {pixels} of the images, or {grid} of the codes, got {size}."
        )
    if size != grid:
        mask = F.max_pool2d(mask, downsample_factor)
    return mask[:, 0] == 0


def kept_at_levels(
    mask: torch.FloatTensor, grid_sizes: Sequence[Sequence[int]], downsample_factors: Sequence[int]
) -> list[torch.BoolTensor]:
    """`kept_codes` of each level, from top to bottom; a mask of codes is one of the top level's."""
    top = kept_codes(mask, grid_sizes[0], downsample_factors[0])
    kept = [top]
    for grid_size, factor in zip(grid_sizes[1:], downsample_factors[1:], strict=True):
        if tuple(mask.shape[-2:]) == tuple(grid_sizes[0]):
            ratio = downsample_factors[0] // factor
            kept.append(top.repeat_interleave(ratio, dim=1).repeat_interleave(ratio, dim=2))
        else:
            kept.append(kept_codes(mask, grid_size, factor))
    return kept


def check_painted(given: Given | None) -> None:
    """A ValueError unless each row of the mask, if there is one, paints something and keeps something."""
    if given is None or given.mask is None:
        return
    mask = given.mask
    shares = mask.flatten(1).mean(dim=1).tolist()
    for row, share in enumerate(shares):
        if share in (0, 1):
            found = "nothing" if share == 0 else "everything"
            raise ValueError(
                "`mask_image` must paint a part of the image and keep a part of it (1 is painted, 0 is kept), got one "
                f"that paints {found} in row {row} of {len(mask)}."
            )


def random_mask(
    shape: Sequence[int], keep_fraction: float, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.FloatTensor:
    """
    A mask `(B, 1, h, w)` of codes that keeps the same number of them in each image, in random places.

    Args:
        shape: `(B, h, w)`.
        keep_fraction: the share of the codes that is kept, rounded to whole codes.
        generator: one for all, or a list of one for each image.
    """
    count, length = shape[0], shape[1] * shape[2]
    sources = generator if isinstance(generator, list) else [generator] * count
    noise = [torch.rand(length, generator=one, device="cpu" if one is None else one.device).cpu() for one in sources]
    ranks = torch.stack(noise).argsort(dim=1).argsort(dim=1)
    return (ranks >= round(keep_fraction * length)).float().view(count, 1, *shape[1:])


def pad_to_outpaint(values: torch.Tensor, outpaint: Sequence[int], divisor: int = 1, value: float = 0) -> torch.Tensor:
    """`values` `(..., H, W)` with `outpaint` over `divisor`, above, below, left and right, added to its sides."""
    top, bottom, left, right = (margin // divisor for margin in outpaint)
    return F.pad(values, (left, right, top, bottom), value=value)


def check_outpaint(outpaint: Sequence[int], downsample_factor: int) -> tuple[int, ...]:
    """`outpaint` as four ints, or a ValueError."""
    margins = tuple(outpaint) if isinstance(outpaint, (list, tuple)) else ()
    if len(margins) != 4:
        raise ValueError(f"`outpaint` must be the pixels to add (top, bottom, left, right), got {outpaint!r}.")
    margins = tuple(check_integer("outpaint", margin, 0) for margin in margins)
    if any(margin % downsample_factor for margin in margins) or not any(margins):
        raise ValueError(
            f"`outpaint` must be multiples of {downsample_factor} (the downsample factor), not all 0, got {margins}."
        )
    return margins


def paste(images: torch.FloatTensor, image: torch.FloatTensor, mask: torch.FloatTensor) -> torch.FloatTensor:
    """
    `images` `(B, C, H, W)` in [0, 1] where the mask `(B, 1, H, W)`, or of codes, is painted, and the pixels of `image`
    in [-1, 1] elsewhere.
    """
    mask = F.interpolate(mask, size=images.shape[-2:]).to(images.device)
    return torch.where(mask == 1, images, image.to(images.device) / 2 + 0.5)


__all__ = [
    "Given",
    "check_outpaint",
    "check_painted",
    "check_whole_size",
    "grids_of",
    "kept_at_levels",
    "kept_codes",
    "pad_to_outpaint",
    "paste",
    "random_mask",
    "read_given",
    "size_of_given",
]
