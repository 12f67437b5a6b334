"""Variations of images and inpainting by the VQ-Diffusion pipeline, against chains written by hand."""

import numpy as np
import PIL.Image
import pytest
import torch

from hf_vq import MaskReplaceScheduler
from hf_vq.pipelines.completion import kept_codes
from tests.pipelines.vq_diffusion_parts import (
    CODES,
    CONDITIONS,
    MASK,
    STEPS,
    codes,
    image,
    indices_of,
    log_probs_by_hand,
    make_copying_transformer,
    make_pipeline,
    make_transformer,
    seeded,
)


# --------------------------------------------------------------------------------------------- variations


def test_a_variation_by_hand():
    pipeline, given = make_pipeline("class"), codes(2)
    scheduler, generator = MaskReplaceScheduler(CODES, STEPS), seeded()
    scheduler.set_timesteps(5)
    sample = scheduler.add_noise(given, 5, generator)
    with torch.no_grad():
        for t in (5, 3, 1):
            log_probs = log_probs_by_hand(pipeline, "class", sample, t).float()
            sample = scheduler.step(log_probs, t, sample, generator=generator).prev_sample
    found = indices_of(pipeline, **CONDITIONS["class"], indices=given, strength=0.7, num_inference_steps=5)
    assert torch.equal(found, sample)


def test_limits_of_strength():
    """Little strength keeps the codes, all of it knows nothing of them."""
    pipeline, given = make_pipeline(transformer=make_copying_transformer()), codes(8)
    agreement = []
    for strength in (0.1, 0.3, 0.6, 1.0):
        found = indices_of(pipeline, indices=given, strength=strength)
        agreement.append((found == given).double().mean().item())
    assert agreement[0] == 1 and agreement == sorted(agreement, reverse=True) and agreement[-1] < 0.2
    assert torch.equal(
        indices_of(pipeline, indices=given, strength=1.0), indices_of(pipeline, num_images_per_prompt=8)
    )
    assert torch.equal(indices_of(pipeline, indices=given), indices_of(pipeline, indices=given, strength=0.7))


@pytest.mark.parametrize(("strength", "first"), [(0.29, 28), (0.57, 56), (0.573, 56), (0.999, 98), (1.0, 99)])
def test_strength_in_decimals_is_not_cut_by_binary_rounding(strength, first):
    """0.29 · 100 and 0.57 · 100 lie just below 29 and 57 in floating point."""
    parts = {
        "transformer": make_transformer(num_train_timesteps=100),
        "scheduler": MaskReplaceScheduler(CODES, 100),
    }
    pipeline = make_pipeline(**parts)
    steps = pipeline.set_timesteps(pipeline.own_scheduler(), strength=strength)
    assert steps.tolist() == list(range(first, -1, -1))


def test_variations_of_an_image_start_at_its_codes():
    pipeline, pixels = make_pipeline(transformer=make_copying_transformer()), image(2)
    with torch.no_grad():
        given = pipeline.vqvae.encode(pixels).indices
    assert torch.equal(indices_of(pipeline, image=pixels, strength=0.1), given)
    arguments = {"num_images_per_prompt": 2, "strength": 0.5}
    assert torch.equal(
        indices_of(pipeline, image=pixels, **arguments), indices_of(pipeline, indices=given, **arguments)
    )


def test_inputs_are_paired_in_order():
    """Images of one input are adjacent; what has one entry goes with every input."""
    pipeline, given, prompts, negative = make_pipeline("text"), codes(2), ["a red cat", "dog"], ["blue", "a"]
    arguments = {"guidance_scale": 2.0, "strength": 0.8}
    found = indices_of(
        pipeline,
        prompt=prompts,
        negative_prompt=negative,
        indices=given,
        num_images_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
        **arguments,
    )
    one_prompt = indices_of(
        pipeline, prompt=prompts[0], indices=given, generator=[seeded(i) for i in range(2)], **arguments
    )
    for i in range(4):
        row = i // 2
        own = {"prompt": prompts[row], "negative_prompt": negative[row], "indices": given[row : row + 1]}
        assert torch.equal(found[i : i + 1], indices_of(pipeline, **own, generator=[seeded(i)], **arguments)), i
    for i in range(2):
        own = {"prompt": prompts[0], "indices": given[i : i + 1], "generator": [seeded(i)]}
        assert torch.equal(one_prompt[i : i + 1], indices_of(pipeline, **own, **arguments)), i


# --------------------------------------------------------------------------------------------- inpainting


def half_mask():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1  # the left half is painted
    return mask


def test_inpainting_keeps_codes_at_every_step_and_pixels_in_the_end():
    pipeline, pixels, seen = make_pipeline("class"), image(), []
    with torch.no_grad():
        given = pipeline.vqvae.encode(pixels).indices
    output = pipeline(
        class_labels=["cat", "dog"],
        guidance_scale=2.0,
        image=pixels,
        mask_image=half_mask(),
        generator=seeded(),
        output_type="pt",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["indices"]),
    )
    assert len(seen) == STEPS and torch.equal(seen[-1], output.indices)
    assert all(torch.equal(x[..., 2:], given[..., 2:].expand(2, -1, -1)) for x in seen)
    assert (seen[0][..., :2] == MASK).any() and (output.indices[..., :2] != given[..., :2]).any()
    assert torch.equal(output.images[..., 4:], (pixels[..., 4:] / 2 + 0.5).expand(2, -1, -1, -1))
    with torch.no_grad():
        decoded = (pipeline.vqvae.decode_indices(output.indices).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(output.images[..., :4], decoded[..., :4], atol=1e-6, rtol=0)


def test_inpainting_by_hand():
    pipeline, given = make_pipeline("class"), codes(2)
    kept = torch.zeros(2, 4, 4, dtype=torch.bool)
    kept[..., 2:] = True
    for strength in (1.0, 0.5):
        scheduler, generator = MaskReplaceScheduler(CODES, STEPS), seeded()
        sample = torch.full_like(given, MASK) if strength == 1 else scheduler.add_noise(given, 4, generator)
        sample = torch.where(kept, given, sample)
        with torch.no_grad():
            for t in range(9 if strength == 1 else 4, -1, -1):
                log_probs = log_probs_by_hand(pipeline, "class", sample, t).float()
                known = {"known_indices": given, "known_mask": kept}
                sample = scheduler.step(log_probs, t, sample, generator=generator, **known).prev_sample
        arguments = {"indices": given, "mask_image": half_mask(), "strength": strength}
        assert torch.equal(indices_of(pipeline, **CONDITIONS["class"], **arguments), sample)


def test_a_code_with_one_painted_pixel_is_painted():
    pipeline, given = make_pipeline(), codes()
    mask = torch.zeros(8, 8)
    mask[5, 2] = 1
    expected = torch.ones(1, 4, 4, dtype=torch.bool)
    expected[0, 2, 1] = False
    assert torch.equal(kept_codes(mask[None, None], (4, 4), 2), expected)
    found = torch.cat([indices_of(pipeline, indices=given, mask_image=mask, generator=seeded(i)) for i in range(5)])
    assert torch.equal((found == given).all(dim=0), expected[0])
    on_grid = 1 - expected[0].float()
    again = indices_of(pipeline, indices=given, mask_image=on_grid, generator=seeded(4))
    assert torch.equal(found[4:], again)


def test_pictures_as_image_and_mask():
    pipeline = make_pipeline()
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    mask = PIL.Image.fromarray((half_mask()[0, 0].numpy() * 255).astype(np.uint8))
    found = pipeline(image=[picture, picture], mask_image=mask, generator=seeded()).images
    assert len(found) == 2 and found[0].size == (8, 8)
    assert np.array_equal(np.asarray(found[1])[:, 4:], np.asarray(picture)[:, 4:])
    assert not np.array_equal(np.asarray(found[1])[:, :4], np.asarray(picture)[:, :4])


def test_pixels_come_from_the_own_image():
    pipeline, pixels = make_pipeline(), image(2)
    found = pipeline(
        image=pixels, mask_image=half_mask(), num_images_per_prompt=2, generator=seeded(), output_type="pt"
    ).images
    assert torch.equal(found[..., 4:], (pixels[..., 4:] / 2 + 0.5).repeat_interleave(2, dim=0))
