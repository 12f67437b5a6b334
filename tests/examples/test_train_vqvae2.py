"""The training script of the hierarchical tokenizer: what it saves, its figures of each level, and its resuming."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_vq import VQVAE2Model
from tests.examples.runs import rows, script


ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--hidden_size", "8", "--residual_hidden_size", "4", "--num_residual_layers", "1", "--embed_dim", "4",
    "--num_embeddings", "8", "--downsample_factor", "4", "--resolution", "16", "--cpu", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    found = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    found = found.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": found, "validation": found.select([1, 2, 3])}).save_to_disk(folder)
    return folder


def train(images, output, *options, steps=2):
    length = ["--max_train_steps", str(steps), "--train_batch_size", "4", "--logging_steps", "1"]
    places = ["--dataset_name_or_path", str(images), "--output_dir", str(output)]
    script("vqvae2").main([*places, *length, *SMALL, *options])
    return VQVAE2Model.from_pretrained(output / "tokenizer")


@pytest.mark.parametrize("options", [[], ["--num_levels", "3", "--downsample_factor", "8", "--level_dropout", "0.3"]])
def test_what_it_saves(images, tmp_path, options):
    model = train(images, tmp_path, *options)
    levels = model.config.num_levels
    assert levels == (3 if options else 2) and model.config.quantizer == "ema"
    assert model.config.level_dropout == (0.3 if options else 0)
    pixels = (
        torch.stack([torch.as_tensor(np.array(Image.new("RGB", (16, 16), "red")))]).permute(0, 3, 1, 2) / 127.5 - 1
    )
    assert [tuple(level.shape[1:]) for level in model.encode(pixels).indices] == (
        [(2, 2), (4, 4), (8, 8)] if options else [(4, 4), (8, 8)]
    )
    assert type(AutoModel.from_pretrained(tmp_path / "tokenizer")) is VQVAE2Model
    assert AutoImageProcessor.from_pretrained(tmp_path / "tokenizer").size["shortest_edge"] == 16
    training, validation = rows(tmp_path)[-2:]
    for level in range(levels):
        assert 1 <= training[f"codebook_perplexity_{level}"] <= 8
        assert 0 < validation[f"validation/codebook_usage_{level}"] <= 1
    assert training["loss"] == pytest.approx(training["reconstruction_loss"] + training["quantizer_loss"], rel=1e-5)
    with Image.open(tmp_path / "pictures/levels-0000002.png") as picture:
        assert picture.size == (3 * 18 - 2, (1 + levels) * 18 - 2)  # the originals and a row for each level, 2 apart
    card = (tmp_path / "tokenizer/README.md").read_text()
    assert "psnr" in card and "VQVAE2Model" in card


def test_the_variance_divides_the_error(images, tmp_path):
    pixels = np.stack([np.array(row["image"]) for row in datasets.load_from_disk(images)["validation"]])
    model = train(images, tmp_path)
    assert model.config.data_variance == pytest.approx((pixels / 127.5 - 1).var(), rel=1e-3)


def test_gumbel_cools_at_every_level(images, tmp_path, monkeypatch):
    module, seen = script("vqvae2"), []
    finish_step = module.TrainingRun.finish_step

    def spy(run):
        seen.append([level.temperature for level in run.models["model"].quantize])
        finish_step(run)

    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", spy)
    train(images, tmp_path, "--quantizer", "gumbel", steps=3)
    assert all(top == bottom for top, bottom in seen) and seen[0][0] > seen[1][0] > seen[2][0]


def test_a_tokenizer_is_trained_further(images, tmp_path):
    first = train(images, tmp_path / "first")
    again = train(images, tmp_path / "again", "--model_name_or_path", str(tmp_path / "first/tokenizer"), steps=1)
    for name, tensor in first.state_dict().items():
        assert tensor.shape == again.state_dict()[name].shape
    distance = (again.decoder.conv_in.weight - first.decoder.conv_in.weight).abs().max()
    assert 0 < distance < 1e-3


def test_a_resumed_run_is_an_unbroken_one(images, tmp_path, monkeypatch):
    options = ["--checkpointing_steps", "2", "--ema_decay", "0.9", "--level_dropout", "0.3", "--random_flip", "true"]
    train(images, tmp_path / "unbroken", *options, steps=5)
    finish_step, seen = script("vqvae2").TrainingRun.finish_step, []

    def interrupted(run):
        finish_step(run)
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(images, tmp_path / "broken", *options, steps=5)
    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", finish_step)
    train(images, tmp_path / "broken", *options, steps=5)
    assert rows(tmp_path / "broken") == rows(tmp_path / "unbroken")
