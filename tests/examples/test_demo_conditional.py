"""A short form of `make demo-conditional`: the real script on the real images, with a few steps of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_vq import VQAutoregressivePipeline


ROOT = Path(__file__).resolve().parents[2]


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
    for kind in ("segmentation", "edges"):
        assert 0 < metrics[f"{kind}_bits_per_index"] < 10
        pipe = VQAutoregressivePipeline.from_pretrained(str(tmp_path / kind / "prior/pipeline"))
        assert pipe.condition_processor.condition == kind
        image = pipe(condition_image=np.zeros((64, 64), np.uint8), height=32, width=48).images[0]
        assert image.size == (48, 32)
