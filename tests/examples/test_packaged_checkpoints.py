"""The checkpoints that come with the project load, reconstruct unseen pictures as their cards say, and sample."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

import hf_vq
from hf_vq.evaluation.reconstruction import psnr
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "examples/checkpoints"
FOLDERS = sorted(path.parent for path in CHECKPOINTS.glob("*/model_index.json"))
MEGABYTES = 36  # of all of them together
STEPS = {"VQDiffusionImagePipeline": 10, "VQLatentDiffusionPipeline": 10}  # of those that take a number of steps


def load(folder):
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(hf_vq, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"num_inference_steps": STEPS[name]} if name in STEPS else {}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_checkpoint(folder):
    pipeline, arguments = load(folder)
    side = pipeline.vqvae.config.resolution
    dataset = load_image_dataset(DataArguments(str(ROOT / "examples/data/emoji-64"), resolution=side), "validation")
    images = torch.stack([dataset[number]["pixel_values"] for number in range(0, 372, 23)])
    with torch.no_grad():
        samples = pipeline.vqvae.decode(pipeline.vqvae.encode(images).latents).sample.clamp(-1, 1)
    stated = {r.metric_type: r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results}
    assert float(psnr(samples, images).mean()) == pytest.approx(stated["psnr"], abs=1.5)
    if hasattr(pipeline, "unet"):  # its denoiser knows latents of unit variance
        latents = pipeline.vqvae.encode(images).latents.detach() * pipeline.vqvae.config.scaling_factor
        assert float(latents.std()) == pytest.approx(1, abs=0.02)
    given = {"class_labels": "Flags"}
    if getattr(pipeline, "condition_tokenizer", None) is not None:
        given = {"condition_image": np.pad(np.full((16, 16), 9), 8)}  # a square that is a flag
    (drawn,) = pipeline(**given, generator=torch.Generator().manual_seed(0), **arguments).images
    assert drawn.size == (side, side) and np.asarray(drawn).std() > 20


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_weight_is_stored_in_half_precision_and_loaded_as_float32(folder):
    files = sorted(folder.glob("*/*.safetensors"))
    assert files
    for path in files:
        with safe_open(path, "pt") as tensors:
            types = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        assert not types & {"F32", "F64"}, f"{path} has {types}"
    pipeline, _ = load(folder)
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {model.dtype for model in models} == {torch.float32}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_model_card_is_that_of_the_folder(folder):
    card = (ROOT / "model_cards" / f"{folder.name}.md").read_text()
    assert card == (folder / "README.md").read_text().replace("](", f"](../examples/checkpoints/{folder.name}/")
    same = [other for other in FOLDERS if weights(other / "vqvae") == weights(folder / "vqvae")]
    assert all((folder / name).is_file() for name in ["samples.webp", "row.png"])
    assert any((other / "reconstructions.webp").is_file() for other in same)  # of one of those with its tokenizer


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_checkpoints_are_small():
    assert size(CHECKPOINTS) < MEGABYTES * 1e6
    assert all(size(folder) < 8e6 for folder in FOLDERS)


def test_each_folder_is_whole_where_there_are_no_links():
    assert not [path for path in CHECKPOINTS.rglob("*") if path.is_symlink()]
