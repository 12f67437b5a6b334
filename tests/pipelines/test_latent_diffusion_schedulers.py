"""Schedulers and prediction types against a case with a solution: latents of a normal distribution."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from hf_vq import VQLatentDiffusionPipeline
from tests.pipelines.latent_diffusion_parts import D, image, latents_of, make_vqvae, seeded


# numpy 2 on how diffusers' schedulers make arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

MEAN, STD = 0.5, 0.3  # of the scaled latents
STEPS = {"ddim": 125}  # a divisor of 1000, which that scheduler's steps are exact for
FIRST_ORDER = ("ddim", "euler", "euler_trailing")
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def alpha_sigma(kind: str, timestep) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.as_tensor(timestep, dtype=torch.float64)
    if kind == "flow":
        return 1 - t / 1000, t / 1000
    # between two timesteps, the logarithm of σ/α is linear
    ratio = ((1 - ALPHAS) / ALPHAS).sqrt().log()
    low = t.floor().long().clamp(0, 998)
    ratio = torch.lerp(ratio[low], ratio[low + 1], t - low).exp()
    return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()


def solution(kind, timestep, noisy):
    """Where the probability-flow ODE (Song et al. 2021, equation 13) leads from `noisy`: standard scores are kept."""
    alpha, sigma = alpha_sigma(kind, timestep)
    return MEAN + STD * (noisy - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


class GaussianDenoiser(UNet2DModel):
    """The best prediction for latents with independent N(MEAN, STD²) values, in closed form."""

    kind = "epsilon"

    def forward(self, sample, timestep, **kwargs):
        alpha, sigma = alpha_sigma(self.kind, timestep)
        sample = sample.double()
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        clean = MEAN + gain * (sample - alpha * MEAN)
        noise = (sample - alpha * clean) / sigma
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow": noise - clean}[self.kind]
        return UNet2DOutput(output.float())


def gaussian_pipeline(kind, scheduler):
    unet = GaussianDenoiser(
        sample_size=4,
        in_channels=D,
        out_channels=D,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    unet.kind = kind
    pipeline = VQLatentDiffusionPipeline(make_vqvae(), unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(kind, name):
    if kind == "flow":
        flow = {"use_flow_sigmas": True, "flow_shift": 1.0, "prediction_type": "flow_prediction"}
        return {
            "euler": FlowMatchEulerDiscreteScheduler,
            "heun": FlowMatchHeunDiscreteScheduler,
            "dpm": lambda: DPMSolverMultistepScheduler(**flow),
            "unipc": lambda: UniPCMultistepScheduler(**flow),
        }[name]()
    known = {
        "ddim": lambda **kwargs: DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **kwargs),
        "dpm": DPMSolverMultistepScheduler,
        "dpm_karras": lambda **kwargs: DPMSolverMultistepScheduler(use_karras_sigmas=True, **kwargs),
        "singlestep": lambda **kwargs: DPMSolverSinglestepScheduler(lower_order_final=True, **kwargs),
        "euler": EulerDiscreteScheduler,
        "euler_trailing": lambda **kwargs: EulerDiscreteScheduler(timestep_spacing="trailing", **kwargs),
        "heun": HeunDiscreteScheduler,
        "kdpm2": KDPM2DiscreteScheduler,
        "deis": DEISMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
        "pndm": lambda **kwargs: PNDMScheduler(skip_prk_steps=True, **kwargs),
    }
    return known[name](beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type=kind)


NAMES = (
    "ddim",
    "dpm",
    "dpm_karras",
    "singlestep",
    "euler",
    "euler_trailing",
    "heun",
    "kdpm2",
    "deis",
    "unipc",
    "pndm",
)
CASES = [(kind, name) for kind in ("epsilon", "v_prediction") for name in NAMES]
CASES += [("flow", name) for name in ("euler", "heun", "dpm", "unipc")]


def sample(pipeline, name, **arguments):
    """Latents, scaled, in so many steps that the solver is near the solution."""
    return latents_of(pipeline, num_inference_steps=STEPS.get(name, 112), **arguments).double() * 2.5


def tolerance(name):
    return 0.06 if name in FIRST_ORDER else 0.02


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_noise_becomes_latents(kind, name):
    pipeline = gaussian_pipeline(kind, make(kind, name))
    noise = torch.randn(1, D, 4, 4, generator=seeded())
    expected = solution(kind, 1000 if kind == "flow" else 999, noise)
    assert (sample(pipeline, name, latents=noise) - expected).abs().max() < tolerance(name)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_image_with_noise_becomes_other_latents(kind, name):
    """Of the half of the steps that is taken, the first says how much noise the image gets."""
    pipeline = gaussian_pipeline(kind, make(kind, name))
    noise, seen = torch.randn(1, D, 4, 4, generator=seeded()), []
    found = sample(
        pipeline,
        name,
        image=image(),
        latents=noise,
        strength=0.5,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(t),
    )
    assert 400 < seen[0] < 600
    alpha, sigma = alpha_sigma(kind, seen[0])
    expected = solution(kind, seen[0], alpha * pipeline.encode_image(image()) * 2.5 + sigma * noise)
    assert (found - expected).abs().max() < tolerance(name)
