"""The VQGAN tokenizer; `encode`, `decode` and `forward` are those of `modeling_tokenizer.VQTokenizerModel`.

Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis", appendix A (the networks are
those of Ho et al. 2020). Module names follow the original VQGAN, so that converting its checkpoints hardly renames a key.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  (diffusers looks for a base class in the module it loads from)
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vqgan import VQGANConfig
from .modeling_tokenizer import VQTokenizerModel, build_quantizer_of


class ResnetBlock(GradientCheckpointingLayer):
    """GroupNorm, swish, 3×3 convolution, twice, around a skip: `(B, C_in, H, W) -> (B, C_out, H, W)`."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, norm_num_groups: int = 32):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.nin_shortcut(hidden_states) if hasattr(self, "nin_shortcut") else hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(self.dropout(F.silu(self.norm2(hidden_states))))
        return residual + hidden_states


class AttnBlock(GradientCheckpointingLayer):
    """Self-attention with one head over all positions, around a skip: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int, norm_num_groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        # contiguous: the fused kernels, whose memory does not grow with the square of the positions, ask for it
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for projection in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.squeeze(1).transpose(1, 2).reshape(hidden_states.shape)
        return hidden_states + self.proj_out(attended)


class Downsample(nn.Module):
    """3×3 convolution with stride 2, padded on the right and below only: `(B, C, H, W) -> (B, C, H/2, W/2)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3×3 convolution: `(B, C, H, W) -> (B, C, 2H, 2W)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: `block`, `attn` (empty, or one for each block), and a `downsample` or `upsample`."""

    def __init__(self, channels: list[int], attention: bool, dropout: float, norm_num_groups: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in, c_out, dropout, norm_num_groups)
            for c_in, c_out in zip(channels[:-1], channels[1:], strict=True)
        )
        self.attn = nn.ModuleList(AttnBlock(c_out, norm_num_groups) for c_out in channels[1:] if attention)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if self.attn:
                hidden_states = self.attn[i](hidden_states)
        return hidden_states


class MidBlock(nn.Module):
    """Residual block, attention (unless switched off), residual block, at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, dropout: float, norm_num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, norm_num_groups)
        self.attn_1 = AttnBlock(channels, norm_num_groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, dropout, norm_num_groups)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class Encoder(nn.Module):
    """Image `(B, in_channels, H, W)` to features `(B, latent_channels, H/f, W/f)`, f = 2 ** (levels - 1)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        dropout, groups = config.dropout, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous, resolution = config.base_channels, config.resolution
        for i, width in enumerate(widths):
            channels = [previous] + [width] * config.num_res_blocks
            level = Level(channels, resolution in config.attn_resolutions, dropout, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
                resolution //= 2
            self.down.append(level)
            previous = width
        self.mid = MidBlock(previous, config.mid_attention, dropout, groups)
        self.norm_out = nn.GroupNorm(groups, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(pixel_values)
        for level in self.down:
            hidden_states = level(hidden_states)
            if hasattr(level, "downsample"):
                hidden_states = level.downsample(hidden_states)
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class Decoder(nn.Module):
    """Features `(B, latent_channels, h, w)` to image `(B, out_channels, h·f, w·f)`.

    `up` is in the order of resolution, the highest first, so it is run from its end.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        dropout, groups = config.dropout, config.norm_num_groups
        previous, resolution = widths[-1], config.resolution // 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(config.latent_channels, previous, 3, padding=1)
        self.mid = MidBlock(previous, config.mid_attention, dropout, groups)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            channels = [previous] + [width] * (config.num_res_blocks + 1)
            level = Level(channels, resolution in config.attn_resolutions, dropout, groups)
            if i > 0:
                level.upsample = Upsample(width)
                resolution *= 2
            levels.append(level)
            previous = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(groups, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, config.out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
            if hasattr(level, "upsample"):
                hidden_states = level.upsample(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class VQGANModel(VQTokenizerModel):
    """Convolutional encoder and decoder with residual blocks and attention around a vector quantizer.

    The model is the generator alone; the perceptual and adversarial losses that make it a VQGAN are in
    `hf_vq.training.objectives.vqgan_loss`. `forward` gives the plain squared error.
    """

    config: VQGANConfig
    config_class = VQGANConfig
    _no_split_modules = ["ResnetBlock", "AttnBlock"]

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = build_quantizer_of(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.post_init()

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, which the adaptive adversarial weight is measured on."""
        return self.decoder.conv_out.weight


__all__ = ["VQGANModel"]
