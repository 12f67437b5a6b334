"""The hierarchical pipeline with tiny real components, against the joint distribution of its levels."""

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from hf_vq.hub import save_with_code
from hf_vq.hub_cards import model_card
from hf_vq.models.autoencoders.configuration_vqvae import VQVAEConfig
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from hf_vq.models.autoencoders.modeling_vqvae import VQVAEModel
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM
from hf_vq.pipelines.completion import kept_at_levels
from hf_vq.pipelines.conditioning import to_mask
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from hf_vq.pipelines.pipeline_vqvae2 import VQVAE2Pipeline
from tests.pipelines.completing import complete
from tests.pipelines.vqvae2_parts import CLASSES, make_pipeline, make_prior, make_vqvae, seeded


def same(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def greedy(pipeline, label, kept=None):
    """The likeliest code at each position, by a full pass over the sequence each time; `kept` forces some."""
    above, levels = {}, []
    for level, prior in enumerate(pipeline.priors):
        sequence, grid = prior.prepare_condition(label), prior.config.grid_size
        for position in range(grid[0] * grid[1]):
            with torch.no_grad():
                code = prior(input_ids=sequence, use_cache=False, **above).logits[:, -1].argmax(-1)
            if kept is not None and kept[level][1].flatten()[position]:
                code = kept[level][0].flatten()[position].view(1)
            sequence = torch.cat([sequence, code[:, None]], dim=1)
        levels.append(prior.extract_indices(sequence))
        above = {"condition_indices": levels[-1]}
    return tuple(levels)


# ------------------------------------------------------------------------------------------------- the distribution


@pytest.fixture(scope="module")
def small():
    """Two codes, one on the top and four on the bottom: the 32 images can be counted."""
    return make_pipeline(num_codes=2, top=1)


def all_images():
    codes = torch.cartesian_prod(*[torch.arange(2)] * 5)
    return codes[:, :1].view(-1, 1, 1), codes[:, 1:].reshape(-1, 2, 2)


def number(indices):
    flat = torch.cat([level.flatten(1) for level in indices], dim=1)
    return flat @ torch.tensor([16, 8, 4, 2, 1])


def test_samples_follow_the_product_of_the_levels(small):
    sampled = small(class_labels=1, num_images_per_prompt=6000, generator=seeded(), output_type="indices").indices
    top, bottom = all_images()
    with torch.no_grad():
        expected = small.top_prior.log_likelihood(top, 1)
        expected = (expected + small.bottom_prior.log_likelihood(bottom, 1, condition_indices=top)).exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5) and 0.1 < expected.max() < 0.9
    frequencies = torch.bincount(number(sampled), minlength=32) / 6000
    torch.testing.assert_close(frequencies, expected, atol=0.025, rtol=0)


def test_log_likelihood_is_that_of_the_product(small):
    levels = all_images()
    top, bottom = levels
    with torch.no_grad():
        expected = small.top_prior.log_likelihood(top, 2)
        expected = expected + small.bottom_prior.log_likelihood(bottom, 2, condition_indices=top)
    found = small.log_likelihood(indices=levels, class_labels="owl")
    assert found.shape == (32,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    by_class = small.log_likelihood(indices=[level[5:6] for level in levels], class_labels=[0, 1, 2])
    torch.testing.assert_close(by_class[2], found[5])
    assert by_class.unique().numel() == 3
    assert small.log_likelihood(indices=levels).exp().sum().item() == pytest.approx(1, abs=1e-5)
    images = torch.rand(3, 3, 4, 4, generator=seeded()) * 2 - 1
    codes = small.vqvae.encode(images).indices
    torch.testing.assert_close(small.log_likelihood(images, class_labels=1), small.log_likelihood(None, codes, 1))


def test_given_top_codes_are_kept_and_condition_the_bottom(small):
    top = torch.tensor([[[1]]])
    output = small(1, top_indices=top, num_images_per_prompt=4000, generator=seeded(), output_type="indices")
    assert torch.equal(output.indices[0], top.expand(4000, 1, 1))
    _, bottom = all_images()
    with torch.no_grad():
        expected = small.bottom_prior.log_likelihood(bottom[16:], 1, condition_indices=top.expand(16, 1, 1)).exp()
    frequencies = torch.bincount(number(output.indices) - 16, minlength=16) / 4000
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------------------- the call


@pytest.mark.parametrize("levels", [2, 3])
def test_outputs(levels):
    pipeline = make_pipeline(levels)
    outputs = {kind: pipeline([0, 2], generator=seeded(), output_type=kind) for kind in ("pil", "np", "pt", "indices")}
    indices = outputs["indices"].indices
    assert [tuple(level.shape) for level in indices] == [(2, 2 * 2**i, 2 * 2**i) for i in range(levels)]
    assert all(level.dtype == torch.int64 for level in indices) and outputs["indices"].images is None
    assert all(same(output.indices, indices) for output in outputs.values())
    with torch.no_grad():
        expected = (pipeline.vqvae.decode_indices(indices).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(outputs["pt"].images, expected)
    np.testing.assert_allclose(outputs["np"].images, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    for picture, pixels in zip(outputs["pil"].images, outputs["np"].images, strict=True):
        assert isinstance(picture, PIL.Image.Image) and picture.size == (2 * 2**levels, 2 * 2**levels)
        np.testing.assert_allclose(np.array(picture) / 255, pixels, atol=0.51 / 255)
    images, again = pipeline([0, 2], generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, outputs["pt"].images) and same(again, indices)


@pytest.mark.parametrize("levels", [2, 3])
def test_greedy_is_the_naive_loop(levels):
    pipeline = make_pipeline(levels)
    expected = greedy(pipeline, 1)
    assert sum(level.unique().numel() for level in expected) > 2 * levels
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert same(pipeline(1, output_type="indices", **filters).indices, expected)


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}, {"guidance_scale": 3.0}, {"guidance_scale": (1.0, 0.0)}],
)
def test_with_and_without_a_cache(filters):
    pipeline = make_pipeline()
    options = {"class_labels": [0, 1, 2], "output_type": "indices", **filters}
    expected = pipeline(**options, generator=seeded(), use_cache=False).indices
    assert same(pipeline(**options, generator=seeded()).indices, expected)


def test_arguments_for_each_level():
    pipeline = make_pipeline()
    likeliest = greedy(pipeline, 1)
    options = {"class_labels": 1, "num_images_per_prompt": 8, "output_type": "indices", "generator": seeded()}
    for filters in ({"top_k": (1, None)}, {"top_p": [1e-6, None]}, {"temperature": (1e-6, 1.0)}):
        top, bottom = pipeline(**options, **filters).indices
        assert torch.equal(top, likeliest[0].expand(8, -1, -1))
        assert len(bottom.flatten(1).unique(dim=0)) > 1
    top, bottom = pipeline(**options, top_k=(None, 1)).indices
    assert len(top.flatten(1).unique(dim=0)) > 1
    for one, below in zip(top, bottom, strict=True):
        assert torch.equal(pipeline(1, top_indices=one[None], top_k=1, output_type="indices").indices[1][0], below)


def test_guidance_weighs_the_class_and_not_the_level_above():
    """null + s · (conditional - null), both given the same codes above, at each position."""
    pipeline = make_pipeline()
    top, bottom = pipeline(1, top_k=1, guidance_scale=(3.0, 2.0), output_type="indices").indices
    for prior, codes, scale, above in (
        (pipeline.top_prior, top, 3.0, {}),
        (pipeline.bottom_prior, bottom, 2.0, {"condition_indices": top}),
    ):
        logits = []
        for label in (1, None):
            ids = torch.cat([prior.prepare_condition(label), codes.flatten(1)[:, :-1]], dim=1)
            with torch.no_grad():
                logits.append(prior(input_ids=ids, use_cache=False, **above).logits.log_softmax(-1))
        guided = logits[1] + scale * (logits[0] - logits[1])
        assert torch.equal(guided.argmax(-1), codes.flatten(1))
    unconditional = pipeline(top_k=1, output_type="indices").indices
    assert same(pipeline(1, top_k=1, guidance_scale=0.0, output_type="indices").indices, unconditional)


def test_generators():
    pipeline = make_pipeline()
    options = {"class_labels": [0, 1], "num_images_per_prompt": 2, "output_type": "indices"}
    state = torch.get_rng_state()
    first = pipeline(**options, generator=seeded(1)).indices
    assert torch.equal(torch.get_rng_state(), state)
    assert same(pipeline(**options, generator=seeded(1)).indices, first)
    assert not same(pipeline(**options, generator=seeded(2)).indices, first)
    together = pipeline([0, 1, 2], generator=[seeded(i) for i in range(3)], output_type="indices").indices
    for i in range(3):
        alone = pipeline(i, generator=[seeded(i)], output_type="indices").indices
        assert same([level[0] for level in alone], [level[i] for level in together])


def test_callback_sees_every_code_of_every_level():
    pipeline = make_pipeline()
    seen = []
    output = pipeline(
        [0, 1],
        output_type="indices",
        callback_on_step_end=lambda pipe, step, position, found: seen.append((pipe, step, position, found)),
        callback_on_step_end_tensor_inputs=["indices", "level"],
    )
    assert [(step, position, found["level"]) for _, step, position, found in seen] == [
        *((i, i, 0) for i in range(4)),
        *((4 + i, i, 1) for i in range(16)),
    ]
    for pipe, _, position, found in seen:
        assert pipe is pipeline
        assert torch.equal(found["indices"], output.indices[found["level"]].flatten(1)[:, : position + 1])
    seen.clear()
    pipeline(0, top_indices=output.indices[0][:1], callback_on_step_end=lambda *args: seen.append(args))
    assert len(seen) == 16


def test_one_grid_goes_with_several_classes_and_one_class_with_several_grids():
    pipeline = make_pipeline(3)
    top, middle, _ = pipeline([0, 1], generator=seeded(), output_type="indices").indices
    output = pipeline([0, 1, 2], top_indices=top[:1], top_k=1, output_type="indices").indices
    assert torch.equal(output[0], top[:1].expand(3, -1, -1)) and len(output[1]) == len(output[2]) == 3
    output = pipeline("owl", top_indices=(top, middle), num_images_per_prompt=2, output_type="indices").indices
    assert torch.equal(output[0], top.repeat_interleave(2, 0)) and torch.equal(
        output[1], middle.repeat_interleave(2, 0)
    )


def test_priors_without_classes():
    pipeline = make_pipeline(condition={})
    assert len(pipeline(num_images_per_prompt=2).images) == 2
    mixed = make_pipeline()
    mixed.register_modules(bottom_prior=make_prior(4, 2, condition={}))
    output = mixed([0, 2], guidance_scale=(2.0, 1.0), output_type="indices")
    assert len(output.indices[1]) == 2
    with pytest.raises(ValueError, match="guidance_scale"):
        mixed([0, 2], guidance_scale=2.0)


# ------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("half", ["top", "bottom", "left", "right"])
def test_completion_keeps_a_half_of_every_level(half):
    pipeline = make_pipeline()
    image = torch.rand(2, 3, 8, 8, generator=seeded(4)) * 2 - 1
    codes = pipeline.vqvae.encode(image).indices
    output = complete(pipeline, image, half, class_labels=[0, 1], generator=seeded()).indices
    for level, side in enumerate((2, 4)):
        first, second = slice(0, side // 2), slice(side // 2, side)
        rows, columns = {
            "top": (first, slice(None)),
            "bottom": (second, slice(None)),
            "left": (slice(None), first),
            "right": (slice(None), second),
        }[half]
        assert torch.equal(output[level][:, rows, columns], codes[level][:, rows, columns])
    assert any((found != given).any() for found, given in zip(output, codes, strict=True))


def test_completion_is_conditioned_on_what_is_kept():
    pipeline = make_pipeline()
    codes = tuple(torch.randint(8, (1, side, side), generator=seeded(side)) for side in (2, 4))
    pixels = torch.zeros(8, 8, dtype=torch.bool)
    pixels[:4, 4:] = True  # one code of the top, four of the bottom
    pixels[6:, 0:2] = True  # one of the bottom
    keep = [torch.zeros(side, side, dtype=torch.bool) for side in (2, 4)]
    keep[0][0, 1] = True
    keep[1][:2, 2:] = True
    keep[1][3, 0] = True
    output = complete(pipeline, indices=codes, keep=pixels, class_labels=1, top_k=1).indices
    assert same(output, greedy(pipeline, 1, list(zip(codes, keep, strict=True))))
    assert torch.equal(output[0][0, 0, 1], codes[0][0, 0, 1]) and torch.equal(output[1][0, 3, 0], codes[1][0, 3, 0])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_with_its_own_generator_and_mask_is_completed_as_if_alone(guidance_scale):
    pipeline = make_pipeline(top=4)
    image = torch.rand(3, 3, 16, 16, generator=seeded(4)) * 2 - 1
    keep = torch.zeros(3, 16, 16, dtype=torch.bool)
    keep[0, :8] = True  # read at once if this image were alone
    keep[1, 4:, 4:] = True
    keep[2, 0, 0] = True  # less than a code
    options = {"guidance_scale": guidance_scale, "output_type": "indices"}
    together = complete(
        pipeline, image, keep, class_labels=[0, 1, 2], generator=[seeded(i) for i in range(3)], **options
    )
    for i in range(3):
        alone = complete(pipeline, image[i], keep[i], class_labels=i, generator=[seeded(i)], **options)
        assert same([level[0] for level in alone.indices], [level[i] for level in together.indices])


def test_masks_of_pixels_and_of_the_top_grid():
    pixels = torch.ones(16, 8, dtype=torch.bool)
    pixels[5, 3] = False
    grids, factors = [(4, 2), (8, 4), (16, 8)], (4, 2, 1)
    for kept, factor in zip(kept_at_levels(to_mask(~pixels), grids, factors), factors, strict=True):
        expected = torch.ones(1, 16 // factor, 8 // factor, dtype=torch.bool)
        expected[0, 5 // factor, 3 // factor] = False
        assert torch.equal(kept, expected)
    top = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    for kept, factor in zip(kept_at_levels(to_mask(~top), grids, factors), factors, strict=True):
        rows, columns = torch.arange(16 // factor) * factor // 4, torch.arange(8 // factor) * factor // 4
        assert torch.equal(kept[0], top[rows][:, columns])


# ------------------------------------------------------------------------------------------------- rejection


def brightness(images, class_ids):
    return images.mean(dim=(1, 2, 3)) * (class_ids + 1)


def test_rejection_keeps_the_best_of_what_was_drawn():
    pipeline = make_pipeline()
    options = {"num_images_per_class": 2, "batch_size": 4, "output_type": "pt", "top_k": (None, 5)}
    results = pipeline.rejection_sample(
        [2, 0], brightness, acceptance_rates=[1.0, 0.25], generator=seeded(), **options
    )
    generator = seeded()
    for j, label in enumerate((2, 0)):
        drawn = [
            pipeline(label, num_images_per_prompt=4, top_k=(None, 5), generator=generator, output_type="pt")
            for _ in range(2)
        ]
        images = torch.cat([output.images for output in drawn])
        indices = [torch.cat(level) for level in zip(*(output.indices for output in drawn), strict=True)]
        scores = brightness(images, torch.full((8,), label))
        for rate, candidates in ((1.0, 2), (0.25, 8)):
            best = scores[:candidates].topk(2)
            rows = slice(2 * j, 2 * j + 2)
            torch.testing.assert_close(results[rate].scores[rows], best.values)
            torch.testing.assert_close(results[rate].images[rows], images[best.indices])
            assert same([level[rows] for level in results[rate].indices], [level[best.indices] for level in indices])
            assert results[rate].class_ids[rows].tolist() == [label] * 2 and results[rate].acceptance_rate == rate
    assert results[0.25].scores.sum() > results[1.0].scores.sum()


# ------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("levels", [2, 3])
def test_save_and_load(levels, tmp_path):
    pipeline = make_pipeline(levels)
    pipeline.save_pretrained(tmp_path)
    VQImageProcessor(size=24).save_pretrained(tmp_path / "vqvae")
    loaded = VQVAE2Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.middle_prior is None) == (levels == 2)
    options = {"class_labels": ["dog", 2], "guidance_scale": 2.0, "output_type": "pt"}
    expected, output = pipeline(generator=seeded(), **options), loaded(generator=seeded(), **options)
    assert same(output.indices, expected.indices) and torch.equal(output.images, expected.images)
    loaded.save_pretrained(tmp_path / "again")
    assert VQImageProcessor.from_pretrained(tmp_path / "again" / "vqvae").size.shortest_edge == 24


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
output = pipeline([0, 2], guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="pt")
expected = load_file({expected!r})
assert all(torch.equal(level, expected[str(i)]) for i, level in enumerate(output.indices)) and len(output.indices) == 2
assert torch.equal(output.images, expected["images"])
assert type(pipeline).__module__.startswith("diffusers_modules.") and "hf_vq" not in sys.modules
"""


@pytest.mark.hub
def test_it_loads_with_its_code_where_hf_vq_is_not_installed(hub, tmp_path):
    pipeline = make_pipeline()
    save_with_code(pipeline, tmp_path / "pipeline")
    output = pipeline([0, 2], guidance_scale=2.0, generator=seeded(), output_type="pt")
    tensors = {str(level): indices.contiguous() for level, indices in enumerate(output.indices)}
    save_file({**tensors, "images": output.images.contiguous()}, tmp_path / "expected.st")
    source, expected = str(tmp_path / "pipeline"), str(tmp_path / "expected.st")
    hub.run(LOAD.format(source=source, expected=expected), installed=False)
    assert type(VQVAE2Pipeline.from_pretrained(source).bottom_prior) is PixelSNAILForCausalLM


def test_the_card_names_levels_and_priors():
    card = str(model_card(make_pipeline(), "user/hierarchy", "apache-2.0", "emoji-64"))
    assert "VQVAE2Pipeline" in card and "class_labels=0" in card
    assert "4×4, 2×2" in card and "`top_prior` codes" in card and "`bottom_prior` codes" in card


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"class_labels": [3]}, "`class_labels` must be ids from 0 to 2"),
        ({"class_labels": "cow"}, "`class_labels` must be .*, or one of"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"class_labels": 0, "guidance_scale": (1.0, -1.0)}, "guidance_scale"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale"),
        ({"class_labels": 0, "guidance_scale": float("inf")}, "guidance_scale"),
        ({"class_labels": 0, "temperature": float("nan")}, "`temperature` must be a finite number"),
        ({"class_labels": 0, "top_p": "0.5"}, "top_p"),
        ({"class_labels": 0, "guidance_scale": (1.0, 1.0, 1.0)}, "`guidance_scale` must be one value .* of 2"),
        ({"class_labels": 0, "temperature": (1.0, 0)}, "temperature"),
        ({"class_labels": 0, "top_k": [0, 5]}, "top_k"),
        ({"class_labels": 0, "top_p": (0.5,)}, "top_p"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"class_labels": 0, "decode_batch_size": 0}, "`decode_batch_size` must be an int of at least 1"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "generator"),
        ({"class_labels": 0, "callback_on_step_end": 5}, "callback_on_step_end"),
        ({"top_indices": torch.zeros(1, 2, 3, dtype=torch.long)}, r"`top_indices` must be int64 .* \(B, 2, 2\)"),
        ({"top_indices": torch.full((1, 2, 2), 8)}, "`top_indices` must lie in 0 … 7"),
        ({"top_indices": torch.zeros(1, 2, 2)}, "int64"),
        ({"top_indices": torch.zeros(0, 2, 2).long()}, r"`top_indices` must be int64 codes .* \(0, 2, 2\)"),
        ({"top_indices": np.zeros((1, 2, 2), int)}, "`top_indices` must be int64 codes .* got a ndarray"),
        ({"top_indices": (torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 4).long())}, "1 to 1 levels, got 2"),
        ({"top_indices": torch.zeros(2, 2, 2).long(), "class_labels": [0, 1, 2]}, "`top_indices` .* 1 or 3 rows"),
    ],
)  # fmt: skip
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**bad)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"image": torch.zeros(1, 3, 8, 8), "indices": 1}, "Only one"),
        ({}, "`mask_image` needs an `image`"),
        ({"indices": torch.zeros(1, 2, 2).long()}, "`indices` must give codes of 2 levels, got 1"),
        ({"indices": (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long())}, r"shape \(B, 4, 4\)"),
        ({"image": torch.zeros(3, 16, 16)}, "image"),
        ({"image": torch.zeros(3, 8, 8), "keep": torch.ones(3, 3, dtype=torch.bool)}, "mask_image"),
    ],
)
def test_bad_completions(bad, message):
    with pytest.raises(ValueError, match=message):
        complete(make_pipeline(), **bad)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"vqvae": (3, 8)}, "`vqvae` must have as many levels as there are priors, got 3 and 2"),
        ({"vqvae": VQVAEModel(VQVAEConfig(resolution=8))}, "as many levels as there are priors, got 1 and 2"),
        (
            {"vqvae": make_vqvae(quantizer="residual", quantizer_kwargs={"depth": 2})},
            "`vqvae` must have one code at each position",
        ),
        (
            {"bottom_prior": {"grid": 4, "above": 2, "num_upper_codes": 5}},
            "`bottom_prior` must have conditioning_codebook_size=8, .* got 5",
        ),
        ({"vqvae": (2, 9)}, "`top_prior` must have as many codes as `vqvae`: got 8 and 9"),
        ({"bottom_prior": {"grid": 6, "above": 2}}, r"`bottom_prior` .* twice the grid .* \(2, 2\), got \(6, 6\)"),
        ({"bottom_prior": {"grid": 4}}, r"`bottom_prior` must have conditioning_grid_size=\(2, 2\)"),
        ({"bottom_prior": {"grid": 4, "above": 1}}, "got .*1, 1"),
        ({"top_prior": {"grid": 2, "above": 1}}, "`top_prior` must have conditioning_grid_size=None"),
        (
            {"bottom_prior": {"grid": 4, "above": 2, "condition": {"condition_type": "class", "num_classes": 4}}},
            r"the same classes, got \[3, 4\]",
        ),
    ],
)  # fmt: skip
def test_components_must_fit(changed, message):
    parts = {"vqvae": make_vqvae(), "top_prior": make_prior(2), "bottom_prior": make_prior(4, 2)}
    for name, change in changed.items():
        if isinstance(change, dict):
            change = make_prior(**change)
        parts[name] = make_vqvae(*change) if isinstance(change, tuple) else change
    with pytest.raises(ValueError, match=message):
        VQVAE2Pipeline(**parts)


def test_one_prior_is_not_enough():
    with pytest.raises(ValueError, match="`vqvae` must have one level"):
        VQAutoregressivePipeline(make_vqvae(), make_prior(2))


def test_the_top_prior_may_be_another_model():
    torch.manual_seed(0)
    config = VQGPTConfig(codebook_size=8, grid_size=2, n_embd=16, n_layer=1, n_head=2, **CLASSES)
    pipeline = VQVAE2Pipeline(make_vqvae(), VQGPTForCausalLM(config).eval(), make_prior(4, 2))
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline([0, 1], guidance_scale=2.0).images) == 2
