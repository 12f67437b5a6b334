"""The VQ-VAE tokenizer; `encode`, `decode` and `forward` are those of `modeling_tokenizer.VQTokenizerModel`.

Van den Oord, Vinyals and Kavukcuoglu 2017, "Neural Discrete Representation Learning".
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  (diffusers looks for a base class in the module it loads from)
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vqvae import VQVAEConfig
from .modeling_tokenizer import VQTokenizerModel, build_quantizer_of


class VQVAEResidualBlock(GradientCheckpointingLayer):
    """ReLU, 3×3 convolution, ReLU, 1×1 convolution, around a skip: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.rectified = config.rectified_residual
        bias = not self.rectified
        self.conv1 = nn.Conv2d(config.hidden_size, config.residual_hidden_size, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(config.residual_hidden_size, config.hidden_size, 1, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rectified = F.relu(hidden_states)
        residual = rectified if self.rectified else hidden_states
        return residual + self.conv2(F.relu(self.conv1(rectified)))


class VQVAEResidualStack(nn.Module):
    """The residual blocks and a last ReLU."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.layers = nn.ModuleList(VQVAEResidualBlock(config) for _ in range(config.num_residual_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return F.relu(hidden_states)


class VQVAEEncoder(nn.Module):
    """4×4 convolutions with stride 2, a 3×3 one, residual blocks: image `(B, C, H, W)` to `(B, hidden, H/f, W/f)`."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        levels = config.downsample_factor.bit_length() - 1
        # the first convolution has half the width, unless it is the only one
        widths = [config.in_channels] + [config.hidden_size // 2] * min(levels - 1, 1)
        widths += [config.hidden_size] * (levels + 1 - len(widths))
        self.down = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 4, stride=2, padding=1) for c_in, c_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.conv_out = nn.Conv2d(config.hidden_size, config.hidden_size, 3, padding=1)
        self.residual_stack = VQVAEResidualStack(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = pixel_values
        for conv in self.down:
            hidden_states = F.relu(conv(hidden_states))
        return self.residual_stack(self.conv_out(hidden_states))


class VQVAEDecoder(nn.Module):
    """A 3×3 convolution, residual blocks, transposed 4×4 convolutions: `(B, D, h, w)` to image `(B, C, h·f, w·f)`."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        levels = config.downsample_factor.bit_length() - 1
        self.conv_in = nn.Conv2d(config.embed_dim, config.hidden_size, 3, padding=1)
        self.residual_stack = VQVAEResidualStack(config)
        widths = [config.in_channels] + [config.hidden_size // 2] * min(levels - 1, 1)
        widths = (widths + [config.hidden_size] * (levels + 1 - len(widths)))[::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
            for c_in, c_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        hidden_states = self.residual_stack(self.conv_in(quantized))
        for conv in self.up[:-1]:
            hidden_states = F.relu(conv(hidden_states))
        return self.up[-1](hidden_states)


class VQVAEModel(VQTokenizerModel):
    """The convolutional VQ-VAE, with any of the quantizers; `forward` gives its whole training loss (equation 3)."""

    config: VQVAEConfig
    config_class = VQVAEConfig
    _no_split_modules = ["VQVAEResidualBlock"]

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.encoder = VQVAEEncoder(config)
        self.quant_conv = nn.Conv2d(config.hidden_size, config.embed_dim, 1)
        self.quantize = build_quantizer_of(config)
        self.post_quant_conv = nn.Identity()
        self.decoder = VQVAEDecoder(config)
        self.post_init()

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, which an adaptive adversarial weight is measured on."""
        return self.decoder.up[-1].weight


__all__ = ["VQVAEModel"]
