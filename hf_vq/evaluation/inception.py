"""The Inception network of published figures (FID, KID, Inception Score), and the images to measure against."""

import hashlib
import importlib
import importlib.util
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from ..distributed import share_of_process
from ..images import as_rgb


# torch-fidelity's copy of the weights of 2015-12-05, which are those of the published figures: the first digits of its
# SHA-256, which are also the last part of its name
ORIGINAL = "6726825d"
ORIGINAL_NETWORK = "inception"
WHERE = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth "
    "holds the weights of the published figures."
)


class InceptionFeatures(nn.Module):
    """Inception v3 as FID (Heusel et al. 2017), KID and Inception Score use it, by torch-fidelity's implementation.

    It sees images as they are in a file, in 8 bits, and enlarges them itself, as TensorFlow 1 did, to 299×299.

    Args:
        weights: a file in torch-fidelity's format. Only the original weights give figures that may be called FID, KID
            and Inception Score; `name` is then "inception", and "inception:" and digits of the file's hash otherwise.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: the file does not hold this network's weights.
    """

    def __init__(self, weights: str | Path):
        super().__init__()
        check_weights(Path(weights))
        network = inception_class()
        layers = ["2048", "logits_unbiased"]
        try:
            self.network = network("inception", layers, feature_extractor_weights_path=str(weights))
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip() if "\n" in str(error) else error
            raise ValueError(f"`weights` {str(weights)!r} must fit Inception v3: {reason} {WHERE}") from error
        digits = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[: len(ORIGINAL)]
        self.name = ORIGINAL_NETWORK if digits == ORIGINAL else f"inception:{digits}"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`images` `(B, C, H, W)` in [-1, 1] -> features `(B, 2048)`, and logits without bias `(B, 1008)`."""
        pixels = (as_rgb(images).float().clamp(-1, 1) + 1) * 127.5
        return self.network(pixels.round().to(torch.uint8))

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """`images` `(B, C, H, W)` in [-1, 1] -> features `(B, 2048)`, of FID, KID, precision and recall."""
        return self(images)[0]


class InceptionLogits(nn.Module):
    """The logits of the Inception Score.

    Args:
        features: the network.
    """

    def __init__(self, features: InceptionFeatures):
        super().__init__()
        self.network, self.name = features, features.name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images` `(B, C, H, W)` in [-1, 1] -> `(B, 1008)`."""
        return self.network(images)[1]


def check_weights(path: Path) -> None:
    """Refuses what is no file of finite tensors by name, before torch-fidelity unpickles it without a restriction."""
    if not path.is_file():
        raise ValueError(f"`weights` must be a file of Inception's weights, got {str(path)!r}. {WHERE}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"`weights` {str(path)!r} must hold tensors by name and nothing else: {reason}") from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"`weights` {str(path)!r} must hold tensors by name, got a {type(tensors).__name__}.")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"`weights` {str(path)!r} must be finite, got NaN or infinity in {broken[:3]}.")


def inception_class() -> type[nn.Module]:
    """torch-fidelity's Inception v3, which needs no torchvision.

    torch-fidelity imports torchvision for its other networks. Where that is missing or does not fit torch, the modules
    of this network are imported without the package's own.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise ImportError("Inception needs torch-fidelity: pip install 'hf_vq[eval]', or --no-deps torch-fidelity.")
    try:
        return importlib.import_module("torch_fidelity").FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):  # the latter from a torchvision that was built for another torch
        _forget("torch_fidelity")
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        _forget("torch_fidelity")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


@dataclass
class ReferenceBatch:
    """The real images that samples are compared with, or what is known of their features.

    Args:
        name: of the file.
        images: uint8 `(N, H, W, 3)`.
        mean, covariance: of the original Inception's features, `(2048,)` and `(2048, 2048)`, float64.
    """

    name: str
    images: np.ndarray | None
    mean: torch.Tensor | None
    covariance: torch.Tensor | None

    @classmethod
    def from_npz(cls, path: str | Path) -> "ReferenceBatch":
        """Reads a file as ADM (Dhariwal and Nichol 2021) publishes them: `arr_0`, or `mu` and `sigma`, or both.

        Raises:
            ValueError: a file with neither, or with arrays of other shapes.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("arr_0", "mu", "sigma") if name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
            raise ValueError(f"`reference` must be an .npz file of arrays, got {str(path)!r}: {error}") from error
        images, mean, covariance = (arrays.get(name) for name in ("arr_0", "mu", "sigma"))
        if images is not None and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
            raise ValueError(
                f"`arr_0` of {path} must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}."
            )
        if (mean is None) != (covariance is None) or (images is None and mean is None):
            raise ValueError(f"{path} must hold `arr_0`, or `mu` and `sigma`, got {sorted(arrays)}.")
        if mean is not None and (mean.ndim != 1 or covariance.shape != (len(mean), len(mean))):
            raise ValueError(
                f"`mu` and `sigma` of {path} must be (D,) and (D, D), got {mean.shape} and {covariance.shape}."
            )
        statistics = [None if part is None else torch.from_numpy(part).double() for part in (mean, covariance)]
        return cls(path.name, images, *statistics)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """This process's part of the images, `(B, 3, H, W)` in [-1, 1]."""
        if self.images is None:
            raise ValueError(f"{self.name} must hold images (`arr_0`) for more than the Fréchet distance.")
        own = share_of_process(self.images)
        for start in range(0, len(own), batch_size):
            yield torch.from_numpy(own[start : start + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1


__all__ = ["InceptionFeatures", "InceptionLogits", "ReferenceBatch", "inception_class"]
