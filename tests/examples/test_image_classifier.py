"""The classifier that chooses among samples: what it learns, and that it is the same after saving."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/demo"))
from image_classifier import LinearClassifier  # noqa: E402


class MeanColour:
    """Three features that tell the classes apart, and one that never changes."""

    name = "mean colour"

    def pooled(self, images):
        return torch.cat([images.mean((2, 3)), torch.zeros(len(images), 1)], dim=1)


class Coloured(Dataset):
    """Noise around one colour for each class."""

    class_names = ["red", "green", "blue"]

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        self.images = torch.rand(count, 3, 4, 4, generator=generator) * 0.8 - 0.6
        self.images[torch.arange(count), self.labels] += 0.4

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {"pixel_values": self.images[number], "label": int(self.labels[number])}


def test_classes_are_told_apart_and_a_saved_classifier_gives_the_same_scores(tmp_path):
    classifier = LinearClassifier.fit(MeanColour(), Coloured(60, 0))
    unseen = Coloured(30, 1)
    assert classifier.accuracy(unseen) == 1
    classifier.save(tmp_path / "folder/model.safetensors")
    again = LinearClassifier.load(tmp_path / "folder/model.safetensors", MeanColour())
    images = unseen.images / 2 + 0.5
    scores = classifier(images, unseen.labels)
    assert scores.min() > 0.5
    torch.testing.assert_close(again(images, unseen.labels), scores, atol=2e-3, rtol=0)
    wrong = classifier(images, (unseen.labels + 1) % 3)
    assert wrong.max() < 0.5


def test_another_file_is_refused(tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight, mean and std"):
        LinearClassifier.load(tmp_path / "model.safetensors", MeanColour())
