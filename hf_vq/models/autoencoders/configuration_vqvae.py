"""Configuration of the VQ-VAE tokenizer."""

from collections.abc import Sequence
from typing import Any

from ...argument_checks import check_integer
from .configuration_tokenizer import VQTokenizerConfig


class VQVAEConfig(VQTokenizerConfig):
    """VQ-VAE (van den Oord et al. 2017, section 4.1); the defaults are the paper's, at f4.

    Args:
        hidden_size: width of the networks, at least 2.
        residual_hidden_size: width inside a residual block.
        num_residual_layers: residual blocks on either side.
        downsample_factor: a power of 2, pixels a code along each side.
        rectified_residual: the skip of a residual block carries relu(x) and its convolutions have no bias, as in the
            PyTorch port whose in-place ReLU does so; for checkpoints from there.
        kwargs: those of `VQTokenizerConfig`, with K = 512, D = 64, an EMA codebook and 32 pixels.

    Raises:
        ValueError: an argument is out of its range, or `resolution` is no multiple of `downsample_factor`.
    """

    model_type = "hf_vq_vqvae"

    def __init__(
        self,
        hidden_size: int = 128,
        residual_hidden_size: int = 32,
        num_residual_layers: int = 2,
        downsample_factor: int = 4,
        rectified_residual: bool = False,
        resolution: int | Sequence[int] = 32,
        embed_dim: int = 64,
        num_embeddings: int = 512,
        quantizer: str = "ema",
        **kwargs: Any,
    ):
        downsample_factor = check_integer("downsample_factor", downsample_factor)
        if downsample_factor < 2 or downsample_factor & (downsample_factor - 1):
            raise ValueError(f"`downsample_factor` must be a power of 2 and at least 2, got {downsample_factor}.")
        super().__init__(
            resolution=resolution, embed_dim=embed_dim, num_embeddings=num_embeddings, quantizer=quantizer, **kwargs
        )
        # the outermost layers have half of it
        self.hidden_size = check_integer("hidden_size", hidden_size, minimum=2)
        self.residual_hidden_size = check_integer("residual_hidden_size", residual_hidden_size, minimum=1)
        self.num_residual_layers = check_integer("num_residual_layers", num_residual_layers, minimum=0)
        self.downsample_factor = downsample_factor
        self.rectified_residual = rectified_residual
        self._check_resolution()

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Width of the networks at each resolution, that of the image first."""
        return (self.hidden_size,) * self.downsample_factor.bit_length()

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, under the name that diffusers gives them."""
        return self.embed_dim


__all__ = ["VQVAEConfig"]
