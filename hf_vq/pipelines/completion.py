"""Completion: part of an image is kept, an autoregressive prior samples the rest."""

import numpy as np
import torch

from .code_sampling import KnownCodes
from .conditioning import repeat_rows
from .pipeline_output import VQPipelineOutput
from .vq_pipeline import of_levels


HALVES = ("top", "bottom", "left", "right")


def kept_positions(keep, grid_size, downsample_factor: int) -> torch.BoolTensor:
    """
    Which codes are kept.

    Args:
        keep: "top", "bottom", "left" or "right" for that half (rounded up), or a bool array or tensor, true where the image
            is kept: on the grid, `(h, w)` or `(B, h, w)`, or on pixels, `(H, W)` or `(B, H, W)`, where a code is kept if all
            its pixels are.
        grid_size: `(h, w)`.
        downsample_factor: `H / h`.

    Returns:
        bool `(1 or B, h, w)`.
    """
    height, width = grid_size
    if isinstance(keep, str):
        if keep not in HALVES:
            raise ValueError(f"`keep` must be one of {HALVES} or a mask, got {keep!r}.")
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        half = {
            "top": rows < (height + 1) // 2,
            "bottom": rows >= height // 2,
            "left": columns < (width + 1) // 2,
            "right": columns >= width // 2,
        }
        return half[keep][None]
    mask = keep if isinstance(keep, torch.Tensor) else torch.as_tensor(np.asarray(keep))
    if mask.dtype != torch.bool or mask.ndim not in (2, 3):
        raise ValueError(
            f"`keep` must be a bool mask of 2 or 3 dimensions, got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    mask = mask[None] if mask.ndim == 2 else mask
    if tuple(mask.shape[1:]) == (height, width):
        return mask
    factor = downsample_factor
    if tuple(mask.shape[1:]) != (height * factor, width * factor):
        raise ValueError(
            f"`keep` must have shape ({height}, {width}) on the grid or ({height * factor}, {width * factor}) on pixels, got "
            f"{tuple(mask.shape[1:])}."
        )
    return mask.unflatten(2, (width, factor)).unflatten(1, (height, factor)).all(dim=4).all(dim=2)


def kept_at_levels(keep, grid_sizes, downsample_factors) -> list[torch.BoolTensor]:
    """`kept_positions` of each level, from top to bottom; a mask on the grid is one on the top level's grid."""
    top = kept_positions(keep, grid_sizes[0], downsample_factors[0])
    on_grid = not isinstance(keep, str) and tuple(np.shape(keep)[-2:]) == tuple(grid_sizes[0])
    kept = [top]
    for grid_size, factor in zip(grid_sizes[1:], downsample_factors[1:], strict=True):
        if on_grid:
            ratio = downsample_factors[0] // factor
            kept.append(top.repeat_interleave(ratio, dim=1).repeat_interleave(ratio, dim=2))
        else:
            kept.append(kept_positions(keep, grid_size, factor))
    return kept


@torch.no_grad()
def complete(
    pipeline,
    image=None,
    keep="top",
    indices: torch.LongTensor | tuple[torch.LongTensor, ...] | None = None,
    class_labels=None,
    condition=None,
    num_images_per_prompt: int = 1,
    output_type: str = "pil",
    return_dict: bool = True,
    decode_batch_size: int = 16,
    **sampling,
) -> VQPipelineOutput | tuple:
    """
    Keeps the codes of a part of an image, unchanged at every level, and samples the others.

    A prior reads row by row: a sampled code is conditioned on the codes before it, kept or sampled, and never on kept
    codes of its level that come after it. The top half is therefore completed from all of it, while what is sampled
    above a kept bottom half does not know it. The encoder has seen all of `image`, so a kept code near the border may
    hold traces of the pixels beyond.

    Args:
        pipeline ([`AutoregressivePipeline`]): samples.
        image: PIL images or a tensor `(B, C, H, W)` in [-1, 1], of the size that the priors' grids stand for.
        keep: what to keep, see [`kept_positions`]; a mask on the grid is one on the top level's.
        indices (int `(B, h, w)`, or a tuple of them from top to bottom, *optional*): codes to complete, in place of
            `image`.
        class_labels, condition, num_images_per_prompt, output_type, return_dict, decode_batch_size: as in the call.
            One image goes with several classes, and one class with several images.
        sampling: `guidance_scale`, `temperature`, `top_k`, `top_p`, `generator`, `use_cache`, `cache_implementation`
            and `callback_on_step_end` of the call.

    Returns:
        [`VQPipelineOutput`] with `B * num_images_per_prompt` images, those of one input adjacent.

    Raises:
        ValueError: both or none of `image` and `indices`, wrong shapes, or as in the call.
    """
    times, decode_batch_size = pipeline.check_output(num_images_per_prompt, output_type, decode_batch_size)
    codes = pipeline.given_codes(image, indices)
    grid_sizes = [tuple(prior.config.grid_size) for prior in pipeline.priors]
    keep = kept_at_levels(keep, grid_sizes, pipeline.vqvae.config.downsample_factors)
    rows = {
        "image": codes,
        "class_labels": pipeline.prepare_prompts(class_labels, condition),
        "keep": [mask.to(pipeline._execution_device) for mask in keep],
    }
    rows = repeat_rows(rows, times)
    known = [KnownCodes(*of_level) for of_level in zip(rows["image"], rows["keep"], strict=True)]
    indices = of_levels(pipeline.sample_levels(rows["class_labels"], known, **sampling))
    images = pipeline.postprocess(indices, output_type, decode_batch_size)
    pipeline.maybe_free_model_hooks()
    return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)


__all__ = ["complete", "kept_at_levels", "kept_positions"]
