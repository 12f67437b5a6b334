"""A short form of `make demo-vqvae2`: the real script on the real images, with a few steps of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_vq import VQVAE2Pipeline


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_writes_pictures_a_pipeline_and_metrics(tmp_path):
    command = [sys.executable, "examples/demo/demo_vqvae2.py", "--quick", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "reconstructions",
        "samples",
        "bottoms",
        "completions",
        "rejection",
        "codebook_usage_0",
        "codebook_usage_1",
    ):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images_per_second"] > 0 and metrics["psnr"] > 5
    assert metrics["classifier_accuracy"] > 0.3  # of 9 classes, after 64 images
    scores = [metrics[f"class_probability_at_rate_{rate}"] for rate in ("1", "0.25", "0.0625")]
    assert scores[0] <= scores[1] + 1e-6 <= scores[2] + 2e-6
    for split in ("train", "validation"):
        bits = {part: metrics[f"{split}_{part}_bits_per_image"] for part in ("top", "bottom", "whole")}
        assert bits["whole"] == pytest.approx(bits["top"] + bits["bottom"])
        assert metrics[f"{split}_top_bits_per_index"] == pytest.approx(bits["top"] / 64)
        assert metrics[f"{split}_bottom_bits_per_index"] == pytest.approx(bits["bottom"] / 256)
        assert metrics[f"{split}_whole_bits_per_pixel_dim"] == pytest.approx(bits["whole"] / (3 * 64 * 64))
    for line in ("psnr", "bottom_codebook_perplexity", "bits/index", "whole"):
        assert line in done.stdout
    pipe = VQVAE2Pipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert [level.shape for level in pipe(0, output_type="indices").indices] == [(1, 8, 8), (1, 16, 16)]
