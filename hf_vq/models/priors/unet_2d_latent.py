"""diffusers' UNet2DModel and UNet2DConditionModel with what denoisers of the original latent diffusion code have
beyond them.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ...argument_checks import check_integer
from ...config_registration import register_by_name
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

    @register_by_name
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
            _drop_convolutions(self)


class LatentUNet2DConditionModel(CheckedLoadingMixin, UNet2DConditionModel):
    """
    A [`~diffusers.UNet2DConditionModel`] that resamples by residual blocks or without convolutions (Rombach et al.,
    2022), as [`LatentUNet2DModel`] does without cross-attention.

    Args:
        sample_size, in_channels, out_channels, down_block_types, up_block_types, block_out_channels, layers_per_block,
            dropout, cross_attention_dim, transformer_layers_per_block, attention_head_dim, encoder_hid_dim,
            encoder_hid_dim_type, resnet_time_scale_shift, num_class_embeds: of [`~diffusers.UNet2DConditionModel`].
        resample_type: `"resnet"` halves and doubles the sides inside of residual blocks (those of levels without
            attention are `"ResnetDownsampleBlock2D"` and `"ResnetUpsampleBlock2D"`), `"pool"` takes means on the way
            down and repeats each value on the way up, without weights.

    Raises:
        ValueError: another `resample_type`.
    """

    @register_by_name
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels: tuple[int, ...] = (192, 384, 960),
        layers_per_block: int = 2,
        dropout: float = 0.0,
        cross_attention_dim: int = 512,
        transformer_layers_per_block: int = 1,
        attention_head_dim: int | tuple[int, ...] = 8,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        resnet_time_scale_shift: str = "default",
        num_class_embeds: int | None = None,
        resample_type: str = "resnet",
    ):
        if resample_type not in ("resnet", "pool"):
            raise ValueError(f"`resample_type` must be 'resnet' or 'pool', got {resample_type!r}.")
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            dropout=dropout,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            attention_head_dim=attention_head_dim,
            encoder_hid_dim=encoder_hid_dim,
            encoder_hid_dim_type=encoder_hid_dim_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            num_class_embeds=num_class_embeds,
        )
        if resample_type == "pool":
            _drop_convolutions(self)
            return
        for block in (*self.down_blocks, *self.up_blocks):
            # the built block keeps its weights; only its last step becomes another one
            if isinstance(block, CrossAttnDownBlock2D) and block.downsamplers is not None:
                block.__class__ = ResnetCrossAttnDownBlock2D
                block.resnet_downsamplers = self._residual_sampler(block, dropout, down=True)
                block.downsamplers = None
            elif isinstance(block, CrossAttnUpBlock2D) and block.upsamplers is not None:
                block.__class__ = ResnetCrossAttnUpBlock2D
                block.resnet_upsamplers = self._residual_sampler(block, dropout, up=True)
                block.upsamplers = None

    def _residual_sampler(self, block: nn.Module, dropout: float, **way: bool) -> nn.ModuleList:
        width = block.resnets[-1].out_channels
        sampler = ResnetBlock2D(
            in_channels=width,
            out_channels=width,
            temb_channels=self.time_embedding.linear_2.out_features,
            eps=self.config.norm_eps,
            groups=self.config.norm_num_groups,
            dropout=dropout,
            time_embedding_norm=self.config.resnet_time_scale_shift,
            **way,
        )
        return nn.ModuleList([sampler])


class ResnetCrossAttnDownBlock2D(CrossAttnDownBlock2D):
    """A block with cross-attention and, after it, a residual block that halves the sides."""

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As diffusers' block: the states `(B, C, H/2, W/2)`, and those of every step for the way up."""
        hidden_states, states = super().forward(hidden_states, temb, **options)
        for sampler in self.resnet_downsamplers:
            hidden_states = sampler(hidden_states, temb)
        return hidden_states, (*states, hidden_states)


class ResnetCrossAttnUpBlock2D(CrossAttnUpBlock2D):
    """A block with cross-attention and, after it, a residual block that doubles the sides."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As diffusers' block: the states `(B, C, 2H, 2W)`."""
        hidden_states = super().forward(hidden_states, res_hidden_states_tuple, temb, **options)
        for sampler in self.resnet_upsamplers:
            hidden_states = sampler(hidden_states, temb)
        return hidden_states


def _drop_convolutions(unet: UNet2DModel | UNet2DConditionModel):
    """Means of pixels on the way down, each value repeated on the way up."""
    for block in (*unet.down_blocks, *unet.up_blocks):
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


__all__ = ["LatentUNet2DConditionModel", "LatentUNet2DModel"]
