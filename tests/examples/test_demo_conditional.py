"""`make demo-conditional`: what it measures, by hand, and a short form of the real script on the real images."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import VQAutoregressivePipeline


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/demo"))
    return importlib.import_module("demo_conditional")


def test_a_mask_is_what_is_not_white_and_what_that_encloses(demo):
    images = torch.ones(1, 3, 5, 6)
    images[0, 2, 1:4, 1:4] = -0.5  # a yellow square
    images[0, :, 2, 2] = 1  # with an eye
    images[0, :, 0, 5] = 0.95  # a trace that is as good as white
    expected = torch.zeros(1, 5, 6, dtype=torch.bool)
    expected[0, 1:4, 1:4] = True
    assert torch.equal(demo.recovered_mask(images, 0.1), expected)
    labels = expected.long() * 4
    assert demo.mask_iou(images, labels, 0.1) == 1
    assert demo.mask_iou(images, labels.roll(1, dims=2), 0.1) == pytest.approx((6 / 12 + 18 / 24) / 2)


def test_the_figure_of_seams(demo):
    """Windows that sample 4 pixels, then 2 at a time: a step of 3 before pixels 4 and 6, of 1 elsewhere."""
    steps = torch.tensor([1.0, 1, 1, 3, 1, 3, 1])
    line = torch.cat([torch.zeros(1), steps.cumsum(0)])
    images = (line[:, None] + line).expand(2, 3, 8, 8)
    assert demo.seam_ratio(images, 2) == pytest.approx(3)


def test_scenes_are_four_pictures(demo, monkeypatch):
    pictures = torch.arange(8.0)[:, None, None, None].expand(8, 3, 64, 64) / 8
    monkeypatch.setattr(demo, "load_pairs", lambda pipe, count, side: {"pixel_values": pictures[:count]})
    scenes = demo.load_scenes(None, 2)
    assert scenes["pixel_values"].shape == (2, 3, 128, 128) and scenes["condition"].shape == (2, 1, 128, 128)
    assert (scenes["pixel_values"][1, 0, ::64, ::64] * 8).tolist() == [[1, 3], [5, 7]]


@pytest.mark.slow
def test_writes_pictures_pipelines_and_metrics(tmp_path):
    command = [sys.executable, "examples/demo/demo_conditional.py", "--quick", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("segmentation", "edges", "large"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["segmentation_mean_iou_of_originals"] > 0.8  # what no sample can surpass by much
    assert metrics["edge_f1_of_originals"] == 1
    assert 0 < metrics["seam_ratio"] < 3 and 0 < metrics["seam_ratio_of_originals"] < 1.5
    for kind in ("segmentation", "edges"):
        assert 0 < metrics[f"{kind}_bits_per_index"] < 10
        pipe = VQAutoregressivePipeline.from_pretrained(str(tmp_path / kind / "prior/pipeline"))
        assert pipe.condition_processor.condition == kind
        image = pipe(condition_image=np.zeros((64, 64), np.uint8), height=32, width=48).images[0]
        assert image.size == (48, 32)
