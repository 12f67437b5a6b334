"""The Gumbel-softmax quantizer and its temperature schedule."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...argument_checks import check_integer, check_real
from ..modeling_outputs import QuantizerOutput
from .gradient_estimators import straight_through
from .quantizer import Quantizer, look_up


class GumbelQuantizer(Quantizer):
    """Codes drawn from a categorical whose logits are a 1×1 convolution of z (Jang et al. 2017; Ramesh et al. 2021).

    Training relaxes the draw at the temperature τ and adds `kl_weight` · KL(q(code | z) ‖ uniform), the mean over
    positions, with the uniform probability 1 / `prior_size`. Evaluation takes the most likely code.

    `set_training_step` moves τ, the attribute `temperature`: linearly from `temperature_start` to `temperature` over
    `warmup_steps`, then along half a cosine down to `temperature_end` at `decay_steps` and after. τ is a function of
    the step alone and is not saved.

    Args:
        num_embeddings: K.
        embed_dim: D.
        kl_weight: at least 0.
        temperature: τ where the cosine begins, and before any schedule; above 0.
        hard: in training, use the one-hot in the forward pass and the relaxed gradient (straight-through).
        temperature_start: τ at step 0 of the warm-up; None for `temperature`.
        temperature_end: τ at the end of the cosine; above 0.
        warmup_steps: length of the warm-up.
        decay_steps: the step at which the cosine ends, beyond `warmup_steps`; None for the length of the run.
        prior_size: of a codebook that was cut down to the codes in use, how many there were; None for K.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        kl_weight: float = 5e-4,
        temperature: float = 0.9,
        hard: bool = True,
        temperature_start: float | None = None,
        temperature_end: float = 1e-6,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        prior_size: int | None = None,
    ):
        super().__init__(num_embeddings, embed_dim)
        self.kl_weight = check_real("kl_weight", kl_weight, minimum=0)
        self.temperature = self.peak_temperature = check_real("temperature", temperature, above=0)
        start = temperature if temperature_start is None else temperature_start
        self.temperature_start = check_real("temperature_start", start, above=0)
        self.temperature_end = check_real("temperature_end", temperature_end, above=0)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, minimum=0)
        if decay_steps is not None:
            decay_steps = check_integer("decay_steps", decay_steps, minimum=self.warmup_steps + 1)
        self.decay_steps, self.hard = decay_steps, hard
        self.prior_size = num_embeddings if prior_size is None else prior_size
        self.prior_size = check_integer("prior_size", self.prior_size, minimum=num_embeddings)
        self.proj = nn.Conv2d(embed_dim, num_embeddings, 1)
        self.embed = nn.Embedding(num_embeddings, embed_dim)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embed.weight

    def reset_parameters(self) -> None:
        init.normal_(self.embed.weight)

    def temperature_at(self, step: int, total_steps: int) -> float:
        """τ after `step` steps of a run of `total_steps`."""
        step, total_steps = (
            check_integer("step", step, minimum=0),
            check_integer("total_steps", total_steps, minimum=1),
        )
        if step < self.warmup_steps:
            return self.temperature_start + (self.peak_temperature - self.temperature_start) * step / self.warmup_steps
        end = total_steps if self.decay_steps is None else self.decay_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, end - self.warmup_steps))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.temperature_end + (self.peak_temperature - self.temperature_end) * cosine

    def set_training_step(self, step: int, total_steps: int) -> None:
        self.temperature = self.temperature_at(step, total_steps)

    def forward(self, latents: torch.Tensor, noise: torch.Tensor | None = None) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`.

        Args:
            latents: `(B, D, h, w)`.
            noise: Gumbel(0, 1) noise `(B, K, h, w)`. Given, it is used, in evaluation also; otherwise it is drawn in
                training and there is none in evaluation.
        """
        self.check_latents(latents)
        temperature = check_real("temperature", self.temperature, above=0)
        with torch.autocast(latents.device.type, enabled=False):
            logits = F.conv2d(latents.float(), self.proj.weight.float(), self.proj.bias.float())
            if noise is None and self.training:
                # -log of an exponential draw is Gumbel(0, 1); the floor keeps a draw of exactly 0 finite
                noise = -torch.empty_like(logits).exponential_().clamp_min(torch.finfo(torch.float32).tiny).log()
            perturbed = logits if noise is None else logits + noise
            indices = perturbed.argmax(dim=1)
            if self.training:
                weights = (perturbed / temperature).softmax(dim=1)
                if self.hard:
                    one_hot = torch.zeros_like(weights).scatter_(1, indices.unsqueeze(1), 1.0)
                    weights = straight_through(weights, one_hot)
                quantized = torch.einsum("bkhw,kd->bdhw", weights, self.embed.weight.float()).contiguous()
            else:
                quantized = look_up(indices, self.embed.weight.float())
            log_q = logits.log_softmax(dim=1)
            kl = (log_q.exp() * (log_q + math.log(self.prior_size))).sum(dim=1).mean()
        return QuantizerOutput(quantized=quantized.to(latents.dtype), indices=indices, loss=self.kl_weight * kl)


__all__ = ["GumbelQuantizer"]
