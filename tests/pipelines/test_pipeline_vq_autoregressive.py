"""The autoregressive pipeline with tiny real components."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from hf_vq.images import numpy_to_pil, to_pixel_values
from hf_vq.models.autoencoders.configuration_vqvae import VQVAEConfig
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.models.autoencoders.modeling_vqvae import VQVAEModel
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM
from hf_vq.pipelines.code_sampling import draw_codes
from hf_vq.pipelines.completion import kept_codes
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.pipelines.autoregressive_parts import KINDS, make_pipeline, make_small_pipeline, seeded
from tests.pipelines.completing import complete


def arguments(kind):
    return {
        "unconditional": {"num_images_per_prompt": 2},
        "class": {"class_labels": [0, 2]},
        "codes": {"condition": torch.tensor([[0, 1, 2, 3], [6, 5, 4, 3]])},
        "coordinates": {"condition": torch.stack([torch.arange(16), torch.arange(16, 32)])},
    }[kind]


# ---------------------------------------------------------------------------------------------------- draws


def test_draws_follow_the_distribution():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log() + 3.7
    codes = draw_codes(log_probs.expand(40000, -1), seeded())
    frequencies = torch.bincount(codes, minlength=5) / 40000
    # 40000 draws: standard deviation at most 0.0025
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), atol=0.01, rtol=0)
    assert frequencies[4] == 0


def test_a_row_with_its_own_generator_does_not_depend_on_the_others():
    log_probs = torch.randn(3, 1000)
    together = draw_codes(log_probs, [seeded(1), seeded(2), seeded(3)])
    alone = [draw_codes(log_probs[i, None], [seeded(i + 1)]).item() for i in range(3)]
    assert together.tolist() == alone and len(set(alone)) == 3


def test_samples_follow_the_prior():
    pipeline = make_small_pipeline()
    sampled = pipeline(class_labels=1, num_images_per_prompt=6000, generator=seeded(), output_type="indices").indices
    codes = torch.cartesian_prod(*[torch.arange(2)] * 3)
    with torch.no_grad():
        expected = pipeline.prior.log_likelihood(codes, 1).exp()
    frequencies = torch.bincount(sampled.flatten(1) @ torch.tensor([4, 2, 1]), minlength=8) / 6000
    assert expected.max() > 0.2
    torch.testing.assert_close(frequencies, expected, atol=0.025, rtol=0)


# ---------------------------------------------------------------------------------------------------- the call


@pytest.mark.parametrize("kind", KINDS)
def test_outputs(kind):
    pipeline = make_pipeline(kind)
    outputs = {
        t: pipeline(**arguments(kind), generator=seeded(), output_type=t) for t in ("pil", "np", "pt", "indices")
    }
    indices = outputs["indices"].indices
    assert indices.shape == (2, 4, 4) and indices.dtype == torch.int64 and indices.unique().numel() > 4
    assert outputs["indices"].images is None
    assert all(torch.equal(output.indices, indices) for output in outputs.values())
    with torch.no_grad():
        expected = (pipeline.vqvae.decode_indices(indices).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(outputs["pt"].images, expected)
    np.testing.assert_allclose(outputs["np"].images, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    for picture, pixels in zip(outputs["pil"].images, outputs["np"].images, strict=True):
        assert isinstance(picture, PIL.Image.Image) and picture.size == (8, 8)
        np.testing.assert_allclose(np.array(picture) / 255, pixels, atol=0.51 / 255)
    images, same = pipeline(**arguments(kind), generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, outputs["pt"].images) and torch.equal(same, indices)


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}]
)
def test_caches_agree(filters):
    pipeline = make_pipeline()
    options = {"class_labels": [0, 1, 2], "output_type": "indices", **filters}
    expected = pipeline(**options, generator=seeded(), use_cache=False).indices
    assert torch.equal(pipeline(**options, generator=seeded()).indices, expected)
    assert torch.equal(pipeline(**options, generator=seeded(), cache_implementation="static").indices, expected)


def test_filters_and_guidance_act():
    pipeline = make_pipeline()
    prompt = pipeline.prior.prepare_condition([0, 1])
    greedy = pipeline.prior.extract_indices(pipeline.prior.generate(prompt, do_sample=False))
    output = pipeline.prior.generate(prompt, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(pipeline.prior.extract_indices(output), greedy)
    with pytest.raises(ValueError, match="`sequences` must be a tensor, got a list"):
        pipeline.prior.extract_indices([0])
    options = {"class_labels": [0, 1], "output_type": "indices"}
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert torch.equal(pipeline(**options, **filters).indices, greedy)
    guided = pipeline.prior.extract_indices(pipeline.prior.generate(prompt, do_sample=False, guidance_scale=5.0))
    assert torch.equal(pipeline(**options, top_k=1, guidance_scale=5.0).indices, guided)
    assert not torch.equal(guided, greedy)
    unconditional = pipeline(num_images_per_prompt=2, top_k=1, output_type="indices").indices
    assert torch.equal(pipeline(**options, top_k=1, guidance_scale=0.0).indices, unconditional)


def test_generator_reproduces_and_leaves_global_randomness_alone():
    pipeline = make_pipeline()
    options = {"class_labels": [0, 1], "num_images_per_prompt": 2, "output_type": "indices"}
    state = torch.get_rng_state()
    first = pipeline(**options, generator=seeded(1)).indices
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipeline(**options, generator=seeded(1)).indices, first)
    assert not torch.equal(pipeline(**options, generator=seeded(2)).indices, first)
    torch.manual_seed(5)
    free = pipeline(**options).indices
    assert not torch.equal(pipeline(**options).indices, free)
    torch.manual_seed(5)
    assert torch.equal(pipeline(**options).indices, free)


def test_a_generator_for_each_image_makes_it_independent_of_its_batch():
    pipeline = make_pipeline()
    options = {"output_type": "indices", "guidance_scale": 2.0}
    together = pipeline(class_labels=[0, 1, 2], generator=[seeded(i) for i in range(3)], **options).indices
    for i in range(3):
        alone = pipeline(class_labels=i, generator=[seeded(i)], **options).indices
        assert torch.equal(alone[0], together[i])


def test_class_names_and_number_of_images():
    pipeline = make_pipeline()
    options = {"output_type": "indices", "num_images_per_prompt": 2}
    named = pipeline(class_labels=["owl", "cat"], generator=seeded(), **options).indices
    assert named.shape == (4, 4, 4)
    assert torch.equal(pipeline(class_labels=[2, 0], generator=seeded(), **options).indices, named)
    by_hand = pipeline(class_labels=torch.tensor([2, 2, 0, 0]), generator=seeded(), output_type="indices").indices
    assert torch.equal(by_hand, named)


def test_callback_sees_every_code():
    pipeline = make_pipeline()
    seen = []
    output = pipeline(
        class_labels=[0, 1],
        output_type="indices",
        callback_on_step_end=lambda pipe, step, position, kwargs: seen.append(
            (pipe, step, position, kwargs["indices"])
        ),
    )
    assert [(step, position) for _, step, position, _ in seen] == [(i, i) for i in range(16)]
    assert all(pipe is pipeline for pipe, *_ in seen)
    for _, step, _, indices in seen:
        assert torch.equal(indices, output.indices.flatten(1)[:, : step + 1])


def test_decoding_in_slices_is_the_same():
    pipeline = make_pipeline()
    indices = torch.randint(8, (5, 4, 4))
    torch.testing.assert_close(pipeline.decode_indices(indices, batch_size=2), pipeline.decode_indices(indices))
    with pytest.raises(ValueError, match="batch_size"):
        pipeline.decode_indices(indices, batch_size=0)


def test_single_channel_images():
    output = make_pipeline(channels=1)(class_labels=0)
    assert output.images[0].mode == "L" and output.images[0].size == (8, 8)
    with pytest.raises(ValueError, match="channels"):
        make_pipeline(channels=4)(class_labels=0)
    assert make_pipeline(channels=4)(class_labels=0, output_type="pt").images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(dtype, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "float32")
    pipeline = VQAutoregressivePipeline.from_pretrained(tmp_path / "float32", dtype=dtype)
    pipeline.save_pretrained(tmp_path / "again")
    loaded = VQAutoregressivePipeline.from_pretrained(tmp_path / "again", dtype=dtype)
    for name in ("vqvae", "prior"):
        saved = getattr(pipeline, name).state_dict()
        original = getattr(make_pipeline(), name).state_dict()
        for key, tensor in getattr(loaded, name).state_dict().items():
            assert tensor.dtype == saved[key].dtype and torch.equal(tensor, saved[key]), key
            assert torch.equal(tensor, original[key].to(tensor.dtype)), key
    assert loaded.prior.dtype == loaded.vqvae.decoder.conv_in.weight.dtype == dtype
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
    options = {"class_labels": ["dog", 2], "guidance_scale": 2.0, "output_type": "pt"}
    expected, output = pipeline(generator=seeded(), **options), loaded(generator=seeded(), **options)
    assert torch.equal(output.indices, expected.indices) and torch.equal(output.images, expected.images)
    assert output.images.dtype == torch.float32


def test_the_image_processor_beside_the_tokenizer_is_saved_again(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "first")
    VQImageProcessor(size=24).save_pretrained(tmp_path / "first" / "vqvae")
    pipeline = VQAutoregressivePipeline.from_pretrained(tmp_path / "first")
    pipeline.save_pretrained(tmp_path / "second")
    assert VQImageProcessor.from_pretrained(tmp_path / "second" / "vqvae").size.shortest_edge == 24
    parts = {name for name, part in pipeline.components.items() if part is not None}
    assert parts == {"vqvae", "prior"}
    make_pipeline().save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "vqvae" / "preprocessor_config.json").exists()


def test_index_of_a_folder_with_code_names_the_installed_classes(tmp_path):
    import hf_vq

    assert hf_vq.VQGANModel is VQGANModel
    file = tmp_path / "model_index.json"
    index = {
        "_class_name": ["pipeline_vq_autoregressive", "VQAutoregressivePipeline"],
        "_diffusers_version": "0.42.1",
        "vqvae": ["modeling_vqgan", "VQGANModel"],
        "prior": ["modeling_vq_gpt", "VQGPTForCausalLM"],
        "other": ["modeling_other", "SomebodyElsesModel"],
        "missing": [None, None],
    }
    file.write_text(json.dumps(index))
    assert VQAutoregressivePipeline._dict_from_json_file(file) == {
        **index,
        "_class_name": "VQAutoregressivePipeline",
        "vqvae": ["hf_vq", "VQGANModel"],
        "prior": ["hf_vq", "VQGPTForCausalLM"],
    }


@pytest.mark.parametrize(
    "kind, bad, message",
    [
        ("class", {"class_labels": [3]}, "`class_labels` must be ids from 0 to 2"),
        ("class", {"class_labels": "cow"}, "`class_labels` must be .*, or one of"),
        ("class", {"condition": torch.zeros(1, 4, dtype=torch.long)}, "condition_type is 'codes'"),
        ("codes", {"class_labels": [1]}, "condition_type is 'class'"),
        ("unconditional", {"class_labels": [1]}, "condition_type is 'class'"),
        ("class", {"class_labels": 0, "condition": torch.zeros(1, 4)}, "Only one"),
        ("class", {"guidance_scale": 2.0}, "guidance_scale"),
        ("unconditional", {"guidance_scale": 2.0}, "guidance_scale"),
        ("class", {"class_labels": 0, "guidance_scale": -1.0}, "guidance_scale"),
        ("class", {"class_labels": 0, "temperature": 0}, "temperature"),
        ("class", {"class_labels": 0, "top_k": 0}, "top_k"),
        ("class", {"class_labels": 0, "top_p": 0.0}, "top_p"),
        ("class", {"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ("class", {"class_labels": 0, "decode_batch_size": 0}, "`decode_batch_size` must be an int of at least 1"),
        ("class", {"class_labels": 0, "num_images_per_prompt": "two"}, "num_images_per_prompt"),
        ("class", {"class_labels": 0, "output_type": "jpg"}, "output_type"),
        ("class", {"class_labels": 0, "generator": 5}, "generator"),
        ("class", {"class_labels": [0, 1], "generator": [torch.Generator()]}, "generator"),
        ("class", {"class_labels": 0, "callback_on_step_end": 5}, "callback_on_step_end"),
    ],
)
def test_bad_arguments(kind, bad, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(kind)(**bad)


def test_components_must_have_one_codebook():
    pipeline = make_pipeline()
    prior = VQGPTForCausalLM(VQGPTConfig(codebook_size=9, grid_size=2, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="codes"):
        VQAutoregressivePipeline(pipeline.vqvae, prior)


def test_a_tokenizer_of_several_codes_a_position_is_refused():
    pipeline = make_pipeline()
    sizes = {"hidden_size": 4, "residual_hidden_size": 4, "embed_dim": 4, "num_embeddings": 8}
    vqvae = VQVAEModel(VQVAEConfig(**sizes, quantizer="residual", quantizer_kwargs={"depth": 2}))
    with pytest.raises(ValueError, match="`vqvae` must have one code at each position, got the quantizer 'residual'"):
        VQAutoregressivePipeline(vqvae, pipeline.prior)


# ---------------------------------------------------------------------------------------------------- completion


def random_indices(batch_size=2):
    return torch.randint(8, (batch_size, 4, 4), generator=seeded(9))


@pytest.mark.parametrize("half", ["top", "bottom", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_completion_keeps_a_half(kind, half):
    pipeline = make_pipeline(kind)
    options = {name: value for name, value in arguments(kind).items() if name != "num_images_per_prompt"}
    indices = random_indices()
    output = complete(pipeline, indices=indices, keep=half, generator=seeded(), **options)
    rows, columns = {
        "top": (slice(0, 2), slice(None)),
        "bottom": (slice(2, 4), slice(None)),
        "left": (slice(None), slice(0, 2)),
        "right": (slice(None), slice(2, 4)),
    }[half]
    assert torch.equal(output.indices[:, rows, columns], indices[:, rows, columns])
    changed = output.indices != indices
    assert changed.any() and len(output.images) == 2


def test_completion_of_the_top_is_generation_from_a_prompt():
    pipeline = make_pipeline()
    indices = random_indices()
    prompt = torch.cat([pipeline.prior.prepare_condition([0, 1]), indices.flatten(1)[:, :8]], dim=1)
    for scale in (1.0, 4.0):
        expected = pipeline.prior.generate(prompt, do_sample=False, guidance_scale=scale)
        output = complete(pipeline, indices=indices, keep="top", class_labels=[0, 1], top_k=1, guidance_scale=scale)
        assert torch.equal(output.indices, pipeline.prior.extract_indices(expected))


def test_sampled_codes_are_conditioned_on_the_kept_ones_before_them():
    pipeline = make_pipeline()
    indices = random_indices(1)
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[1, 2] = keep[2, 0] = True
    output = complete(pipeline, indices=indices, keep=keep, class_labels=1, top_k=1).indices.flatten()
    sequence = pipeline.prior.prepare_condition(1)
    for position in range(16):
        with torch.no_grad():
            code = pipeline.prior(input_ids=sequence).logits[0, -1].argmax()
        if keep.flatten()[position]:
            code = indices.flatten()[position]
        assert output[position] == code
        sequence = torch.cat([sequence, code.view(1, 1)], dim=1)


def test_completion_of_different_parts_and_of_images():
    pipeline = make_pipeline()
    image = torch.rand(3, 8, 8, generator=seeded(4)) * 2 - 1
    indices = pipeline.vqvae.encode(image[None]).indices
    keep = torch.zeros(2, 4, 4, dtype=torch.bool)
    keep[0, :, 1] = True
    keep[1, 3] = True
    output = complete(pipeline, image, keep, class_labels=[0, 1], num_images_per_prompt=2, generator=seeded())
    assert output.indices.shape == (4, 4, 4)
    for i in range(4):
        kept = keep[i // 2]
        assert torch.equal(output.indices[i][kept], indices[0][kept])
    picture = numpy_to_pil(image[None].permute(0, 2, 3, 1).numpy() / 2 + 0.5)[0]
    all_but_last = torch.arange(16).view(4, 4) < 15
    from_picture = complete(pipeline, picture, all_but_last, class_labels=0)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    expected = pipeline.vqvae.encode(pixels[None]).indices
    assert torch.equal(from_picture.indices[:, all_but_last], expected[:, all_but_last])


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_images_are_prepared_as_by_the_image_processor(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 4), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    if mode == "I;16":
        image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode != "RGBA":
        image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((2, 3))
    image.getexif()[0x0112] = 6  # to be shown turned a quarter clockwise
    expected = VQImageProcessor(do_resize=False, do_center_crop=False)(image, return_tensors="pt").pixel_values
    values = to_pixel_values(image, 3)
    assert values.shape == (1, 3, 12, 8)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value, message", [(np.float32(0.5), "no fixed range"), (np.int32(-1), "16 bits")])
def test_images_without_a_range_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        to_pixel_values(PIL.Image.fromarray(np.full((8, 8), value)), 3)


def test_pixel_masks_keep_a_code_only_with_all_its_pixels():
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[3, 5] = False
    expected = torch.ones(1, 4, 4, dtype=torch.bool)
    expected[0, 1, 2] = False
    assert torch.equal(kept_codes((~mask).float()[None, None], (4, 4), 2), expected)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({}, "`mask_image` needs an `image`"),
        ({"image": torch.zeros(3, 8, 8), "indices": torch.zeros(1, 4, 4)}, "Only one"),
        (
            {"image": torch.zeros(3, 4, 8), "keep": torch.arange(32).view(4, 8) < 8},
            "`image` must be 8 high and 8 wide",
        ),
        ({"image": torch.zeros(8, 8)}, "image"),
        ({"image": "picture.png"}, "image"),
        (
            {"image": torch.arange(192.0).view(3, 8, 8)},
            r"`image` must be a tensor in \[-1, 1\], got values from 0 to 191",
        ),
        ({"indices": torch.zeros(1, 4, 4)}, "int64"),
        ({"indices": torch.full((1, 4, 4), 8)}, "0 … 7"),
        ({"indices": random_indices(), "keep": torch.ones(5, 4, dtype=torch.bool)}, "mask_image"),
        ({"indices": random_indices(), "class_labels": [0, 1, 2]}, "rows"),
    ],
)
def test_bad_completions(bad, message):
    with pytest.raises(ValueError, match=message):
        complete(make_pipeline(), **bad)


# ---------------------------------------------------------------------------------------------------- rejection


def brightness(images, class_ids):
    return images.mean(dim=(1, 2, 3)) * (class_ids + 1)


def test_rejection_keeps_the_best_of_what_was_drawn():
    pipeline = make_pipeline()
    options = {"num_images_per_class": 3, "batch_size": 4, "output_type": "pt", "top_k": 5}
    results = pipeline.rejection_sample(
        [2, 0], brightness, acceptance_rates=[1.0, 0.5, 0.25], generator=seeded(), **options
    )
    generator = seeded()
    for j, label in enumerate((2, 0)):
        drawn = torch.cat(
            [
                pipeline(
                    class_labels=label, num_images_per_prompt=4, top_k=5, generator=generator, output_type="pt"
                ).images
                for _ in range(3)
            ]
        )
        scores = brightness(drawn, torch.full((12,), label))
        for rate, candidates in ((1.0, 3), (0.5, 6), (0.25, 12)):
            best = scores[:candidates].sort(descending=True)
            rows = slice(3 * j, 3 * j + 3)
            torch.testing.assert_close(results[rate].scores[rows], best.values[:3])
            torch.testing.assert_close(results[rate].images[rows], drawn[best.indices[:3]])
            assert results[rate].class_ids[rows].tolist() == [label] * 3
            assert results[rate].acceptance_rate == rate
    for result in results.values():
        assert result.threshold == result.scores.min().item() and result.indices.shape == (6, 4, 4)
    assert results[0.25].scores.sum() > results[1.0].scores.sum()
    single = pipeline.rejection_sample([2, 0], brightness, acceptance_rates=0.25, generator=seeded(), **options)
    assert torch.equal(single.indices, results[0.25].indices)


def test_acceptance_rate_is_what_was_accepted():
    pipeline = make_pipeline()
    result = pipeline.rejection_sample("dog", brightness, acceptance_rates=0.3, output_type="indices")
    assert result.acceptance_rate == 1 / 4 and result.images is None
    result = pipeline.rejection_sample("dog", brightness, num_images_per_class=7, acceptance_rates=0.7)
    assert result.acceptance_rate == 7 / 10 and len(result.images) == 7


def test_rejection_by_an_image_classifier():
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    classifier = ViTForImageClassification(config).eval()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pipeline = make_pipeline()
    result = pipeline.rejection_sample(
        [0, 1], classifier, 2, acceptance_rates=0.5, image_processor=processor, generator=seeded()
    )
    with torch.no_grad():
        logits = classifier(**processor(images=result.images, return_tensors="pt")).logits
    expected = logits.softmax(-1)[range(4), [0, 0, 1, 1]]
    torch.testing.assert_close(result.scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"class_labels": None}, "class_labels"),
        ({"class_labels": [1, 1]}, "differ"),
        ({"acceptance_rates": 0.0}, "acceptance_rates"),
        ({"acceptance_rates": [0.5, 1.5]}, "acceptance_rates"),
        ({"acceptance_rates": []}, "acceptance_rates"),
        ({"generator": [torch.Generator()]}, "generator"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_images_per_class": 0}, "`num_images_per_class` must be an int of at least 1, got 0"),
        ({"num_images_per_class": 1.5}, "`num_images_per_class` must be an int of at least 1, got 1.5"),
        ({"acceptance_rates": "half"}, "acceptance_rates"),
        ({"classifier": lambda images, class_ids: class_ids * float("nan")}, "`classifier` .* nan"),
        ({"classifier": lambda images, class_ids: images.mean()}, "one score"),
        ({"classifier": make_pipeline().vqvae}, "image_processor"),
        ({"classifier": "vit"}, "`classifier` must be a function or a model, got a str"),
    ],
)
def test_bad_rejections(bad, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().rejection_sample(**{"class_labels": 0, "classifier": brightness, **bad})
