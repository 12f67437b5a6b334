"""The comparison of priors: its table, its sheet, and a short form of the whole."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/comparison"


def load_script():
    spec = importlib.util.spec_from_file_location("compare_priors", FOLDER / "compare_priors.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_priors"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


script = load_script()


def figures(value):
    return {
        "frechet_distance": {
            "value": value,
            "network": "net.layer1",
            "num_real": 10,
            "num_generated": 20,
        },
        "kernel_distance": {"value": value / 10, "standard_error": 0.004},
    }


def test_the_table():
    results = {
        "training_images": {"title": "Training images", **figures(3.14159)},
        "gpt": {
            "title": "GPT",
            "parameters": 1_234_567,
            "train_steps": 800,
            "train_seconds": 359.7,
            "images_per_second": 12.34,
            "bits_per_index": 6.789,
            **figures(22.2222),
        },
        "unet": {"title": "U-Net", "parameters": 5e5, "bits_per_index": None, **figures(30)},
    }
    lines = script.table(results).splitlines()
    assert lines[0].count("|") == 9 and lines[1] == "|---" * 8 + "|"
    assert lines[2] == "| Training images |  |  |  |  |  | 3.14 | 0.314 ± 0.004 |"
    assert lines[3] == "| GPT | 1.23 M | 800 | 360 | 12.3 | 6.79 | 22.22 | 2.222 ± 0.004 |"
    assert lines[4] == "| U-Net | 0.50 M |  |  |  |  | 30.00 | 3.000 ± 0.004 |"
    assert "net.layer1" in lines[6] and "20 images" in lines[6] and "10 validation images" in lines[6]


def test_the_table_of_minutes():
    def after(minutes, bits, distance):
        return {"minutes": minutes, "bits_per_index": bits, **figures(distance)}

    results = {
        "training_images": {"title": "Training images", **figures(3)},
        "gpt": {"title": "GPT", "after": [after(0.5, 7.125, 40), after(2.0, 6.5, 20.5)]},
        "unet": {"title": "U-Net", "after": [after(0.5, None, 33), after(2.0, None, 22)]},
    }
    lines = script.table_of_minutes(results).splitlines()
    assert lines[0].endswith("| 0.5 min | 2 min |") and lines[1] == "|---|---|---|"
    assert lines[2:] == ["| GPT | 7.12, 40.00 | 6.50, 20.50 |", "| U-Net | –, 33.00 | –, 22.00 |"]


def test_the_sheet():
    """A row for each prior, two images of each class, in the order of the classes."""
    labels = [1, 0, 1, 0, 1, 0]
    shades = torch.linspace(-0.8, 0.6, 6).view(6, 1, 1, 1).expand(6, 3, 16, 16)
    picture = np.asarray(script.sheet({"a": shades, "b": -shades}, labels, ["zero", "one"]).convert("L"))
    middles = picture.shape[0] - 36 - 18, picture.shape[0] - 18  # of rows of 2 · 16 pixels, 4 apart
    for y, sign in zip(middles, (1, -1), strict=True):
        runs = [(shade, len(list(run))) for shade, run in itertools.groupby(picture[y])]
        found = [int(shade) for shade, length in runs if length == 32 and shade != 255]
        assert found == [round((sign * float(shades[i, 0, 0, 0]) + 1) * 127.5) for i in (1, 3, 0, 2)]


def test_images_of_the_same_classes():
    class Images:
        labels = np.array([0, 1, 0, 1, 0, 1, 0, 0])

        def __getitem__(self, index):
            return {"pixel_values": torch.full((3, 1, 1), float(index))}

    chosen = script.images_of_classes(Images(), [0, 1, 0, 0]).flatten(1)[:, 0].tolist()
    assert chosen == [0, 4, 7, 1]  # of the class 0 the first, the middle and the last


def test_a_generator_for_each_batch(monkeypatch):
    """All labels in their order, whatever the batches; images of the pipeline's [0, 1] become [-1, 1]."""
    seen = []

    class Pipe:
        device = torch.device("cpu")

        def set_progress_bar_config(self, disable):
            assert disable

        def __call__(self, class_labels, generator, output_type, **sampling):
            seen.append((class_labels, generator.initial_seed(), sampling))
            images = torch.tensor(class_labels, dtype=torch.float).view(-1, 1, 1, 1) / 10
            return type("Output", (), {"images": images})

    monkeypatch.setattr(script, "BATCH_SIZE", 2)
    images, speed = script.draw(script.CONTESTANTS["vq_diffusion"], Pipe(), [1, 2, 3])
    torch.testing.assert_close(images.flatten(), torch.tensor([-0.8, -0.6, -0.4]))
    assert [(labels, seed) for labels, seed, _ in seen] == [([1, 2], 0), ([3], 2)] and speed > 0
    assert all(sampling == {"guidance_scale": 2.0, "num_inference_steps": 50} for *_, sampling in seen)


def test_the_configurations_ask_for_the_same():
    configs = {name: yaml.safe_load((FOLDER / c.config).read_text()) for name, c in script.CONTESTANTS.items()}
    for key in ("tokenizer", "dataset_name_or_path", "label_column", "resolution", "train_batch_size"):
        assert len({config[key] for config in configs.values()}) == 1, key
    assert {config["condition_dropout"] for config in configs.values()} == {0.1}


def compare(output_dir, *options):
    command = [sys.executable, str(FOLDER / "compare_priors.py"), "--quick", "--output_dir", str(output_dir), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((output_dir / "results.json").read_text())


@pytest.mark.slow
def test_a_short_comparison(tmp_path):
    printed, results = compare(tmp_path)
    assert list(results) == ["training_images", "reconstructions", *script.CONTESTANTS]
    for name in script.CONTESTANTS:
        result = results[name]
        assert 1.4e6 < result["parameters"] < 1.8e6 and result["train_steps"] == 2, name
        assert result["train_seconds"] > 0 and result["images_per_second"] > 0
        assert (result["bits_per_index"] is None) == (name == "latent_diffusion")
        # two steps teach nothing: further from the validation images than training images are
        assert result["frechet_distance"]["value"] > 2 * results["training_images"]["frechet_distance"]["value"]
        assert result["frechet_distance"]["num_generated"] == 64 and result["title"] in printed
    with Image.open(tmp_path / "samples.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert (tmp_path / "results.md").read_text() in printed
    with Image.open(tmp_path / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 20

    printed, again = compare(tmp_path, "--priors", "gpt")  # a second run trains no further
    assert "Already finished at step 2" in printed and list(again)[2:] == ["gpt"]
    assert again["gpt"]["frechet_distance"] == results["gpt"]["frechet_distance"]
