"""Images beyond the size of training, and completion, under the same arguments in every pipeline."""

import pytest
import torch

from hf_vq import MaskReplaceScheduler
from hf_vq.pipelines.pipeline_vq_diffusion import window_order
from tests.pipelines import autoregressive_parts, latent_diffusion_parts, vq_diffusion_parts, vqvae2_parts
from tests.pipelines.autoregressive_parts import seeded
from tests.pipelines.test_windows import by_hand
from tests.pipelines.vq_diffusion_parts import CODES, MASK, STEPS, conditions_by_hand


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler

SIDES = ("top", "bottom", "left", "right")
PIPELINES = {
    "autoregressive": (autoregressive_parts.make_pipeline, {"class_labels": 1, "top_k": 1}),
    "vqvae2": (vqvae2_parts.make_pipeline, {"class_labels": 1, "top_k": 1}),
    "vq_diffusion": (lambda: vq_diffusion_parts.make_pipeline("class"), {"class_labels": 1}),
    "latent_diffusion": (
        lambda: latent_diffusion_parts.make_pipeline("class"),
        {"class_labels": 1, "num_inference_steps": 3},
    ),
    "inpainting": (
        lambda: latent_diffusion_parts.make_pipeline(unet=latent_diffusion_parts.make_unet(in_channels=9)),
        {"num_inference_steps": 3},
    ),
}


def picture(batch_size=1, seed=3):
    return torch.rand(batch_size, 3, 8, 8, generator=seeded(seed)) * 2 - 1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", PIPELINES)
def test_outpainting_in_four_directions(kind, side):
    make, arguments = PIPELINES[kind]
    pipeline, image = make(), picture()
    margins = [4 if name == side else 0 for name in SIDES]
    found = pipeline(image=image, outpaint=margins, generator=seeded(), output_type="pt", **arguments)
    assert found.images.shape[2:] == ((12, 8) if side in ("top", "bottom") else (8, 12))
    rows, columns = slice(margins[0], margins[0] + 8), slice(margins[2], margins[2] + 8)
    torch.testing.assert_close(found.images[:, :, rows, columns], image / 2 + 0.5)
    added = torch.ones(found.images.shape[2:], dtype=torch.bool)
    added[rows, columns] = False
    other = pipeline(image=image, outpaint=margins, generator=seeded(), output_type="pt", **arguments).images
    assert torch.equal(other, found.images) and found.images[..., added].std() > 0
    if "indices" in found:
        levels = found.indices if isinstance(found.indices, tuple) else (found.indices,)
        own = pipeline.vqvae.encode(image).indices
        for codes, kept in zip(levels, own if isinstance(own, tuple) else (own,), strict=True):
            factor = 8 // kept.shape[-1]
            top, left = margins[0] // factor, margins[2] // factor
            assert torch.equal(codes[:, top : top + kept.shape[1], left : left + kept.shape[2]], kept)


@pytest.mark.parametrize("kind", PIPELINES)
def test_masks_of_pixels_and_of_codes_and_random_ones(kind):
    make, arguments = PIPELINES[kind]
    pipeline, image = make(), picture()
    factor = pipeline.vqvae.config.downsample_factors[0]
    mask = torch.zeros(8 // factor, 8 // factor)
    mask[:, : 4 // factor] = 1
    of_pixels = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    by_codes, by_pixels = (
        pipeline(image=image, mask_image=one, generator=seeded(), output_type="pt", **arguments).images
        for one in (mask, of_pixels)
    )
    torch.testing.assert_close(by_codes, by_pixels)
    torch.testing.assert_close(by_codes[..., 4:], image[..., 4:] / 2 + 0.5)
    kept = pipeline(image=image, keep_fraction=1.0, output_type="pt", **arguments).images
    torch.testing.assert_close(kept, image / 2 + 0.5)
    half = pipeline(image=image, keep_fraction=0.5, generator=seeded(), output_type="pt", **arguments).images
    same = torch.isclose(half, image / 2 + 0.5, atol=1e-6).all(dim=1).double().mean()
    assert 0.5 <= same < 0.9


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"mask_image": torch.ones(8, 8)}, "`mask_image` needs an `image`"),
        ({"keep_fraction": 0.5}, "`keep_fraction` needs an `image`"),
        ({"outpaint": (4, 0, 0, 0)}, "`outpaint` needs an `image`"),
        ({"image": picture(), "keep_fraction": 0.5, "outpaint": (4, 0, 0, 0)}, "`keep_fraction` excludes"),
        ({"image": picture(), "keep_fraction": 1.5}, r"`keep_fraction` must be a number in \[0, 1\]"),
        ({"image": picture(), "outpaint": (1, 0, 0, 0)}, "`outpaint` must be multiples of"),
        ({"image": picture(), "outpaint": (4, 0, 0)}, "`outpaint` must be the pixels to add"),
        ({"image": picture(), "outpaint": "left"}, "`outpaint` must be the pixels to add"),
        ({"image": picture(), "mask_image": torch.eye(5)}, r"`mask_image` must have the size \(8, 8\)"),
        ({"image": picture(), "mask_image": torch.full((8, 8), float("nan"))}, "`mask_image` must be an image"),
        ({"image": picture(), "mask_image": "mask.png"}, "`mask_image` must be a PIL image"),
        ({"image": picture() * float("inf"), "mask_image": torch.eye(8)}, "`image` must be finite"),
        ({"image": [], "mask_image": torch.eye(8)}, "`image` must be .* empty list"),
        ({"image": torch.zeros(1, 3, 8, 10)[..., :9], "mask_image": torch.eye(8)}, "`image` must have a width that"),
        ({"image": picture(), "mask_image": torch.eye(8), "height": 16}, "`image` must be 16 high and 8 wide"),
        ({"height": "8"}, "`height` must be an int"),
        ({"width": 9}, "`width` must be a multiple of"),
    ],
)
@pytest.mark.parametrize("kind", PIPELINES)
def test_what_no_pipeline_takes(kind, bad, message):
    make, arguments = PIPELINES[kind]
    with pytest.raises(ValueError, match=message):
        make()(**{**arguments, **bad})


# ------------------------------------------------------------------------------------------------ VQ-Diffusion


def test_windows_cover_a_grid_and_grow_from_what_is_kept():
    assert window_order((4, 4), (4, 4)) == [(0, 0)]
    order = window_order((8, 10), (4, 4))
    covered = torch.zeros(8, 10, dtype=torch.bool)
    for number, (top, left) in enumerate(order):
        part = covered[top : top + 4, left : left + 4]
        assert (part.any() or not number) and not part.all()
        part.fill_(True)
    assert covered.all() and order[0] == (0, 0) and len(order) == 3 * 4
    kept = torch.zeros(1, 8, 8, dtype=torch.bool)
    kept[:, 6:, 6:] = True
    assert window_order((8, 8), (4, 4), kept)[0] == (4, 4)
    assert window_order((8, 8), (4, 4), torch.ones(2, 8, 8, dtype=torch.bool)) == []
    with pytest.raises(ValueError, match="`stride` must be an int in 1…4, got 5"):
        window_order((8, 8), (4, 4), stride=5)


def chain_by_hand(pipeline, sample, codes, kept, generator):
    given, _ = conditions_by_hand(pipeline, "class")
    scheduler = MaskReplaceScheduler(CODES, STEPS)
    with torch.no_grad():
        for t in range(STEPS - 1, -1, -1):
            logits = pipeline.transformer(sample, t, **given).sample
            known = {"known_indices": codes, "known_mask": kept}
            sample = scheduler.step(logits, t, sample, generator=generator, **known).prev_sample
    return sample


def test_large_grids_of_vq_diffusion_by_hand():
    """A strip of 4 x 8 codes: the second window keeps the half that the first has left it, and so on."""
    pipeline = vq_diffusion_parts.make_pipeline("class")
    generator = seeded()
    grid, done = torch.zeros(2, 4, 8, dtype=torch.long), torch.zeros(2, 4, 8, dtype=torch.bool)
    for left in (0, 2, 4):
        view = slice(None), slice(None), slice(left, left + 4)
        start = torch.where(done[view], grid[view], MASK)
        grid[view] = chain_by_hand(pipeline, start, grid[view].clone(), done[view].clone(), generator)
        done[view] = True
    seen = []
    found = pipeline(
        class_labels=["cat", 1],
        width=16,
        generator=seeded(),
        output_type="pt",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(i),
    )
    assert torch.equal(found.indices, grid) and found.images.shape == (2, 3, 8, 16)
    assert seen == list(range(3 * STEPS))


def test_large_images_are_independent_of_their_batch():
    pipeline = vq_diffusion_parts.make_pipeline("class")
    codes = torch.randint(CODES, (2, 6, 8), generator=seeded(1))
    masks = torch.ones(2, 6, 8)
    masks[0, :3, :3] = masks[1, 4:, 5:] = 0
    arguments = {"class_labels": 1, "output_type": "indices", "num_inference_steps": 4}
    both = pipeline(indices=codes, mask_image=masks, generator=[seeded(5), seeded(6)], **arguments).indices
    assert torch.equal(both[masks == 0], codes[masks == 0])
    for row in range(2):
        alone = pipeline(
            indices=codes[row : row + 1], mask_image=masks[row], generator=[seeded(5 + row)], **arguments
        ).indices
        assert torch.equal(alone[0], both[row])


def test_sizes_that_vq_diffusion_refuses():
    pipeline = vq_diffusion_parts.make_pipeline("class")
    for bad, message in (
        ({"height": 6}, "`height` must be at least 8, the transformer's grid in pixels, got 6"),
        ({"width": 16, "stride": 5}, "`stride` must be an int in 1…4, got 5"),
        ({"strength": 0.5}, "`strength` needs an `image`"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(class_labels=0, **bad)


# ------------------------------------------------------------------------------------------------ VQ-VAE-2


def test_large_grids_of_a_hierarchy_by_hand():
    """Each level's windows, the lower one's with the part of the upper level's codes that lies under them."""
    pipeline = vqvae2_parts.make_pipeline()
    top_prior, bottom_prior = pipeline.priors
    found = pipeline(class_labels=1, height=12, width=16, top_k=1, output_type="pt")
    top, bottom = found.indices
    assert found.images.shape == (1, 3, 12, 16)
    prompt = top_prior.prepare_condition(1)
    assert torch.equal(top, by_hand(top_prior, lambda *origin: prompt, (3, 4), side=2))
    assert bottom.shape == (1, 6, 8)
    prompt = bottom_prior.prepare_condition(1)
    for i in range(6):
        for j in range(8):
            first = [min(max(place - 2, 0) // 2 * 2, length - 4) for place, length in ((i, 6), (j, 8))]
            window = bottom[:, first[0] : first[0] + 4, first[1] : first[1] + 4].flatten(1)
            above = top[:, first[0] // 2 : first[0] // 2 + 2, first[1] // 2 : first[1] // 2 + 2]
            place = (i - first[0]) * 4 + j - first[1]
            with torch.no_grad():
                ids = torch.cat([prompt, window[:, :place]], dim=1)
                logits = bottom_prior(input_ids=ids, condition_indices=above).logits[0, -1]
            assert bottom[0, i, j] == logits.argmax()
    again = pipeline(class_labels=1, height=12, width=16, top_indices=top, top_k=1, output_type="indices").indices
    assert torch.equal(again[1], bottom)
    with pytest.raises(ValueError, match="`stride` must be an int in 1…1, got 2"):
        pipeline(class_labels=1, height=12, width=16, stride=2)
    with pytest.raises(ValueError, match="`height` must be at least the 2 codes"):
        pipeline(class_labels=1, height=4, width=16)


# ------------------------------------------------------------------------------------------------ latent diffusion


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "flow"])
def test_latents_are_kept_at_every_step(scheduler):
    """What is kept has the noise of its timestep, and in the end none: sigma by the scheduler's own tables."""
    pipeline, image, seen = latent_diffusion_parts.make_pipeline("unconditional", scheduler), picture(), []
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    mask = torch.zeros(4, 4)
    mask[:2] = 1
    found = pipeline(
        image=image,
        mask_image=mask,
        latents=noise,
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append((int(t), tensors["latents"].clone())),
    ).latents
    own = pipeline.encode_image(image)
    torch.testing.assert_close(found[:, :, 2:], own[:, :, 2:])
    assert not torch.isclose(found[:, :, :2], own[:, :, :2], atol=1e-3).all()
    steps = pipeline.own_scheduler()
    pipeline.set_timesteps(steps, 4)
    for number, (_, latents) in enumerate(seen):
        if scheduler == "ddim":
            alpha = steps.alphas_cumprod[int(seen[number + 1][0])] if number < 3 else torch.tensor(1.0)
            signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        else:
            sigma = steps.sigmas[number + 1]
            signal = 1 - sigma if scheduler == "flow" else 1.0
        expected = signal * own * 2.5 + sigma * noise
        torch.testing.assert_close(latents[:, :, 2:], expected[:, :, 2:], atol=1e-4, rtol=1e-4)
