"""The forward chain of mask-and-replace diffusion: its named schedules, and what happens between any two timesteps."""

import math
from typing import NamedTuple

import torch


SCHEDULES = ("linear", "cosine", "mask_only", "uniform_only")


class Transition(NamedTuple):
    """
    Probabilities of the forward chain at timesteps s < t, one for each sample of a batch (Gu et al. 2022, section
    4.1).

    From the data to s (`alpha_s`, `beta_s`, `gamma_s`), from the data to t (`..._t`), and from s to t (`alpha`,
    `beta`, `gamma`), a code keeps its value with probability α, becomes any of the K codes, its own included, with β
    each, and the mask with γ: α + K β + γ = 1. The mask stays the mask.

    The posterior q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) is made of the properties. Where
    everything is masked at t, an x_t that is a code cannot be; it stays what it is.
    """

    alpha_s: torch.Tensor
    beta_s: torch.Tensor
    gamma_s: torch.Tensor
    alpha_t: torch.Tensor
    beta_t: torch.Tensor
    gamma_t: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor
    gamma: torch.Tensor

    @classmethod
    def between(cls, tables: torch.DoubleTensor, prev_timesteps: torch.LongTensor, timesteps: torch.LongTensor):
        """Reads `tables` `(3, T + 1)`, see `cumulative_tables`, at s and t `(B,)`; float64 `(B,)`."""
        alpha_s, beta_s, gamma_s = tables[:, prev_timesteps + 1]
        alpha_t, beta_t, gamma_t = tables[:, timesteps + 1]
        alpha = alpha_t / alpha_s
        # β̄_t = α β̄_s + β (1 - γ̄_s): exactly 0 where nothing is replaced, unlike (1 - α - γ) / K
        beta = ((beta_t - alpha * beta_s) / (1 - gamma_s)).clamp_min(0)
        gamma = (gamma_t - gamma_s) / (1 - gamma_s)
        return cls(alpha_s, beta_s, gamma_s, alpha_t, beta_t, gamma_t, alpha, beta, gamma)

    def for_positions(self, device: torch.device | str | None) -> "Transition":
        """The same in float32 `(B, 1)` on `device`, to be combined with positions `(B, L)`."""
        return Transition(*(value[:, None].to(device, torch.float32) for value in self))

    @property
    def mask_stays(self) -> torch.Tensor:
        """γ̄_s / γ̄_t: a mask at t was one at s."""
        return _ratio(self.gamma_s, self.gamma_t)

    @property
    def mask_from_code(self) -> torch.Tensor:
        """γ / γ̄_t: times q(x_s | x_0), a mask at t was the code x_s at s."""
        return _ratio(self.gamma, self.gamma_t)

    @property
    def code_from_other(self) -> torch.Tensor:
        """β / β̄_t: times q(x_s | x_0), a code at t that is not x_0 was the other code x_s at s."""
        return _ratio(self.beta, self.beta_t)

    @property
    def code_stays_unreplaced(self) -> torch.Tensor:
        """(α + β) ᾱ_s / (ᾱ_t + β̄_t): a code at t that equals x_0 was the same at s, and never replaced until s."""
        return _ratio((self.alpha + self.beta) * self.alpha_s, self.alpha_t + self.beta_t, otherwise=1.0)

    @property
    def right_code_stays(self) -> torch.Tensor:
        """(α + β) (ᾱ_s + β̄_s) / (ᾱ_t + β̄_t): a code at t that equals x_0 was the same at s."""
        return _ratio(
            (self.alpha + self.beta) * (self.alpha_s + self.beta_s), self.alpha_t + self.beta_t, otherwise=1.0
        )

    @property
    def wrong_code_stays(self) -> torch.Tensor:
        """(α + β) β̄_s / β̄_t: a code at t that is not x_0 was the same at s. 1 if nothing is replaced: x_s is x_t
        then.
        """
        return _ratio((self.alpha + self.beta) * self.beta_s, self.beta_t, otherwise=1.0)

    @property
    def right_code_replaced(self) -> torch.Tensor:
        """β̄_t / (ᾱ_t + β̄_t): a code at t that equals x_0 has come there by replacement."""
        return _ratio(self.beta_t, self.alpha_t + self.beta_t)


def _ratio(a: torch.Tensor, b: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
    """a / b, and `otherwise` where b is 0."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), otherwise)


def cumulative_tables(
    schedule: str,
    num_embeddings: int,
    num_train_timesteps: int,
    alphas: tuple[float, float],
    gammas: tuple[float, float],
) -> torch.DoubleTensor:
    """
    Cumulative ᾱ, β̄, γ̄ at timesteps -1 (the data), 0, …, T-1.

    Args:
        schedule: "linear" (the paper's: ᾱ and γ̄ go from their first to their last value in equal steps), "cosine"
            (they go along cos² and sin² of a quarter period, as in Nichol & Dhariwal 2021), "mask_only" (linear ᾱ, all
            the rest is masked, nothing replaced: γ̄ = 1 - ᾱ) or "uniform_only" (linear ᾱ, nothing is masked: γ̄ = 0).
        num_embeddings: K.
        num_train_timesteps: T.
        alphas, gammas: values at timesteps 0 and T-1; "mask_only" and "uniform_only" do not read `gammas`.

    Returns:
        float64 `(3, T + 1)`.

    Raises:
        ValueError: a schedule that does not exist, or values that no chain has.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be one of {SCHEDULES}, got {schedule!r}.")
    progress = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
    if schedule == "cosine":
        progress = (progress * math.pi / 2).sin() ** 2
    alpha = alphas[0] + progress * (alphas[1] - alphas[0])
    gamma = gammas[0] + progress * (gammas[1] - gammas[0])
    if schedule == "mask_only":
        gamma = 1 - alpha
    elif schedule == "uniform_only":
        gamma = torch.zeros_like(alpha)
    replaced = 1 - alpha - gamma
    replaced[replaced.abs() < 1e-12] = 0  # rounding of none at all
    data = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    tables = torch.cat([data, torch.stack([alpha, replaced / num_embeddings, gamma])], dim=1)
    _check_tables(tables)
    return tables


def _check_tables(tables: torch.Tensor):
    alpha, beta, gamma = tables
    # an unmasked code is unreplaced ever less often, or a step would have to undo replacements
    unreplaced = alpha[:-1] / (1 - gamma[:-1])
    last = alpha[-1] <= unreplaced[-1] * (1 - gamma[-1]) + 1e-12
    falling = (alpha[:-1] > 0).all() and alpha[-1] >= 0 and last and (unreplaced.diff() <= 1e-12).all()
    rising = (gamma[:-1] < 1).all() and gamma[-1] <= 1 and (gamma.diff() >= 0).all()
    if not (falling and rising and (beta >= 0).all()):
        raise ValueError(
            "`alpha_cumprod_start`, `alpha_cumprod_end`, `gamma_cumprod_start` and `gamma_cumprod_end` must be "
            "probabilities of a chain: ᾱ + γ̄ at most 1, γ̄ rising, and ᾱ / (1 - γ̄) falling; got "
            f"{[float(x) for x in (alpha[1], alpha[-1], gamma[1], gamma[-1])]}."
        )


__all__ = ["SCHEDULES", "Transition", "cumulative_tables"]
