"""A short form of `make demo-diffusion`: the real script on the real images, with a few steps and a tiny text
encoder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_vq import VQDiffusionImagePipeline


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_writes_pictures_a_pipeline_and_metrics(inputs, tmp_path):
    command = [sys.executable, "examples/demo/demo_diffusion.py", "--quick", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command += ["--text_encoder", str(inputs / "text")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("prompts", "steps"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["training_steps"] == 12 and metrics["images_per_second"] > 0
    assert 0 < metrics["bits_per_index"] < 30 and metrics["uniform_bits_per_index"] == 9
    network = "mobilenet_v2.layer13"
    # a denoiser of 12 steps makes nothing; real images are nearer to real images
    for steps in (10, 25, 100):
        distance = metrics[f"{steps}_steps_frechet_distance[{network}]"]
        assert distance > 2 * metrics[f"training_images_frechet_distance[{network}]"]
    assert metrics[f"floor_frechet_distance[{network}]"] > 0
    for name in metrics:
        assert name in done.stdout
    pipe = VQDiffusionImagePipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert pipe("purple heart", num_inference_steps=1, output_type="indices").indices.shape == (1, 8, 8)
