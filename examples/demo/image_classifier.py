"""A classifier of real images that takes seconds to train: logistic regression on the features of a frozen network."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from hf_vq.evaluation.features import FeatureExtractor, extract_features
from hf_vq.training.data.image_datasets import collate


class LinearClassifier:
    """
    Scores for rejection sampling: the probability of an image's class.

    Args:
        extractor: the network, on its device.
        dataset: `pixel_values` `(3, H, W)` in [-1, 1] and a `label` each.
        weight_decay: on the standardised features' weights.
    """

    def __init__(self, extractor: FeatureExtractor, dataset, weight_decay: float = 1e-2):
        self.extractor = extractor
        features, labels = self._read(dataset)
        self.std, self.mean = torch.std_mean(features, dim=0)
        self.weight = torch.zeros(len(dataset.class_names), features.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self._logits(features), labels)
            loss = loss + weight_decay * self.weight[:, :-1].square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.weight.requires_grad_(False)

    def _read(self, dataset) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(DataLoader(dataset, batch_size=64, collate_fn=collate))
        features = extract_features(batches, self.extractor, progress=False).features
        return features, torch.cat([batch["label"] for batch in batches])

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        scaled = (features - self.mean) / self.std.clamp_min(1e-6)
        return scaled @ self.weight[:, :-1].T + self.weight[:, -1]

    def __call__(self, images: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """The probability `(B,)` of the class `(B,)` of each image `(B, 3, H, W)` in [0, 1]."""
        features = self.extractor.pooled(images * 2 - 1).cpu()
        return self._logits(features).softmax(-1).gather(1, class_ids.cpu()[:, None])[:, 0]

    def accuracy(self, dataset) -> float:
        """The share of images whose likeliest class is their own."""
        features, labels = self._read(dataset)
        return float((self._logits(features).argmax(-1) == labels).float().mean())
