"""The latent diffusion pipeline with tiny real components, against chains written by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    ClassifierFreeGuidance,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    PNDMScheduler,
)

from hf_vq import VQGANModel, VQLatentDiffusionPipeline, VQVAE2Config, VQVAE2Model
from hf_vq.hub import save_with_code
from hf_vq.hub_cards import model_card
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from hf_vq.pipelines.denoising_pipeline import GuidanceInterval
from tests.pipelines.latent_diffusion_parts import (
    CONDITIONS,
    SCHEDULERS,
    D,
    image,
    latents_of,
    make_pipeline,
    make_text_unet,
    make_unet,
    make_vqvae,
    seeded,
)


# numpy 2 on how diffusers' schedulers make arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# --------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_chain_by_hand(kind):
    """DDIM (Song et al. 2021, equation 12), guidance and scaling written out."""
    pipeline = make_pipeline(kind)
    noise = torch.randn(2, D, 4, 4, generator=seeded())
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    unet, x = pipeline.unet, noise
    embeds = None
    if kind == "text":
        text = pipeline.tokenizer(["a red cat", "a blue dog", "", ""], padding="max_length", return_tensors="pt")
        embeds = pipeline.text_encoder(**text).last_hidden_state
    if kind == "class_token":
        table = unet.encoder_hid_proj
    with torch.no_grad():
        for t in (666, 333, 0):
            if kind == "unconditional":
                eps = unet(x, t).sample
            elif kind == "class":
                given, null = unet(x, t, torch.tensor([0, 1])).sample, unet(x, t, torch.tensor([2, 2])).sample
            elif kind == "class_token":
                # a table of vectors: the columns of the projection, with its bias
                vectors = (table.weight.T + table.bias)[:, None]
                unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = None, None
                given, null = unet(x, t, vectors[[0, 1]]).sample, unet(x, t, vectors[[2, 2]]).sample
                unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = table, "text_proj"
            else:
                mask = text["attention_mask"]
                given = unet(x, t, embeds[:2], encoder_attention_mask=mask[:2]).sample
                null = unet(x, t, embeds[2:], encoder_attention_mask=mask[2:]).sample
            if kind != "unconditional":
                eps = null + 3.0 * (given - null)
            a, b = alphas[t], alphas[t - 333] if t >= 333 else torch.tensor(1.0)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    arguments = {**CONDITIONS[kind], "latents": noise}
    output = pipeline(**arguments, num_inference_steps=3, output_type="pt")
    torch.testing.assert_close(output.latents, x / 2.5, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        quantized = pipeline.vqvae.quantize(output.latents).quantized
        pixels = pipeline.vqvae.decode(quantized, quantize=False).sample
    torch.testing.assert_close(output.images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("share", "guided"),
    [((0.0, 1.0), 4 * [True]), ((0.25, 0.75), [False, True, True, False]), ((0.3, 0.9), [False, True, True, False])],
)
def test_guidance_in_an_interval_by_hand(share, guided):
    """A step is guided if it lies within the interval as a whole; the others cost no null rows."""
    pipeline = make_pipeline("class")
    x = noise = torch.randn(1, D, 4, 4, generator=seeded())
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    with torch.no_grad():
        for t, guides in zip((750, 500, 250, 0), guided, strict=True):
            eps = pipeline.unet(x, t, torch.tensor([1])).sample
            if guides:
                null = pipeline.unet(x, t, torch.tensor([2])).sample
                eps = null + 3.0 * (eps - null)
            a, b = alphas[t], alphas[t - 250] if t >= 250 else torch.tensor(1.0)
            x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    options = {"guidance_scale": 3.0, "guidance_start": share[0], "guidance_end": share[1]}
    found = latents_of(pipeline, class_labels=1, latents=noise, num_inference_steps=4, **options)
    torch.testing.assert_close(found, x / 2.5, atol=2e-4, rtol=1e-4)
    assert rows == [2 if guides else 1 for guides in guided]


INTERVALS = [(0, 1), (0.25, 0.75), (0.3, 0.9), (0, 0.5), (0.29, 0.58), (0.7, 1), (0.4, 0.41)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 30, 50, 100])
def test_the_steps_of_an_interval_are_those_of_diffusers(count):
    for start, end in INTERVALS:
        # 0.58 · 50 is 28.999999999999996, which diffusers cuts to 28
        guider = ClassifierFreeGuidance(guidance_scale=2.0, start=start + 1e-9, stop=min(end + 1e-9, 1.0))
        expected = []
        for step in range(count):
            guider.set_state(step=step, num_inference_steps=count, timestep=None)
            expected.append(guider.num_conditions == 2)
        if any(expected):
            assert GuidanceInterval(start, end).guided(count) == expected, (start, end)
            assert GuidanceInterval(np.float32(start), np.float32(end)).guided(count) == expected, (start, end)
        else:
            with pytest.raises(ValueError, match=f"at least one of the {count} steps"):
                GuidanceInterval(start, end).guided(count)


def test_a_step_of_second_order_is_guided_as_a_whole():
    pipeline = make_pipeline("class", "heun")
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append((int(args[1]), len(args[0]))))
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "guidance_start": 0.25, "guidance_end": 0.75}
    latents_of(pipeline, class_labels=1, **options)
    assert calls == [(999, 1), (666, 1), (666, 2), (333, 2), (333, 2), (0, 2), (0, 1)]
    with pytest.raises(ValueError, match="at least one of the 4 steps"):
        latents_of(pipeline, class_labels=1, **{**options, "guidance_start": 0.76, "guidance_end": 0.99})
    latents_of(pipeline, class_labels=1, num_inference_steps=1, guidance_end=0.5)  # nothing to guide


def test_steps_that_a_scheduler_cannot_take():
    pipeline = make_pipeline(scheduler="ddim")
    pipeline.scheduler = PNDMScheduler()
    with pytest.raises(ValueError, match="`num_inference_steps`: a PNDMScheduler takes no num_inference_steps=1: "):
        latents_of(pipeline, num_inference_steps=1)


def test_a_scheduler_whose_step_takes_more_is_refused():
    pipeline = make_pipeline(scheduler="ddim")
    pipeline.scheduler = CogVideoXDPMScheduler()
    with pytest.raises(ValueError, match=r"`scheduler`: .*CogVideoXDPMScheduler needs .*'timestep_back'\]"):
        latents_of(pipeline)


def test_a_scheduler_of_flows_needs_a_denoiser_of_flows():
    pipeline = make_pipeline()
    pipeline.scheduler = DDIMScheduler(prediction_type="v_prediction")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(
        ValueError, match="`scheduler`: a FlowMatchEuler.* of prediction_type='v_prediction', does not"
    ):
        latents_of(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    latents_of(pipeline)


def test_strength_leaves_the_interval_at_its_noise_levels():
    pipeline = make_pipeline("class")
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append((int(args[1]), len(args[0]))))
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "guidance_start": 0.25, "guidance_end": 0.75}
    latents_of(pipeline, class_labels=1, image=image(), strength=0.5, **options)
    assert calls == [(250, 2), (0, 1)]


def test_a_flow_by_hand():
    pipeline = make_pipeline("unconditional", "flow")
    x = noise = torch.randn(1, D, 4, 4, generator=seeded())
    sigmas = [1.0, 0.6, 0.1, 0.0]
    with torch.no_grad():
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            x = x + (then - now) * pipeline.unet(x, torch.tensor(1000.0 * now)).sample
    found = latents_of(pipeline, latents=noise, sigmas=sigmas[:3])
    torch.testing.assert_close(found, x / 2.5, atol=1e-5, rtol=1e-5)


def test_quantized_steps_by_hand():
    pipeline = make_pipeline()
    noise = torch.randn(1, D, 4, 4, generator=seeded())
    alphas, x = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), noise
    with torch.no_grad():
        for t in (500, 0):
            eps = pipeline.unet(x, t).sample
            a, b = alphas[t], alphas[t - 500] if t >= 500 else torch.tensor(1.0)
            x0 = pipeline.vqvae.quantize((x - (1 - a).sqrt() * eps) / a.sqrt() / 2.5).quantized * 2.5
            x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    found = latents_of(pipeline, latents=noise, num_inference_steps=2, quantize_denoised=True)
    torch.testing.assert_close(found, x / 2.5, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`quantize_denoised` needs a DDIMScheduler"):
        latents_of(make_pipeline(scheduler="euler"), quantize_denoised=True)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("count", "steps"), [(7, 8), (30, 31), (10, 10), (1, 1)])
def test_the_originals_steps_of_any_number_by_hand(count, steps, quantize):
    """`range(0, T, T // S) + 1` and ᾱ of timestep 0 in the end: more than S steps where S does not divide T."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = np.arange(0, 1000, 1000 // count) + 1
    previous = [alphas[0], *alphas[times[:-1]]]
    assert len(times) == steps
    x = noise = torch.randn(1, D, 4, 4, generator=seeded())
    with torch.no_grad():
        for t, b in reversed(list(zip(times, previous, strict=True))):
            eps, a = pipeline.unet(x, torch.tensor(t)).sample, alphas[t]
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            x0 = pipeline.vqvae.quantize(x0 / 2.5).quantized * 2.5 if quantize else x0
            x = b**0.5 * x0 + (1 - b) ** 0.5 * eps
    given = range(1, 1001, 1000 // count)[::-1]
    found = latents_of(pipeline, latents=noise, timesteps=given, quantize_denoised=quantize)
    torch.testing.assert_close(found, x / 2.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "timesteps",
    [
        [800, 500, 200, 50],  # not even
        [857, 714, 571, 428, 285, 142],  # even by 143, and neither 1000 // 6 nor 1000 // 7
        [900, 700, 500, 300],  # the data are two strides below the last
        [1000, 500],
        [600.5, 100.5],
    ],
)
def test_timesteps_that_ddim_cannot_take(timesteps):
    with pytest.raises(ValueError, match=r"`timesteps` of a DDIMScheduler must be ints that fall evenly by 1000 // n"):
        latents_of(make_pipeline(), timesteps=timesteps)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler):
    """Finite and repeatable images; a list of generators makes an image independent of its batch."""
    pipeline = make_pipeline("class", scheduler)
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.5}
    both = latents_of(pipeline, class_labels=[0, 1], generator=[seeded(1), seeded(2)], **arguments)
    assert both.isfinite().all() and both.std() > 0.01
    alone = latents_of(pipeline, class_labels=1, generator=[seeded(2)], **arguments)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    again = latents_of(pipeline, class_labels=[0, 1], generator=[seeded(1), seeded(2)], **arguments)
    assert torch.equal(both, again)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_to_image(scheduler):
    """Little strength stays near the image's latents; strength 1 does not."""
    pipeline = make_pipeline("unconditional", scheduler)
    pixels = image()
    own = pipeline.encode_image(pixels)
    steps = []
    arguments = {"image": pixels, "generator": seeded(), "num_inference_steps": 20}
    near = latents_of(pipeline, strength=0.1, callback_on_step_end=lambda p, i, t, d: steps.append(i), **arguments)
    far = latents_of(pipeline, **arguments)
    assert (near - own).norm() < 0.5 * (far - own).norm()
    assert len(steps) == (3 if scheduler == "heun" else 2)  # Heun takes two evaluations a step, but one in its last


def test_the_steps_of_a_strength():
    """A share of the steps is taken, of which Heun's but the last have two evaluations."""
    for scheduler, strength, steps in (("ddim", 0.25, 1), ("heun", 0.25, 1), ("heun", 0.5, 3), ("heun", 1.0, 7)):
        pipeline, seen = make_pipeline("unconditional", scheduler), []
        callback = lambda pipe, i, t, tensors: seen.append(t)  # noqa: B023, E731
        latents_of(pipeline, image=image(), strength=strength, num_inference_steps=4, callback_on_step_end=callback)
        assert len(seen) == steps, (scheduler, strength)
    pipeline = make_pipeline()
    scheduler = pipeline.own_scheduler()
    steps = pipeline._last_steps(scheduler, pipeline.set_timesteps(scheduler, 100), 0.29)
    assert len(steps) == 29  # 0.29 · 100 is 28.999… in floating point
    with pytest.raises(ValueError, match="`strength` must leave at least one of 4 steps"):
        latents_of(pipeline, image=image(), strength=0.2, num_inference_steps=4)
    pipeline.scheduler = PNDMScheduler()
    with pytest.raises(ValueError, match="skip_prk_steps=True"):
        latents_of(pipeline, image=image(), strength=0.5, num_inference_steps=4)
    pipeline.scheduler = IPNDMScheduler()
    with pytest.raises(ValueError, match="`image` needs a scheduler that adds noise"):
        latents_of(pipeline, image=image())


def test_image_to_image_starts_at_the_noised_image():
    for scheduler in ("ddim", "flow"):
        pipeline = make_pipeline("unconditional", scheduler)
        scheduler = pipeline.own_scheduler()
        pipeline.set_timesteps(scheduler, 4)
        pipeline.unet.conv_out.weight.data.zero_()
        pipeline.unet.conv_out.bias.data.zero_()  # no noise predicted, or no velocity: one step scales, or stays
        noise = torch.randn(1, D, 4, 4, generator=seeded())
        latents = pipeline.encode_image(image()) * 2.5
        found = latents_of(pipeline, image=image(), latents=noise, strength=0.25, num_inference_steps=4) * 2.5
        if hasattr(scheduler, "sigmas"):
            sigma = scheduler.sigmas[-2]
            expected = (1 - sigma) * latents + sigma * noise
        else:
            alpha = scheduler.alphas_cumprod[0]
            expected = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise) / alpha.sqrt()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- the call


def test_output_types_and_sizes():
    pipeline = make_pipeline("class")
    arguments = {"class_labels": [0, 1], "num_inference_steps": 2}
    outputs = {t: pipeline(**arguments, generator=seeded(), output_type=t) for t in ("pil", "np", "pt", "latent")}
    assert outputs["latent"].images is outputs["latent"].latents
    assert all(torch.equal(output.latents, outputs["pt"].latents) for output in outputs.values())
    pixels = outputs["pt"].images
    assert pixels.shape == (2, 3, 8, 8) and 0 <= pixels.min() and pixels.max() <= 1
    assert np.array_equal(outputs["np"].images, pixels.permute(0, 2, 3, 1).numpy())
    assert abs(np.asarray(outputs["pil"].images[1]) / 255 - outputs["np"].images[1]).max() <= 0.5 / 255 + 1e-6
    wide = pipeline(class_labels=0, height=8, width=16, num_inference_steps=1, return_dict=False)
    assert wide[0][0].size == (16, 8) and wide[1].shape == (1, D, 4, 8)


def test_callback_changes_the_latents():
    pipeline, seen = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.full_like(tensors["latents"], 5.0)} if step == 2 else None

    found = latents_of(pipeline, callback_on_step_end=callback)
    assert seen == [(0, 666, (1, D, 4, 4)), (1, 333, (1, D, 4, 4)), (2, 0, (1, D, 4, 4))]
    assert torch.equal(found, torch.full_like(found, 2.0))


def test_what_a_callback_cannot_return():
    for changed, message in (
        ([1], "must return a dict or None, got a list"),
        ({"latents": torch.zeros(1, D, 2, 4)}, r"must return `latents` as torch.float32 of shape \(1, 4, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            latents_of(make_pipeline(), callback_on_step_end=lambda *args, changed=changed: changed)


def test_images_of_one_class_are_adjacent_and_null_is_the_default():
    pipeline = make_pipeline("class")
    generators = [seeded(i) for i in range(4)]
    found = latents_of(pipeline, class_labels=["cat", "dog"], num_images_per_prompt=2, generator=generators)
    torch.testing.assert_close(found[1:2], latents_of(pipeline, class_labels=0, generator=seeded(1)))
    dog = latents_of(pipeline, class_labels="dog", generator=seeded())
    for one in (1, np.int64(1), np.array([1]), torch.tensor(1), [torch.tensor(1)]):
        assert torch.equal(latents_of(pipeline, class_labels=one, generator=seeded()), dog)


def test_half_precision():
    pipeline = make_pipeline("class")
    full = latents_of(pipeline, class_labels=0, generator=seeded())
    pipeline.to(torch.bfloat16)
    half = pipeline(class_labels=0, generator=seeded(), num_inference_steps=3, output_type="pt")
    assert half.latents.dtype == half.images.dtype == torch.float32
    assert (half.latents - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unconditional", {"class_labels": 0}, "`class_labels` needs a denoiser with classes"),
        ("unconditional", {"prompt": "a"}, "`prompt` needs a denoiser that is conditioned on text"),
        ("unconditional", {"guidance_scale": 2.0}, "`guidance_scale` other than 1 needs a conditional denoiser"),
        ("class", {"class_labels": 2}, "from 0 to 1"),
        ("class", {"class_labels": "owl"}, r"one of \['cat', 'dog'\]"),
        ("class", {"guidance_scale": 2.0}, "`guidance_scale` other than 1 needs `class_labels`"),
        ("class", {"class_labels": 0, "guidance_scale": -1}, "`guidance_scale` must be"),
        ("class", {"class_labels": 0, "guidance_scale": float("nan")}, "`guidance_scale` must be"),
        ("unconditional", {"num_inference_steps": 0}, "`num_inference_steps` must be an int of at least 1"),
        ("unconditional", {"strength": 0.5}, "`strength` needs an `image`"),
        ("unconditional", {"strength": 1.5}, r"`strength` must be a number in \(0, 1\]"),
        ("unconditional", {"image": image(), "mask_image": torch.ones(8, 8), "strength": 0.5}, "`strength` must be 1"),
        ("unconditional", {"condition_image": image()}, "`condition_image` must give the 0 channels"),
        ("unconditional", {"condition_image": np.full((4, 4, 3), 2.0)}, "`condition_image` cannot be read"),
        ("unconditional", {"eta": 2}, r"`eta` must be a number in \[0, 1\], got 2"),
        ("unconditional", {"latents": [0.0]}, "`latents` must be floating and have shape .* got list"),
        ("unconditional", {"height": 7}, "`height` must be a multiple of 2"),
        ("unconditional", {"latents": torch.zeros(1, D, 3, 3)}, "`latents` must be floating and have shape"),
        ("unconditional", {"output_type": "indices"}, "`output_type` must be one of"),
        ("unconditional", {"num_images_per_prompt": 0}, "`num_images_per_prompt` must be"),
        ("unconditional", {"generator": [seeded(), seeded()]}, "`generator` must hold one"),
        ("unconditional", {"sigmas": [1.0, 0.5]}, "`sigmas` cannot be given to a DDIMScheduler"),
        ("unconditional", {"sigmas": [1.0], "timesteps": [1]}, "Only one of"),
        ("unconditional", {"callback_on_step_end": 1}, "must be callable"),
        (
            "text",
            {"prompt": ["a", "cat"], "image": image().repeat(4, 1, 1, 1)},
            "`prompt` must hold one entry .* 4 inputs, got 2",
        ),
        (
            "text",
            {"prompt": ["a"] * 4, "negative_prompt": ["cat", "dog"], "guidance_scale": 2.0},
            "`negative_prompt` must hold one entry .* 4 inputs, got 2",
        ),
        ("unconditional", {"decode_batch_size": 0}, "`decode_batch_size` must be an int of at least 1, got 0"),
        ("unconditional", {"image": image()[:0]}, "`image` must be finite and not empty"),
        ("text", {"prompt": []}, "`prompt` must be a str or a list"),
        ("text", {"prompt": [1]}, "`prompt` must be a str or a list"),
        ("text", {"prompt_embeds": torch.zeros(2, 8)}, r"`prompt_embeds` must be a float tensor \(B, S, D\)"),
        ("text", {"prompt": "a", "prompt_embeds": torch.zeros(1, 6, 8)}, "Only one of `prompt` and `prompt_embeds`"),
        (
            "text",
            {"prompt_embeds": torch.zeros(1, 4, 8), "guidance_scale": 2.0},
            r"`negative_prompt_embeds`, .* must have as many tokens .* \(6, 8\) and \(4, 8\)",
        ),
        (
            "text",
            {"prompt_embeds": torch.zeros(1, 4, 8), "prompt_attention_mask": torch.ones(1, 3)},
            r"`prompt_attention_mask` must have shape \(1, 4\)",
        ),
    ],
)
def test_errors(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(kind)(**arguments)


def test_an_offloaded_tokenizer_is_loaded_first():
    """What `enable_model_cpu_offload` hooks to `forward`, which encoding, quantizing and decoding pass by."""

    class Loading(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            module.loaded = True
            return args, kwargs

    pipeline, seen = make_pipeline(), []
    add_hook_to_module(pipeline.vqvae, Loading())
    for name in ("encode", "decode"):
        method = getattr(pipeline.vqvae, name)

        def checked(*args, name=name, method=method):
            assert pipeline.vqvae.loaded
            pipeline.vqvae.loaded = False
            seen.append(name)
            return method(*args)

        setattr(pipeline.vqvae, name, checked)
    pipeline(image=image(), strength=0.5, num_inference_steps=4)
    assert seen == ["encode", "decode"]


def test_errors_of_parts():
    with pytest.raises(ValueError, match="`vqvae` must have one level of codes, got 2"):
        make_pipeline(vqvae=VQVAE2Model(VQVAE2Config(resolution=8, downsample_factor=4, hidden_size=8, embed_dim=D)))
    with pytest.raises(ValueError, match="`unet` must have 4 output channels"):
        make_pipeline(unet=make_unet(out_channels=3))
    with pytest.raises(ValueError, match="either cross-attention or a class embedding"):
        make_pipeline(unet=make_text_unet(num_class_embeds=3))
    with pytest.raises(ValueError, match="must be given: the denoiser takes 5 channels"):
        make_pipeline(unet=make_unet(in_channels=D + 5))(image=image(), strength=0.5)
    with pytest.raises(ValueError, match="`null_class_id` must be one of the classes"):
        make_pipeline("class", null_class_id=3)
    with pytest.raises(ValueError, match="`eta` has no meaning for a EulerDiscreteScheduler"):
        latents_of(make_pipeline(scheduler="euler"), eta=0.5)
    with pytest.raises(ValueError, match="no null class"):
        latents_of(make_pipeline("class", null_class_id=None))


# --------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", CONDITIONS)
def test_saved_and_loaded(tmp_path, kind):
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    expected = latents_of(pipeline, **CONDITIONS[kind], generator=seeded())
    for loader in (VQLatentDiffusionPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is VQLatentDiffusionPipeline
        assert torch.equal(latents_of(loaded, **CONDITIONS[kind], generator=seeded()), expected)
        assert loaded.vqvae.config.scaling_factor == 2.5


def test_the_stock_pipeline_loads_the_folder(tmp_path):
    """`LDMPipeline` of diffusers, with our tokenizer as its `vqvae`."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    stock = LDMPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.vqvae) is VQGANModel
    images = stock(batch_size=2, generator=seeded(), num_inference_steps=4, output_type="np").images
    own = pipeline(num_images_per_prompt=2, generator=seeded(), num_inference_steps=4, output_type="np").images
    assert images.std() > 0.01
    np.testing.assert_array_equal(images, own)


def test_the_stock_pipeline_of_super_resolution_loads_the_folder(tmp_path):
    """`LDMSuperResolutionPipeline`, which has no scaling factor and sizes its latents as the image."""
    parts = {"vqvae": make_vqvae(scaling_factor=1.0, embed_dim=3), "unet": make_unet(in_channels=6, out_channels=3)}
    pipeline = make_pipeline(**parts)
    pipeline.save_pretrained(tmp_path)
    stock = LDMSuperResolutionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    low = (image(size=32) / 2 + 0.5).clamp(0, 1)
    arguments = {"generator": seeded(), "num_inference_steps": 4, "output_type": "np"}
    images = stock(low, **arguments).images
    arguments["generator"] = seeded()
    own = pipeline(condition_image=low, height=64, width=64, **arguments).images
    assert images.std() > 0.01
    np.testing.assert_allclose(images, own, atol=1e-5)


@pytest.mark.slow
def test_a_folder_with_its_code_loads_without_hf_vq(tmp_path):
    pipeline = make_pipeline("class")
    save_with_code(pipeline, tmp_path / "shared")
    expected = latents_of(pipeline, class_labels=["dog"], generator=seeded())
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys, torch\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('shared', trust_remote_code=True)\n"
        "found = pipe(class_labels=['dog'], generator=torch.Generator().manual_seed(0), num_inference_steps=3,"
        " output_type='latent').latents\n"
        "assert 'hf_vq' not in sys.modules\nassert torch.equal(found, torch.load('expected.pt'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = VQLatentDiffusionPipeline.from_pretrained(tmp_path / "shared")
    assert torch.equal(latents_of(again, class_labels=["dog"], generator=seeded()), expected)


def test_card_and_image_processor(tmp_path):
    pipeline = make_pipeline("class")
    pipeline.vqvae.save_pretrained(tmp_path / "vqvae")
    VQImageProcessor(size=8).save_pretrained(tmp_path / "vqvae")
    vqvae = VQGANModel.from_pretrained(tmp_path / "vqvae")
    make_pipeline("class", vqvae=vqvae).save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline/vqvae/preprocessor_config.json").read_text())["size"]
    card = str(model_card(pipeline, "user/name", license="unknown", dataset="a folder"))
    assert f"{pipeline.unet.num_parameters():,}" in card and "`unet` class" in card
    assert "class_labels=0" in card and "VQLatentDiffusionPipeline" in card
