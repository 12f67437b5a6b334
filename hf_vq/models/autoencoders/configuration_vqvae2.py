"""Configuration of the hierarchical tokenizer of VQ-VAE-2."""

from collections.abc import Sequence
from typing import Any

from ...argument_checks import check_integer, check_real
from .configuration_vqvae import VQVAEConfig


class VQVAE2Config(VQVAEConfig):
    """VQ-VAE-2 (Razavi, van den Oord and Vinyals 2019, section 3.1); the defaults are the paper's for 256 pixels.

    The levels are counted from the top, the coarsest; each has twice the resolution of the one above it, and a
    codebook of its own of `num_embeddings` codes. The paper's three levels for 1024 pixels, 32×32, 64×64 and 128×128
    codes, are `num_levels=3, downsample_factor=32, resolution=1024`.

    Args:
        num_levels: at least 2.
        downsample_factor: a power of 2, pixels a code of the top level along each side; that of the bottom level,
            smaller by `2 ** (num_levels - 1)`, is at least 2.
        level_dropout: in training, probability with which the decoder sees the codes of some upper levels alone, how
            many being drawn evenly (the "quantizer dropout" of Zeghidour et al. 2021, section III-C, on levels). The
            upper levels then hold as much of the image as they can, and decode to a picture by themselves; the paper
            has none.
        kwargs: those of `VQVAEConfig`, with residual blocks of 64 inner channels.
    """

    model_type = "hf_vq_vqvae2"

    def __init__(
        self,
        num_levels: int = 2,
        downsample_factor: int = 8,
        level_dropout: float = 0.0,
        residual_hidden_size: int = 64,
        resolution: int | Sequence[int] = 256,
        **kwargs: Any,
    ):
        num_levels = check_integer("num_levels", num_levels, minimum=2)
        downsample_factor = check_integer("downsample_factor", downsample_factor)
        if downsample_factor < 2**num_levels:
            raise ValueError(
                f"`downsample_factor` must be at least {2**num_levels} for {num_levels} levels, got "
                f"{downsample_factor}."
            )
        super().__init__(
            downsample_factor=downsample_factor,
            residual_hidden_size=residual_hidden_size,
            resolution=resolution,
            **kwargs,
        )
        self.num_levels = num_levels
        self.level_dropout = check_real("level_dropout", level_dropout, minimum=0, maximum=1)

    @property
    def downsample_factors(self) -> tuple[int, ...]:
        return tuple(self.downsample_factor >> level for level in range(self.num_levels))


__all__ = ["VQVAE2Config"]
