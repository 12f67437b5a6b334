"""Outputs shared by every tokenizer of the package."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class QuantizerOutput(ModelOutput):
    """What a quantizer returns.

    Args:
        quantized (`torch.Tensor` of shape `(B, D, h, w)`): the code vectors, with the gradient of the estimator.
        indices (`torch.LongTensor` of shape `(B, h, w)`; `(B, h, w, depth)` for residual codes): the codes.
        loss (scalar): the weighted sum that is added to the training objective.
        codebook_loss (scalar): `||sg[z] - e||²`, the codebook's side, unweighted.
        commitment_loss (scalar): `||z - sg[e]||²`, the encoder's side, unweighted.
    """

    quantized: torch.FloatTensor | None = None
    indices: torch.LongTensor | None = None
    loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None


@dataclass
class VQEncoderOutput(ModelOutput):
    """
    `latents` `(B, D, h, w)` before quantization, `quantized` of the same shape, `indices` int64 `(B, h, w)`; tuples of
    them, from top to bottom, where the tokenizer has levels.
    """

    latents: torch.FloatTensor | None = None
    quantized: torch.FloatTensor | None = None
    indices: torch.LongTensor | None = None


@dataclass
class VQDecoderOutput(ModelOutput):
    """`sample`: images `(B, C, H, W)` in about [-1, 1]."""

    sample: torch.FloatTensor | None = None


@dataclass
class VQModelOutput(ModelOutput):
    """One training pass of a tokenizer. Where it has levels, what belongs to one of them is a tuple, from top to
    bottom.

    The latents come first: `pipeline("image-feature-extraction")` gives the first output (that of a tokenizer with
    levels with `return_tensors=True` only, as they are no one tensor).

    Args:
        latents (`(B, D, h, w)`): the encoder's output before quantization.
        sample (`(B, C, H, W)`): the reconstruction.
        indices (int64 `(B, h, w)`): the codes.
        loss (scalar): `reconstruction_loss` plus the quantizer's weighted loss.
        reconstruction_loss (scalar): the mean squared error, see the model's config.
        quantizer_loss (scalar): the quantizer's weighted loss.
        codebook_loss, commitment_loss (scalars): its unweighted parts, where the quantizer has them.
        perplexity (scalar): exp of the entropy of the code frequencies in this batch, over latents that are finite.
    """

    latents: torch.FloatTensor | None = None
    sample: torch.FloatTensor | None = None
    indices: torch.LongTensor | None = None
    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    quantizer_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None


__all__ = ["QuantizerOutput", "VQDecoderOutput", "VQEncoderOutput", "VQModelOutput"]
