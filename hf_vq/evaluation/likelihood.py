"""How well a prior predicts the codes: bits per index, and bits per pixel dimension of the picture they stand for."""

import math

import torch

from ..argument_checks import check_integer, check_tensor
from ..distributed import all_reduced


class CodeLikelihood:
    """Collects `log_likelihood` of a prior over a data set, batch by batch and over processes.

    Args:
        pixel_dims: C·H·W of the picture that one grid of codes stands for. With it, `bits_per_pixel_dim` is given: the
            rate of the codes, in bits, spread over the values of the picture. The decoder is lossy, so this is a
            compression rate and not the likelihood of the picture.
    """

    def __init__(self, pixel_dims: int | None = None):
        self.pixel_dims = None if pixel_dims is None else check_integer("pixel_dims", pixel_dims, 1)
        # images, indices, sum of bits, sum of squared bits
        self.totals = torch.zeros(4, dtype=torch.float64)

    def update(self, log_likelihood: torch.Tensor, num_indices: int) -> None:
        """Add one batch: `log_likelihood` `(B,)` in nats, of `num_indices` codes each."""
        check_tensor("log_likelihood", log_likelihood)
        if log_likelihood.ndim != 1 or log_likelihood.isnan().any():
            raise ValueError(
                f"`log_likelihood` must be numbers of shape (B,), got {log_likelihood.dtype} of shape "
                f"{tuple(log_likelihood.shape)}, {int(log_likelihood.isnan().sum())} of them nan."
            )
        num_indices = check_integer("num_indices", num_indices, 1)
        bits = -log_likelihood.detach().double().cpu() / math.log(2)
        images = bits.shape[0]
        self.totals += torch.stack(
            [
                torch.tensor(images).double(),
                torch.tensor(images * num_indices).double(),
                bits.sum(),
                bits.square().sum(),
            ]
        )

    def compute(self) -> dict[str, float]:
        """`bits_per_index`, `bits_per_image`, of several images with its standard error, `num_images`, and
        `bits_per_pixel_dim` where `pixel_dims` is known."""
        images, indices, bits, squared_bits = all_reduced(self.totals).tolist()
        if images == 0:
            raise ValueError("no likelihood has been added: call `update(...)` before `compute()`")
        mean = bits / images
        variance = max(squared_bits / images - mean * mean, 0.0) * images / max(images - 1, 1)
        result = {"bits_per_index": bits / indices, "bits_per_image": mean}
        if images > 1:
            result["bits_per_image_standard_error"] = math.sqrt(variance / images)
        result["num_images"] = int(images)
        if self.pixel_dims is not None:
            result["bits_per_pixel_dim"] = mean / self.pixel_dims
        return result


__all__ = ["CodeLikelihood"]
