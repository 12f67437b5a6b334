"""What a denoiser of codes is trained on: the variational bound, and the likelihood of the clean codes beside it."""

import math
from dataclasses import dataclass

import torch

from ...argument_checks import check_real
from ...schedulers.scheduling_mask_replace import MaskReplaceScheduler


@dataclass
class MaskReplaceLoss:
    """
    Args:
        loss: scalar, float32, what is minimised; of the size of nats per position.
        terms: float32 `(B,)`, nats, each sample's term of the bound at its timestep, with the weights of its
            positions, detached.
        bits_per_index: scalar, an unbiased estimate of the bound's sum over timesteps, detached.
    """

    loss: torch.Tensor
    terms: torch.Tensor
    bits_per_index: torch.Tensor


class MaskReplaceObjective:
    """
    The loss of VQ-Diffusion (Gu et al. 2022, equations 7 to 9): the bound's term at one random timestep of each
    sample, and with a small weight -log p(x_0 | x_t), by which every timestep teaches the network to name the clean
    codes.

    Both are divided by p(t), the probability of the timestep, so that the loss estimates a sum over timesteps however
    these are drawn, and by the number of positions.

    Args:
        scheduler: the forward chain. Its `mask_loss_weights` weigh the positions that are masked in x_t and the
            others, in both parts, but not at t = 0.
        auxiliary_weight (*optional*): of the second part, before the scheduler's adaptive weight 1 + (1 - t/T); by
            default the scheduler's `auxiliary_loss_weight`. The original's is 5e-4, or 1e-3 on ImageNet and FFHQ.

    Raises:
        ValueError: `auxiliary_weight` is not a finite number of at least 0.
    """

    def __init__(self, scheduler: MaskReplaceScheduler, auxiliary_weight: float | None = None):
        if auxiliary_weight is None:
            auxiliary_weight = scheduler.config.auxiliary_loss_weight
        self.scheduler = scheduler
        self.auxiliary_weight = check_real("auxiliary_weight", auxiliary_weight, minimum=0)

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
        bound = self.scheduler.vlb_terms(model_output, original_samples, sample, timesteps).flatten(1)
        weights = self._position_weights(sample, timesteps).flatten(1)
        terms = (weights * bound).sum(dim=1)
        losses = terms
        if self.auxiliary_weight > 0:
            auxiliary = self.scheduler.auxiliary_loss(model_output, original_samples, timesteps).flatten(1)
            losses = losses + self.auxiliary_weight * (weights * auxiliary).sum(dim=1)
        positions = original_samples.numel()
        bits = (bound.detach().sum(dim=1) / probabilities).sum() / (positions * math.log(2))
        return MaskReplaceLoss((losses / probabilities).sum() / positions, terms.detach(), bits)

    def _position_weights(self, sample: torch.LongTensor, timesteps: torch.LongTensor) -> torch.FloatTensor:
        masked, others = self.scheduler.config.mask_loss_weights
        weights = torch.where(sample == self.scheduler.mask_index, masked, others)
        is_first = (timesteps == 0).to(sample.device).view(-1, *[1] * (sample.ndim - 1))
        return torch.where(is_first, 1.0, weights)


__all__ = ["MaskReplaceLoss", "MaskReplaceObjective"]
