"""diffusers' UNet2DModel with what denoisers of the original latent diffusion code have beyond it."""

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D

from ...argument_checks import check_integer
from ..checked_loading import CheckedLoadingMixin


class LatentUNet2DModel(CheckedLoadingMixin, UNet2DModel):
    """
    A [`~diffusers.UNet2DModel`] with one number of attention heads for all its widths, and with resampling that may
    have no convolutions (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022; the
    inpainting model has 8 heads over three widths).

    Args:
        sample_size, in_channels, out_channels, down_block_types, up_block_types, block_out_channels, layers_per_block,
            dropout, attention_head_dim, downsample_type, upsample_type, attn_norm_num_groups,
            resnet_time_scale_shift, num_class_embeds: of [`~diffusers.UNet2DModel`].
        num_attention_heads (*optional*): of every attention layer, in place of `attention_head_dim`.
        num_up_attention_heads (*optional*): of those on the way up, where it is another number.
        resample_with_conv: False pools on the way down, and repeats each value on the way up.

    Raises:
        ValueError: a width that is no multiple of the number of heads.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        dropout: float = 0.0,
        attention_head_dim: int | None = None,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        attn_norm_num_groups: int | None = None,
        resnet_time_scale_shift: str = "default",
        num_class_embeds: int | None = None,
        num_attention_heads: int | None = None,
        num_up_attention_heads: int | None = None,
        resample_with_conv: bool = True,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            dropout=dropout,
            attention_head_dim=attention_head_dim,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            attn_norm_num_groups=attn_norm_num_groups,
            resnet_time_scale_shift=resnet_time_scale_shift,
            num_class_embeds=num_class_embeds,
        )
        down = (*self.down_blocks, self.mid_block)
        for blocks, name, heads in (
            (down, "num_attention_heads", num_attention_heads),
            (self.up_blocks, "num_up_attention_heads", num_up_attention_heads or num_attention_heads),
        ):
            if heads is not None:
                for attention in (layer for block in blocks for layer in getattr(block, "attentions", ())):
                    _set_heads(attention, name, check_integer(name, heads, minimum=1))
        if not resample_with_conv:
            self._drop_convolutions()

    def _drop_convolutions(self):
        for block in (*self.down_blocks, *self.up_blocks):
            for samplers in (getattr(block, "downsamplers", None), getattr(block, "upsamplers", None)):
                for i, sampler in enumerate(samplers or ()):
                    if isinstance(sampler, Downsample2D):
                        samplers[i] = Downsample2D(sampler.channels, use_conv=False)
                    elif isinstance(sampler, Upsample2D):
                        samplers[i] = Upsample2D(sampler.channels, use_conv=False)


def _set_heads(attention: torch.nn.Module, name: str, heads: int):
    """The projections of all heads lie side by side, so that their number is only how they are read."""
    if attention.inner_dim % heads:
        raise ValueError(f"`{name}` must divide the width {attention.inner_dim} of a level, got {heads}.")
    attention.heads = attention.sliceable_head_dim = heads
    attention.scale = (attention.inner_dim // heads) ** -0.5


__all__ = ["LatentUNet2DModel"]
