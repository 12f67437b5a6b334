"""Concatenated maps and text as conditions of latent diffusion."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from hf_vq import VQLatentDiffusionPipeline
from hf_vq.pipelines.conditioning import encode_text, resize_map
from tests.pipelines.latent_diffusion_parts import (
    D,
    image,
    latents_of,
    make_pipeline,
    make_text_parts,
    make_unet,
    make_vqvae,
    seeded,
)


# --------------------------------------------------------------------------------------------- concatenated maps


def test_resizing_is_the_originals():
    """Two bilinear halvings for a factor of 4; nothing for a map of the latents' size."""
    values = torch.randn(2, 5, 16, 16, generator=seeded())
    halved = F.interpolate(F.interpolate(values, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(resize_map(values, (4, 4)), halved)
    assert resize_map(values, (16, 16)) is values
    assert resize_map(values, (32, 32)).shape == (2, 5, 32, 32)


def spy(pipeline, seen):
    forward = pipeline.unet.forward

    def wrapped(sample, *args, **kwargs):
        seen.append(sample)
        return forward(sample, *args, **kwargs)

    pipeline.unet.forward = wrapped


def test_maps_are_concatenated():
    pipeline, seen = make_pipeline(unet=make_unet(in_channels=D + 5)), []
    spy(pipeline, seen)
    maps = torch.rand(2, 5, 8, 8, generator=seeded())
    found = latents_of(pipeline, condition_image=maps, generator=seeded(), num_images_per_prompt=2)
    assert found.shape == (4, D, 4, 4)
    expected = F.avg_pool2d(maps, 2).repeat_interleave(2, dim=0)
    assert all(torch.allclose(sample[:, D:], expected) for sample in seen)


STAGES = {"method": "nearest", "multiplier": 0.5, "n_stages": 2}


def test_maps_by_stages_and_ones(tmp_path):
    """Every fourth pixel, and ones after them; a folder keeps both options, and one without them has neither."""
    options = {"condition_stages": STAGES, "condition_ones": True}
    make_pipeline(unet=make_unet(in_channels=D + 6), **options).save_pretrained(tmp_path)
    pipeline, seen = VQLatentDiffusionPipeline.from_pretrained(tmp_path), []
    spy(pipeline, seen)
    maps = torch.rand(2, 5, 16, 16, generator=seeded())
    latents_of(pipeline, condition_image=maps, generator=seeded())
    expected = torch.cat([maps[..., ::4, ::4], torch.ones(2, 1, 4, 4)], dim=1)
    assert seen and all(torch.equal(sample[:, D:], expected) for sample in seen)
    wide = torch.rand(1, 5, 16, 32, generator=seeded())
    assert latents_of(pipeline, condition_image=wide, height=8, width=16).shape == (1, D, 4, 8)
    with pytest.raises(ValueError, match="have a size that 2 times 0.5 is the 4x4 of the latents .* got 16x32"):
        latents_of(pipeline, condition_image=wide)
    with pytest.raises(ValueError, match="`condition_image` must give the 5 channels .* got 6"):
        latents_of(pipeline, condition_image=torch.rand(1, 6, 16, 16))
    with pytest.raises(ValueError, match="the denoiser takes 5 channels beside the latents"):
        latents_of(pipeline)
    index = json.loads((tmp_path / "model_index.json").read_text())
    new = ("condition_stages", "condition_ones", "condition_vqvae", "encode_condition")
    old = {name: value for name, value in index.items() if name not in new}
    (tmp_path / "model_index.json").write_text(json.dumps(old))
    maps = VQLatentDiffusionPipeline.from_pretrained(tmp_path).prepare_concatenated((4, 4), torch.rand(1, 6, 8, 8))
    assert len(old) == len(index) - len(new) and maps.shape == (1, 6, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition_stages": "nearest"}, "must be a dict with method, multiplier and n_stages, got 'nearest'"),
        ({"condition_stages": {**STAGES, "mode": 1}}, "must be a dict with method, multiplier and n_stages"),
        ({"condition_stages": {**STAGES, "method": "linear"}}, "`condition_stages` must have a method of .* 'linear'"),
        ({"condition_stages": {**STAGES, "multiplier": 0}}, "`condition_stages.multiplier` must be .* above 0"),
        ({"condition_stages": {**STAGES, "n_stages": 0.5}}, "`condition_stages.n_stages` must be an int"),
        ({"condition_ones": True}, "`condition_ones` needs a `unet` that takes a map .* got one of 5 input channels"),
    ],
)
def test_stages_and_ones_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(unet=make_unet(in_channels=D + 1), **options)


@pytest.mark.parametrize("own", [True, False])
def test_a_condition_is_encoded(own, tmp_path):
    """By its own tokenizer, of 4 pixels per latent, or by that of the images, of 2. Latents are taken as they are."""
    pixels = image(size=16 if own else 8)
    part = make_vqvae(channel_multiplier=(1, 1, 1), embed_dim=3, latent_channels=3)
    options = {"condition_vqvae": part} if own else {"encode_condition": True}
    channels = 3 if own else D
    make_pipeline(unet=make_unet(in_channels=D + channels), **options).save_pretrained(tmp_path)
    pipeline, seen = VQLatentDiffusionPipeline.from_pretrained(tmp_path), []
    spy(pipeline, seen)
    with torch.no_grad():
        expected = (part if own else pipeline.vqvae).encode(pixels).latents
    found = latents_of(pipeline, condition_image=pixels, generator=seeded())
    assert len(seen) == 3 and all(torch.equal(sample[:, D:], expected) for sample in seen)
    assert torch.equal(latents_of(pipeline, condition_image=expected, generator=seeded()), found)
    with pytest.raises(
        ValueError, match=r"`condition_image` must be \(B, 3, (8, 8|16, 16)\), .* got \(1, 3, 12, 12\)"
    ):
        latents_of(pipeline, condition_image=image(size=12))
    with pytest.raises(ValueError, match=f"`condition_image` must give the {channels} channels"):
        latents_of(pipeline, condition_image=torch.zeros(1, 5, 4, 4))
    with pytest.raises(ValueError, match="`condition_vqvae` must be an image tokenizer"):
        make_pipeline(unet=make_unet(in_channels=2 * D), condition_vqvae=make_unet())


def test_inpainting_with_a_tokenizer_of_the_condition():
    """It encodes the masked image."""
    part = make_vqvae(embed_dim=3, latent_channels=3)
    pipeline, seen = make_pipeline(unet=make_unet(in_channels=D + 4), condition_vqvae=part), []
    spy(pipeline, seen)
    pixels, mask = image(), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    pipeline(image=pixels, mask_image=mask, num_inference_steps=1)
    with torch.no_grad():
        expected = part.encode(torch.where(mask.bool(), torch.tensor(-1.0), pixels)).latents
    torch.testing.assert_close(seen[0][:, D : D + 3], expected)


def test_inputs_are_paired_in_order():
    """Images of one input are adjacent, whatever it consists of."""
    pipeline, given = make_pipeline("text"), torch.cat([image(3), image(4)])
    prompts, negative = ["a red cat", "dog"], ["blue", "a"]
    arguments = {"guidance_scale": 2.0, "strength": 0.8}
    found = latents_of(
        pipeline,
        prompt=prompts,
        negative_prompt=negative,
        image=given,
        num_images_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
        **arguments,
    )
    for i in range(4):
        row = i // 2
        own = {"prompt": prompts[row], "negative_prompt": negative[row], "image": given[row : row + 1]}
        alone = latents_of(pipeline, **own, generator=[seeded(i)], **arguments)
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_low_resolution_images():
    pipeline = make_pipeline(unet=make_unet(in_channels=D + 3))
    low = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8))
    other = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (4, 4, 3), np.uint8))
    both = pipeline(condition_image=[low, other], generator=[seeded(), seeded()], num_inference_steps=2)
    assert both.images[0].size == (8, 8) and not torch.equal(both.latents[0], both.latents[1])
    wide = PIL.Image.new("RGB", (8, 4))
    assert pipeline(condition_image=wide, height=8, width=16, num_inference_steps=1).images[0].size == (16, 8)
    with pytest.raises(ValueError, match="proportions of the 4x4 latents, got 4x8"):
        pipeline(condition_image=wide)


def test_semantic_maps_of_any_number():
    """One-hot classes, whatever the kind of number that holds them."""
    pipeline = make_pipeline(unet=make_unet(in_channels=D + 3))
    classes = torch.randint(3, (2, 8, 8), generator=seeded())
    maps = F.one_hot(classes, 3).movedim(-1, 1)
    found = [latents_of(pipeline, condition_image=m, generator=seeded()) for m in (maps, maps.bool(), maps.float())]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match=r"`condition_image` must be \(B, C, H, W\)"):
        latents_of(pipeline, condition_image=classes[0])


def test_inpainting():
    """The original's maps: latents of the image with black under the mask, and the mask in {-1, 1}."""
    pipeline, seen = make_pipeline(unet=make_unet(in_channels=2 * D + 1)), []
    spy(pipeline, seen)
    pixels, mask = image(), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    output = pipeline(image=pixels, mask_image=mask, generator=seeded(), num_inference_steps=2, output_type="pt")
    black = torch.where(mask.bool(), torch.tensor(-1.0), pixels)
    with torch.no_grad():
        torch.testing.assert_close(seen[0][:, D : 2 * D], pipeline.vqvae.encode(black).latents)
    assert torch.equal(seen[0][:, 2 * D :], torch.tensor([1.0, 1, -1, -1]).expand(1, 1, 4, 4))
    torch.testing.assert_close(output.images[..., 4:], pixels[..., 4:] / 2 + 0.5)
    assert not torch.allclose(output.images[..., :4], pixels[..., :4] / 2 + 0.5, atol=0.05)
    pair = torch.cat([pixels, -pixels])
    several = pipeline(image=pair, mask_image=mask, num_images_per_prompt=2, num_inference_steps=2, output_type="pt")
    torch.testing.assert_close(several.images[..., 4:], pair[..., 4:].repeat_interleave(2, dim=0) / 2 + 0.5)
    picture = PIL.Image.fromarray((mask[0, 0].numpy() * 255).astype(np.uint8))
    for same in (picture, mask.bool(), mask[0, 0]):
        again = pipeline(image=pixels, mask_image=same, generator=seeded(), num_inference_steps=2, output_type="pt")
        assert torch.equal(again.images, output.images)


# --------------------------------------------------------------------------------------------- text


def test_text_is_padded_and_cuts_are_named(caplog):
    encoder, tokenizer = make_text_parts()
    condition = encode_text(encoder, tokenizer, ["A Red cat", "dog"], lower_case=True, normalize=True)
    assert condition.mask.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    torch.testing.assert_close(condition.embeddings.norm(dim=-1), torch.ones(2, 6))
    plain = encode_text(encoder, tokenizer, "a red cat").embeddings
    torch.testing.assert_close(condition.embeddings[:1], plain / plain.norm(dim=-1, keepdim=True))
    from diffusers.utils import logging

    logging.enable_propagation()
    encode_text(encoder, tokenizer, "a red cat dog", max_length=2)
    assert "does not see 'cat dog'" in caplog.text
    caplog.clear()
    tokenizer.truncation_side = "left"
    encode_text(encoder, tokenizer, "a red cat dog", max_length=1)
    assert "does not see 'a red cat'" in caplog.text
    with pytest.raises(ValueError, match="`max_length` must be an int of at least 1, got 0"):
        encode_text(encoder, tokenizer, "a", max_length=0)
    with pytest.raises(ValueError, match="`max_length` must be at most 6, the positions of the encoder, got 7"):
        encode_text(encoder, tokenizer, "a", max_length=7)
    with pytest.raises(ValueError, match="`prompts` must be a str or a list"):
        encode_text(encoder, tokenizer, [])


def test_embeddings_in_place_of_text():
    pipeline = make_pipeline("text", text_mask=False)
    condition = encode_text(pipeline.text_encoder, pipeline.tokenizer, ["a red cat", ""], mask_padding=False)
    by_text = latents_of(pipeline, prompt="a red cat", guidance_scale=2.0, generator=seeded())
    embeds = {"prompt_embeds": condition.embeddings[:1], "negative_prompt_embeds": condition.embeddings[1:]}
    bare = make_pipeline("text", text_encoder=None, tokenizer=None)
    torch.testing.assert_close(latents_of(bare, **embeds, guidance_scale=2.0, generator=seeded()), by_text)
    assert not torch.allclose(latents_of(pipeline, prompt="dog", generator=seeded()), by_text)


def test_embeddings_with_their_masks():
    """Texts and embeddings mix, and a mask says which tokens of embeddings are seen."""
    pipeline = make_pipeline("text")
    by_text = latents_of(pipeline, prompt="a red cat", guidance_scale=2.0, generator=seeded())
    condition = encode_text(pipeline.text_encoder, pipeline.tokenizer, ["a red cat", ""])
    given = {"prompt_embeds": condition.embeddings[:1], "prompt_attention_mask": condition.mask[:1]}
    null = {"negative_prompt_embeds": condition.embeddings[1:], "negative_prompt_attention_mask": condition.mask[1:]}
    for mixed in ({**given, **null}, {"prompt": "a red cat", **null}, {**given, "negative_prompt": ""}):
        found = latents_of(pipeline, **mixed, guidance_scale=2.0, generator=seeded())
        torch.testing.assert_close(found, by_text, atol=1e-4, rtol=1e-4)
    unmasked = latents_of(pipeline, prompt_embeds=condition.embeddings[:1], guidance_scale=2.0, generator=seeded())
    assert not torch.allclose(unmasked, by_text)
