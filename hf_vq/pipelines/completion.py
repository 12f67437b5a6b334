"""Completion: a part of an image is kept, the rest is drawn anew."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..argument_checks import check_integer


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


def check_painted(mask: torch.FloatTensor) -> None:
    """A ValueError unless each row of a mask `(B, 1, H, W)` paints something and keeps something; 1 is painted."""
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
    "check_outpaint",
    "check_painted",
    "kept_at_levels",
    "kept_codes",
    "pad_to_outpaint",
    "paste",
    "random_mask",
]
