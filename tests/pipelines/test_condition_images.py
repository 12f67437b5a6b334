"""Spatial conditions as people have them: maps, drawings, and photos that an annotator makes conditions of."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hf_vq.cli import main
from hf_vq.hub import save_with_code
from hf_vq.hub_cards import model_card
from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.pipelines.autoregressive_parts import make_pipeline, seeded


CHANNELS = {"segmentation": 3, "depth": 1, "edges": 1, "pose": 3}
RANDOM = np.random.default_rng(0)


def seeded_choice(length, count):
    return torch.randperm(length, generator=seeded())[:count]


def make_conditional(condition="segmentation", **options):
    """2x2 codes of a condition, a quarter of the side of its pixels, for 4x4 codes of an image, half of its side."""
    bare = make_pipeline("codes")
    channels = CHANNELS[condition]
    config = VQGANConfig(
        in_channels=channels,
        out_channels=channels,
        base_channels=32,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        resolution=8,
        latent_channels=4,
        embed_dim=4,
        num_embeddings=7,
        quantizer="vq",
    )
    torch.manual_seed(4)
    tokenizer = VQGANModel(config).eval()
    with torch.no_grad():  # codes from among the latents of conditions, or all would have the same one
        values = torch.stack([make_condition(condition, 16, 16)[1] for _ in range(4)])
        latents = tokenizer.encode(values).latents.movedim(1, -1).flatten(0, 2)
        tokenizer.quantize.embedding.weight.copy_(latents[seeded_choice(len(latents), 7)])
    if condition == "segmentation":
        options = {"num_labels": 3, **options}
    processor = VQConditionProcessor(condition, size=8, **options)
    pipeline = VQAutoregressivePipeline(bare.vqvae, bare.prior, tokenizer, processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_condition(kind, height, width):
    """A condition, and the values in [-1, 1], or 0 and 1, that stand for it."""
    if kind == "segmentation":
        labels = RANDOM.integers(0, 3, (height, width))
        return labels, F.one_hot(torch.as_tensor(labels), 3).permute(2, 0, 1).float()
    if kind == "pose":
        pixels = RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return pixels, torch.as_tensor(pixels).permute(2, 0, 1) / 127.5 - 1
    values = RANDOM.random((height, width)).astype(np.float32)
    if kind == "edges":
        return values > 0.5, torch.as_tensor(values > 0.5)[None] * 2.0 - 1
    return values, torch.as_tensor((values - values.min()) / (values.max() - values.min()) * 2 - 1)[None]


@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
@pytest.mark.parametrize("kind", CHANNELS)
def test_a_condition_is_the_codes_of_its_values(kind, size):
    pipeline = make_conditional(kind)
    condition, values = make_condition(kind, *size)
    with torch.no_grad():
        codes = pipeline.condition_tokenizer.encode(values[None]).indices
    assert codes.unique().numel() > 1
    options = {"height": size[0], "width": size[1], "top_k": 1, "stride": 2, "output_type": "indices"}
    expected = pipeline(condition=codes, **options).indices
    given = [condition, [condition], torch.as_tensor(condition)]
    if kind == "segmentation":
        given.append(PIL.Image.fromarray(condition.astype(np.uint8)))
    elif kind != "depth":
        given.append(PIL.Image.fromarray(condition))
    for one in given:
        assert torch.equal(pipeline(condition_image=one, **options).indices, expected)
    assert torch.equal(pipeline(condition=codes.numpy(), **options).indices, expected)
    others = pipeline(condition=(codes + 1) % 7, **options).indices
    assert not torch.equal(others, expected)


def test_photos_are_annotated_at_the_size_of_the_image():
    pipeline, seen = make_conditional(), []
    labels = RANDOM.integers(0, 3, (8, 8))
    wide = np.pad(labels, ((0, 0), (4, 4)))  # the middle is cut out
    photo = PIL.Image.fromarray(np.repeat(wide[..., None] * 100, 3, axis=2).astype(np.uint8))

    def annotator(images):
        seen.extend(images)
        return np.stack([np.asarray(image)[..., 0] // 100 for image in images]).astype(np.int64)

    options = {"top_k": 1, "output_type": "indices"}
    found = pipeline(condition_image=[photo, photo], annotator=annotator, **options).indices
    assert [one.size for one in seen] == [(8, 8)] * 2 and len(found) == 2
    assert torch.equal(found[:1], pipeline(condition_image=labels, **options).indices)
    assert torch.equal(found[:1], pipeline(condition_image=wide, **options).indices)


def test_canny_edges_of_a_photo():
    canny = pytest.importorskip("skimage.feature").canny
    pipeline = make_conditional("edges")
    grey = np.zeros((16, 16), np.uint8)
    grey[:, 8:] = 255
    edges = canny(grey / 255, sigma=2)
    assert 0 < edges.sum() < edges.size / 4
    options = {"height": 16, "width": 16, "stride": 2, "top_k": 1, "output_type": "indices"}
    found = pipeline(condition_image=PIL.Image.fromarray(grey).convert("RGB"), annotator="edges", **options).indices
    assert torch.equal(found, pipeline(condition_image=edges, **options).indices)


def test_completion_and_outpainting_with_a_condition():
    pipeline = make_conditional()
    picture = torch.rand(1, 3, 8, 8, generator=seeded()) * 2 - 1
    labels, values = make_condition("segmentation", 8, 16)
    with torch.no_grad():
        codes = pipeline.condition_tokenizer.encode(values[None]).indices
    arguments = {"image": picture, "outpaint": (0, 0, 4, 4), "stride": 2, "top_k": 1, "output_type": "indices"}
    found = pipeline(condition_image=labels, **arguments).indices
    assert found.shape == (1, 4, 8)
    assert torch.equal(found, pipeline(condition=codes, **arguments).indices)
    assert torch.equal(found[:, :, 2:6], pipeline.vqvae.encode(picture).indices)


LOAD = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pipeline = DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
expected = load_file({expected!r})
found = pipeline(condition_image=expected["labels"], height=16, width=12, stride=2, top_k=1, output_type="pt")
assert torch.equal(found.indices, expected["indices"]) and torch.equal(found.images, expected["images"])
assert pipeline.condition_processor.label_map == {{"0": 0, "1": 1, "9": 2}}
assert type(pipeline).__module__.startswith("diffusers_modules.") and "hf_vq" not in sys.modules
"""


@pytest.mark.hub
def test_it_is_saved_shared_and_loaded_where_hf_vq_is_not_installed(hub, tmp_path, capsys):
    pipeline = make_conditional(label_map={0: 0, 1: 1, 9: 2})
    labels = np.array([0, 1, 9])[RANDOM.integers(0, 3, (16, 12))]
    options = {"height": 16, "width": 12, "stride": 2, "top_k": 1, "output_type": "pt"}
    expected = pipeline(condition_image=labels, **options)
    source = tmp_path / "pipeline"
    save_with_code(pipeline, source)
    for other in (VQAutoregressivePipeline.from_pretrained(source), VQAutoregressivePipeline.from_pipe(pipeline)):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(other(condition_image=labels, **options).indices, expected.indices)
    tensors = {"labels": torch.as_tensor(labels), "indices": expected.indices, "images": expected.images}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "expected.st")
    hub.run(LOAD.format(source=str(source), expected=str(tmp_path / "expected.st")), installed=False)
    assert "condition_image=picture" in str(model_card(pipeline, "user/maps", "apache-2.0", "emoji-64"))

    PIL.Image.fromarray(labels[:8, :8].astype(np.uint8)).save(tmp_path / "labels.png")
    command = ["sample", str(source), "--condition-image", str(tmp_path / "labels.png"), "--output"]
    assert main([*command, str(tmp_path / "sheet.png")]) == 0
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) >= 8


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"condition_image": np.full((8, 8), 3)}, r"`condition_image` .* labels in 0…2 or 255 .*, got \[3\]"),
        ({"condition_image": np.full((8, 8), -1)}, r"labels in 0…2 .*, got \[-1\]"),
        ({"condition_image": np.zeros((8, 8))}, "must be label maps of integers .* float64 .* `annotator`"),
        ({"condition_image": PIL.Image.new("RGB", (8, 8))}, "got mode 'RGB'; a photo needs an `annotator`"),
        ({"condition_image": np.zeros((8, 8, 3), np.uint8)}, "a photo needs an `annotator`"),
        ({"condition_image": []}, "at least one condition"),
        ({"condition_image": np.zeros((0, 8), int)}, "must be label maps"),
        ({"condition_image": np.zeros((8, 8), int), "annotator": "edges"}, "`condition_image` must be PIL images"),
        ({"condition_image": PIL.Image.new("RGB", (8, 8)), "annotator": "sketch"}, "`annotator` must be .* 'sketch'"),
        (
            {"condition_image": PIL.Image.new("RGB", (8, 8)), "annotator": lambda photos: None},
            "`annotator` must give a condition for each image, got NoneType",
        ),
        (
            {
                "condition_image": [PIL.Image.new("RGB", (8, 8))] * 2,
                "annotator": lambda photos: np.zeros((1, 8, 8), int),
            },
            "`annotator` must give a condition for each image, got 1 for 2",
        ),
        ({"annotator": "edges"}, "`annotator` needs a `condition_image`"),
        ({"condition_image": np.zeros((8, 8), int), "height": 10}, "multiples of 4, the condition tokenizer's"),
        ({"condition_image": np.zeros((8, 8), int), "height": 4}, "`height` must be at least the 4 codes"),
        ({"condition": torch.zeros(1, 3, 3, dtype=torch.long)}, "as many codes for each window .* 4 condition ids"),
        ({"condition": torch.zeros(1, 1, 2, dtype=torch.long)}, "`condition` must have 4 ids"),
        ({"condition": torch.zeros(1, 2, 2)}, "`condition` must hold integers"),
        ({"condition": torch.zeros(1, 4, 4), "height": 16, "width": 16}, "`condition` must hold integers"),
        ({"condition": torch.eye(4).long()[None] * 7, "height": 16, "width": 16}, "`condition` must lie in 0 … 6"),
        ({"condition": torch.full((1, 2, 2), 7)}, "`condition` must lie in 0 … 6"),
    ],
)
def test_bad_conditions(bad, message):
    condition = np.zeros((8, 8), int)
    both = {"condition_image": condition, "condition": torch.zeros(1, 2, 2, dtype=torch.long)}
    pipeline = make_conditional()
    with pytest.raises(ValueError, match=message):
        pipeline(**bad)
    with pytest.raises(ValueError, match="Only one of `condition_image` and `condition`"):
        pipeline(**both)
    for bare in (make_pipeline("codes"), make_pipeline("class")):
        with pytest.raises(ValueError, match="`condition_image` needs a pipeline with `condition_tokenizer`"):
            bare(condition_image=condition)


def test_parts_that_do_not_fit():
    pipeline, depth = make_conditional(), make_conditional("depth")
    parts = dict(pipeline.components)
    for bad, message in (
        (
            {"condition_processor": depth.condition_processor},
            "must give the 3 channels of `condition_tokenizer`, got 1",
        ),
        ({"prior": make_pipeline("class").prior}, "needs a prior whose condition_type is 'codes', got 'class'"),
        ({"condition_tokenizer": parts["vqvae"]}, "must have the 7 codes that `prior` is conditioned on, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            VQAutoregressivePipeline(**{**parts, **bad})
