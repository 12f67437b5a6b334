"""Several codes a position, each for what the ones before it left over."""

from typing import Any

import torch
from torch import nn

from ...argument_checks import check_integer
from ..modeling_outputs import QuantizerOutput
from .quantizer import Quantizer, check_options
from .vector_quantizers import EMAVectorQuantizer, VectorQuantizer


RESIDUAL_BASES = {"vq": VectorQuantizer, "ema": EMAVectorQuantizer}


class ResidualQuantizer(Quantizer):
    """Each quantizer codes what the ones before it left over (Zeghidour et al. 2021; Lee et al. 2022, equation 3).

    `indices` have shape `(B, h, w, depth)`. Losses are sums over the depth.

    Args:
        num_embeddings: K of each quantizer.
        embed_dim: D.
        depth: the number of quantizers.
        base: "vq" or "ema".
        kwargs: go to each of the quantizers. The gradient estimator acts once, on the sum of the codes.
    """

    def __init__(self, num_embeddings: int, embed_dim: int, depth: int = 4, base: str = "ema", **kwargs: Any):
        super().__init__(num_embeddings, embed_dim)
        self.depth = check_integer("depth", depth, minimum=1)
        if base not in RESIDUAL_BASES:
            raise ValueError(f"`base` must be 'vq' or 'ema', got {base!r}.")
        check_options(base, RESIDUAL_BASES[base], kwargs)
        self.layers = nn.ModuleList(RESIDUAL_BASES[base](num_embeddings, embed_dim, **kwargs) for _ in range(depth))

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(depth, K, D)`, one table a depth."""
        return torch.stack([layer.codebook for layer in self.layers])

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`; `indices` are `(B, h, w, depth)`."""
        self.check_latents(latents)
        residual = latents.float()
        outputs = []
        for layer in self.layers:
            outputs.append(layer(residual))
            residual = residual - outputs[-1].quantized.detach()

        def total(name):
            terms = [getattr(output, name) for output in outputs]
            return None if terms[0] is None else sum(terms)

        # a sum of estimators would pass the gradient `depth` times; one estimator on the sum passes it once
        codes = sum(output.quantized.detach() for output in outputs)
        return QuantizerOutput(
            quantized=self.layers[0].estimator(latents.float(), codes).to(latents.dtype),
            indices=torch.stack([output.indices for output in outputs], dim=-1),
            loss=total("loss"),
            codebook_loss=total("codebook_loss"),
            commitment_loss=total("commitment_loss"),
        )

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Sums of code vectors `(B, D, h, w)` of `indices` `(B, h, w, d)` with 1 ≤ d ≤ depth."""
        if indices.ndim != 4 or not 1 <= indices.shape[-1] <= self.depth:
            raise ValueError(
                f"`indices` must have shape (B, h, w, d) with d from 1 to {self.depth}, got {tuple(indices.shape)}."
            )
        return sum(
            layer.indices_to_latents(level) for layer, level in zip(self.layers, indices.unbind(-1), strict=False)
        )


__all__ = ["ResidualQuantizer"]
