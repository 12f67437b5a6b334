"""The patch discriminator of VQGAN training."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...argument_checks import check_integer
from ...distributed import is_distributed, num_processes, sum_over_processes


NORMS = ("batch", "group", "none")


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, https://arxiv.org/abs/1611.07004, section 3.2.2): one logit per image patch.

    With the defaults a logit sees 70x70 pixels. Module names (`main.{i}`) are those of the original VQGAN's
    discriminator, so its weights load by name when `norm="batch"`.

    Args:
        in_channels: channels of the images.
        base_channels: width of the first convolution (`ndf`); it doubles at every layer, up to 8 times.
        num_layers: stride-2 convolutions; each also widens the patch a logit sees.
        norm: `"batch"` (the original, over the batches of all processes), `"group"` (statistics of one image: nothing
            to keep in step over processes, and no dependence on the batch's other images) or `"none"`.

    Raises:
        ValueError: for a size below 1 or an unknown `norm`.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm: str = "batch"):
        super().__init__()
        in_channels = check_integer("in_channels", in_channels, minimum=1)
        base_channels = check_integer("base_channels", base_channels, minimum=1)
        num_layers = check_integer("num_layers", num_layers, minimum=1)
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {NORMS}, got {norm!r}.")
        self.arguments = {
            "in_channels": in_channels,
            "base_channels": base_channels,
            "num_layers": num_layers,
            "norm": norm,
        }
        self.min_size = 3 * 2**num_layers  # two more 4x4 convolutions without stride take 2 pixels off

        layers = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = base_channels
        for depth in range(1, num_layers + 1):
            out_channels = base_channels * min(2**depth, 8)
            stride = 2 if depth < num_layers else 1
            # a normalisation has its own bias
            layers.append(nn.Conv2d(channels, out_channels, 4, stride=stride, padding=1, bias=norm == "none"))
            layers.append(_norm_layer(norm, out_channels))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = out_channels
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "PatchDiscriminator":
        """The discriminator that `save` has written, or the conversion of an original VQGAN with `--discriminator`.

        Raises:
            ValueError: a file is missing, cannot be read, or holds another network.
        """
        folder = Path(folder)
        try:
            network = cls(**json.loads((folder / "config.json").read_text()))
            network.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} must hold a discriminator, config.json and model.safetensors: {error}"
            ) from error
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            raise ValueError(f"{folder / 'model.safetensors'} holds values that are not finite.")
        return network

    def save(self, folder: str | Path) -> None:
        """Writes the constructor's arguments and the weights."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(self.arguments, indent=2) + "\n")

    def forward(
        self, images: torch.Tensor, others: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of one batch, or of two batches that are normalised apart.

        The second argument lets a distributed wrapper see real and generated images as one forward pass.

        Args:
            images: `(B, C, H, W)`.
            others: `(B', C, H, W)`, optional.

        Returns:
            `(B, 1, h, w)` logits, high for real; with `others` a tuple of two.

        Raises:
            ValueError: if the images are too small for the number of layers.
        """
        if others is not None:
            return self(images), self(others)
        if min(images.shape[-2:]) < self.min_size:
            raise ValueError(
                f"`images` must be at least {self.min_size} pixels high and wide for this number of layers, "
                f"got {tuple(images.shape)}; use fewer `num_layers`."
            )
        return self.main(images)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are of the batches of all processes, on GPUs and on CPUs.

    torch's `SyncBatchNorm` does the same on GPUs alone. Every process must bring as many pixels as the others. With
    one process, and in evaluation mode, it is `nn.BatchNorm2d`.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training or not is_distributed():
            return super().forward(images)
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        count = values.numel() // values.shape[1] * num_processes()
        mean = sum_over_processes(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(images.dtype)


def _norm_layer(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return SyncedBatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.Identity()


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for normalisations (Radford et al. 2015, section 3)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
