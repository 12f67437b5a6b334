"""Features of pictures, by which distributions of pictures are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from ..argument_checks import check_tensor
from ..distributed import all_gathered, is_main_process
from ..images import check_pixel_range


class FeatureExtractor(Protocol):
    """A network that describes each picture by one vector, such as
    `hf_vq.training.objectives.perceptual.MobileNetV2Features`.

    Attributes:
        name: of the network and its weights; every figure made with it carries this name.
    """

    name: str

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """`images` `(B, 3, H, W)` in [-1, 1] -> features `(B, D)`."""
        ...


class PooledLayer:
    """One intermediate activation of a network, averaged over positions.

    A layer of few channels is what the Fréchet distance needs when pictures are few: its estimate is mostly bias
    unless there are several times more pictures than features. Layer 13 of MobileNetV2 has 96.

    Args:
        network: has a `name` and `features(images (B, 3, H, W) in [-1, 1], layers)`, a list of `(B, C, h, w)`.
        layer: which one, in the network's own numbering.
    """

    def __init__(self, network: nn.Module, layer: int):
        self.network = network
        self.layer = layer
        self.name = f"{network.name}.layer{layer}"

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """`images` `(B, 3, H, W)` in [-1, 1] -> `(B, C)`."""
        (activation,) = self.network.features(images, (self.layer,))
        return activation.mean((2, 3))


@dataclass
class FeatureSet:
    """`features` `(N, D)` of N pictures, and the name of the `network` that made them."""

    features: torch.Tensor
    network: str

    def __post_init__(self):
        check_tensor("features", self.features)
        if self.features.ndim != 2:
            raise ValueError(f"`features` must have shape (N, D), got {tuple(self.features.shape)}")

    def __len__(self) -> int:
        return self.features.shape[0]


class FeatureCollector:
    """Keeps the features, not the pictures, of a stream of batches; one row for each picture, on the CPU.

    Args:
        extractor: see `FeatureExtractor`.
    """

    def __init__(self, extractor: FeatureExtractor):
        self.extractor = extractor
        self.batches: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, images: torch.Tensor) -> None:
        """Add a batch `(B, 3, H, W)` in [-1, 1], on the extractor's device."""
        if images.ndim != 4:
            raise ValueError(f"`images` must have shape (B, 3, H, W), got {tuple(images.shape)}.")
        check_pixel_range("images", images)
        with torch.autocast(images.device.type, enabled=False):
            features = self.extractor.pooled(images.float())
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"`extractor.pooled` must return (B, D) for {len(images)} images, got {tuple(features.shape)}"
            )
        self.batches.append(features.float().cpu())

    def compute(self) -> FeatureSet:
        """The features of all batches of all processes, by rank."""
        local = torch.cat(self.batches) if self.batches else None
        return FeatureSet(all_gathered(local), self.extractor.name)


def extract_features(
    images: Iterable,
    extractor: FeatureExtractor,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FeatureSet:
    """Features of a stream of pictures.

    Args:
        images: yields batches, either tensors `(B, 3, H, W)` in [-1, 1] or dicts that have one as `pixel_values`.
        extractor: see `FeatureExtractor`.
        device: where the extractor is; batches are moved there.
        progress: show a progress bar.
    """
    collector = FeatureCollector(extractor)
    for batch in tqdm(images, desc=f"features {extractor.name}", disable=not (progress and is_main_process())):
        pixel_values = batch if torch.is_tensor(batch) else batch["pixel_values"]
        collector.update(pixel_values if device is None else pixel_values.to(device))
    return collector.compute()


__all__ = ["FeatureCollector", "FeatureExtractor", "FeatureSet", "PooledLayer", "extract_features"]
