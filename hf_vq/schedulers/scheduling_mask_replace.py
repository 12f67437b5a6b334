"""Mask-and-replace diffusion over codes: noise, exact steps between any two timesteps, and the variational bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput

from ..argument_checks import check_integer, check_real
from ..config_registration import register_by_name
from .categorical_draws import nucleus, uniform, uniform_positions
from .posterior import posterior_kl, posterior_probs
from .reverse_steps import posterior_step, purity_step
from .sample_checks import (
    check_distributions,
    check_generators,
    check_indices,
    check_predictions,
    check_rate,
    check_timesteps,
)
from .transition_tables import Transition, cumulative_tables


_MOST_TIMESTEPS = 10**6  # the tables are made when the scheduler is


@dataclass
class MaskReplaceSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: int64 `(B, *)`, x_s: codes, and the mask index K.
    """

    prev_sample: torch.LongTensor


class MaskReplaceScheduler(SchedulerMixin, ConfigMixin):
    """
    The noise of VQ-Diffusion (Gu et al. 2022): at each step a code is kept, replaced by a random one, or masked.

    A timestep t in 0…T-1 means noised by entry t of the cumulative tables; -1 is the data. Sampling starts at T-1,
    fully masked (of random codes with "uniform_only"), and takes steps of any length by the exact posterior q(x_s |
    x_t, x_0).

    Args:
        num_embeddings: K, the number of codes; the mask has index K.
        num_train_timesteps: T, from 2 to a million.
        schedule: "linear" (the paper's), "cosine", "mask_only" or "uniform_only", see `cumulative_tables`.
        alpha_cumprod_start, alpha_cumprod_end: ᾱ, the probability that a code is kept, at timesteps 0 and T-1.
        gamma_cumprod_start, gamma_cumprod_end: γ̄, the probability of the mask; not read by "mask_only",
            "uniform_only".
        auxiliary_loss_weight: what [`MaskReplaceObjective`] gives -log p(x_0 | x_t) by default.
        adaptive_auxiliary_loss: with the further weight 1 + (1 - t/T), see `auxiliary_loss`.
        mask_loss_weights: of the losses of positions that are masked in x_t, and of the others; read by
            [`MaskReplaceObjective`].

    Raises:
        ValueError: numbers that no such chain has.
    """

    order = 1

    @register_by_name
    def __init__(
        self,
        num_embeddings: int,
        num_train_timesteps: int = 100,
        schedule: str = "linear",
        alpha_cumprod_start: float = 0.99999,
        alpha_cumprod_end: float = 9e-6,
        gamma_cumprod_start: float = 9e-6,
        gamma_cumprod_end: float = 0.99999,
        auxiliary_loss_weight: float = 5e-4,
        adaptive_auxiliary_loss: bool = True,
        mask_loss_weights: tuple[float, float] = (1.0, 1.0),
    ):
        numbers = {
            "num_embeddings": check_integer("num_embeddings", num_embeddings, minimum=2),
            "num_train_timesteps": check_integer("num_train_timesteps", num_train_timesteps, 2, _MOST_TIMESTEPS),
            "auxiliary_loss_weight": check_real("auxiliary_loss_weight", auxiliary_loss_weight, minimum=0),
        }
        ends = {
            "alpha_cumprod_start": alpha_cumprod_start,
            "alpha_cumprod_end": alpha_cumprod_end,
            "gamma_cumprod_start": gamma_cumprod_start,
            "gamma_cumprod_end": gamma_cumprod_end,
        }
        numbers |= {name: check_real(name, value, minimum=0, maximum=1) for name, value in ends.items()}
        if not isinstance(mask_loss_weights, (tuple, list)) or len(mask_loss_weights) != 2:
            raise ValueError(f"`mask_loss_weights` must be two numbers, got {mask_loss_weights!r}.")
        weights = tuple(check_real("mask_loss_weights", weight, minimum=0) for weight in mask_loss_weights)
        self.register_to_config(**numbers, mask_loss_weights=weights)
        self._tables = cumulative_tables(
            schedule,
            self.config.num_embeddings,
            self.config.num_train_timesteps,
            (self.config.alpha_cumprod_start, self.config.alpha_cumprod_end),
            (self.config.gamma_cumprod_start, self.config.gamma_cumprod_end),
        )
        self.num_inference_steps = None
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)

    @classmethod
    def from_config(cls, config: dict | None = None, **kwargs: Any):
        """A scheduler of the numbers in a configuration.

        Raises:
            ValueError: that of a scheduler without codes.
        """
        if isinstance(config, dict) and "num_embeddings" not in {**config, **kwargs}:
            raise ValueError(
                f"`config` must be of a {cls.__name__}, with `num_embeddings`, got that of a "
                f"{config.get('_class_name')}."
            )
        return super().from_config(config, **kwargs)

    @property
    def mask_index(self) -> int:
        """K, the index that stands for no code."""
        return self.config.num_embeddings

    @property
    def alphas_cumprod(self) -> torch.DoubleTensor:
        """ᾱ of timesteps 0…T-1, float64 `(T,)`: a code is kept."""
        return self._tables[0, 1:]

    @property
    def betas_cumprod(self) -> torch.DoubleTensor:
        """β̄ of timesteps 0…T-1, float64 `(T,)`: a code becomes a given one of the K codes by replacement."""
        return self._tables[1, 1:]

    @property
    def gammas_cumprod(self) -> torch.DoubleTensor:
        """γ̄ of timesteps 0…T-1, float64 `(T,)`: a code is masked."""
        return self._tables[2, 1:]

    # Timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | torch.LongTensor | None = None,
    ):
        """
        Sets `timesteps`: `num_inference_steps` of them in strides that are equal up to rounding, the last one to the
        data included, or a list.

        Raises:
            ValueError: not exactly one of both, a number outside of 1…T, or a list that does not fall from T-1 to 0 or
                more.
        """
        train = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Exactly one of `num_inference_steps` and `timesteps` must be given.")
        if timesteps is None:
            num_inference_steps = check_integer("num_inference_steps", num_inference_steps, minimum=1, maximum=train)
            timesteps = [i * train // num_inference_steps - 1 for i in range(num_inference_steps, 0, -1)]
        given = torch.as_tensor(timesteps)
        if given.dtype not in (torch.int64, torch.int32) or given.ndim != 1:
            raise ValueError(f"`timesteps` must be a list of int, got {timesteps!r}.")
        timesteps = given.tolist()
        falling = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
        if not timesteps or timesteps[0] != train - 1 or timesteps[-1] < 0 or not falling:
            raise ValueError(f"`timesteps` must fall from {train - 1} to 0 or more, got {timesteps}.")
        self.timesteps = torch.tensor(timesteps, device=device)
        self.num_inference_steps = len(timesteps)

    def previous_timestep(self, timestep: int | torch.LongTensor) -> torch.LongTensor:
        """
        The timestep that follows each of `timestep` in `timesteps`, int64 of its shape; -1, the data, after the last.

        Raises:
            ValueError: a timestep that is not in `timesteps`.
        """
        timestep, steps = torch.as_tensor(timestep).cpu(), self.timesteps.cpu()
        found = timestep[..., None] == steps
        if not found.any(dim=-1).all():
            raise ValueError(f"`timestep` must be in `timesteps` {steps.tolist()}, got {timestep.tolist()}.")
        following = torch.cat([steps[1:], steps.new_tensor([-1])])
        return following[found.int().argmax(dim=-1)]

    # The forward chain

    def initial_sample(
        self,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """x at T-1, int64 of `shape` `(B, *)`: all masked; random codes, from `generator`, with "uniform_only"."""
        sample = torch.full(tuple(shape), self.mask_index, device=device)
        if self.config.schedule != "uniform_only":
            return sample
        check_generators(generator, len(sample))
        u = uniform_positions(sample.reshape(len(sample), -1), generator)
        return self._random_code(u).reshape(sample.shape)

    def add_noise(
        self,
        original_samples: torch.LongTensor,
        timesteps: int | torch.LongTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """
        Draws x_t from q(x_t | x_0): each code is kept, masked, or replaced by a random one.

        Args:
            original_samples (int64 `(B, *)`): codes in 0…K-1.
            timesteps: an int, or int64 `(B,)`, in 0…T-1.
            generator: `None`, a `torch.Generator`, or a list with one for each sample.

        Returns:
            int64 `(B, *)`.
        """
        check_indices("original_samples", original_samples, self.mask_index - 1)
        batch = len(original_samples)
        check_generators(generator, batch)
        now = check_timesteps("timesteps", timesteps, batch, 0, self.config.num_train_timesteps - 1)
        flat = original_samples.reshape(batch, -1)
        alpha, _, gamma = self._tables[:, now + 1][:, :, None].to(flat.device, torch.float32)
        counts = torch.full((batch,), flat.shape[1])
        u, v = uniform(counts, 2, generator, flat.device).reshape(*flat.shape, 2).unbind(dim=-1)
        noise = torch.where(u < alpha + gamma, self.mask_index, self._random_code(v))
        return torch.where(u < alpha, flat, noise).reshape(original_samples.shape)

    def _random_code(self, u: torch.FloatTensor) -> torch.LongTensor:
        return (u * self.mask_index).long().clamp_max(self.mask_index - 1)  # u * K may round up to K

    # The reverse chain

    def predict_original(self, model_output: torch.FloatTensor, truncation_rate: float = 1.0) -> torch.FloatTensor:
        """
        p(x_0 | x_t), truncated to its nucleus and normalised again.

        The original does not normalise. That makes no difference to what it samples: the posterior is linear in
        p(x_0), and a draw takes probabilities of any scale.

        Args:
            model_output (`(B, *, K)`): logits.
            truncation_rate: the mass that the kept codes must reach, in (0, 1]; see `nucleus`. 1 keeps all.

        Returns:
            float32 `(B, *, K)`.

        Raises:
            ValueError: a rate out of range, or logits that make no distribution, such as NaN.
        """
        truncation_rate = check_rate(truncation_rate)
        probs = model_output.softmax(dim=-1, dtype=torch.float32)
        check_distributions("model_output", probs)
        if truncation_rate == 1:
            return probs
        probs = torch.where(nucleus(probs, truncation_rate), probs, 0.0)
        return probs / probs.sum(dim=-1, keepdim=True)

    def q_posterior(
        self,
        pred_original: torch.FloatTensor,
        sample: torch.LongTensor,
        timesteps: int | torch.LongTensor,
        prev_timesteps: int | torch.LongTensor,
    ) -> torch.FloatTensor:
        """
        p(x_s | x_t) = Σ_i p(x_0 = i) q(x_s | x_t, x_0 = i), exact for any s < t; see `posterior_probs`.

        Args:
            pred_original (`(B, *, K)`): p(x_0), normalised.
            sample (int64 `(B, *)`): x_t.
            timesteps, prev_timesteps: t in 0…T-1 and s in -1…t-1, ints or int64 `(B,)`; -1 is the data.

        Returns:
            float32 `(B, *, K + 1)`, the mask last.
        """
        check_predictions("pred_original", pred_original, sample, self.mask_index)
        if not (pred_original.sum(dim=-1) > 0).all():  # neither NaN nor nothing
            raise ValueError("`pred_original` must hold probabilities, got a row whose sum is not positive.")
        transition, _ = self._transition(sample, timesteps, prev_timesteps)
        flat = sample.reshape(len(sample), -1)
        probs = posterior_probs(pred_original.float().reshape(*flat.shape, self.mask_index), flat, transition)
        return probs.reshape(*sample.shape, self.mask_index + 1)

    def step(
        self,
        model_output: torch.FloatTensor,
        timestep: int | torch.LongTensor,
        sample: torch.LongTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        truncation_rate: float = 1.0,
        prior_rule: int = 0,
        prior_weight: float = 0.0,
        prev_timestep: int | torch.LongTensor | None = None,
        known_indices: torch.LongTensor | None = None,
        known_mask: torch.BoolTensor | None = None,
        temperature: float = 1.0,
        return_dict: bool = True,
        prior_count: int | None = None,
    ) -> MaskReplaceSchedulerOutput | tuple:
        """
        Draws x_s from p(x_s | x_t), exactly for any s < t (`posterior_step`), or by the purity prior (`purity_step`).

        The purity prior takes every step but the last one, to the data. It reveals as many masked positions as leave
        masked what the chain leaves masked at s, γ̄_s of the positions, rounded, so that the denoiser sees as many
        masks as it did in training, whatever the grid and the steps. For 1024 positions and 100 steps that is the
        original's table, give or take one position; its table for 10 steps reveals up to 69 fewer until a step, and
        `prior_count` takes its numbers.

        Args:
            model_output (`(B, *, K)`): logits of p(x_0 | x_t), in any floating dtype; computed with in float32.
            timestep: t, an int or int64 `(B,)`.
            sample (int64 `(B, *)`): x_t, codes or the mask.
            generator: `None`, a `torch.Generator`, or a list with one for each sample, whose draws then do not depend
                on the other samples.
            truncation_rate: see `predict_original`.
            prior_rule: 0, no purity prior; 1, all masked positions are alike; 2, those with a sure prediction come
                first.
            prior_weight: at least 0; with rule 2, how much sure predictions are sharpened.
            prev_timestep: s, like t; by default what follows t in `timesteps`.
            known_indices, known_mask (int64 and bool `(B, *)`): codes that are kept where the mask is set. `sample`
                should hold them from the start, not noised: the denoiser takes what is not masked for clean.
            temperature: divides the logits, before truncation.
            return_dict: False returns a tuple.
            prior_count: how many positions of each sample the purity prior reveals in this step.

        Raises:
            ValueError: an argument out of range or of the wrong shape.
        """
        check_predictions("model_output", model_output, sample, self.mask_index)
        truncation_rate, prior_rule, prior_weight, temperature, prior_count = self._checked_sampling(
            truncation_rate, prior_rule, prior_weight, temperature, prior_count
        )
        check_generators(generator, len(sample))
        prev_timestep = self.previous_timestep(timestep) if prev_timestep is None else prev_timestep
        transition, is_last = self._transition(sample, timestep, prev_timestep, ("timestep", "prev_timestep"))
        known_indices, known_mask = self._known(known_indices, known_mask, sample)

        flat, free = sample.reshape(len(sample), -1), ~known_mask.reshape(len(sample), -1)
        arguments = (generator, truncation_rate, temperature)
        logits = model_output.reshape(-1, self.mask_index)
        if prior_rule == 0 or is_last.all():
            result = posterior_step(logits, flat, free, transition, *arguments)
        elif is_last.any():
            raise ValueError("`prior_rule` needs samples that all take their last step together, or none of them.")
        else:
            counts = self._prior_counts(flat, free, transition) if prior_count is None else prior_count
            result = purity_step(logits, flat, free, counts, prior_weight if prior_rule == 2 else None, *arguments)
        result = torch.where(known_mask, known_indices, result.reshape(sample.shape))
        return MaskReplaceSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _prior_counts(self, sample, free, transition) -> torch.LongTensor:
        """Positions `(B, 1)` that the purity prior reveals."""
        masked = ((sample == self.mask_index) & free).sum(dim=1, keepdim=True)
        left = (free.sum(dim=1, keepdim=True) * transition.for_positions(sample.device).gamma_s).round().long()
        return (masked - left).clamp_min(0)

    # The variational bound

    def vlb_terms(
        self,
        model_output: torch.FloatTensor,
        original_samples: torch.LongTensor,
        sample: torch.LongTensor,
        timesteps: int | torch.LongTensor,
        prev_timesteps: int | torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0, -log p(x_0 | x_t) (Gu et al. 2022, section 4.2).

        Args:
            model_output (`(B, *, K)`): logits of p(x_0 | x_t).
            original_samples (int64 `(B, *)`): x_0.
            sample (int64 `(B, *)`): x_t, drawn from q(x_t | x_0).
            timesteps: t, an int or int64 `(B,)`.
            prev_timesteps (*optional*): in place of t - 1, for a chain of fewer steps; -1 is the data.

        Returns:
            float32 `(B, *)` in nats, differentiable. Summed over all t and positions, with `prior_kl` for each
            position, it estimates an upper bound of -log p(x_0).
        """
        check_predictions("model_output", model_output, sample, self.mask_index)
        check_indices("original_samples", original_samples, self.mask_index - 1, sample.shape)
        now = check_timesteps("timesteps", timesteps, len(sample), 0, self.config.num_train_timesteps - 1)
        prev_timesteps = now - 1 if prev_timesteps is None else prev_timesteps
        transition, _ = self._transition(sample, now, prev_timesteps)
        flat = sample.reshape(len(sample), -1)
        log_probs = model_output.log_softmax(dim=-1, dtype=torch.float32).reshape(*flat.shape, self.mask_index)
        check_distributions("model_output", log_probs, in_training=True)
        return posterior_kl(log_probs, original_samples.reshape(flat.shape), flat, transition).reshape(sample.shape)

    def auxiliary_loss(
        self, model_output: torch.FloatTensor, original_samples: torch.LongTensor, timesteps: int | torch.LongTensor
    ) -> torch.FloatTensor:
        """
        -log p(x_0 | x_t) (Gu et al. 2022, section 4.2), with `adaptive_auxiliary_loss` times 1 + (1 - t/T), as in its
        published code.

        Args:
            model_output, original_samples, timesteps: see `vlb_terms`.

        Returns:
            float32 `(B, *)` in nats, differentiable.
        """
        check_indices("original_samples", original_samples, self.mask_index - 1)
        check_predictions("model_output", model_output, original_samples, self.mask_index)
        batch = len(original_samples)
        now = check_timesteps("timesteps", timesteps, batch, 0, self.config.num_train_timesteps - 1)
        log_probs = model_output.log_softmax(dim=-1, dtype=torch.float32).reshape(-1, self.mask_index)
        check_distributions("model_output", log_probs, in_training=True)
        nll = F.nll_loss(log_probs, original_samples.flatten(), reduction="none").reshape(batch, -1)
        if self.config.adaptive_auxiliary_loss:
            nll = nll * (2 - now / self.config.num_train_timesteps)[:, None].to(nll)
        return nll.reshape(original_samples.shape)

    def prior_kl(self) -> float:
        """
        KL(q(x_{T-1} | x_0) || p(x_{T-1})) of a position, in nats; the same for every x_0.

        p(x_{T-1}) is what the chain makes of uniform codes: the mask with γ̄, and each code with (1 - γ̄) / K.
        Sampling, as the original's, starts from the mask alone, to which q(x_{T-1} | x_0) comes as close as 1 - γ̄
        (1e-5 by default).
        """
        alpha, beta, gamma = self._tables[:, -1]
        entropy = torch.xlogy(alpha + beta, alpha + beta) + (self.mask_index - 1) * torch.xlogy(beta, beta)
        return float(entropy - torch.xlogy(1 - gamma, (1 - gamma) / self.mask_index))

    # Arguments

    def _transition(
        self, sample, timesteps, prev_timesteps, names=("timesteps", "prev_timesteps")
    ) -> tuple[Transition, torch.BoolTensor]:
        """Between the two timesteps of each sample, and which samples `(B,)` go to the data."""
        check_indices("sample", sample, self.mask_index - (self.config.schedule == "uniform_only"))
        train = self.config.num_train_timesteps
        now = check_timesteps(names[0], timesteps, len(sample), 0, train - 1)
        prev = check_timesteps(names[1], prev_timesteps, len(sample), -1, train - 1)
        if (prev >= now).any():
            raise ValueError(f"`{names[1]}` must be below `{names[0]}`, got {prev.tolist()} for {now.tolist()}.")
        return Transition.between(self._tables, prev, now), prev == -1

    def _checked_sampling(self, truncation_rate, prior_rule, prior_weight, temperature, prior_count) -> tuple:
        """The same as plain numbers."""
        truncation_rate = check_rate(truncation_rate)
        prior_rule = check_integer("prior_rule", prior_rule, minimum=0, maximum=2)
        if prior_rule and self.config.schedule == "uniform_only":
            raise ValueError("`prior_rule` needs a schedule with masks, got 'uniform_only'.")
        prior_weight = check_real("prior_weight", prior_weight, minimum=0)
        if prior_weight and prior_rule != 2:
            raise ValueError(f"`prior_weight` needs `prior_rule` 2, got {prior_weight!r} with rule {prior_rule!r}.")
        temperature = check_real("temperature", temperature, minimum=1e-6)  # logits by less could leave float32
        if prior_count is not None:
            prior_count = check_integer("prior_count", prior_count, minimum=0)
        return truncation_rate, prior_rule, prior_weight, temperature, prior_count

    def _known(self, indices, mask, sample) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The known codes, and where they are; nowhere if there are none."""
        if indices is None and mask is None:
            return sample, torch.zeros_like(sample, dtype=torch.bool)
        if indices is None or mask is None:
            raise ValueError("`known_indices` and `known_mask` must be given together.")
        mask = torch.as_tensor(mask, device=sample.device)
        if mask.dtype != torch.bool or mask.shape != sample.shape:
            raise ValueError(
                f"`known_mask` must be bool of shape {tuple(sample.shape)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}."
            )
        check_indices("known_indices", indices, self.mask_index, sample.shape)
        if (indices[mask] == self.mask_index).any():
            raise ValueError("`known_indices` must hold codes where `known_mask` is set, got the mask index.")
        return indices, mask


__all__ = ["MaskReplaceScheduler", "MaskReplaceSchedulerOutput"]
