"""Noise, targets and weights of continuous diffusion against their closed forms."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hf_vq.training.objectives.diffusion_objective import DiffusionObjective, LatentScale


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(prediction_type, **arguments):
    """An objective, latents, noise, timesteps, and α and σ written out."""
    objective = DiffusionObjective(prediction_type, **arguments)
    x, noise = torch.randn(2, 6, 4, 3, 3, generator=seeded())
    if prediction_type == "flow":
        t = torch.tensor([1.0, 100.0, 250.0, 500.0, 900.0, 999.0])
        sigma = t / 1000
        alpha = 1 - sigma
    else:
        t = torch.tensor([0, 10, 100, 500, 900, 999])
        betas = [(math.sqrt(0.0015) + (math.sqrt(0.0195) - math.sqrt(0.0015)) * i / 999) ** 2 for i in range(1000)]
        cumulative = torch.tensor([math.prod(1 - beta for beta in betas[: i + 1]) for i in t.tolist()])
        alpha, sigma = cumulative.sqrt(), (1 - cumulative).sqrt()
    return objective, x, noise, t, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


KINDS = ["epsilon", "v_prediction", "flow"]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_targets(kind):
    objective, x, noise, t, alpha, sigma = make(kind)
    noisy = objective.add_noise(x, noise, t)
    torch.testing.assert_close(noisy, alpha * x + sigma * noise, atol=1e-5, rtol=1e-5)
    target = objective.target(x, noise, t)
    expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "flow": noise - x}[kind]
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedulers_of_diffusers_agree(kind):
    objective, x, noise, t, *_ = make(kind)
    noisy, target = objective.add_noise(x, noise, t), objective.target(x, noise, t)
    if kind == "flow":
        reference = FlowMatchEulerDiscreteScheduler()
        expected = reference.scale_noise(x[2:3], torch.tensor([250.0]), noise[2:3])
        torch.testing.assert_close(noisy[2:3], expected, atol=1e-5, rtol=1e-5)
        return
    reference = DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    torch.testing.assert_close(noisy, reference.add_noise(x, noise, t), atol=1e-5, rtol=1e-5)
    if kind == "v_prediction":
        torch.testing.assert_close(target, reference.get_velocity(x, noise, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_recovers_the_latents_from_the_target(kind):
    """The scheduler of the pipeline understands what the denoiser is trained to say."""
    objective, x, noise, t, *_ = make(kind)
    scheduler = objective.scheduler
    if kind == "flow":
        scheduler.set_timesteps(sigmas=[0.5])
        t = scheduler.timesteps
        noisy, target = objective.add_noise(x[:1], noise[:1], t), objective.target(x[:1], noise[:1], t)
        found = scheduler.step(target, t[0], noisy).prev_sample
    else:
        scheduler.set_timesteps(10)
        t = torch.tensor([499])
        noisy, target = objective.add_noise(x[:1], noise[:1], t), objective.target(x[:1], noise[:1], t)
        found = scheduler.step(target, 499, noisy).pred_original_sample
    torch.testing.assert_close(found, x[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr(kind, gamma):
    """The weighted error of any prediction is min(SNR, γ) times the error of the latents that follow from it."""
    objective, x, noise, t, alpha, sigma = make(kind, min_snr_gamma=gamma)
    noisy = alpha * x + sigma * noise
    wrong = objective.target(x, noise, t) + 0.1 * torch.randn(x.shape, generator=seeded(1))
    found = {
        "epsilon": (noisy - sigma * wrong) / alpha,
        "v_prediction": alpha * noisy - sigma * wrong,
        "flow": noisy - sigma * wrong,
    }[kind]
    snr = (alpha / sigma).square()
    each = (snr.clamp(max=gamma) * (found.double() - x).square()).mean(dim=(1, 2, 3))
    weighted = objective.weight(t) * (wrong - objective.target(x, noise, t)).square().mean(dim=(1, 2, 3))
    some = slice(2, None)  # near the data, x follows from noise by a difference of nearly equal numbers
    torch.testing.assert_close(weighted[some].double(), each[some], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(objective.loss(wrong, x, noise, t), weighted.mean(), atol=1e-6, rtol=1e-5)
    formula = {"epsilon": snr.clamp(max=gamma) / snr, "v_prediction": snr.clamp(max=gamma) / (snr + 1)}
    if kind in formula:  # as the paper gives them
        torch.testing.assert_close(objective.weight(t), formula[kind].flatten(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_it_is_the_squared_error(kind):
    objective, x, noise, t, *_ = make(kind)
    expected = (objective.target(x, noise, t) - 0.5).square().mean()
    torch.testing.assert_close(objective.loss(torch.full_like(x, 0.5), x, noise, t), expected)


def test_timesteps():
    torch.manual_seed(0)
    discrete = DiffusionObjective("epsilon", num_train_timesteps=10).draw_timesteps(20000, torch.device("cpu"))
    assert torch.bincount(discrete, minlength=10).sub(2000).abs().max() < 200 and discrete.max() == 9
    flow = DiffusionObjective("flow", num_train_timesteps=10).draw_timesteps(20000, torch.device("cpu")) / 10
    assert 0 < flow.min() and flow.max() < 1
    # logit-normal: the median is 1/2, and 68.3 % lie between the logistic functions of -1 and 1
    assert abs((flow < 0.5).float().mean() - 0.5) < 0.015
    inside = (flow > 1 / (1 + math.e)) & (flow < 1 / (1 + 1 / math.e))
    assert abs(inside.float().mean() - 0.6827) < 0.015
    even = DiffusionObjective("epsilon").even_timesteps(4, torch.device("cpu"))
    assert even.tolist() == [125, 375, 625, 875]


def test_errors():
    with pytest.raises(ValueError, match="`prediction_type` must be one of"):
        DiffusionObjective("noise")
    with pytest.raises(ValueError, match="`min_snr_gamma` must be a finite number above 0, got"):
        DiffusionObjective("epsilon", min_snr_gamma=0)


def test_the_scale():
    values = torch.randn(3, 7, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    scale = LatentScale()
    scale.measure(iter(values))
    assert abs(scale.value - 1 / np.std(values.numpy())) < 1e-6
    for other in (LatentScale(), LatentScale(scale.value)):
        other.load_state_dict(scale.state_dict())
        assert other.value == scale.value
    with pytest.raises(ValueError, match="with which the run started, got 2.0"):
        LatentScale(2.0).load_state_dict(scale.state_dict())
    with pytest.raises(ValueError, match="`value` must be positive"):
        LatentScale(0.0)
    with pytest.raises(ValueError, match="their standard deviation is 0"):
        LatentScale().measure([torch.ones(2, 2)])
