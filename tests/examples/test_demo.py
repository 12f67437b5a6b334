"""A minute-long form of `make demo`: the real scripts on the real images, with a few steps of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_vq import VQAutoregressivePipeline


ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run_demo(output_dir: Path) -> str:
    command = [sys.executable, "examples/demo/demo.py", "--quick", "--output_dir", str(output_dir)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("demo")
    return output_dir, run_demo(output_dir)


def test_writes_pictures_a_pipeline_and_metrics(demo):
    output_dir, printed = demo
    for name in ("shipped_samples", "reconstructions", "samples", "codebook_usage"):
        with Image.open(output_dir / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, name
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics["perceptual_network"] == "mobilenet_v2"
    assert 5 < metrics["psnr"] < 40
    assert 1 <= metrics["codebook_perplexity"] <= 256
    assert 0 < metrics["codebook_usage"] <= 1
    assert 0 < metrics["bits_per_index"] < 20
    assert metrics["images_per_second"] > 0
    for name in metrics:
        assert name in printed
    pipeline = VQAutoregressivePipeline.from_pretrained(str(output_dir / "pipeline"))
    assert pipeline(class_labels=0, output_type="indices").indices.shape == (1, 8, 8)


def test_a_second_run_skips_what_is_done(demo):
    output_dir, _ = demo
    assert run_demo(output_dir).count("Already finished") == 2
