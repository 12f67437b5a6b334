"""The program that makes a checkpoint to be shipped: half precision, figures, sheets and a card."""

import filecmp
import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vq import (
    PixelCNNConfig,
    PixelCNNForCausalLM,
    VQAutoregressivePipeline,
    VQConditionProcessor,
    VQImageProcessor,
    VQVAEConfig,
    VQVAEModel,
)
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer


SCRIPT = Path(__file__).resolve().parents[2] / "examples/checkpoints/ship.py"
spec = importlib.util.spec_from_file_location("ship", SCRIPT)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


def test_a_figure_that_half_precision_changes_is_an_error():
    full = {"psnr": 25.0, "bits_per_index": 5.0}
    program.check_half(full, {"psnr": 25.01, "bits_per_index": 5.001})
    with pytest.raises(ValueError, match="`bits_per_index` from 5.0000 to 5.2000"):
        program.check_half(full, {"psnr": 25.0, "bits_per_index": 5.2})


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The program writes below `tmp_path`."""
    monkeypatch.setattr(program, "HERE", tmp_path / "examples/checkpoints")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    (tmp_path / "model_cards").mkdir()


@pytest.mark.slow
def test_a_pipeline_becomes_a_checkpoint(tmp_path, places):
    torch.manual_seed(0)
    tokenizer = VQVAEModel(VQVAEConfig(hidden_size=8, residual_hidden_size=4, embed_dim=4, num_embeddings=16))
    config = PixelCNNConfig(
        codebook_size=16,
        grid_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        condition_type="class",
        condition_vocab_size=9,
    )
    pipeline = VQAutoregressivePipeline(vqvae=tokenizer, prior=PixelCNNForCausalLM(config))
    pipeline.save_pretrained(tmp_path / "trained")
    VQImageProcessor(size=32).save_pretrained(tmp_path / "trained/vqvae")
    (tmp_path / "about.md").write_text("Blobs.\n\n![Samples](samples.webp)\n")
    options = ["--about", str(tmp_path / "about.md"), "--command", "python train.py", "--max-samples", "96"]
    program.main([str(tmp_path / "trained"), "--name", "first", *options])
    weights = {"weight": torch.zeros(9, 1281), "mean": torch.zeros(1280), "std": torch.ones(1280)}
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "classifier.safetensors")
    pipeline.vqvae.config.scaling_factor = 0.5  # as a latent diffusion has it, beside the same weights
    pipeline.save_pretrained(tmp_path / "trained")
    options += ["--tokenizer-of", "first", "--classifier", str(tmp_path / "classifier.safetensors")]
    program.main([str(tmp_path / "trained"), "--name", "second", *options])

    folder = tmp_path / "examples/checkpoints/first"
    shown = (path for path in folder.rglob("*") if path.suffix in (".png", ".webp", ".md"))
    names = {path.relative_to(folder).as_posix() for path in shown}
    assert names == {"README.md", "samples.webp", "row.png", "nearest.webp", "reconstructions.webp"}
    stored = load_file(folder / "prior/model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    figures = {one.metric_type: one.metric_value for one in ModelCard.load(folder / "README.md").data.eval_results}
    assert 3 < figures["bits_per_index"] < 6 and figures["uniform_bits_per_index"] == 4
    assert figures["frechet_distance[mobilenet_v2.layer13] (96 against 96 images)"] > 1
    assert 0 <= figures["copied_share"] <= 1
    card = (tmp_path / "model_cards/first.md").read_text()
    assert "![Samples](../examples/checkpoints/first/samples.webp)" in card and "python train.py" in card

    card = ModelCard.load(tmp_path / "examples/checkpoints/second/README.md")
    figures = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert figures["class probability of samples accepted at 0.25"] == pytest.approx(1 / 9, abs=1e-4)
    copied = tmp_path / "examples/checkpoints/second/vqvae"
    assert not copied.is_symlink() and filecmp.dircmp(folder / "vqvae", copied).diff_files == ["config.json"]
    assert program.load(copied.parent).vqvae.config.scaling_factor == 0.5
    pipeline.vqvae.get_last_layer().data.add_(1)
    pipeline.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="--condition-column cannot be given"):
        program.main([str(tmp_path / "trained"), "--name", "second", "--condition-column", "mask", *options])
    assert program.load(copied.parent)  # what was there stays
    with pytest.raises(ValueError, match="--tokenizer-of first: .* must have the weights"):
        program.main([str(tmp_path / "trained"), "--name", "third", *options])


@pytest.mark.slow
def test_a_pipeline_after_label_maps_becomes_a_checkpoint(tmp_path, places):
    torch.manual_seed(0)
    sizes = {"channel_multiplier": (1, 1, 1), "embed_dim": 4, "num_embeddings": 16}
    maps = make_tiny_tokenizer(resolution=32, in_channels=10, out_channels=10, **sizes)
    codes = {"condition_type": "codes", "condition_vocab_size": 16, "condition_length": 64, "n_unmasked": 64}
    pipeline = VQAutoregressivePipeline(
        vqvae=VQVAEModel(VQVAEConfig(hidden_size=8, residual_hidden_size=4, embed_dim=4, num_embeddings=16)),
        prior=make_tiny_prior(grid_size=8, n_positions=127, **codes),
        condition_tokenizer=maps,
        condition_processor=VQConditionProcessor("segmentation", size=32, num_labels=10),
    )
    pipeline.save_pretrained(tmp_path / "trained")
    VQImageProcessor(size=32).save_pretrained(tmp_path / "trained/vqvae")
    (tmp_path / "about.md").write_text("Blobs.")
    options = ["--about", str(tmp_path / "about.md"), "--command", "python train.py", "--max-samples", "48"]
    with pytest.raises(ValueError, match="--condition-column must be given"):
        program.main([str(tmp_path / "trained"), "--name", "maps", *options])
    program.main([str(tmp_path / "trained"), "--name", "maps", "--condition-column", "mask", *options])

    folder = tmp_path / "examples/checkpoints/maps"
    with Image.open(folder / "samples.webp") as sheet, Image.open(folder / "row.png") as row:
        # twelve maps, three samples of each and the originals; a map above its sample
        assert sheet.width > 12 * 64 and sheet.height >= 5 * 64
        assert 2 * 64 <= row.height < 3 * 64
    figures = {one.metric_type: one.metric_value for one in ModelCard.load(folder / "README.md").data.eval_results}
    assert figures["uniform_bits_per_index"] == 4 and 3 < figures["bits_per_index"] < 6
    assert 0 <= figures["segmentation_mean_iou"] <= 1 and 0 <= figures["segmentation_mean_iou_shuffled"] <= 1
