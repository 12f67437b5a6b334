"""The configuration fields that every tokenizer has."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ...argument_checks import check_integer, check_real


class VQTokenizerConfig(PreTrainedConfig):
    """Codebook, quantizer and image size of a tokenizer.

    Args:
        in_channels: channels of the image, any number: 1 for greyscale, 3 for RGB, N for label maps.
        resolution: side of the images it is trained on, in pixels, or `[height, width]`; other sizes work. A multiple
            of the downsample factor.
        embed_dim: D, channels of a code.
        num_embeddings: K, codes (also `codebook_size`).
        quantizer: a name of `hf_vq.models.quantizers.build.QUANTIZERS`, such as "vq" or "ema".
        quantizer_kwargs: further arguments of that class.
        commitment_cost: β, the weight of the commitment term, at least 0.
        legacy_beta: put β on the codebook's term, as the original VQGAN code does.
        remapped_from: the codes behind a remap table that is saved with the tokenizer (`quantize.remap`); its indices
            are then renumbered to `num_embeddings` values. None has no table.
        unknown_code: with `remapped_from`, what becomes of a code that the table lacks: "random", "nearest", "error",
            an index, or "extra": the last index.
        data_variance: divide the squared error of `forward` by this variance of the pixels, above 0; None does not.
        scaling_factor: latents are multiplied by it for a continuous diffusion prior; above 0.
        kwargs: those of `PreTrainedConfig`.

    Raises:
        ValueError: an argument is out of its range.
    """

    attribute_map = {"codebook_size": "num_embeddings"}
    # what pipelines of diffusers also read of a tokenizer's configuration
    force_upcast = False

    def __init__(
        self,
        in_channels: int = 3,
        resolution: int | Sequence[int] = 256,
        embed_dim: int = 256,
        num_embeddings: int = 1024,
        quantizer: str = "vq",
        quantizer_kwargs: dict[str, Any] | None = None,
        commitment_cost: float = 0.25,
        legacy_beta: bool = False,
        remapped_from: int | None = None,
        unknown_code: str | int = "random",
        data_variance: float | None = None,
        scaling_factor: float = 1.0,
        **kwargs: Any,
    ):
        self.in_channels = check_integer("in_channels", in_channels, minimum=1)
        self.resolution = _checked_resolution(resolution)
        self.embed_dim = check_integer("embed_dim", embed_dim, minimum=1)
        self.num_embeddings = check_integer("num_embeddings", num_embeddings, minimum=1)
        self.quantizer = quantizer
        self.quantizer_kwargs = dict(quantizer_kwargs or {})
        for name in ("num_embeddings", "embed_dim"):
            if name in self.quantizer_kwargs:
                raise ValueError(f"`quantizer_kwargs` must leave {name!r} out, which is given as `{name}`.")
        self.commitment_cost = check_real("commitment_cost", commitment_cost, minimum=0)
        self.legacy_beta = legacy_beta
        if remapped_from is not None:
            used = self.num_embeddings - (unknown_code == "extra")
            remapped_from = check_integer("remapped_from", remapped_from, minimum=used)
            if quantizer == "residual":
                raise ValueError("`remapped_from` must be None for quantizer='residual', whose codes are several.")
        self.remapped_from = remapped_from
        self.unknown_code = unknown_code
        self.data_variance = None if data_variance is None else check_real("data_variance", data_variance, above=0)
        self.scaling_factor = check_real("scaling_factor", scaling_factor, above=0)
        super().__init__(**kwargs)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it is trained on, in pixels."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else tuple(self.resolution)

    @property
    def downsample_factors(self) -> tuple[int, ...]:
        """Pixels a code along each side, of each level from top to bottom."""
        return (self.downsample_factor,)

    @property
    def vq_embed_dim(self) -> int:
        """`embed_dim` under the name that diffusers gives it."""
        return self.embed_dim

    def _check_resolution(self) -> None:
        factor = self.downsample_factor
        if any(side % factor for side in self.image_size):
            raise ValueError(
                f"`resolution` must be a multiple of {factor} (the downsample factor), got {self.resolution}."
            )


def _checked_resolution(resolution: int | Sequence[int]) -> int | list[int]:
    """One number where the sides are equal."""
    if not isinstance(resolution, Sequence) or isinstance(resolution, str):
        return check_integer("resolution", resolution, minimum=1)
    sides = [check_integer("resolution", side, minimum=1) for side in resolution]
    if len(sides) != 2:
        raise ValueError(f"`resolution` must be an int or [height, width], got {sides}.")
    return sides[0] if sides[0] == sides[1] else sides


__all__ = ["VQTokenizerConfig"]
