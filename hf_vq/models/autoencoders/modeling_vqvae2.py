"""The hierarchical tokenizer of VQ-VAE-2; `encode` and `forward` are those of `modeling_tokenizer.VQTokenizerModel`.

Razavi, van den Oord and Vinyals 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  (diffusers looks for a base class in the module it loads from)

from ..modeling_outputs import QuantizerOutput, VQDecoderOutput
from .configuration_vqvae2 import VQVAE2Config
from .modeling_tokenizer import VQTokenizerModel, build_quantizer_of
from .modeling_vqvae import VQVAEResidualStack


class VQVAE2Encoder(nn.Module):
    """4×4 convolutions with stride 2, a 3×3 one, residual blocks: `(B, C, H, W) -> (B, hidden, H/factor,
    W/factor)`.
    """

    def __init__(self, config: VQVAE2Config, in_channels: int, factor: int):
        super().__init__()
        halvings = factor.bit_length() - 1
        # unlike that of VQ-VAE, the first convolution has half the width also where it is the only one
        widths = [in_channels, config.hidden_size // 2, *[config.hidden_size] * (halvings - 1)]
        self.down = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 4, stride=2, padding=1) for c_in, c_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.conv_out = nn.Conv2d(widths[-1], config.hidden_size, 3, padding=1)
        self.residual_stack = VQVAEResidualStack(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for conv in self.down:
            hidden_states = F.relu(conv(hidden_states))
        return self.residual_stack(self.conv_out(hidden_states))


class VQVAE2Decoder(nn.Module):
    """A 3×3 convolution, residual blocks, transposed 4×4 ones: `(B, C, h, w) -> (B, C', h·factor, w·factor)`."""

    def __init__(self, config: VQVAE2Config, in_channels: int, out_channels: int, factor: int):
        super().__init__()
        doublings = factor.bit_length() - 1
        self.conv_in = nn.Conv2d(in_channels, config.hidden_size, 3, padding=1)
        self.residual_stack = VQVAEResidualStack(config)
        widths = [config.hidden_size] * max(doublings - 1, 1) + [config.hidden_size // 2] * min(doublings - 1, 1)
        widths.append(out_channels)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
            for c_in, c_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        hidden_states = self.residual_stack(self.conv_in(codes))
        for conv in self.up[:-1]:
            hidden_states = F.relu(conv(hidden_states))
        return self.up[-1](hidden_states)


class VQVAE2Model(VQTokenizerModel):
    """The hierarchical VQ-VAE, with any of the quantizers; `forward` gives its whole training loss.

    Each level's features are encoded from those of the level below it. From the top down, the codes so far are decoded
    to the next level's resolution and condition that level's latents; the image's decoder sees the codes of all
    levels, those of the upper ones upsampled. Lists of modules and tuples of tensors are in the order of the levels,
    the top first.

    Raises:
        ValueError: as for every tokenizer, or for what is no tuple of as many levels or fewer.
    """

    config: VQVAE2Config
    config_class = VQVAE2Config
    _no_split_modules = ["VQVAEResidualBlock"]

    def __init__(self, config: VQVAE2Config):
        super().__init__(config)
        levels, hidden, dim = config.num_levels, config.hidden_size, config.embed_dim
        bottom = config.downsample_factors[-1]
        self.encoder = nn.ModuleList(
            [VQVAE2Encoder(config, hidden, 2) for _ in range(levels - 1)]
            + [VQVAE2Encoder(config, config.in_channels, bottom)]
        )
        self.quant_conv = nn.ModuleList(
            nn.Conv2d(hidden if level == 0 else dim + hidden, dim, 1) for level in range(levels)
        )
        self.quantize = nn.ModuleList(build_quantizer_of(config) for _ in range(levels))
        # the codes of level 0 … l together have (l + 1)·D channels
        self.conditioner = nn.ModuleList(
            VQVAE2Decoder(config, (level + 1) * dim, dim, 2) for level in range(levels - 1)
        )
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d((level + 1) * dim, (level + 1) * dim, 4, stride=2, padding=1)
            for level in range(levels - 1)
        )
        self.decoder = VQVAE2Decoder(config, levels * dim, config.in_channels, bottom)
        self.post_init()

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, which an adaptive adversarial weight is measured on."""
        return self.decoder.up[-1].weight

    def modules_after_codes(self) -> list[nn.Module]:
        """The modules that no code depends on; of three levels, the codes of the bottom depend on the first
        upsampling.
        """
        return [*self.upsample[-1:], self.decoder]

    def _at(self, factor: int, function, inputs: torch.Tensor, scale: float) -> torch.Tensor:
        """`function(inputs)` in slices and tiles; a position of `inputs` is `factor` pixels wide."""
        return self._in_pieces(function, inputs, (self.tile_size or 0) // factor, self.tile_overlap // factor, scale)

    def _encode_features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        factors = self.config.downsample_factors
        features = [self._at(1, self.encoder[-1], pixel_values, 1 / factors[-1])]
        for level in reversed(range(self.config.num_levels - 1)):
            features.insert(0, self._at(factors[level + 1], self.encoder[level], features[0], 1 / 2))
        return features

    def _encode_and_quantize(self, pixel_values: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], QuantizerOutput]:
        self._check_pixels(pixel_values)
        latents, outputs, codes = [], [], None
        for level, features in enumerate(self._encode_features(pixel_values)):
            if level > 0:
                factor = self.config.downsample_factors[level - 1]
                condition = self._at(factor, self.conditioner[level - 1], codes, 2)
                features = torch.cat([condition, features], dim=1)
            latents.append(self.quant_conv[level](features))
            outputs.append(self.quantize[level](latents[-1]))
            codes = self._join(level, codes, outputs[-1].quantized)

        def total(name):
            terms = [getattr(output, name) for output in outputs]
            return None if terms[0] is None else sum(terms)

        return tuple(latents), QuantizerOutput(
            quantized=tuple(output.quantized for output in outputs),
            indices=tuple(output.indices for output in outputs),
            loss=total("loss"),
            codebook_loss=total("codebook_loss"),
            commitment_loss=total("commitment_loss"),
        )

    def _join(self, level: int, codes: torch.Tensor | None, quantized: torch.Tensor) -> torch.Tensor:
        """The codes of all levels down to `level`, `(B, (level + 1)·D, h, w)`, from those above it and its own."""
        return quantized if level == 0 else torch.cat([self.upsample[level - 1](codes), quantized], dim=1)

    def _decode_quantized(self, quantized: Sequence[torch.Tensor]) -> torch.Tensor:
        codes, factor = None, self.config.downsample_factors[-1]
        kept = self._draw_kept_levels(quantized[0]) if self.training and self.config.level_dropout > 0 else None
        batch_size, dim, height, width = quantized[0].shape
        for level in range(self.config.num_levels):
            if level < len(quantized):
                own = quantized[level]
            else:
                own = quantized[0].new_zeros(batch_size, dim, height << level, width << level)
            if kept is not None:
                own = own * (level < kept).to(own.dtype)
            codes = self._join(level, codes, own)
        return self._at(factor, self.decoder, codes, factor)

    def _draw_kept_levels(self, like: torch.Tensor) -> torch.Tensor:
        """How many levels the decoder sees, `(B, 1, 1, 1)`."""
        shape, levels = (len(like), 1, 1, 1), self.config.num_levels
        dropped = torch.rand(shape, device=like.device) < self.config.level_dropout
        return torch.where(dropped, torch.randint(1, levels, shape, device=like.device), levels)

    def _perplexity(
        self, indices: tuple[torch.LongTensor, ...], latents: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        perplexity = super()._perplexity
        return tuple(perplexity(own, level) for own, level in zip(indices, latents, strict=True))

    def _check_levels(self, name: str, levels: Sequence[torch.Tensor]) -> None:
        count = self.config.num_levels
        if isinstance(levels, torch.Tensor) or not 1 <= len(levels) <= count:
            got = "one tensor" if isinstance(levels, torch.Tensor) else f"{len(levels)}"
            raise ValueError(f"`{name}` must be a tuple of up to {count} levels, from top to bottom, got {got}.")
        if any(level.shape[:1] != levels[0].shape[:1] for level in levels):  # a set would fix the batch in an export
            raise ValueError(
                f"`{name}` must have the same batch at each level, got {[tuple(level.shape) for level in levels]}."
            )
        for above, below in zip(levels[:-1], levels[1:], strict=True):
            # spatial axes: those of (B, D, h, w) or of indices (B, h, w[, depth])
            axes = slice(2, 4) if name == "latents" else slice(1, 3)
            if above.ndim < 3 or below.shape[axes] != torch.Size(2 * side for side in above.shape[axes]):
                shapes = [tuple(level.shape) for level in levels]
                raise ValueError(f"`{name}` must double their height and width from level to level, got {shapes}.")

    def decode(
        self,
        latents: Sequence[torch.Tensor],
        quantize: bool = True,
        return_dict: bool = True,
        force_not_quantize: bool = False,
    ) -> VQDecoderOutput | tuple[torch.Tensor]:
        """Latents to images.

        Args:
            latents: `(B, D, h, w)` of each level from top to bottom. Of fewer levels, those from the top on, the
                others' vectors are 0.
            quantize: False takes them as already quantized.
            return_dict: whether to return a `VQDecoderOutput`.
            force_not_quantize: True is `quantize=False`, under the name that pipelines of diffusers use.
        """
        self._check_levels("latents", latents)
        if quantize and not force_not_quantize:
            latents = [quantizer(own).quantized for quantizer, own in zip(self.quantize, latents, strict=False)]
        sample = self._decode_quantized(latents)
        return VQDecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_indices(
        self, indices: Sequence[torch.Tensor], return_dict: bool = True
    ) -> VQDecoderOutput | tuple[torch.Tensor]:
        """Codes, int64 `(B, h, w)` of each level from top to bottom, to images `(B, C, H, W)`; of fewer as in
        `decode`.
        """
        self._check_levels("indices", indices)
        quantized = [
            quantizer.indices_to_latents(own).to(self.dtype)
            for quantizer, own in zip(self.quantize, indices, strict=False)
        ]
        return self.decode(quantized, quantize=False, return_dict=return_dict)


__all__ = ["VQVAE2Model"]
