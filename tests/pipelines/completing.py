"""Completion with what is kept, in place of what is painted."""

import numpy as np
import torch


def halves(height: int, width: int) -> dict[str, torch.Tensor]:
    """Masks `(h, w)`, true in one half."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "top": rows < (height + 1) // 2,
        "bottom": rows >= height // 2,
        "left": columns < (width + 1) // 2,
        "right": columns >= width // 2,
    }


def complete(pipeline, image=None, keep="top", **arguments):
    """The call with a mask that paints what `keep`, a half or a mask, does not."""
    if isinstance(keep, str):
        factor = pipeline.vqvae.config.downsample_factors[0]
        keep = halves(*(side * factor for side in pipeline.priors[0].config.grid_size))[keep]
    return pipeline(image=image, mask_image=~torch.as_tensor(np.asarray(keep)), **arguments)
