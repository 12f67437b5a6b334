"""What a denoiser of continuous latents is trained on: scaled latents, noise, targets, and weights of noise levels."""

from collections.abc import Iterable

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ...argument_checks import check_integer, check_real
from .gaussian_bound import GaussianBound


PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


class DiffusionObjective:
    """
    Clean latents x and noise n are mixed to `z = α x + σ n`, and the denoiser predicts

    - "epsilon": n (Ho et al. 2020);
    - "v_prediction": `α n - σ x` (Salimans & Ho 2022, appendix D);
    - "flow": `n - x` with `α = 1 - σ` (Lipman et al. 2023; rectified flow, Liu et al. 2023).

    Args:
        prediction_type: one of the three.
        num_train_timesteps, beta_start, beta_end: noise schedule of the first two, linear in the square root of β as
            latent diffusion's. Of a flow, only the number counts: the denoiser sees `σ · num_train_timesteps` as its
            timestep.
        min_snr_gamma: γ of min-SNR weighting (Hang et al. 2023, equation 9): the squared error of the prediction of x
            is weighted with `min(SNR, γ)`; None weighs the prediction itself with 1.
        simple_weight: of that mean squared error in the loss.
        elbo_weight: of the variational bound's term beside it (Ho et al. 2020, equation 12; `original_elbo_weight` of
            latent diffusion); 0 for a flow.
        variance_mix: see `GaussianBound`; read by the bound's term alone.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0015,
        beta_end: float = 0.0195,
        min_snr_gamma: float | None = None,
        simple_weight: float = 1.0,
        elbo_weight: float = 0.0,
        variance_mix: float = 0.0,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, minimum=1)
        if min_snr_gamma is not None:
            min_snr_gamma = check_real("min_snr_gamma", min_snr_gamma, above=0)
        beta_start = check_real("beta_start", beta_start, above=0, below=1)
        beta_end = check_real("beta_end", beta_end, minimum=beta_start, below=1)
        self.prediction_type = prediction_type
        self.min_snr_gamma = min_snr_gamma
        self.num_train_timesteps = num_train_timesteps
        self.simple_weight = check_real("simple_weight", simple_weight, minimum=0)
        self.elbo_weight = check_real("elbo_weight", elbo_weight, minimum=0)
        if self.elbo_weight and prediction_type == "flow":
            raise ValueError(f"`elbo_weight` must be 0 for a flow, which has no such bound, got {elbo_weight}.")
        if prediction_type == "flow":
            self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps)
        else:
            self.scheduler = DDIMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule="scaled_linear",
                prediction_type=prediction_type,
                clip_sample=False,
                timestep_spacing="trailing",
            )
            self.bound = GaussianBound(self.scheduler.betas, variance_mix)

    def draw_timesteps(
        self, batch_size: int, device: torch.device, generators: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Random timesteps `(B,)`: int64, uniform in [0, T), or for a flow float32 in (0, T), the logistic function of a
        normal variable (Esser et al. 2024, section 3.1). With `generators` on the CPU, one for each sample, a sample's
        timestep does not depend on the others.
        """
        if generators is not None:
            if self.prediction_type == "flow":
                normal = torch.stack([torch.randn((), generator=source) for source in generators])
                return (torch.sigmoid(normal) * self.num_train_timesteps).to(device)
            draws = [torch.randint(self.num_train_timesteps, (), generator=source) for source in generators]
            return torch.stack(draws).to(device)
        if self.prediction_type == "flow":
            return torch.sigmoid(torch.randn(batch_size, device=device)) * self.num_train_timesteps
        return torch.randint(self.num_train_timesteps, (batch_size,), device=device)

    def even_timesteps(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Timesteps `(B,)` at even distances, for a validation that is the same every time."""
        middles = (torch.arange(batch_size, device=device) + 0.5) / batch_size * self.num_train_timesteps
        return middles if self.prediction_type == "flow" else middles.long()

    def alpha_sigma(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of each timestep, `(B, 1, 1, 1)`, float32."""
        if self.prediction_type == "flow":
            sigma = timesteps.float() / self.num_train_timesteps
            return (1 - sigma).view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        cumulative = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.alpha_sigma(timesteps)
        return alpha * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser is to predict, in the latents' shape."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma = self.alpha_sigma(timesteps)
        return alpha * noise - sigma * latents

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The weight of each image's squared error, `(B,)`."""
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alpha, sigma = (values.flatten() for values in self.alpha_sigma(timesteps))
        clipped = torch.minimum((alpha / sigma).square(), torch.full_like(alpha, self.min_snr_gamma))
        # by how much an error of the prediction is an error of x, squared
        if self.prediction_type == "epsilon":
            return clipped * (sigma / alpha).square()
        return clipped * sigma.square()

    def loss(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The weighted mean squared error, and the bound's term by its weight, a scalar in float32."""
        errors = (prediction.float() - self.target(latents, noise, timesteps).float()).square().mean(dim=(1, 2, 3))
        weights = self.simple_weight * self.weight(timesteps)
        if self.elbo_weight:
            weights = (
                weights + self.elbo_weight * self.bound.weights(self.prediction_type).to(timesteps.device)[timesteps]
            )
        return (weights * errors).mean()


class LatentScale:
    """The factor that gives latents a standard deviation of 1, part of a run's state so that a resumed run keeps it.

    Args:
        value: a known factor, which a resumed run must have started with.
    """

    def __init__(self, value: float | None = None):
        if value is not None and not value > 0:
            raise ValueError(f"`value` must be positive, got {value}.")
        self.value = self.given = value

    def measure(self, batches: Iterable[torch.Tensor]) -> float:
        """`1 / std` over all values of `batches` of latents (Rombach et al. 2022, appendix G)."""
        count, total, squares = 0, 0.0, 0.0
        for latents in batches:
            latents = latents.double()
            count += latents.numel()
            total += float(latents.sum())
            squares += float(latents.square().sum())
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not variance > 0:
            raise ValueError("`batches` must hold latents that vary: their standard deviation is 0.")
        self.value = variance**-0.5
        return self.value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        if self.given not in (None, state["value"]):
            raise ValueError(f"`value` must be {state['value']}, with which the run started, got {self.given}.")
        self.value = state["value"]


__all__ = ["PREDICTION_TYPES", "DiffusionObjective", "LatentScale"]
