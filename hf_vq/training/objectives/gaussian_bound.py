"""The variational bound of diffusion with Gaussian noise: the posterior of one step, and the weights of its terms."""

import torch

from ...argument_checks import check_real


class GaussianBound:
    """
    The chain q(z_t | z_{t-1}) = N(√(1 - β_t) z_{t-1}, β_t), its posterior, and the terms of the bound of -log p(z_0),
    the divergences between the posteriors of the clean and of the predicted latents (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239, equations 5 to 7 and 12).

    Args:
        betas: float `(T,)`, β of timesteps 0…T-1; timestep 0 has taken one step from the data.
        variance_mix: v in [0, 1]; the variance of a step is (1 - v) β̃_t + v β_t, of which β̃_t is the posterior's and
            β_t the other extreme (section 3.2).

    Raises:
        ValueError: betas out of (0, 1), or a `variance_mix` out of [0, 1].
    """

    def __init__(self, betas: torch.FloatTensor, variance_mix: float = 0.0):
        variance_mix = check_real("variance_mix", variance_mix, minimum=0, maximum=1)
        betas = torch.as_tensor(betas).double().cpu()
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"`betas` must be at least 2 numbers between 0 and 1, got shape {tuple(betas.shape)}.")
        cumulative = (1 - betas).cumprod(dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
        self.alphas_cumprod = cumulative
        self.clean_weights = betas * previous.sqrt() / (1 - cumulative)
        self.noisy_weights = (1 - previous) * (1 - betas).sqrt() / (1 - cumulative)
        self.variances = (1 - variance_mix) * betas * (1 - previous) / (1 - cumulative) + variance_mix * betas

    def posterior(
        self, clean: torch.Tensor, noisy: torch.Tensor, timesteps: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        q(z_{t-1} | z_t, z_0), equation 7.

        Args:
            clean, noisy: z_0 and z_t, `(B, C, H, W)`.
            timesteps: int64 `(B,)`.

        Returns:
            The mean `(B, C, H, W)`, the variance and its logarithm `(B, 1, 1, 1)`, float32. At timestep 0 the variance
            is 0 with `variance_mix=0`; the logarithm is that of at least 1e-20.
        """
        of_clean, of_noisy = (_at(values, timesteps, noisy) for values in (self.clean_weights, self.noisy_weights))
        mean = of_clean * clean.float() + of_noisy * noisy.float()
        log_variance = _at(self.variances.clamp(min=1e-20).log(), timesteps, noisy)
        return mean, _at(self.variances, timesteps, noisy), log_variance

    def weights(self, prediction_type: str = "epsilon", exact: bool = False) -> torch.FloatTensor:
        """
        The weight of the squared error of a prediction in each term of the bound, float32 `(T,)`.

        Timestep 0 has the weight of timestep 1, as in the original latent diffusion: -log p(z_0 | z_1) is no
        divergence, and its weight has no bound as the variance goes to 0.

        Args:
            prediction_type: "epsilon" (equation 12), "sample" or "v_prediction". The original latent diffusion weighs
                "sample" by √ᾱ / (2 (2 - ᾱ)), which is no term of the bound; so does this.
            exact: the terms of the bound for "sample" too.

        Raises:
            ValueError: another `prediction_type`.
        """
        alphas, noises = self.alphas_cumprod, 1 - self.alphas_cumprod
        # by how much a squared error of the prediction is one of z_0
        errors = {"epsilon": noises / alphas, "sample": torch.ones_like(alphas), "v_prediction": noises}
        if prediction_type not in errors:
            raise ValueError(f"`prediction_type` must be one of {sorted(errors)}, got {prediction_type!r}.")
        weights = errors[prediction_type] * self.clean_weights.square() / (2 * self.variances)
        if prediction_type == "sample" and not exact:
            weights = alphas.sqrt() / (2 * (2 - alphas))
        weights[0] = weights[1]
        return weights.float()


def _at(values: torch.Tensor, timesteps: torch.LongTensor, like: torch.Tensor) -> torch.FloatTensor:
    return values.to(timesteps.device)[timesteps].float().view(-1, *[1] * (like.ndim - 1)).to(like.device)


__all__ = ["GaussianBound"]
