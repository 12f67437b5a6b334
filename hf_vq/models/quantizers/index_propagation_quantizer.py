"""Index back-propagation: a choice of code whose gradient reaches every code."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...argument_checks import check_real
from ..modeling_outputs import QuantizerOutput
from .code_entropies import choice_entropies
from .quantizer import Quantizer, flatten, look_up


class IndexPropagationQuantizer(Quantizer):
    """Index back-propagation quantization, IBQ (Shi et al. 2024, "Taming Scalable Visual Tokenizer").

    The code is that of the largest inner product, i = argmax z·e. With p = softmax(z·e) the quantized vector is
    Σ (onehot(i) + p - sg[p]) e: its value is the code e_i, its gradient that of the soft choice, to all codes and to
    z.

    loss = mean |q - z|² + mean |sg[e] - z|² + β · mean |e - sg[z]|² + w · (E H[p] - H[E p]), where the entropies are
    of the softmax of z·e / τ. q has the gradient above, e that of the chosen code alone.

    All N×K probabilities are held in training, since every one of them has a gradient.

    Args:
        num_embeddings: K.
        embed_dim: D.
        commitment_cost: β, at least 0; it is on the codebook's side, as in the original.
        entropy_weight: w, at least 0.
        diversity_weight: a factor on the second entropy.
        entropy_temperature: τ, above 0.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        entropy_weight: float = 0.0,
        diversity_weight: float = 1.0,
        entropy_temperature: float = 0.01,
    ):
        super().__init__(num_embeddings, embed_dim)
        self.commitment_cost = check_real("commitment_cost", commitment_cost, minimum=0)
        self.entropy_weight = check_real("entropy_weight", entropy_weight, minimum=0)
        self.diversity_weight = check_real("diversity_weight", diversity_weight, minimum=0)
        self.entropy_temperature = check_real("entropy_temperature", entropy_temperature, above=0)
        self.embedding = nn.Embedding(num_embeddings, embed_dim)
        self.reset_parameters()

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embedding.weight

    def reset_parameters(self) -> None:
        init.uniform_(self.embedding.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z, codebook = latents.float(), self.embedding.weight.float()
            flat = flatten(z)
            scores = flat @ codebook.t()
            indices = scores.argmax(dim=1).reshape(z.shape[0], *z.shape[2:])
            codes = quantized = look_up(indices, codebook)
            if self.training:
                # p - sg[p] is 0, so the codes that it multiplies have no gradient from here
                soft = (scores.softmax(dim=1) @ codebook.detach()).reshape(*indices.shape, -1).movedim(-1, 1)
                quantized = codes + (soft - soft.detach())
            codebook_loss, commitment_loss = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
            loss = F.mse_loss(quantized, z) + commitment_loss + self.commitment_cost * codebook_loss
            if self.entropy_weight > 0:
                each, mean = choice_entropies(
                    flat, codebook, None, self.entropy_temperature, epsilon=1e-5, of_all_processes=self.training
                )
                loss = loss + self.entropy_weight * (each - self.diversity_weight * mean)
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype),
            indices=indices,
            loss=loss,
            codebook_loss=codebook_loss.detach(),
            commitment_loss=commitment_loss.detach(),
        )


__all__ = ["IndexPropagationQuantizer"]
