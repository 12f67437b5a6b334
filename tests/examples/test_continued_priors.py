"""Training that goes on with a trained prior, on data of the same classes or of others."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import (
    VQAutoregressivePipeline,
    VQDiffusionImagePipeline,
    VQGPTConfig,
    VQGPTForCausalLM,
    VQLatentDiffusionPipeline,
)
from hf_vq.training.fine_tuning import StartingPoint
from tests.examples.runs import places_and_length, script


SIZES = {
    "gpt": "--num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1".split(),
    "llama": "--architecture llama --num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1".split(),
    "pixelcnn": ["--hidden_size", "8", "--prior_kwargs", '{"num_hidden_layers": 2, "head_hidden_size": 8}'],
    "pixelsnail": [
        "--prior", "pixelsnail", "--hidden_size", "8", "--kernel_size", "3", "--prior_kwargs",
        '{"num_blocks": 1, "num_res_blocks": 1, "res_channels": 8, "num_attention_heads": 2}',
    ],
    "vq_diffusion": ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "4"],
    "latent_diffusion": [
        "--block_out_channels", "8", "16", "--layers_per_block", "1", "--attention_levels", "1",
        "--attention_head_dim", "4", "--norm_num_groups", "4", "--prediction_type", "epsilon", "--beta_end", "0.03",
    ],
}  # fmt: skip
SCRIPTS = {"gpt": "vq_gpt", "llama": "vq_gpt", "pixelsnail": "pixelcnn", "latent_diffusion": "vq_latent_diffusion"}
STILL = ["--learning_rate", "1e-12"]  # what is loaded stays what it is


@pytest.fixture(scope="module")
def others(inputs, tmp_path_factory):
    """Images of the classes b and d; `inputs` has a caption for each class."""
    pixels = np.random.default_rng(1).integers(0, 255, (8, 16, 16, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "caption": ["a picture of 1", "a dog"] * 4}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path_factory.mktemp("others") / "images"
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(folder)
    return folder


def train(kind, inputs, output, *options):
    script(SCRIPTS.get(kind, kind)).main([*places_and_length(inputs, 1), "--output_dir", str(output), *options])
    kinds = {"vq_diffusion": VQDiffusionImagePipeline, "latent_diffusion": VQLatentDiffusionPipeline}
    return kinds.get(kind, VQAutoregressivePipeline).from_pretrained(output / "pipeline")


@torch.no_grad()
def predicted(pipe, label):
    """What the pipeline's network predicts of the class of a name, or of none."""
    torch.manual_seed(0)
    if isinstance(pipe, VQAutoregressivePipeline):
        indices = torch.randint(8, (2, 4, 4))
        return pipe.prior.log_likelihood(indices, condition=label)
    names = {name: int(number) for number, name in pipe.id2label.items()}
    null = pipe.config.null_class_id if isinstance(pipe, VQLatentDiffusionPipeline) else pipe.transformer.null_class_id
    labels, timesteps = torch.full((2,), null if label is None else names[label]), torch.tensor([3, 7])
    if isinstance(pipe, VQLatentDiffusionPipeline):
        return pipe.unet(torch.randn(2, 4, 4, 4), timesteps, class_labels=labels).sample
    return pipe.transformer(torch.randint(9, (2, 4, 4)), timesteps, class_labels=labels).sample


@pytest.mark.parametrize("kind", SIZES)
def test_weights_go_on_and_classes_are_told_by_their_names(inputs, others, tmp_path, kind):
    labels = ["--label_column", "caption"]
    first = train(
        kind, inputs, tmp_path / "first", *labels, *SIZES[kind], *"--learning_rate 0.05 --train_batch_size 8".split()
    )
    start = ["--model_name_or_path", str(tmp_path / "first/pipeline")]
    same = train(kind, inputs, tmp_path / "same", *labels, *start, *STILL)
    other = train(kind, inputs, tmp_path / "other", *labels, *start, *STILL, "--dataset_name_or_path", str(others))
    names = ["a picture of 0", "a picture of 1", "a picture of 2"]
    for name in [None, *names]:
        torch.testing.assert_close(predicted(same, name), predicted(first, name), atol=1e-5, rtol=1e-5)
    for name in (None, "a picture of 1"):
        torch.testing.assert_close(predicted(other, name), predicted(first, name), atol=1e-5, rtol=1e-5)
    new = predicted(other, "a dog")
    assert all(not torch.allclose(new, predicted(first, name)) for name in names)
    if kind == "latent_diffusion":  # the noise and the scale that the denoiser knows
        assert other.scheduler.config.prediction_type == "epsilon" and other.scheduler.config.beta_end == 0.03
        assert other.vqvae.config.scaling_factor == first.vqvae.config.scaling_factor


def test_a_prior_alone_and_a_level(inputs, tmp_path):
    train("gpt", inputs, tmp_path / "first", *SIZES["gpt"])
    start = ["--model_name_or_path", str(tmp_path / "first/pipeline/prior")]
    again = train("gpt", inputs, tmp_path / "again", *start, *STILL, "--dropout", "0.3").prior
    before = VQGPTForCausalLM.from_pretrained(tmp_path / "first/pipeline/prior")
    assert again.config.n_embd == 8 and again.config.resid_pdrop == 0.3
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["unconditional", "class"])
def test_a_prior_goes_on_with_a_map_as_its_condition(tmp_path, kind):
    """Where no position attends to its condition, codes are predicted as before: attention is taken off here."""
    shape = {"codebook_size": 8, "grid_size": (2, 2), "n_layer": 2, "n_embd": 4, "n_head": 1}
    torch.manual_seed(0)
    first = VQGPTForCausalLM(VQGPTConfig(condition_type=kind, num_classes=3 if kind == "class" else 0, **shape)).eval()
    for block in first.transformer.h:
        block.attn.c_proj.weight.data.zero_()
    first.save_pretrained(tmp_path)
    start = StartingPoint(str(tmp_path), "prior", (VQGPTForCausalLM,))
    fields = {"condition_type": "codes", "condition_vocab_size": 5, "condition_length": 4, "n_unmasked": 4}
    second = start.remake(fields, 5).eval()
    codes = torch.randint(8, (3, 4))
    before = first(torch.cat([first.prepare_condition(None, batch_size=3), codes[:, :3]], 1)).logits[:, 1:]
    after = second(torch.cat([second.prepare_condition(torch.zeros(3, 2, 2).long()), codes[:, :3]], 1)).logits[:, 4:]
    torch.testing.assert_close(after, before)


def test_more_classes_than_a_converted_prior_has(tmp_path):
    """The original's priors of classes give class c the row of code c: no row is a class's own."""
    shape = {"codebook_size": 8, "grid_size": (2, 2), "n_layer": 1, "n_embd": 4, "n_head": 1}
    shape |= {"condition_type": "class", "share_condition_embedding": True}
    VQGPTForCausalLM(VQGPTConfig(condition_vocab_size=3, **shape)).save_pretrained(tmp_path)
    start = StartingPoint(str(tmp_path), "prior", (VQGPTForCausalLM,))
    model = start.remake({"condition_vocab_size": 5}, 5)
    assert model.config.condition_vocab_size == 5
    assert all(torch.equal(weight, start.model.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "kind,options,message",
    [
        ("gpt", ["--resolution", "8"], r"its `grid_size` must be \(2, 2\)"),
        ("gpt", ["--positions_from_grid", "true"], "positions_from_grid=True: with model_name_or_path"),
        ("pixelcnn", [], "must be a PixelCNNForCausalLM or PixelSNAILForCausalLM, .* got a VQAutoregressivePipeline"),
        ("vq_diffusion", [], "must be a VQDiffusionTransformer2DModel, .* got a VQAutoregressivePipeline without one"),
        ("latent_diffusion", [], "must be a UNet2DModel or UNet2DConditionModel"),
    ],
)
def test_what_cannot_go_on(inputs, tmp_path_factory, kind, options, message):
    folder = tmp_path_factory.getbasetemp() / "of-classes"
    if not folder.exists():
        train("gpt", inputs, folder, *SIZES["gpt"], "--label_column", "caption")
    start = ["--model_name_or_path", str(folder / "pipeline")]
    with pytest.raises(ValueError, match=message):
        train(kind, inputs, folder.with_name("refused"), *start, *options)
    assert not (folder.with_name("refused") / "indices").exists()  # before anything was encoded
