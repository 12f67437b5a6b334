"""The VQGAN tokenizer; `encode`, `decode` and `forward` are those of `modeling_tokenizer.VQTokenizerModel`.

Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis", appendix A (the networks are
those of Ho et al. 2020). Module names follow the original VQGAN, so that converting its checkpoints hardly renames a
key.
"""

import importlib
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  (diffusers looks for a base class in the module it loads from)
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vqgan import VQGANConfig
from .modeling_tokenizer import VQTokenizerModel, build_quantizer_of


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read off the codes: norm(x) · Y(codes) + B(codes).

    Zheng et al. 2022, "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation", equation 5; Y and B are
    1×1 convolutions of the codes resized to x by nearest neighbour.

    Args:
        channels: of x.
        code_channels: of the codes.
        norm_num_groups: groups of GroupNorm.
        add_conv: pass the resized codes through a 3×3 convolution first.
    """

    def __init__(self, channels: int, code_channels: int, norm_num_groups: int, add_conv: bool = False):
        super().__init__()
        self.norm_layer = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        if add_conv:
            self.conv = nn.Conv2d(code_channels, code_channels, 3, padding=1)
        self.conv_y = nn.Conv2d(code_channels, channels, 1)
        self.conv_b = nn.Conv2d(code_channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        codes = F.interpolate(codes, size=hidden_states.shape[-2:], mode="nearest")
        if hasattr(self, "conv"):
            codes = self.conv(codes)
        return self.norm_layer(hidden_states) * self.conv_y(codes) + self.conv_b(codes)


class NormLayers:
    """Makes the norms of an encoder or decoder: GroupNorm, or SpatialNorm where there are codes to read."""

    def __init__(self, config: VQGANConfig, spatial: bool = False):
        self.groups, self.spatial = config.norm_num_groups, spatial
        self.code_channels, self.add_conv = config.embed_dim, config.spatial_norm_conv

    def __call__(self, channels: int) -> nn.Module:
        if self.spatial:
            return SpatialNorm(channels, self.code_channels, self.groups, self.add_conv)
        return nn.GroupNorm(self.groups, channels, eps=1e-6)


def _normed(norm: nn.Module, hidden_states: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
    return norm(hidden_states) if codes is None else norm(hidden_states, codes)


# A new feature map costs more than the sum or the swish in it, since the system gives large ones page by page.


def _normed_swish(norm: nn.Module, hidden_states: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
    normed = _normed(norm, hidden_states, codes)
    return F.silu(normed, inplace=not normed.requires_grad)


def _add_to(fresh: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual + fresh, in the memory of `fresh`, which nobody else reads, if it is like the residual's."""
    alike = fresh.dtype == residual.dtype and fresh.stride() == residual.stride()
    return fresh.add_(residual) if alike else residual + fresh


class ResnetBlock(GradientCheckpointingLayer):
    """Norm, swish, 3×3 convolution, twice, around a skip: `(B, C_in, H, W) -> (B, C_out, H, W)`."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, norm_layers: NormLayers):
        super().__init__()
        self.norm1 = norm_layers(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm_layers(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        residual = self.nin_shortcut(hidden_states) if hasattr(self, "nin_shortcut") else hidden_states
        hidden_states = self.conv1(_normed_swish(self.norm1, hidden_states, codes))
        hidden_states = self.conv2(self.dropout(_normed_swish(self.norm2, hidden_states, codes)))
        return _add_to(hidden_states, residual)


class AttnBlock(GradientCheckpointingLayer):
    """Self-attention with one head over all positions, around a skip: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, channels: int, norm_layers: NormLayers):
        super().__init__()
        self.norm = norm_layers(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        normed = _normed(self.norm, hidden_states, codes)
        # contiguous: the fused kernels, whose memory does not grow with the square of the positions, ask for it
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for projection in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.squeeze(1).transpose(1, 2).reshape(hidden_states.shape)
        return _add_to(self.proj_out(attended), hidden_states)


class LinearAttnBlock(GradientCheckpointingLayer):
    """Linear attention with one head, without norm or skip: `(B, C, H, W) -> (B, C, H, W)`.

    The keys' softmax is over the positions, and their products with the values are summed before the queries read them
    (Shen et al. 2021, "Efficient Attention"; the original latent diffusion code's `attn_type="linear"`).
    """

    def __init__(self, channels: int, norm_layers: NormLayers):
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).flatten(2).chunk(3, dim=1)
        context = key.softmax(dim=-1) @ value.transpose(1, 2)
        return self.to_out((context.transpose(1, 2) @ query).reshape(hidden_states.shape))


ATTENTION_BLOCKS = {"vanilla": AttnBlock, "linear": LinearAttnBlock}


class Downsample(nn.Module):
    """Halves the sides: `(B, C, H, W) -> (B, C, H/2, W/2)`.

    A 3×3 convolution with stride 2, padded on the right and below only; or the mean of 2×2 pixels without `with_conv`.
    """

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "conv"):
            return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))
        return F.avg_pool2d(hidden_states, 2)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and, `with_conv`, a 3×3 convolution: `(B, C, H, W) -> (B, C, 2H, 2W)`."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return self.conv(hidden_states) if hasattr(self, "conv") else hidden_states


class Level(nn.Module):
    """The blocks of one resolution: `block`, `attn` (empty, or one for each block), and a `downsample` or
    `upsample`.
    """

    def __init__(self, config: VQGANConfig, channels: list[int], has_attention: bool, norm_layers: NormLayers):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in, c_out, config.dropout, norm_layers)
            for c_in, c_out in zip(channels[:-1], channels[1:], strict=True)
        )
        attention = ATTENTION_BLOCKS[config.attention_type]
        attended = channels[1:] if has_attention else []
        self.attn = nn.ModuleList(attention(width, norm_layers) for width in attended)

    def layers(self) -> Iterator[nn.Module]:
        """Its blocks and attentions in turns; called one by one, so that nobody holds the level's input meanwhile."""
        for i, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[i]


class MidBlock(nn.Module):
    """Residual block, attention (unless switched off), residual block, at the lowest resolution."""

    def __init__(self, config: VQGANConfig, channels: int, norm_layers: NormLayers):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config.dropout, norm_layers)
        if config.mid_attention:
            self.attn_1 = ATTENTION_BLOCKS[config.attention_type](channels, norm_layers)
        self.block_2 = ResnetBlock(channels, channels, config.dropout, norm_layers)

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.block_1(hidden_states, codes)
        if hasattr(self, "attn_1"):
            hidden_states = self.attn_1(hidden_states, codes)
        return self.block_2(hidden_states, codes)


class Encoder(nn.Module):
    """Image `(B, in_channels, H, W)` to features `(B, latent_channels, H/f, W/f)`, f = 2 ** (levels - 1)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        norm_layers = NormLayers(config)
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous, side = config.base_channels, min(config.image_size)
        for i, width in enumerate(widths):
            has_attention = side in config.attn_resolutions
            level = Level(config, [previous] + [width] * config.num_res_blocks, has_attention, norm_layers)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, config.resamp_with_conv)
                side //= 2
            self.down.append(level)
            previous = width
        self.mid = MidBlock(config, previous, norm_layers)
        self.norm_out = norm_layers(previous)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(pixel_values)
        for level in self.down:
            for layer in level.layers():
                hidden_states = layer(hidden_states)
            if hasattr(level, "downsample"):
                hidden_states = level.downsample(hidden_states)
        hidden_states = self.mid(hidden_states)
        return self.conv_out(_normed_swish(self.norm_out, hidden_states, None))


class Decoder(nn.Module):
    """Features `(B, latent_channels, h, w)` to image `(B, out_channels, h·f, w·f)`.

    `up` is in the order of resolution, the highest first, so it is run from its end. Spatial norms also read the
    `codes` `(B, embed_dim, h, w)`.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.decoder_channel_multiplier]
        norm_layers = NormLayers(config, spatial=config.decoder_norm == "spatial")
        previous, side = widths[-1], min(config.image_size) // 2 ** (len(widths) - 1)
        depth = config.of_decoder("num_res_blocks") + 1
        self.conv_in = nn.Conv2d(config.of_decoder("latent_channels"), previous, 3, padding=1)
        self.mid = MidBlock(config, previous, norm_layers)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            has_attention = side in config.of_decoder("attn_resolutions")
            level = Level(config, [previous] + [width] * depth, has_attention, norm_layers)
            if i > 0:
                level.upsample = Upsample(width, config.resamp_with_conv)
                side *= 2
            levels.append(level)
            previous = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm_layers(previous)
        self.conv_out = nn.Conv2d(previous, config.out_channels, 3, padding=1)
        self.give_pre_end, self.tanh_out = config.give_pre_end, config.tanh_out

    def forward(self, latents: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(latents), codes)
        for level in reversed(self.up):
            for layer in level.layers():
                hidden_states = layer(hidden_states, codes)
            if hasattr(level, "upsample"):
                hidden_states = level.upsample(hidden_states)
        if self.give_pre_end:
            return hidden_states
        sample = self.conv_out(_normed_swish(self.norm_out, hidden_states, codes))
        return sample.tanh() if self.tanh_out else sample


class VQGANModel(VQTokenizerModel):
    """Convolutional encoder and decoder with residual blocks and attention around a vector quantizer.

    The model is the generator alone; the perceptual and adversarial losses that make it a VQGAN are in
    `hf_vq.training.objectives.vqgan_loss`. `forward` gives the plain squared error.
    """

    config: VQGANConfig
    config_class = VQGANConfig
    _no_split_modules = ["ResnetBlock", "AttnBlock", "LinearAttnBlock"]

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = build_quantizer_of(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.of_decoder("latent_channels"), 1)
        self.decoder = Decoder(config)
        self.post_init()

    def _decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        spatial = self.config.decoder_norm == "spatial"
        return self.decoder(self.post_quant_conv(codes), codes if spatial else None)

    @classmethod
    def from_diffusers(
        cls,
        source: str | PathLike,
        subfolder: str | None = None,
        resolution: int | None = None,
        scaling_factor: float = 1.0,
        **options: Any,
    ) -> "VQGANModel":
        """A tokenizer from diffusers' `VQModel`, such as amused/amused-256 with `subfolder="vqvae"`. hf_vq must be
        installed.

        Args:
            source: a folder, or the id of a repository.
            subfolder: the part of a pipeline's repository that holds it.
            resolution: side of the images it was trained on, in pixels; by default the configuration's `sample_size`.
            scaling_factor: what latents are multiplied by for diffusion. It is 1 for the published models, whatever
                their configuration says: diffusers fills in that of Stable Diffusion.
            options: of `hf_hub_download`, such as `revision`.

        Returns:
            the model in float32, in `eval` mode.

        Raises:
            ValueError: it is no `VQModel`, has an option that `VQGANModel` has no equivalent of, or lacks weights.
        """
        converter = importlib.import_module("hf_vq.conversion.diffusers_tokenizer")
        return converter.load_vqmodel(source, subfolder, resolution, scaling_factor, **options)

    def to_diffusers(self, folder: str | PathLike) -> None:
        """Writes the tokenizer as diffusers' `VQModel`, which `VQModel.from_pretrained(folder)` loads.

        Raises:
            ValueError: an option that `VQModel` has no equivalent of, such as `quantizer="cosine"`.
        """
        importlib.import_module("hf_vq.conversion.diffusers_tokenizer").save_vqmodel(self, folder)

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, which the adaptive adversarial weight is measured on."""
        return self.decoder.conv_out.weight


__all__ = ["VQGANModel"]
