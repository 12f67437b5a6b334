"""Mask-and-replace diffusion over codes: noise, exact steps between any two timesteps, and the variational bound."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from .categorical_draws import counts_of, draw_rows, nucleus, uniform
from .posterior import posterior_kl, posterior_probs
from .transition_tables import Transition, cumulative_tables


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

    A timestep t in 0…T-1 means noised by entry t of the cumulative tables; -1 is the data. Sampling starts at T-1, fully
    masked (of random codes with "uniform_only"), and takes steps of any length by the exact posterior q(x_s | x_t, x_0).

    Args:
        num_embeddings: K, the number of codes; the mask has index K.
        num_train_timesteps: T, at least 2.
        schedule: "linear" (the paper's), "cosine", "mask_only" or "uniform_only", see `cumulative_tables`.
        alpha_cumprod_start, alpha_cumprod_end: ᾱ, the probability that a code is kept, at timesteps 0 and T-1.
        gamma_cumprod_start, gamma_cumprod_end: γ̄, the probability of the mask; not read by "mask_only", "uniform_only".

    Raises:
        ValueError: numbers that no such chain has.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_embeddings: int,
        num_train_timesteps: int = 100,
        schedule: str = "linear",
        alpha_cumprod_start: float = 0.99999,
        alpha_cumprod_end: float = 9e-6,
        gamma_cumprod_start: float = 9e-6,
        gamma_cumprod_end: float = 0.99999,
    ):
        for name, value in (("num_embeddings", num_embeddings), ("num_train_timesteps", num_train_timesteps)):
            if not isinstance(value, int) or value < 2:
                raise ValueError(f"`{name}` must be an int of at least 2, got {value!r}.")
        self._tables = cumulative_tables(
            schedule,
            num_embeddings,
            num_train_timesteps,
            (alpha_cumprod_start, alpha_cumprod_end),
            (gamma_cumprod_start, gamma_cumprod_end),
        )
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

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
        timesteps: list[int] | None = None,
    ):
        """
        Sets `timesteps`: `num_inference_steps` of them in equal strides (up to rounding) from T-1, so that the last step,
        which leads to the data, is as long as the others; or a list.

        Raises:
            ValueError: not exactly one of both, a number outside of 1…T, or a list that does not fall from T-1 to 0 or more.
        """
        train = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Exactly one of `num_inference_steps` and `timesteps` must be given.")
        if timesteps is None:
            if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= train:
                raise ValueError(
                    f"`num_inference_steps` must be an int in 1…{train}, the steps of training, got {num_inference_steps!r}."
                )
            timesteps = [i * train // num_inference_steps - 1 for i in range(num_inference_steps, 0, -1)]
        timesteps = [int(t) for t in timesteps]
        falling = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
        if not timesteps or timesteps[0] != train - 1 or timesteps[-1] < 0 or not falling:
            raise ValueError(f"`timesteps` must fall from {train - 1} to 0 or more, got {timesteps}.")
        self.timesteps = torch.tensor(timesteps, device=device)
        self.num_inference_steps = len(timesteps)

    def previous_timestep(self, timestep: int | torch.LongTensor) -> torch.LongTensor:
        """
        The timestep after each of `timestep` in `timesteps`, int64 and of its shape; -1, the data, after the last.

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

    def initial_sample(self, shape, device=None, generator=None) -> torch.LongTensor:
        """x at T-1, int64: fully masked; random codes with the schedule "uniform_only", which is what needs `generator`."""
        shape = tuple(shape)
        if self.config.schedule != "uniform_only":
            return torch.full(shape, self.mask_index, device=device)
        check_generators(generator, shape[0])
        counts = torch.full((shape[0],), torch.Size(shape[1:]).numel())
        u = uniform(counts, 1, generator, device)
        return (u * self.mask_index).long().clamp_max(self.mask_index - 1).reshape(shape)

    def add_noise(self, original_samples: torch.LongTensor, timesteps, generator=None) -> torch.LongTensor:
        """
        Draws x_t from q(x_t | x_0): each code is kept, masked, or replaced by a random one.

        Args:
            original_samples (int64 `(B, *)`): codes in 0…K-1.
            timesteps: an int, or int64 `(B,)`, in 0…T-1.
            generator: `None`, a `torch.Generator`, or a list with one for each sample.

        Returns:
            int64 `(B, *)`.
        """
        self._check_indices("original_samples", original_samples, self.mask_index - 1)
        batch = original_samples.shape[0]
        check_generators(generator, batch)
        now = self._timesteps("timesteps", timesteps, batch, 0)
        transition = Transition.between(self._tables, torch.full_like(now, -1), now)
        flat = original_samples.reshape(batch, -1)
        per_sample = transition.for_samples(flat)
        keep, mask = per_sample(transition.alpha_t), per_sample(transition.gamma_t)
        u = uniform(torch.full((batch,), flat.shape[1]), 2, generator, flat.device).reshape(*flat.shape, 2)
        replacement = (u[..., 1] * self.mask_index).long().clamp_max(self.mask_index - 1)
        noised = torch.where(u[..., 0] < keep + mask, self.mask_index, replacement)
        return torch.where(u[..., 0] < keep, flat, noised).reshape(original_samples.shape)

    # The reverse chain

    def predict_original(self, model_output: torch.FloatTensor, truncation_rate: float = 1.0) -> torch.FloatTensor:
        """
        p(x_0 | x_t), truncated to its nucleus and normalised again.

        The original leaves the nucleus's mass below 1. As the posterior is linear in p(x_0), its draws, which take any
        scale, come from the same distribution.

        Args:
            model_output (`(B, *, K)`): logits.
            truncation_rate: the mass that the kept codes must reach, in (0, 1], see `nucleus`; 1 keeps all.

        Returns:
            float32 `(B, *, K)`.
        """
        check_rate(truncation_rate)
        probs = model_output.softmax(dim=-1, dtype=torch.float32)
        if truncation_rate == 1:
            return probs
        probs = torch.where(nucleus(probs, truncation_rate), probs, 0.0)
        return probs / probs.sum(dim=-1, keepdim=True)

    def q_posterior(
        self, pred_original: torch.FloatTensor, sample: torch.LongTensor, timesteps, prev_timesteps
    ) -> torch.FloatTensor:
        """
        p(x_s | x_t) = Σ_i p(x_0 = i) q(x_s | x_t, x_0 = i), exact for any s < t.

        Args:
            pred_original (`(B, *, K)`): p(x_0), normalised.
            sample (int64 `(B, *)`): x_t.
            timesteps, prev_timesteps: t in 0…T-1 and s in -1…t-1, ints or int64 `(B,)`; -1 is the data.

        Returns:
            float32 `(B, *, K + 1)`, the mask last.
        """
        self._check_output("pred_original", pred_original, sample)
        transition = self._transition(sample, timesteps, prev_timesteps)
        batch, classes = sample.shape[0], self.mask_index
        probs = pred_original.float().reshape(batch, -1, classes)
        posterior = posterior_probs(probs, sample.reshape(batch, -1), transition)
        return posterior.reshape(*sample.shape, classes + 1)

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
        prior_count: int | None = None,
        return_dict: bool = True,
    ) -> MaskReplaceSchedulerOutput | tuple:
        """
        Draws x_s from p(x_s | x_t), exact for any s < t.

        x_0 is drawn from the prediction first and x_s from q(x_s | x_t, x_0), which is the same distribution; but most
        positions keep their value whatever x_0 is, and for these neither is the prediction read.

        The purity prior (Tang et al. 2022, section 3.3) takes every step but the last in another way. Only masked positions
        change: some of them, picked without replacement with probability in proportion to a score, get a code drawn from
        p(x_0). Rule 1 scores all alike; rule 2 by the largest probability of a code, divided by that of the picture's surest
        position, and its draws are from p(x_0)^(1 + prior_weight * score), normalised. The score is of the prediction
        before truncation. As many positions are picked as leave the mask to the share of the picture that the chain
        leaves it to at s, γ̄_s, rounded; for the original's 100 steps that is its own number but for the first two and
        the last two steps.

        Args:
            model_output (`(B, *, K)`): logits of p(x_0 | x_t), in any floating dtype; computed with in float32.
            timestep: t, an int or int64 `(B,)`.
            sample (int64 `(B, *)`): x_t, codes or the mask.
            generator: `None`, a `torch.Generator`, or a list with one for each sample, whose draws then do not depend on
                the other samples.
            truncation_rate: see `predict_original`.
            prior_rule: 0 (none), 1 or 2.
            prior_weight: at least 0; for rule 2.
            prev_timestep: s, likewise; by default the timestep after t in `timesteps`.
            known_indices, known_mask (int64 and bool `(B, *)`): codes to keep, where the mask is set. `sample` should hold
                them too, since the denoiser sees clean codes.
            temperature: divides the logits, before truncation.
            prior_count: positions to pick in each picture, in place of the purity prior's own number.
            return_dict: False returns a tuple.

        Raises:
            ValueError: an argument out of range or of the wrong shape.
        """
        self._check_output("model_output", model_output, sample)
        self._check_sampling(truncation_rate, prior_rule, prior_weight, temperature, prior_count)
        batch = sample.shape[0]
        check_generators(generator, batch)
        prev = self.previous_timestep(timestep) if prev_timestep is None else prev_timestep
        transition = self._transition(sample, timestep, prev)
        known = self._known(known_indices, known_mask, sample)
        flat = sample.reshape(batch, -1)
        logits = model_output.reshape(-1, self.mask_index)
        free = torch.ones_like(flat, dtype=torch.bool) if known is None else ~known[1]
        arguments = {"truncation_rate": truncation_rate, "temperature": temperature, "generator": generator}
        if prior_rule > 0 and (transition.alpha_s < 1).all():
            count = self._prior_counts(flat, free, transition) if prior_count is None else prior_count
            result = self._reveal(logits, flat, free, count, prior_rule, prior_weight, arguments)
        else:
            result = self._posterior_draw(logits, flat, free, transition, arguments)
        if known is not None:
            result = torch.where(known[1], known[0], result)
        result = result.reshape(sample.shape)
        return MaskReplaceSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _posterior_draw(self, logits, sample, free, transition, arguments) -> torch.LongTensor:
        """x_s `(B, L)`: x_0 and then q(x_s | x_t, x_0), at the positions that can change."""
        per_sample = transition.for_samples(sample)
        generator, device = arguments["generator"], sample.device
        everywhere = torch.full((sample.shape[0],), sample.shape[1])
        u = uniform(everywhere, 1, generator, device).reshape(sample.shape)
        clean, replaced = per_sample(transition.clean_code_stays), per_sample(transition.replaced_code_stays)
        stays = torch.where(
            sample == self.mask_index, per_sample(transition.mask_stays), torch.minimum(clean, replaced)
        )
        needed = (u >= stays) & free

        counts = counts_of(needed)
        original = draw_rows(logits, needed.flatten().nonzero().squeeze(1), counts, **arguments)
        now, u = sample[needed], u[needed]
        is_code, same = now != self.mask_index, now == original
        clean, replaced = (value.expand(sample.shape)[needed] for value in (clean, replaced))
        keeps = is_code & (u < torch.where(same, clean, replaced))
        # what changes becomes x_0 with weight ᾱ_s + β̄_s, and each code but x_0 and x_t with β̄_s
        alpha_s, beta_s = (
            per_sample(value).expand(sample.shape)[needed] for value in (transition.alpha_s, transition.beta_s)
        )
        v, w = uniform(counts, 2, generator, device).unbind(dim=1)
        others = self.mask_index - 1 - (is_code & ~same).long()
        takes_original = ~same & (v * (alpha_s + beta_s + others * beta_s) < alpha_s + beta_s)
        pick = (w * others).long().minimum(others - 1)
        pick = pick + (pick >= torch.minimum(original, now))
        pick = pick + ((pick >= torch.maximum(original, now)) & ~same)
        changed = torch.where(keeps, now, torch.where(takes_original, original, pick))
        return sample.masked_scatter(needed, changed)

    def _prior_counts(self, sample, free, transition) -> torch.LongTensor:
        """Positions `(B, 1)` that the purity prior reveals."""
        masked = ((sample == self.mask_index) & free).sum(dim=1)
        target = (free.sum(dim=1) * transition.gamma_s.to(sample.device, torch.float32)).round().long()
        return (masked - target).clamp_min(0)[:, None]

    def _reveal(self, logits, sample, free, count, rule, weight, arguments) -> torch.LongTensor:
        """x_s `(B, L)` of the purity prior: `count` masked positions of each sample get a code from p(x_0)."""
        generator, device = arguments["generator"], sample.device
        score = torch.ones_like(sample, dtype=torch.float32)
        if rule == 2:
            score = (logits.float() / arguments["temperature"]).softmax(dim=-1).amax(dim=-1).reshape(sample.shape)
            score = score / score.amax(dim=1, keepdim=True)
        candidates = (sample == self.mask_index) & free
        everywhere = torch.full((sample.shape[0],), sample.shape[1])
        # the smallest of Exp(1) / score come first: draws in turn, without replacement, in proportion to the score
        times = -torch.log1p(-uniform(everywhere, 1, generator, device).reshape(sample.shape)) / score
        rank = times.masked_fill(~candidates, torch.inf).argsort(dim=1).argsort(dim=1)
        picked = candidates & (rank < count)
        power = 1 + weight * score[picked] if rule == 2 and weight > 0 else None
        rows = picked.flatten().nonzero().squeeze(1)
        return sample.masked_scatter(picked, draw_rows(logits, rows, counts_of(picked), power=power, **arguments))

    # The variational bound

    def vlb_terms(
        self, model_output: torch.FloatTensor, original_samples: torch.LongTensor, sample: torch.LongTensor, timesteps
    ) -> torch.FloatTensor:
        """
        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0, -log p(x_0 | x_t) (Gu et al. 2022, equation 7).

        Args:
            model_output (`(B, *, K)`): logits of p(x_0 | x_t).
            original_samples (int64 `(B, *)`): x_0.
            sample (int64 `(B, *)`): x_t.
            timesteps: t, an int or int64 `(B,)`.

        Returns:
            float32 `(B, *)` in nats, differentiable. Its sum over t = 0…T-1, one x_t each, and `prior_kl` estimate a bound
            of -log p(x_0).
        """
        self._check_output("model_output", model_output, sample)
        self._check_originals(original_samples, sample)
        batch = sample.shape[0]
        now = self._timesteps("timesteps", timesteps, batch, 0)
        transition = self._transition(sample, now, now - 1)
        log_probs = model_output.reshape(batch, -1, self.mask_index).log_softmax(dim=-1, dtype=torch.float32)
        terms = posterior_kl(log_probs, original_samples.reshape(batch, -1), sample.reshape(batch, -1), transition)
        return terms.reshape(sample.shape)

    def auxiliary_loss(
        self, model_output: torch.FloatTensor, original_samples: torch.LongTensor, timesteps
    ) -> torch.FloatTensor:
        """
        -log p(x_0 | x_t) times the adaptive weight 1 + (1 - t/T) (Gu et al. 2022, equation 9).

        Args: as `vlb_terms`. Returns: float32 `(B, *)`, differentiable.
        """
        self._check_output("model_output", model_output, original_samples)
        self._check_originals(original_samples, original_samples)
        now = self._timesteps("timesteps", timesteps, original_samples.shape[0], 0)
        logits = model_output.float().flatten(0, -2)
        nll = torch.nn.functional.cross_entropy(logits, original_samples.flatten(), reduction="none")
        weight = 2 - now.double() / self.config.num_train_timesteps
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        return nll.reshape(original_samples.shape) * weight.to(nll.device, nll.dtype).reshape(shape)

    def prior_kl(self) -> float:
        """
        KL(q(x_{T-1} | x_0) || p(x_{T-1})) of one position, in nats, the same for every x_0.

        p(x_{T-1}) is the chain's own marginal for uniform x_0: the mask with γ̄, each code with (1 - γ̄) / K. Sampling
        starts at the mask alone, which the chain's end reaches up to 1 - γ̄ (1e-5 by default).
        """
        alpha, beta, gamma = self._tables[:, -1]
        codes = self.mask_index
        others = torch.xlogy(beta, beta) * (codes - 1)
        own = torch.xlogy(alpha + beta, alpha + beta)
        return float(others + own - torch.xlogy(1 - gamma, (1 - gamma) / codes))

    # Checks

    def _transition(self, sample, timesteps, prev_timesteps) -> Transition:
        self._check_indices("sample", sample, self.mask_index - (self.config.schedule == "uniform_only"))
        now = self._timesteps("timestep", timesteps, sample.shape[0], 0)
        prev = self._timesteps("prev_timestep", prev_timesteps, sample.shape[0], -1)
        if (prev >= now).any():
            raise ValueError(f"`prev_timestep` must be below `timestep`, got {prev.tolist()} for {now.tolist()}.")
        return Transition.between(self._tables, prev, now)

    def _timesteps(self, name: str, timesteps, batch: int, lowest: int) -> torch.LongTensor:
        """int64 `(B,)` on the CPU, where the tables are."""
        timesteps = torch.as_tensor(timesteps).cpu()
        if timesteps.is_floating_point() or timesteps.shape not in ((), (1,), (batch,)):
            raise ValueError(
                f"`{name}` must be an int, or {batch} ints, one for each sample, got {timesteps.dtype} of shape "
                f"{tuple(timesteps.shape)}."
            )
        if (timesteps < lowest).any() or (timesteps >= self.config.num_train_timesteps).any():
            raise ValueError(
                f"`{name}` must lie in {lowest}…{self.config.num_train_timesteps - 1}, got {timesteps.tolist()}."
            )
        return timesteps.long().expand(batch)

    @staticmethod
    def _check_indices(name: str, indices: torch.Tensor, highest: int):
        if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64 or indices.ndim < 2:
            got = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, torch.Tensor) else type(indices)
            raise ValueError(f"`{name}` must be an int64 tensor of shape (B, *), got {got}.")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) <= highest:
            raise ValueError(
                f"`{name}` must hold indices in 0…{highest}, got {int(indices.min())} to {int(indices.max())}."
            )

    def _check_output(self, name: str, output: torch.Tensor, sample: torch.Tensor):
        expected = (*sample.shape, self.mask_index)
        if not output.is_floating_point() or tuple(output.shape) != expected:
            raise ValueError(
                f"`{name}` must be floating and of shape {expected}, the codes last, got {output.dtype} of shape "
                f"{tuple(output.shape)}."
            )

    def _check_originals(self, originals, sample):
        self._check_indices("original_samples", originals, self.mask_index - 1)
        if originals.shape != sample.shape:
            raise ValueError(
                f"`original_samples` must have the shape of `sample` {tuple(sample.shape)}, got {tuple(originals.shape)}."
            )

    def _check_sampling(self, truncation_rate, prior_rule, prior_weight, temperature, prior_count):
        check_rate(truncation_rate)
        if prior_rule not in (0, 1, 2):
            raise ValueError(f"`prior_rule` must be 0, 1 or 2, got {prior_rule!r}.")
        if prior_rule and self.config.schedule == "uniform_only":
            raise ValueError("`prior_rule` needs a schedule with a mask, got 'uniform_only'.")
        if not prior_weight >= 0:
            raise ValueError(f"`prior_weight` must be at least 0, got {prior_weight!r}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {temperature!r}.")
        if prior_count is not None and (not prior_rule or not isinstance(prior_count, int) or prior_count < 0):
            raise ValueError(f"`prior_count` must be an int of at least 0, with a `prior_rule`, got {prior_count!r}.")

    def _known(self, indices, mask, sample):
        """Known indices and their mask `(B, L)`, or None."""
        if indices is None and mask is None:
            return None
        if indices is None or mask is None:
            raise ValueError("`known_indices` and `known_mask` must be given together.")
        self._check_indices("known_indices", torch.where(mask, indices, 0), self.mask_index - 1)
        for name, value in (("known_indices", indices), ("known_mask", mask)):
            if value.shape != sample.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `sample` {tuple(sample.shape)}, got {tuple(value.shape)}."
                )
        return indices.reshape(sample.shape[0], -1), mask.bool().reshape(sample.shape[0], -1)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def check_rate(rate: float):
    if not 0 < rate <= 1:
        raise ValueError(f"`truncation_rate` must lie in (0, 1], got {rate!r}.")


def check_generators(generator, batch: int):
    generators = generator if isinstance(generator, list) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators if generator is not None):
        raise ValueError("`generator` must be a torch.Generator or a list of them.")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(
            f"`generator` must hold one torch.Generator for each of {batch} samples, got {len(generator)}."
        )


__all__ = ["MaskReplaceScheduler", "MaskReplaceSchedulerOutput"]
