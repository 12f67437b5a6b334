"""The bound of Gaussian diffusion, against products of Gaussians, their divergences, and diffusers' variances."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from hf_vq.training.objectives.diffusion_objective import DiffusionObjective
from hf_vq.training.objectives.gaussian_bound import GaussianBound


BETAS = torch.tensor([0.1, 0.2, 0.05, 0.4, 0.3], dtype=torch.float64)
STEPS = range(1, 5)


def levels(t):
    """α_t, ᾱ_{t-1} and ᾱ_t."""
    return 1 - BETAS[t], (1 - BETAS[:t]).prod(), (1 - BETAS[: t + 1]).prod()


def test_the_posterior_is_a_product_of_gaussians():
    """Bayes: precisions add, and the mean is weighted by them."""
    clean, noisy = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, variance, log_variance = GaussianBound(BETAS).posterior(clean, noisy, torch.tensor([*STEPS]))
    for row, t in enumerate(STEPS):
        alpha, previous, _ = levels(t)
        prior, likelihood = 1 / (1 - previous), alpha / BETAS[t]
        precision = prior + likelihood
        expected = (prior * previous.sqrt() * clean[row] + likelihood * noisy[row] / alpha.sqrt()) / precision
        torch.testing.assert_close(mean[row].double(), expected.double(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(variance[row].item(), (1 / precision).item())
        torch.testing.assert_close(log_variance[row].item(), -precision.log().item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_mix", [0.0, 0.3])
def test_a_term_is_a_divergence(prediction_type, variance_mix):
    bound, generator = GaussianBound(BETAS, variance_mix), torch.Generator().manual_seed(0)
    clean, noise, error = torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    weights = bound.weights(prediction_type, exact=True)
    for t in STEPS:
        _, _, cumulative = levels(t)
        alpha, sigma = cumulative.sqrt(), (1 - cumulative).sqrt()
        noisy = alpha * clean + sigma * noise
        predicted = {
            "epsilon": (noisy - sigma * (noise + error)) / alpha,
            "sample": clean + error,
            "v_prediction": alpha * noisy - sigma * (alpha * noise - sigma * clean + error),
        }[prediction_type]
        rows, step = torch.stack([clean, predicted])[:, None], torch.tensor([t, t])
        means, variances, _ = bound.posterior(rows, noisy[None, None].expand_as(rows), step)
        q, p = (Normal(mean[0].double(), variances[0, 0].double().sqrt()) for mean in means)
        expected = kl_divergence(q, p)
        torch.testing.assert_close(weights[t].double() * error.square(), expected, atol=1e-5, rtol=1e-4)
    assert weights[0] == weights[1]


def test_predictions_of_the_clean_latents_are_weighed_as_in_the_original():
    cumulative = (1 - BETAS).cumprod(dim=0)
    expected = 0.5 * cumulative.sqrt() / (2.0 * 1 - cumulative)
    expected[0] = expected[1]
    torch.testing.assert_close(GaussianBound(BETAS).weights("sample"), expected.float())


@pytest.mark.parametrize(("variance_mix", "variance_type"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_variances_are_those_of_diffusers(variance_mix, variance_type):
    scheduler = DDPMScheduler(5, trained_betas=BETAS.tolist(), variance_type=variance_type)
    _, variances, _ = GaussianBound(BETAS, variance_mix).posterior(*torch.zeros(2, 4, 1, 1, 1), torch.tensor([*STEPS]))
    expected = torch.stack([scheduler._get_variance(t, variance_type=variance_type) for t in STEPS])
    torch.testing.assert_close(variances.flatten(), expected, atol=1e-7, rtol=1e-5)


def test_the_loss_has_both_parts():
    latents, noise, predicted = torch.randn(3, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3, 700])
    parts = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.25)):
        objective = DiffusionObjective("epsilon", simple_weight=weights[0], elbo_weight=weights[1], variance_mix=0.5)
        parts.append(objective.loss(predicted, latents, noise, timesteps))
    torch.testing.assert_close(parts[2], 0.5 * parts[0] + 0.25 * parts[1])
    errors = (predicted - noise).square().mean(dim=(1, 2, 3))
    weights = GaussianBound(objective.scheduler.betas, 0.5).weights()[timesteps]
    torch.testing.assert_close(parts[1], (weights * errors).mean())


def test_what_is_refused():
    with pytest.raises(ValueError, match="`elbo_weight` must be 0 for a flow"):
        DiffusionObjective("flow", elbo_weight=0.1)
    with pytest.raises(ValueError, match="`variance_mix`"):
        GaussianBound(BETAS, 1.5)
    with pytest.raises(ValueError, match=r"`betas` must be at least 2 numbers between 0 and 1"):
        GaussianBound(torch.tensor([0.1, 1.0]))
    with pytest.raises(ValueError, match="`prediction_type` must be one of .* got 'flow'"):
        GaussianBound(BETAS).weights("flow")
