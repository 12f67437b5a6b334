"""Configuration of the VQGAN tokenizer."""

from collections.abc import Sequence
from typing import Any

from ...argument_checks import check_integer, check_real
from .configuration_tokenizer import VQTokenizerConfig


def _integers(name: str, values: Any) -> list[int]:
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__") or not hasattr(values, "__len__"):
        raise ValueError(f"`{name}` must be a list of ints of at least 1, got {values!r}.")
    return [check_integer(name, value, minimum=1) for value in values]


class VQGANConfig(VQTokenizerConfig):
    """The encoder and decoder family of VQGAN (Esser et al. 2021), by default ImageNet's f16 with 1024 codes.

    Args:
        out_channels: channels of the reconstruction; None means `in_channels`.
        base_channels: width of the highest resolution.
        channel_multiplier: width of each resolution over `base_channels`; `f = 2 ** (len - 1)`.
        decoder_channel_multiplier: the decoder's, as many; None means `channel_multiplier`.
        num_res_blocks: residual blocks a resolution (the decoder has one more).
        attn_resolutions: the sides of the feature maps with attention, for images of `resolution`; of rectangular
            images the shorter side counts.
        mid_attention: attention at the lowest resolution (latent diffusion's "noattn" models have none).
        attention_type: "vanilla" or "linear" (latent diffusion's option).
        latent_channels: channels between encoder and `quant_conv` ("z_channels").
        decoder_num_res_blocks, decoder_attn_resolutions, decoder_latent_channels: the decoder's; None means the
            encoder's.
        resamp_with_conv: convolve where the resolution changes; False takes means of 2×2 and plain nearest neighbours.
        decoder_norm: "group", or "spatial" for the norms of MoVQ, whose scale and shift are read off the codes.
        spatial_norm_conv: a 3×3 convolution of the codes in each spatial norm (MoVQ's "add_conv").
        tanh_out: the reconstruction passes through tanh.
        give_pre_end: `decode` gives the features before the last norm and convolution, `base_channels` times the first
            of the decoder's multipliers wide, in place of an image; for converted checkpoints, not for training.
        dropout: in the residual blocks, in [0, 1).
        norm_num_groups: groups of GroupNorm; must divide every width.
        kwargs: those of `VQTokenizerConfig`.

    Raises:
        ValueError: an argument is out of its range, or `resolution` is no multiple of the downsample factor.
    """

    model_type = "hf_vq_vqgan"

    def __init__(
        self,
        out_channels: int | None = None,
        base_channels: int = 128,
        channel_multiplier: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_channel_multiplier: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        mid_attention: bool = True,
        attention_type: str = "vanilla",
        latent_channels: int = 256,
        decoder_num_res_blocks: int | None = None,
        decoder_attn_resolutions: Sequence[int] | None = None,
        decoder_latent_channels: int | None = None,
        resamp_with_conv: bool = True,
        decoder_norm: str = "group",
        spatial_norm_conv: bool = False,
        tanh_out: bool = False,
        give_pre_end: bool = False,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        **kwargs: Any,
    ):
        multipliers = _integers("channel_multiplier", channel_multiplier)
        if decoder_channel_multiplier is None:
            decoder_channel_multiplier = multipliers
        decoder = _integers("decoder_channel_multiplier", decoder_channel_multiplier)
        if not multipliers or len(decoder) != len(multipliers):
            raise ValueError(
                "`channel_multiplier` and `decoder_channel_multiplier` must be as many numbers, at least one each, "
                f"got {multipliers} and {decoder}."
            )
        base_channels = check_integer("base_channels", base_channels, minimum=1)
        norm_num_groups = check_integer("norm_num_groups", norm_num_groups, minimum=1)
        if any(base_channels * multiplier % norm_num_groups for multiplier in [1, *multipliers, *decoder]):
            raise ValueError(
                f"`norm_num_groups`={norm_num_groups} must divide every width: "
                f"`base_channels`={base_channels} and its "
                f"products with `channel_multiplier`={multipliers} and `decoder_channel_multiplier`={decoder}."
            )
        if attention_type not in ("vanilla", "linear"):
            raise ValueError(f"`attention_type` must be 'vanilla' or 'linear', got {attention_type!r}.")
        if decoder_norm not in ("group", "spatial"):
            raise ValueError(f"`decoder_norm` must be 'group' or 'spatial', got {decoder_norm!r}.")
        super().__init__(**kwargs)
        if out_channels is None:
            out_channels = self.in_channels
        self.out_channels = check_integer("out_channels", out_channels, minimum=1)
        self.base_channels = base_channels
        self.channel_multiplier = multipliers
        self.decoder_channel_multiplier = decoder
        self.num_res_blocks = check_integer("num_res_blocks", num_res_blocks, minimum=1)
        self.attn_resolutions = _integers("attn_resolutions", attn_resolutions)
        self.mid_attention = mid_attention
        self.attention_type = attention_type
        self.latent_channels = check_integer("latent_channels", latent_channels, minimum=1)
        for name, value in (
            ("decoder_num_res_blocks", decoder_num_res_blocks),
            ("decoder_latent_channels", decoder_latent_channels),
        ):
            setattr(self, name, None if value is None else check_integer(name, value, minimum=1))
        if decoder_attn_resolutions is not None:
            decoder_attn_resolutions = _integers("decoder_attn_resolutions", decoder_attn_resolutions)
        self.decoder_attn_resolutions = decoder_attn_resolutions
        self.resamp_with_conv = resamp_with_conv
        self.decoder_norm = decoder_norm
        self.spatial_norm_conv = spatial_norm_conv
        self.tanh_out = tanh_out
        self.give_pre_end = give_pre_end
        self.dropout = check_real("dropout", dropout, minimum=0, below=1)
        self.norm_num_groups = norm_num_groups
        self._check_resolution()

    @property
    def downsample_factor(self) -> int:
        """Pixels a code, along each side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    def of_decoder(self, name: str) -> Any:
        """The decoder's value of a field that it may have its own of, such as `num_res_blocks`."""
        own = getattr(self, f"decoder_{name}")
        return getattr(self, name) if own is None else own

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Width of each resolution, the highest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multiplier)


__all__ = ["VQGANConfig"]
