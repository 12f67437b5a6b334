"""The VQ-Diffusion pipeline with tiny real components, against chains written by hand."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hf_vq import MaskReplaceScheduler, VQDiffusionImagePipeline, VQVAE2Config, VQVAE2Model
from tests.pipelines.latent_diffusion_parts import make_text_parts, make_vqvae
from tests.pipelines.vq_diffusion_parts import (
    CODES,
    CONDITIONS,
    MASK,
    STEPS,
    codes,
    image,
    indices_of,
    log_probs_by_hand,
    make_pipeline,
    make_transformer,
    seeded,
)


# --------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("kind", CONDITIONS)
def test_prediction_by_hand(kind):
    """Guided logits are guided log-probabilities."""
    pipeline = make_pipeline(kind)
    sample = torch.randint(CODES + 1, (2, 4, 4), generator=seeded())
    arguments = {"guidance_scale": 1.0, **CONDITIONS[kind]}
    labels = arguments.get("class_labels") and pipeline.class_ids(arguments["class_labels"])
    with torch.no_grad():
        inputs = pipeline.prepare_condition(
            2, arguments.get("prompt"), labels, guided=arguments["guidance_scale"] != 1
        )
        found = pipeline.predict(sample, torch.tensor(4), *inputs, arguments["guidance_scale"])
        expected = log_probs_by_hand(pipeline, kind, sample, 4)
    torch.testing.assert_close(found.double().log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("steps", [STEPS, 4, 1])
def test_a_chain_by_hand(kind, steps):
    pipeline = make_pipeline(kind)
    options = {"truncation_rate": 0.9, "prior_rule": 2, "prior_weight": 1.0, "temperature": 1.2}
    scheduler, generator = MaskReplaceScheduler(CODES, STEPS), seeded()
    scheduler.set_timesteps(steps)
    sample = torch.full((2, 4, 4), MASK)
    with torch.no_grad():
        for t in {10: range(9, -1, -1), 4: (9, 6, 4, 1), 1: (9,)}[steps]:
            log_probs = log_probs_by_hand(pipeline, kind, sample, t).float()
            sample = scheduler.step(log_probs, t, sample, generator=generator, **options).prev_sample
    found = pipeline(**CONDITIONS[kind], **options, num_inference_steps=steps, generator=seeded(), output_type="pt")
    assert torch.equal(found.indices, sample)
    with torch.no_grad():
        pixels = pipeline.vqvae.decode_indices(sample).sample
    torch.testing.assert_close(found.images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"truncation_rate": 1e-6}])
def test_one_step_without_randomness_is_the_most_probable_picture(options):
    pipeline = make_pipeline("class")
    with torch.no_grad():
        masked = torch.full((2, 4, 4), MASK)
        expected = log_probs_by_hand(pipeline, "class", masked, STEPS - 1).argmax(-1)
    assert torch.equal(indices_of(pipeline, **CONDITIONS["class"], num_inference_steps=1, **options), expected)
    assert not torch.equal(indices_of(pipeline, **CONDITIONS["class"], num_inference_steps=1), expected)


def test_steps():
    pipeline, seen = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append(int(timestep))

    indices_of(pipeline, callback_on_step_end=callback)
    assert seen == list(range(STEPS - 1, -1, -1))
    seen.clear()
    indices_of(pipeline, callback_on_step_end=callback, timesteps=[9, 3, 2])
    assert seen == [9, 3, 2]


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_list_of_generators_makes_images_independent_of_their_batch(kind):
    pipeline = make_pipeline(kind)
    arguments = {**CONDITIONS[kind], "num_images_per_prompt": 2, "truncation_rate": 0.9}
    condition = {name: arguments.pop(name) for name in ("class_labels", "prompt") if name in arguments}
    if not condition:
        arguments["num_images_per_prompt"] = 4
    found = indices_of(pipeline, **arguments, **condition, generator=[seeded(i) for i in range(4)])
    assert len({tuple(row.tolist()) for row in found.flatten(1)}) == 4
    for i in range(4):
        alone = {name: value[i // 2] for name, value in condition.items()}  # images of one prompt are adjacent
        single = {**arguments, **alone, "num_images_per_prompt": 1}
        assert torch.equal(found[i : i + 1], indices_of(pipeline, **single, generator=[seeded(i)])), i


# --------------------------------------------------------------------------------------------- conditions


def test_no_condition_is_the_null_condition():
    pipeline = make_pipeline("class")
    masked = torch.full((1, 4, 4), MASK)
    with torch.no_grad():
        expected = pipeline.transformer(masked, STEPS - 1, class_labels=torch.tensor([2])).sample.argmax(-1)
    assert torch.equal(indices_of(pipeline, num_inference_steps=1, temperature=1e-4), expected)
    pipeline = make_pipeline("text")
    assert torch.equal(indices_of(pipeline), indices_of(pipeline, prompt=""))
    pipeline = make_pipeline("text_learned")
    learned = pipeline.transformer.null_embedding.detach()[None]
    assert torch.equal(indices_of(pipeline), indices_of(pipeline, prompt_embeds=learned))
    assert not torch.equal(indices_of(pipeline), indices_of(pipeline, prompt=""))


def test_negative_prompts_take_the_place_of_the_null_condition():
    for kind in ("text", "text_learned"):
        pipeline = make_pipeline(kind)
        arguments = {"prompt": "a red cat", "guidance_scale": 2.0}
        null = pipeline.transformer.null_embedding
        plain = indices_of(pipeline, **arguments)
        if null is None:
            assert torch.equal(plain, indices_of(pipeline, **arguments, negative_prompt=""))
        else:
            embeds = null.detach()[None]
            assert torch.equal(plain, indices_of(pipeline, **arguments, negative_prompt_embeds=embeds))
        assert not torch.equal(plain, indices_of(pipeline, **arguments, negative_prompt="a blue dog"))


def test_embeddings_in_place_of_texts():
    pipeline, bare = make_pipeline("text"), make_pipeline("text", text_encoder=None, tokenizer=None)
    given, negative = pipeline.encode_prompt(["a red cat"]), pipeline.encode_prompt("dog")
    by_text = indices_of(pipeline, prompt="a red cat", negative_prompt="dog", guidance_scale=2.0)
    embeds = {"prompt_embeds": given.embeddings, "negative_prompt_embeds": negative.embeddings}
    masks = {"prompt_attention_mask": given.mask, "negative_prompt_attention_mask": negative.mask}
    assert torch.equal(by_text, indices_of(bare, **embeds, **masks, guidance_scale=2.0))


def test_text_options_reach_the_encoder():
    """The original's: normalised states, padding with id 0 that nothing passes over."""
    options = {"text_normalize": True, "text_mask": False, "text_lower_case": True, "text_max_length": 5}
    pipeline = make_pipeline("text", **options)
    tokens = torch.tensor([[7, 2, 3, 5, 0]])  # [start] a red cat
    with torch.no_grad():
        states = pipeline.text_encoder(input_ids=tokens).last_hidden_state
        inputs = pipeline.prepare_condition(2, "A Red cat")[0]
    assert list(inputs) == ["encoder_hidden_states"]
    expected = states / states.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(inputs["encoder_hidden_states"], expected.expand(2, -1, -1))
    with torch.no_grad():
        tokens[:, 4:] = 4
        states = pipeline.text_encoder(input_ids=tokens).last_hidden_state
        other = make_pipeline("text", **options, text_pad_token_id=4).prepare_condition(1, "a red cat")[0]
    torch.testing.assert_close(other["encoder_hidden_states"], states / states.norm(dim=-1, keepdim=True))


@torch.no_grad()
def test_a_text_as_one_vector(tmp_path):
    """The projected state at the end of the text, which is [unk] here."""
    config = CLIPTextConfig(**{**make_text_parts(start=True)[0].config.to_dict(), "projection_dim": 8})
    torch.manual_seed(0)
    options = {"text_pooled": True, "text_normalize": True, "text_max_length": 5}
    make_pipeline("text", text_encoder=CLIPTextModelWithProjection(config), **options).save_pretrained(tmp_path)
    pipeline = VQDiffusionImagePipeline.from_pretrained(tmp_path)
    tokens = torch.tensor([[7, 2, 3, 5, 1], [7, 6, 1, 0, 0], [7, 1, 0, 0, 0]])  # [start] a red cat [unk], …
    encoder = pipeline.text_encoder
    states = encoder(input_ids=tokens, attention_mask=(tokens > 0).long()).last_hidden_state
    expected = states[torch.arange(3), torch.tensor([4, 2, 1])] @ encoder.text_projection.weight.T
    expected = (expected / expected.norm(dim=-1, keepdim=True))[:, None]
    inputs = pipeline.prepare_condition(2, ["a red cat !", "dog !"], negative_prompt="!", guided=True)
    torch.testing.assert_close(inputs[0]["encoder_hidden_states"], expected[:2])
    torch.testing.assert_close(inputs[1]["encoder_hidden_states"], expected[2:].expand(2, -1, -1))
    assert inputs[0]["encoder_attention_mask"].shape == (2, 1)
    pipeline.set_progress_bar_config(disable=True)
    assert indices_of(pipeline, prompt="a red cat", guidance_scale=2.0).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="`text_pooled` needs a text encoder with a projection, got a CLIPTextModel"):
        make_pipeline("text", text_pooled=True)


# --------------------------------------------------------------------------------------------- the call


def test_output_types():
    pipeline = make_pipeline("class")
    outputs = {
        t: pipeline(class_labels=[0, 1], generator=seeded(), output_type=t) for t in ("pil", "np", "pt", "indices")
    }
    assert outputs["indices"].images is None
    assert all(torch.equal(output.indices, outputs["pt"].indices) for output in outputs.values())
    pixels = outputs["pt"].images
    assert pixels.shape == (2, 3, 8, 8) and 0 <= pixels.min() and pixels.max() <= 1
    assert np.array_equal(outputs["np"].images, pixels.permute(0, 2, 3, 1).numpy())
    assert abs(np.asarray(outputs["pil"].images[1]) / 255 - outputs["np"].images[1]).max() <= 0.5 / 255 + 1e-6
    images, indices = pipeline(class_labels=[0, 1], generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, pixels) and torch.equal(indices, outputs["pt"].indices)
    assert indices.dtype == torch.int64 and indices.max() < CODES
    one_by_one = pipeline(class_labels=[0, 1], generator=seeded(), output_type="pt", decode_batch_size=1)
    torch.testing.assert_close(one_by_one.images, pixels, atol=1e-5, rtol=0)


def test_callback_changes_the_indices():
    pipeline = make_pipeline()
    last = lambda pipe, i, t, tensors: {"indices": torch.full_like(tensors["indices"], 5)} if t == 0 else None  # noqa: E731
    assert torch.equal(indices_of(pipeline, callback_on_step_end=last), torch.full((1, 4, 4), 5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([codes()], "`callback_on_step_end` must return a dict or None, got a list"),
        (codes(), "`callback_on_step_end` must return a dict or None, got a Tensor"),
        ({"indices": codes()[:, :2]}, r"must return `indices` as torch.int64 of shape \(1, 4, 4\), got .*\(1, 2, 4\)"),
        ({"indices": codes().float()}, "must return `indices` as torch.int64 .* got torch.float32"),
        ({"indices": [5]}, "must return `indices` as torch.int64 .* got list"),
        ({"indices": codes() - CODES}, "must return `indices` in 0 … 15 after step 9, got values from -"),
        ({"indices": torch.full((1, 4, 4), MASK)}, "in 0 … 15 after step 9, got values from 16 to 16"),
    ],
)
def test_what_a_callback_cannot_return(changed, message):
    with pytest.raises(ValueError, match=message):
        indices_of(make_pipeline(), callback_on_step_end=lambda pipe, i, t, tensors: changed if t == 0 else None)


def test_a_callback_may_mask_codes_but_not_in_the_end():
    masked = torch.full((1, 4, 4), MASK)
    arguments = {"callback_on_step_end": lambda pipe, i, t, tensors: {"indices": masked} if t == 1 else {}}
    assert indices_of(make_pipeline(), **arguments).max() < CODES


def test_progress_bar(capsys):
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    indices_of(pipeline, num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err


def test_no_gradients():
    pipeline = make_pipeline("text_learned")
    output = pipeline(prompt="cat", guidance_scale=2.0, output_type="pt")
    assert not output.images.requires_grad


def test_half_precision():
    pipeline = make_pipeline("text").to(torch.bfloat16)
    output = pipeline(**CONDITIONS["text"], generator=seeded(), output_type="pt")
    assert output.images.dtype == torch.float32 and output.indices.shape == (2, 4, 4)


def test_guidance_in_an_interval_by_hand():
    """The steps outside are those of the condition alone, and draw what an unguided chain draws there."""
    pipeline = make_pipeline("text")
    scheduler, generator = MaskReplaceScheduler(CODES, STEPS), seeded()
    scheduler.set_timesteps(5)
    sample = torch.full((1, 4, 4), MASK)
    conditional, null = pipeline.prepare_condition(1, "a red cat", guided=True)
    with torch.no_grad():
        for t, guides in zip((9, 7, 5, 3, 1), (False, True, True, True, False), strict=True):
            logits = pipeline.transformer(sample, torch.tensor(t), **conditional).sample
            if guides:
                away = pipeline.transformer(sample, torch.tensor(t), **null).sample
                logits = away + 4.0 * (logits - away)
            sample = scheduler.step(logits, t, sample, generator=generator).prev_sample
    options = {"guidance_scale": 4.0, "guidance_start": 0.2, "guidance_end": 0.8, "num_inference_steps": 5}
    assert torch.equal(indices_of(pipeline, prompt="a red cat", generator=seeded(), **options), sample)
    everywhere = indices_of(
        pipeline, prompt="a red cat", generator=seeded(), guidance_scale=4.0, num_inference_steps=5
    )
    assert not torch.equal(everywhere, sample)


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unconditional", {"class_labels": 0}, "`class_labels` needs a denoiser with classes"),
        ("unconditional", {"prompt": "a"}, "`prompt` needs a denoiser that is conditioned on text"),
        ("unconditional", {"guidance_scale": 2.0}, "`guidance_scale` other than 1 needs a conditional"),
        ("class", {"class_labels": 0, "prompt": "a"}, "`prompt` needs a denoiser"),
        ("text", {"class_labels": 0, "prompt": "a"}, "`class_labels` needs a denoiser"),
        ("class", {"class_labels": 3}, "from 0 to 1"),
        ("class", {"class_labels": 2}, "from 0 to 1"),  # the null class
        ("class", {"class_labels": -1}, "from 0 to 1"),
        ("class", {"class_labels": "owl"}, r"one of \['cat', 'dog'\], got 'owl'"),
        ("class", {"guidance_scale": 2.0}, "`guidance_scale` other than 1 needs `class_labels`"),
        ("class", {"class_labels": 0, "guidance_scale": -1}, "`guidance_scale` must be"),
        ("text", {"guidance_scale": 2.0}, "`guidance_scale` other than 1 needs a `prompt`"),
        ("class", {"class_labels": 0, "guidance_start": -0.1}, r"`guidance_start` must be a number in \[0, 1\]"),
        ("class", {"class_labels": 0, "guidance_end": 1.1}, r"`guidance_end` must be a number in \[0, 1\]"),
        ("class", {"class_labels": 0, "guidance_start": 0.5, "guidance_end": 0.5}, "`guidance_end` must be above"),
        (
            "class",
            {"class_labels": 0, "guidance_scale": 2.0, "guidance_start": 0.51, "guidance_end": 0.59},
            "at least one of the 10 steps",
        ),
        ("class", {"class_labels": 0, "guidance_scale": float("nan")}, "`guidance_scale` must be"),
        ("class", {"class_labels": 0, "guidance_scale": float("inf")}, "`guidance_scale` must be"),
        ("class", {"class_labels": True}, "`class_labels` must be ids from 0 to 1"),
        ("class", {"class_labels": 0, "negative_prompt": "a"}, "`negative_prompt` needs a denoiser"),
        ("text", {"prompt": [1]}, "`prompt` must be a str or a list"),
        ("text", {"prompt": 1}, "`prompt` must be a str or a list"),
        ("text", {"prompt": []}, "`prompt` must be a str or a list"),
        ("text", {"prompt": "a", "negative_prompt": []}, "`negative_prompt` must be a str or a list"),
        ("text", {"prompt": "a", "negative_prompt": 3}, "`negative_prompt` must be a str or a list .* got 3"),
        ("text", {"prompt_embeds": torch.zeros(1, 6, 8).long()}, "`prompt_embeds` must be a float tensor"),
        ("text", {"prompt_embeds": torch.zeros(0, 6, 8)}, "`prompt_embeds` must be finite and not empty"),
        (
            "text",
            {"prompt_embeds": torch.zeros(2, 6, 8), "prompt_attention_mask": torch.eye(6)[:2] * torch.eye(2)[:, :1]},
            "`prompt`, or `prompt_attention_mask`, must have a token .* none in row 1",
        ),
        ("text", {"prompt": "a", "prompt_embeds": torch.zeros(1, 6, 8)}, "Only one of `prompt` and `prompt_embeds`"),
        ("text", {"prompt_embeds": torch.zeros(2, 8)}, r"`prompt_embeds` must be a float tensor \(B, S, D\)"),
        ("text", {"prompt": "a", "prompt_attention_mask": torch.ones(1, 6)}, "`prompt_attention_mask` needs"),
        ("text_learned", {"prompt_embeds": torch.zeros(1, 5, 8), "guidance_scale": 2.0}, "as many tokens of the same"),
        ("unconditional", {"num_inference_steps": STEPS + 1}, "`num_inference_steps` must be an int in 1…10"),
        ("unconditional", {"num_inference_steps": 0}, "`num_inference_steps` must be an int in 1…10"),
        ("unconditional", {"timesteps": [8, 3]}, "`timesteps` must fall from 9"),
        ("unconditional", {"strength": 0.5}, "`strength` needs an `image`"),
        ("unconditional", {"indices": codes(), "strength": 1.5}, r"`strength` must be a number in \(0, 1\]"),
        ("unconditional", {"indices": codes(), "strength": 0.05}, "`strength` must leave at least one of 10"),
        ("unconditional", {"indices": codes(), "image": image()}, "Only one of `image` and `indices`"),
        ("unconditional", {"indices": codes() + CODES}, "`indices` must lie in 0 … 15"),
        ("unconditional", {"indices": codes() - CODES}, "`indices` must lie in 0 … 15"),
        ("unconditional", {"indices": codes()[0]}, r"`indices` must be int64 codes of shape \(B, 4, 4\)"),
        ("unconditional", {"indices": codes().float()}, "`indices` must be int64"),
        (
            "unconditional",
            {"indices": codes()[:0]},
            r"`indices` must be int64 codes .* got torch.int64 of shape \(0, 4, 4\)",
        ),
        ("unconditional", {"indices": codes(), "strength": "a"}, r"`strength` must be a number in \(0, 1\], got 'a'"),
        ("unconditional", {"image": image()[:0]}, "`image` must be finite and not empty"),
        ("unconditional", {"image": image() / 0 * 0}, "`image` must be finite and not empty"),
        ("unconditional", {"image": image(), "mask_image": torch.ones(1, 0, 4)}, "`mask_image` must be"),
        ("unconditional", {"image": image(), "mask_image": torch.full((8, 8), torch.nan)}, "`mask_image` must be"),
        ("unconditional", {"image": torch.zeros(1, 3, 4, 8)}, "`image` must be 8 high and 8 wide"),
        ("unconditional", {"mask_image": torch.ones(8, 8)}, "`mask_image` needs an `image`"),
        ("unconditional", {"image": image(), "mask_image": torch.ones(6, 8)}, "`mask_image` must have the size"),
        ("unconditional", {"image": image(), "mask_image": torch.full((8, 8), 2.0)}, "`mask_image` must be"),
        ("unconditional", {"truncation_rate": 0.0}, "`truncation_rate`"),
        ("unconditional", {"temperature": 0.0}, "`temperature`"),
        ("unconditional", {"prior_rule": 3}, "`prior_rule`"),
        ("unconditional", {"prior_rule": 2, "prior_weight": -1.0}, "`prior_weight`"),
        ("unconditional", {"output_type": "jpg"}, "`output_type` must be one of"),
        ("unconditional", {"num_images_per_prompt": 0}, "`num_images_per_prompt` must be"),
        ("unconditional", {"generator": [seeded(), seeded()]}, "`generator` must hold one"),
        ("unconditional", {"callback_on_step_end": 1}, "must be callable"),
        ("unconditional", {"decode_batch_size": 0}, "`decode_batch_size` must be an int of at least 1, got 0"),
        ("unconditional", {"decode_batch_size": None}, "`decode_batch_size` must be an int of at least 1, got None"),
        (
            "class",
            {"class_labels": [0, 1], "indices": codes(3)},
            "`class_labels` must hold one entry .* 3 inputs, got 2",
        ),
        (
            "class",
            {"class_labels": [0, 1], "indices": codes(4)},
            "`class_labels` must hold one entry .* 4 inputs, got 2",
        ),
        ("class", {"class_labels": [0, 1, 0, 1], "image": image(2)}, "`image` must hold one entry .* 4 inputs, got 2"),
        (
            "text",
            {"prompt": ["a", "cat"], "indices": codes(3), "num_images_per_prompt": 2},
            "`prompt` must hold one entry for all, or one for each of 3 inputs, got 2",
        ),
        (
            "text",
            {"prompt": ["a"] * 4, "negative_prompt": ["cat", "dog"], "guidance_scale": 2.0},
            "`negative_prompt` must hold one entry .* 4 inputs, got 2",
        ),
        (
            "text",
            {"prompt_embeds": torch.ones(3, 6, 8), "image": image(6), "mask_image": torch.ones(8, 8)},
            "`prompt_embeds` must hold one entry .* 6 inputs, got 3",
        ),
        (
            "unconditional",
            {"image": image(4), "mask_image": torch.ones(2, 8, 8)},
            "`mask_image` must hold one entry .* 4 inputs, got 2",
        ),
    ],
)
def test_errors(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(kind)(**arguments)


def test_errors_of_parts():
    with pytest.raises(ValueError, match="`transformer` must have as many codes as `vqvae`: got 15 and 16"):
        make_pipeline(transformer=make_transformer(num_embeddings=15))
    with pytest.raises(ValueError, match="`scheduler` must have as many codes as `vqvae`: got 15 and 16"):
        make_pipeline(scheduler=MaskReplaceScheduler(15, STEPS))
    with pytest.raises(ValueError, match="`scheduler` must have as many timesteps as `transformer`: got 11 and 10"):
        make_pipeline(scheduler=MaskReplaceScheduler(CODES, 11))
    residual = make_vqvae(quantizer="residual", quantizer_kwargs={"depth": 2})
    with pytest.raises(ValueError, match="`vqvae` must have one code at each position, .* 'residual'"):
        make_pipeline(vqvae=residual)
    levels = VQVAE2Model(VQVAE2Config(num_embeddings=CODES, embed_dim=4, hidden_size=8, residual_hidden_size=4))
    with pytest.raises(ValueError, match="`vqvae` must have one level of codes, got 2"):
        make_pipeline(vqvae=levels)


def test_ids_of_names():
    assert make_pipeline("class", id2label={"0": "owl", 2: "none"}).id2label == {0: "owl", 2: "none"}
    with pytest.raises(ValueError, match=r"`id2label` must map ids, ints from 0, .*, got the ids \['a'\]"):
        make_pipeline("class", id2label={"a": "owl", "1": "dog"})


def test_a_text_of_no_tokens():
    """It would leave nothing to attend to; without `text_mask` its padding is read."""
    encoder, tokenizer = make_text_parts()
    pipeline = make_pipeline("text", text_encoder=encoder, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="`prompt`, or .* must have a token .* none in row 1"):
        pipeline(["a", "", "a"])
    with pytest.raises(ValueError, match="`negative_prompt`, or .* must have a token .* none in row 0"):
        pipeline("a", guidance_scale=2.0)
    unmasked = make_pipeline("text", text_encoder=encoder, tokenizer=tokenizer, text_mask=False)
    assert indices_of(unmasked, prompt="a", guidance_scale=2.0).shape == (1, 4, 4)


def test_guidance_needs_a_null_condition():
    bare = make_pipeline("text", text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="`negative_prompt_embeds` must be given"):
        bare(prompt_embeds=torch.zeros(1, 6, 8), guidance_scale=2.0)
    with pytest.raises(ValueError, match="`prompt_embeds` must be given"):
        bare()
    no_null = make_pipeline("class", transformer=make_transformer("class", null_class=False))
    with pytest.raises(ValueError, match="a denoiser with a null class"):
        no_null(class_labels=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="`class_labels` must be given: the denoiser has classes and no null class"):
        no_null()


# --------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", CONDITIONS)
def test_saved_and_loaded(tmp_path, kind):
    options = {"text_normalize": True, "text_mask": False} if kind == "text" else {}
    pipeline = make_pipeline(kind, **options)
    pipeline.save_pretrained(tmp_path)
    expected = indices_of(pipeline, **CONDITIONS[kind])
    for loader in (VQDiffusionImagePipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is VQDiffusionImagePipeline
        assert torch.equal(indices_of(loaded, **CONDITIONS[kind]), expected)
        assert loaded.id2label == pipeline.id2label and loaded.config.text_mask == pipeline.config.text_mask


def test_the_schedule_is_saved(tmp_path):
    scheduler = MaskReplaceScheduler(CODES, STEPS, schedule="uniform_only")
    pipeline = make_pipeline(scheduler=scheduler, vqvae=make_vqvae())
    pipeline.save_pretrained(tmp_path)
    seen = []
    loaded = VQDiffusionImagePipeline.from_pretrained(tmp_path)
    indices_of(loaded, callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["indices"]))
    assert (torch.cat(seen) < MASK).all()
    assert torch.equal(seen[-1], indices_of(pipeline))
