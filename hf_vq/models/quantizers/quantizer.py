"""The base class of all quantizers, and the contract that they keep."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...argument_checks import check_integer, check_tensor
from ..modeling_outputs import QuantizerOutput
from .codebook_statistics import check_indices


class Quantizer(nn.Module):
    """Latents to codes and back: what a tokenizer asks of its quantizer.

    `quantizer(latents)` takes `(B, D, h, w)` of any float dtype and gives a `QuantizerOutput`: the code vectors
    `quantized` of the same shape and dtype, int64 `indices` `(B, h, w)` in [0, K), and the scalar `loss`, float32,
    that is added to the training objective. The choice of codes and all losses are computed in float32, whatever the
    autocast. `indices_to_latents(indices)` gives the same code vectors, to the bit.

    In training mode a quantizer may update its state (moving averages, a codebook that k-means sets); latents that
    are not finite never enter it. In evaluation mode nothing changes.

    In the comments of the subclasses z are the latents, e the code vectors, N = B·h·w.

    Args:
        num_embeddings: K, the number of codes.
        embed_dim: D, the channels of a latent.
    """

    def __init__(self, num_embeddings: int, embed_dim: int):
        super().__init__()
        self.num_embeddings = check_integer("num_embeddings", num_embeddings, minimum=1)
        self.embed_dim = check_integer("embed_dim", embed_dim, minimum=1)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`; row i is that of index i."""
        raise NotImplementedError(f"{type(self).__name__} must define `codebook`.")

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`."""
        raise NotImplementedError(f"{type(self).__name__} must define `forward`.")

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of integer `indices` `(B, h, w)` in [0, K), in the codebook's dtype."""
        check_indices(indices, self.num_embeddings)
        return look_up(indices.long(), self.codebook)

    def reset_parameters(self) -> None:
        """Draw the initial codes; a quantizer without any has nothing to draw."""

    def set_training_step(self, step: int, total_steps: int) -> None:
        """Tell a quantizer with a schedule where training stands; a training loop calls this before each step.

        Args:
            step: steps done so far, from 0.
            total_steps: steps of the whole run.
        """

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raise a `ValueError` unless `latents` has shape `(B, D, h, w)`."""
        check_tensor("latents", latents)
        if latents.ndim != 4 or latents.shape[1] != self.embed_dim:
            raise ValueError(f"`latents` must have shape (B, {self.embed_dim}, h, w), got {tuple(latents.shape)}.")
        if not latents.is_floating_point():
            raise ValueError(f"`latents` must be floating-point values, got {latents.dtype}.")


def flatten(latents: torch.Tensor) -> torch.Tensor:
    """`(B, D, h, w) -> (B·h·w, D)`."""
    return latents.movedim(1, -1).reshape(-1, latents.shape[1])


def look_up(indices: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Vectors `(B, D, h, w)` of `indices` `(B, h, w)`."""
    return F.embedding(indices, codebook).movedim(-1, 1).contiguous()


def check_options(name: str, quantizer_class: type[Quantizer], options: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the `options` that the constructor of `quantizer_class` does not have."""
    known = inspect.signature(quantizer_class).parameters
    unknown = [key for key in options if key not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        own = sorted(set(known) - {"num_embeddings", "embed_dim"})
        raise ValueError(f"`quantizer_kwargs` of {name!r} have no {unknown}; known: {own}.")


__all__ = ["Quantizer", "check_options", "flatten", "look_up"]
