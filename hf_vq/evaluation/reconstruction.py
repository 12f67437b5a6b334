"""How close a reconstruction is to its original, pixel by pixel: PSNR, SSIM and L1, each per image.

All functions take images in [-1, 1]. A decoder's output goes beyond and is refused: clamp it before measuring it, as
saving it as a picture would.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..argument_checks import check_integer, check_real, check_tensor
from ..distributed import all_reduced
from ..images import check_pixel_range


DATA_RANGE = 2.0  # the width of [-1, 1]
SSIM_WINDOW = 11  # pixels, as published


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, `10 log10(range² / MSE)`, of each image; infinite where the two are equal.

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        references: what they are measured against, the same shape.

    Returns:
        `(B,)`.
    """
    _check_pair(images, references)
    squared_error = (_floating(images) - _floating(references)).square().flatten(1).mean(1)
    return 10 * torch.log10(DATA_RANGE**2 / squared_error)


def l1(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of each image: `(B, C, H, W)` twice -> `(B,)`."""
    _check_pair(images, references)
    return (_floating(images) - _floating(references)).abs().flatten(1).mean(1)


def ssim(
    images: torch.Tensor, references: torch.Tensor, window_size: int = SSIM_WINDOW, sigma: float = 1.5
) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, equation 13) of each image, the mean over positions and channels.

    Means, variances and covariance are weighted by a Gaussian window, at the positions where the window lies wholly
    inside the image; `C1 = (0.01 range)²`, `C2 = (0.03 range)²`. Colour channels are compared one by one. The
    luminance term depends on where zero lies: as in every published figure it is that of [0, 1], range 1, which [-1,
    1] is mapped to.

    Args:
        images, references (`(B, C, H, W)` in [-1, 1]): H and W at least `window_size`.
        window_size: odd width of the window, in pixels.
        sigma: the window's standard deviation, in pixels.

    Returns:
        `(B,)`, at most 1.
    """
    _check_pair(images, references)
    window_size, sigma = check_integer("window_size", window_size, 1), check_real("sigma", sigma, above=0)
    if window_size % 2 == 0:
        raise ValueError(f"`window_size` must be odd and positive, got {window_size}")
    if min(images.shape[-2:]) < window_size:
        raise ValueError(f"`images` must be at least {window_size} pixels high and wide, got {tuple(images.shape)}")
    x, y = _floating(images) / 2, _floating(references) / 2  # [0, 1] less a half: variances lose fewer digits
    offsets = torch.arange(window_size, dtype=x.dtype, device=x.device) - window_size // 2
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    window = window / window.sum()

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = values.shape
        values = values.reshape(batch * channels, 1, height, width)
        values = F.conv2d(F.conv2d(values, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return values.view(batch, channels, *values.shape[-2:])

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x * mean_x
    variance_y = local_mean(y * y) - mean_y * mean_y
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    contrast_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * contrast_structure).flatten(1).mean(1)


class MeanOverImages:
    """The mean of per-image values over a data set, batch by batch and over processes, in float64.

    Args:
        names: the values that every batch brings.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.totals = torch.zeros(len(self.names) + 1, dtype=torch.float64)  # the last one counts images

    def update(self, **values: torch.Tensor) -> None:
        """Add one batch: each of `names` once, `(B,)`."""
        if values.keys() != set(self.names):
            raise ValueError(f"`values` must name {sorted(self.names)}, got {sorted(values)}")
        shapes = {tuple(value.shape) for value in values.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"`values` must all be of one shape (B,), got {sorted(shapes)}")
        sums = [values[name].detach().cpu().double().sum() for name in self.names]
        self.totals += torch.stack([*sums, torch.tensor(next(iter(shapes))[0]).double()])

    def compute(self) -> dict[str, float]:
        """The mean of every value over all images of all processes, and `num_images`."""
        *sums, count = all_reduced(self.totals).tolist()
        if count == 0:
            raise ValueError("no image has been added: call `update(...)` before `compute()`")
        means = {name: total / count for name, total in zip(self.names, sums, strict=True)}
        return {**means, "num_images": int(count)}


def _check_pair(images: torch.Tensor, references: torch.Tensor) -> None:
    for name, values in (("images", images), ("references", references)):
        check_tensor(name, values)
    if images.ndim != 4 or images.shape != references.shape:
        raise ValueError(
            "`images` and `references` must have one shape (B, C, H, W), "
            f"got {tuple(images.shape)} and {tuple(references.shape)}."
        )
    check_pixel_range("images", images)
    check_pixel_range("references", references)


def _floating(images: torch.Tensor) -> torch.Tensor:
    return images if images.dtype == torch.float64 else images.float()


__all__ = ["DATA_RANGE", "SSIM_WINDOW", "MeanOverImages", "l1", "psnr", "ssim"]
