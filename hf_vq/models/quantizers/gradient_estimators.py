"""Gradients through the choice of a code, which has none of its own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def straight_through(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The value of `quantized` to the bit, the identity's gradient to `latents` (van den Oord et al. 2017, section
    3.2).
    """
    # in this order the result has the memory layout of the latents, which the decoder then keeps
    return (latents - latents.detach()) + quantized.detach()


def rotation_trick(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The value of `quantized` to the bit, the gradient of the rotation and scaling that takes `latents` to it.

    Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", equation 4:
    q = (|e|/|z|) (I - 2 r rᵀ + 2 ê ẑᵀ) z with r = (ẑ + ê) / |ẑ + ê| and all coefficients constant in the backward
    pass. Both arguments are `(B, D, h, w)`; vectors are along dimension 1. A latent of length 0 has no direction and
    no finite scale: it takes the identity's gradient.
    """
    floor = 1e-6
    with torch.no_grad():
        latent_norm, quantized_norm = latents.norm(dim=1, keepdim=True), quantized.norm(dim=1, keepdim=True)
        z_hat, e_hat = latents / latent_norm.clamp_min(floor), quantized / quantized_norm.clamp_min(floor)
        r = F.normalize(z_hat + e_hat, dim=1, eps=floor)
        scale = quantized_norm / latent_norm.clamp_min(floor)
    along_r = (latents * r).sum(dim=1, keepdim=True)
    along_z = (latents * z_hat).sum(dim=1, keepdim=True)
    rotated = scale * (latents - 2 * r * along_r + 2 * e_hat * along_z)
    # the value of `rotated` is only nearly `quantized` (z and e almost opposite), so only its gradient is taken
    return straight_through(torch.where(latent_norm > floor, rotated, latents), quantized)


GRADIENT_ESTIMATORS = {"straight_through": straight_through, "rotation": rotation_trick}


def gradient_estimator_of(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The estimator called `name`; an unknown one is a `ValueError`."""
    if name not in GRADIENT_ESTIMATORS:
        raise ValueError(f"`gradient_estimator` must be one of {sorted(GRADIENT_ESTIMATORS)}, got {name!r}.")
    return GRADIENT_ESTIMATORS[name]


__all__ = ["GRADIENT_ESTIMATORS", "gradient_estimator_of", "rotation_trick", "straight_through"]
