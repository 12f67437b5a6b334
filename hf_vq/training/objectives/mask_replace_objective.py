"""What a denoiser of codes is trained on: the variational bound, and the likelihood of the clean codes beside it."""

import math
from dataclasses import dataclass

import torch

from ...schedulers.scheduling_mask_replace import MaskReplaceScheduler


@dataclass
class MaskReplaceLoss:
    """
    Args:
        loss: scalar, float32, what is minimised; of the size of nats per position.
        terms: float32 `(B,)`, nats, each sample's term of the bound at its timestep, detached.
        bits_per_index: scalar, an unbiased estimate of the bound's sum over timesteps, detached.
    """

    loss: torch.Tensor
    terms: torch.Tensor
    bits_per_index: torch.Tensor


class MaskReplaceObjective:
    """
    The loss of VQ-Diffusion (Gu et al. 2022, equations 7 to 9): the bound's term at one random timestep of each sample, and
    with a small weight -log p(x_0 | x_t), by which every timestep teaches the network to name the clean codes.

    Both are divided by p(t), the probability of the timestep, so that the loss estimates a sum over timesteps however these
    are drawn, and by the number of positions.

    Args:
        scheduler: the forward chain.
        auxiliary_weight: of the second part, before the scheduler's adaptive weight 1 + (1 - t/T); the original's is 5e-4,
            or 1e-3 on ImageNet and FFHQ.
    """

    def __init__(self, scheduler: MaskReplaceScheduler, auxiliary_weight: float = 5e-4):
        if not auxiliary_weight >= 0:
            raise ValueError(f"`auxiliary_weight` must be at least 0, got {auxiliary_weight}.")
        self.scheduler = scheduler
        self.auxiliary_weight = auxiliary_weight

    def __call__(
        self,
        model_output: torch.FloatTensor,
        original_samples: torch.LongTensor,
        sample: torch.LongTensor,
        timesteps: torch.LongTensor,
        probabilities: torch.FloatTensor,
    ) -> MaskReplaceLoss:
        """
        Args:
            model_output (`(B, *, K)`): logits of p(x_0 | x_t), in any floating dtype.
            original_samples, sample (int64 `(B, *)`): x_0 and x_t.
            timesteps (int64 `(B,)`): t in 0…T-1.
            probabilities (float `(B,)`): p(t), positive.

        Raises:
            ValueError: `probabilities` of another shape or not positive, or a tensor that the scheduler does not take.
        """
        if probabilities.shape != timesteps.shape:
            raise ValueError(
                f"`probabilities` must have the shape of `timesteps` {tuple(timesteps.shape)}, got "
                f"{tuple(probabilities.shape)}."
            )
        if not (probabilities > 0).all():
            raise ValueError(f"`probabilities` must be positive, got {probabilities.tolist()}.")
        probabilities = probabilities.to(model_output.device)
        terms = self.scheduler.vlb_terms(model_output, original_samples, sample, timesteps).flatten(1).sum(dim=1)
        losses = terms
        if self.auxiliary_weight > 0:
            auxiliary = self.scheduler.auxiliary_loss(model_output, original_samples, timesteps)
            losses = losses + self.auxiliary_weight * auxiliary.flatten(1).sum(dim=1)
        positions = original_samples.numel()
        bits = (terms.detach() / probabilities).sum() / (positions * math.log(2))
        return MaskReplaceLoss((losses / probabilities).sum() / positions, terms.detach(), bits)


__all__ = ["MaskReplaceLoss", "MaskReplaceObjective"]
