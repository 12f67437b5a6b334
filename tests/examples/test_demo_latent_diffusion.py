"""A short form of `make demo-latent-diffusion`: the real script on the real images, with a few steps of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_vq import VQLatentDiffusionPipeline


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_writes_pictures_a_pipeline_and_metrics(tmp_path):
    command = [sys.executable, "examples/demo/demo_latent_diffusion.py", "--quick", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("samples", "schedulers"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == 64 and metrics["images_per_second"] > 0
    assert 0 < metrics["validation_loss"] < 10 and metrics["scaling_factor"] > 0
    network = "mobilenet_v2.layer13"
    distance = metrics[f"frechet_distance[{network}]"]
    # a denoiser of 12 steps makes nothing; real images are nearer to real images
    assert distance > 2 * metrics[f"training_images_frechet_distance[{network}]"]
    assert metrics[f"floor_frechet_distance[{network}]"] > 0
    for name in metrics:
        assert name in done.stdout
    pipe = VQLatentDiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert pipe(class_labels=0, num_inference_steps=1, output_type="latent").latents.shape == (1, 32, 8, 8)
