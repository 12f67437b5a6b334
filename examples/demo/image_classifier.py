"""A classifier of real images that takes seconds to train: logistic regression on the features of a frozen network.

    python examples/demo/image_classifier.py --size 64 --output outputs/classifier/model.safetensors

trains it on the packaged images and prints the share of validation images that it names rightly.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from hf_vq.evaluation.features import FeatureExtractor, extract_features
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


DATA = Path(__file__).resolve().parents[1] / "data/emoji-64"


class LinearClassifier:
    """
    Scores for rejection sampling: the probability of an image's class.

    Args:
        extractor: the network, on its device.
        weight: `(classes, D + 1)`, the last column is the bias.
        mean, std: `(D,)`, by which the features are standardised.
    """

    def __init__(self, extractor: FeatureExtractor, weight: torch.Tensor, mean: torch.Tensor, std: torch.Tensor):
        self.extractor = extractor
        self.weight, self.mean, self.std = weight, mean, std

    @classmethod
    def fit(cls, extractor: FeatureExtractor, dataset, weight_decay: float = 1e-2) -> "LinearClassifier":
        """Trains one.

        Args:
            extractor: the network, on its device.
            dataset: `pixel_values` `(3, H, W)` in [-1, 1] and a `label` each, and its `class_names`.
            weight_decay: on the standardised features' weights.
        """
        features, labels = _read(extractor, dataset)
        std, mean = torch.std_mean(features, dim=0)
        weight = torch.zeros(len(dataset.class_names), features.shape[1] + 1, requires_grad=True)
        classifier = cls(extractor, weight, mean, std.clamp_min(1e-6))
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(classifier._logits(features), labels)
            loss = loss + weight_decay * weight[:, :-1].square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        weight.requires_grad_(False)
        return classifier

    @classmethod
    def load(cls, path: str | Path, extractor: FeatureExtractor) -> "LinearClassifier":
        """The one that `save` wrote, over the same network.

        Raises:
            ValueError: for a file of another kind.
        """
        tensors = load_file(path)
        if set(tensors) != {"weight", "mean", "std"}:
            raise ValueError(f"`path` must hold weight, mean and std, got {sorted(tensors)} in {path}.")
        return cls(extractor, **{name: tensor.float() for name, tensor in tensors.items()})

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, in half precision and without the extractor."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # scaled features of almost constant channels would overflow: their weights are as good as none
        tensors = {"weight": self.weight, "mean": self.mean, "std": self.std.clamp_min(1e-4)}
        save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        scaled = (features - self.mean) / self.std
        return scaled @ self.weight[:, :-1].T + self.weight[:, -1]

    def __call__(self, images: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """The probability `(B,)` of the class `(B,)` of each image `(B, 3, H, W)` in [0, 1]."""
        features = self.extractor.pooled(images * 2 - 1).cpu()
        return self._logits(features).softmax(-1).gather(1, class_ids.cpu()[:, None])[:, 0]

    def accuracy(self, dataset) -> float:
        """The share of images whose likeliest class is their own."""
        features, labels = _read(self.extractor, dataset)
        return float((self._logits(features).argmax(-1) == labels).float().mean())


def _read(extractor: FeatureExtractor, dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The features `(N, D)` and the labels `(N,)` of a data set."""
    batches = list(DataLoader(dataset, batch_size=64, collate_fn=collate))
    features = extract_features(batches, extractor, progress=False).features
    return features, torch.cat([batch["label"] for batch in batches])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    data = DataArguments(str(DATA), label_column="category", resolution=args.size)
    train, validation = (load_image_dataset(data, split) for split in ("train", "validation"))
    extractor = build_perceptual("mobilenet_v2")
    LinearClassifier.fit(extractor, train).save(args.output)
    accuracy = LinearClassifier.load(args.output, extractor).accuracy(validation)
    print(f"{args.output}: {accuracy:.1%} of {len(validation)} validation images")


if __name__ == "__main__":
    main()
