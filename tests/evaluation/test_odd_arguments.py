"""Arguments of the figures that no figure is defined for: one error that names each, and never a silent nan."""

import math

import numpy as np
import pytest
import torch

from hf_vq.evaluation.codebook import CodebookCounts, PositionCounts
from hf_vq.evaluation.features import FeatureSet
from hf_vq.evaluation.generation import (
    classifier_score,
    compare_images,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from hf_vq.evaluation.inspection import copied_share, heat_map, index_map
from hf_vq.evaluation.likelihood import CodeLikelihood
from hf_vq.evaluation.reconstruction import psnr, ssim
from hf_vq.models.quantizers.codebook_statistics import codebook_statistics


FEATURES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Means:
    name = "means"

    @staticmethod
    def pooled(images):
        return images.mean((2, 3))


NUMBERS = {
    "window_size": lambda value: ssim(IMAGES, IMAGES, window_size=value),
    "sigma": lambda value: ssim(IMAGES, IMAGES, sigma=value),
    "subset_size": lambda value: kernel_distance(FEATURES, FEATURES, subset_size=value),
    "seed": lambda value: kernel_distance(FEATURES, FEATURES, 5, seed=value),
    "neighbours": lambda value: precision_recall(FEATURES, FEATURES, value),
    "num_splits": lambda value: classifier_score(FEATURES, value),
    "num_embeddings": lambda value: (CodebookCounts(value), PositionCounts(value)),
    "pixel_dims": CodeLikelihood,
    "num_indices": lambda value: CodeLikelihood().update(torch.tensor([-1.0]), value),
    "batch_size": lambda value: compare_images(IMAGES, IMAGES, Means, batch_size=value),
    "scale": lambda value: heat_map(torch.rand(2, 2), value),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "3", [3], 10**30])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, value):
    if (name, value) == ("sigma", 10**30):
        return
    with pytest.raises(ValueError, match=f"`{name}` must"):
        NUMBERS[name](value)


@pytest.mark.parametrize("value", [0, -1.0, -math.inf])
def test_a_window_without_width(value):
    with pytest.raises(ValueError, match="`sigma` must be a finite number above 0"):
        ssim(IMAGES, IMAGES, sigma=value)


def test_numbers_of_numpy_and_torch():
    for value in (np.int64(3), torch.tensor(3)):
        for name, use in NUMBERS.items():
            use(torch.tensor(5) if name == "subset_size" else value)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("images", lambda: psnr(IMAGES.numpy(), IMAGES.numpy())),
        ("references", lambda: psnr(IMAGES, [IMAGES])),
        ("real", lambda: frechet_distance(FEATURES.numpy(), FEATURES)),
        ("generated", lambda: precision_recall(FEATURES, FEATURES.to(torch.complex64))),
        ("logits", lambda: classifier_score(FEATURES * math.nan)),
        ("logits", lambda: classifier_score([1.0])),
        ("features", lambda: FeatureSet(FEATURES.numpy(), "network")),
        ("samples", lambda: copied_share(FEATURES * math.nan, FEATURES, FEATURES)),
        ("held_out", lambda: copied_share(FEATURES, FEATURES, FEATURES[:0])),
        ("log_likelihood", lambda: CodeLikelihood().update(torch.tensor([math.nan]), 4)),
        ("log_likelihood", lambda: CodeLikelihood().update([1.0], 4)),
        ("counts", lambda: codebook_statistics([1, 2])),
        ("counts", lambda: codebook_statistics(torch.tensor([]))),
        ("values", lambda: heat_map(torch.full((2, 2), math.nan))),
        ("indices", lambda: index_map(torch.full((1, 2, 2), 9), 4)),
    ],
)
def test_values(name, use):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        use()
