"""Configuration of the VQGAN tokenizer."""

from collections.abc import Sequence

from .configuration_tokenizer import VQTokenizerConfig


class VQGANConfig(VQTokenizerConfig):
    """The encoder and decoder family of VQGAN (Esser et al. 2021), by default ImageNet's f16 with 1024 codes.

    Args:
        out_channels: channels of the reconstruction; None means `in_channels`.
        base_channels: width of the highest resolution.
        channel_multiplier: width of each resolution over `base_channels`; `f = 2 ** (len - 1)`.
        num_res_blocks: residual blocks a resolution (the decoder has one more).
        attn_resolutions: the sides, at `resolution`, of the feature maps with attention.
        mid_attention: attention at the lowest resolution (latent diffusion's "noattn" models have none).
        latent_channels: channels between encoder and `quant_conv` ("z_channels").
        dropout: in the residual blocks. norm_num_groups: groups of GroupNorm; must divide every width.
        kwargs: those of `VQTokenizerConfig`.
    """

    model_type = "hf_vq_vqgan"

    def __init__(
        self,
        out_channels: int | None = None,
        base_channels: int = 128,
        channel_multiplier: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        mid_attention: bool = True,
        latent_channels: int = 256,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        **kwargs,
    ):
        widths = [base_channels * multiplier for multiplier in channel_multiplier]
        if not widths or any(width % norm_num_groups for width in [base_channels, *widths]):
            raise ValueError(
                f"`norm_num_groups`={norm_num_groups} must divide every width: `base_channels`={base_channels} and its "
                f"products with `channel_multiplier`={list(channel_multiplier)}."
            )
        super().__init__(**kwargs)
        self.out_channels = self.in_channels if out_channels is None else out_channels
        self.base_channels = base_channels
        self.channel_multiplier = list(channel_multiplier)
        self.num_res_blocks = num_res_blocks
        self.attn_resolutions = list(attn_resolutions)
        self.mid_attention = mid_attention
        self.latent_channels = latent_channels
        self.dropout = dropout
        self.norm_num_groups = norm_num_groups

    @property
    def downsample_factor(self) -> int:
        """Pixels a code, along each side."""
        return 2 ** (len(self.channel_multiplier) - 1)


__all__ = ["VQGANConfig"]
