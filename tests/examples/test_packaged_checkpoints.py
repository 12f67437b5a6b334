"""The checkpoints that come with the project load, reconstruct unseen pictures as their cards say, and sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from hf_vq import VQAutoregressivePipeline
from hf_vq.evaluation.reconstruction import psnr
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset


ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "examples/checkpoints").glob("*/model_index.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_checkpoint(folder):
    pipeline = VQAutoregressivePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.vqvae.config.resolution
    dataset = load_image_dataset(DataArguments(str(ROOT / "examples/data/emoji-64"), resolution=side), "validation")
    images = torch.stack([dataset[number]["pixel_values"] for number in range(0, 372, 23)])
    with torch.no_grad():
        samples = pipeline.vqvae.decode(pipeline.vqvae.encode(images).latents).sample.clamp(-1, 1)
    stated = {r.metric_type: r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results}
    assert float(psnr(samples, images).mean()) == pytest.approx(stated["psnr"], abs=1.5)
    (drawn,) = pipeline(class_labels="Flags", generator=torch.Generator().manual_seed(0)).images
    assert drawn.size == (side, side) and np.asarray(drawn).std() > 20
