"""What the pipelines return."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class VQPipelineOutput(BaseOutput):
    """
    Args:
        images: by `output_type`, a list of `PIL.Image.Image` ("pil"), an array `(B, H, W, C)` in [0, 1] ("np"), a
            tensor `(B, C, H, W)` in [0, 1] ("pt"), the quantized latents `(B, D, h, w)` that `vqvae.decode(…,
            quantize=False)` takes, of a tokenizer with levels a tuple of them ("latent"), or `None` ("indices":
            nothing is decoded).
        indices: the sampled codes, int64 `(B, h, w)`; of a tokenizer with levels a tuple of them, from top to bottom.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | tuple[torch.Tensor, ...] | None
    indices: torch.LongTensor | tuple[torch.LongTensor, ...]


__all__ = ["VQPipelineOutput"]
