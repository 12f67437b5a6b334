"""Arguments of the pipelines' calls that no pipeline can mean: one error that names each, no nonsense as pictures."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipelines import autoregressive_parts, latent_diffusion_parts, vq_diffusion_parts
from tests.pipelines.test_condition_images import make_condition, make_conditional
from tests.pipelines.test_text_priors import make_text_pipeline


HUGE = 10**400  # beyond float and int64
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def autoregressive():
    return autoregressive_parts.make_pipeline()


@pytest.mark.parametrize("value", [HUGE, -HUGE, 10**30, Fraction(HUGE)])
@pytest.mark.parametrize("name", ["guidance_scale", "top_p", "num_images_per_prompt", "batch_size", "height"])
def test_numbers_beyond_every_type(autoregressive, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .{{0,200}}$"):
        autoregressive(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_type", np.array(["pil", "pt"])),
        ("callback_on_step_end_tensor_inputs", None),
        ("callback_on_step_end_tensor_inputs", [[]]),
        ("image", torch.zeros(1, 1, 8, 8)),
        ("image", Image.new("RGB", (0, 8))),
    ],
)
def test_named(autoregressive, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        autoregressive(**{"keep_fraction": 0.5 if name == "image" else None, name: value})


@pytest.mark.parametrize("value", [5, [], [1, 2], [3, 3], [5000, 1], "ab", {}, torch.tensor(2.0), range(2)])
def test_timesteps(value):
    pipeline = latent_diffusion_parts.make_pipeline(scheduler="flow")
    with pytest.raises(ValueError, match="`timesteps` must"):
        pipeline(timesteps=value)


@pytest.mark.parametrize("value", [0.5, [], [1.0, 2.0], range(2)])
def test_sigmas(value):
    with pytest.raises(ValueError, match="`sigmas` must"):
        latent_diffusion_parts.make_pipeline(scheduler="euler")(sigmas=value)


def test_sequences_of_numpy_and_torch():
    pipeline = latent_diffusion_parts.make_pipeline(scheduler="flow")
    images = [
        pipeline(timesteps=steps, generator=latent_diffusion_parts.seeded(), output_type="pt").images
        for steps in ([1000, 500], np.array([1000, 500]), torch.tensor([1000, 500]))
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_latents_that_do_not_divide():
    pipeline = latent_diffusion_parts.make_pipeline()
    with pytest.raises(ValueError, match="`height` and `width` must be multiples of 4"):
        pipeline(height=6, **STEPS)
    assert latent_diffusion_parts.make_pipeline("text")(prompt="cat", height=6, **STEPS).images[0].size == (8, 6)


@pytest.mark.parametrize("name", ["latents", "callback_on_step_end"])
def test_no_nan_comes_out_of_a_denoiser(name):
    pipeline = latent_diffusion_parts.make_pipeline()
    value = {
        "latents": torch.full((1, 4, 4, 4), 1e30),
        "callback_on_step_end": lambda pipe, step, timestep, values: {"latents": values["latents"] * torch.nan},
    }[name]
    for output_type in ("pt", "latent"):
        with pytest.raises(ValueError, match="became nan or infinite"):
            pipeline(**{name: value}, output_type=output_type, **STEPS)


def test_no_nan_comes_out_of_a_decoder(autoregressive):
    pipeline = autoregressive_parts.make_pipeline()
    with torch.no_grad():
        pipeline.vqvae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="`vqvae` must decode to finite values"):
        pipeline(output_type="np")


@pytest.mark.parametrize("make", [make_text_pipeline, lambda: latent_diffusion_parts.make_pipeline("text")])
def test_states_of_texts(make):
    pipeline, states = make(), torch.ones(1, 6, 8)
    with pytest.raises(ValueError, match="nan"):
        pipeline(prompt_embeds=states * 3e38)
    with pytest.raises(ValueError, match="`prompt_embeds`, or what the text encoder gives, must have the 8 channels"):
        pipeline(prompt_embeds=states[..., :7])
    for mask in (torch.full((1, 6), torch.nan), -torch.ones(1, 6), "all"):
        with pytest.raises(ValueError, match="`prompt_attention_mask` must"):
            pipeline(prompt_embeds=states, prompt_attention_mask=mask)
    with pytest.raises(ValueError, match="`prompt` must hold text"):
        pipeline(prompt="\ud800")


def test_logits_that_are_no_numbers():
    pipeline = autoregressive_parts.make_pipeline()
    with torch.no_grad():
        pipeline.prior.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="`prior` must give logits that are numbers"):
        pipeline()


def test_conditions():
    pipeline = make_conditional("depth")
    for annotator in (lambda images: 5, lambda images: None, lambda images: []):
        with pytest.raises(ValueError, match="`annotator` must give a condition for each image"):
            pipeline(condition_image=Image.new("RGB", (8, 8)), annotator=annotator)
    for codes in (torch.zeros(0, 2, 2, dtype=torch.long), (np.zeros((1, 2)), 5)):
        with pytest.raises(ValueError, match="`condition` must hold"):
            pipeline(condition=codes)
    with pytest.raises(ValueError, match="`indices` must be int64 codes"):
        pipeline(condition_image=make_condition("depth", 8, 8)[0], indices="codes", keep_fraction=0.5)


def test_a_truncation_that_float32_cannot_tell_from_none():
    pipeline = vq_diffusion_parts.make_pipeline()
    with pytest.raises(ValueError, match="`truncation_rate` must be a number in"):
        pipeline(truncation_rate=1e-320, **STEPS)
    found = [vq_diffusion_parts.indices_of(pipeline, truncation_rate=rate, **STEPS) for rate in (0.5, Fraction(1, 2))]
    assert torch.equal(*found)


@pytest.mark.parametrize("rate", [0, 1e-320, 1e-9, 2, float("nan"), True, "0.5"])
def test_acceptance_rates(autoregressive, rate):
    with pytest.raises(ValueError, match="`acceptance_rates` must be a number in"):
        autoregressive.rejection_sample(0, lambda images, ids: ids.float(), acceptance_rates=rate)
