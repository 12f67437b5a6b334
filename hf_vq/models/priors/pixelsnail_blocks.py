"""
The layers of PixelSNAIL (Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model", 2018, figure 3).
Feature maps are channels-last, `(B, h, w, C)`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_pixelsnail import PixelSNAILConfig


def weight_norm(layer: nn.Module, fan_in: int | None = None) -> nn.Module:
    """
    `layer` with its weight as length and direction, `w = g · v / |v|` for each output (Salimans & Kingma, "Weight
    Normalization", 2016, equation 2). It starts as one that sees `fan_in` numbers, by default those of its weight.
    """
    fan_in = fan_in or layer.weight[0].numel()
    parametrizations.weight_norm(layer, dim=0)
    layer.parametrizations.weight.fan_in = fan_in
    return layer


@torch.no_grad()
def init_weight_norm(module: nn.Module) -> None:
    """
    The weights of a layer of `weight_norm` as torch initialises convolutions. `module` is the layer, for its bias, or
    the list of its parametrizations, for the rest: transformers does not come to a layer that has no parameter of its
    own.
    """
    if isinstance(module, ParametrizationList):
        bound = 1 / math.sqrt(module.fan_in)
        init.uniform_(module.original1, -bound, bound)
        length = torch.linalg.vector_norm(module.original1.flatten(1), dim=1)
        init.copy_(module.original0, length.view_as(module.original0))
    elif is_parametrized(module, "weight") and module.bias is not None:
        bound = 1 / math.sqrt(module.parametrizations.weight.fan_in)
        init.uniform_(module.bias, -bound, bound)


def pointwise_conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Linear:
    """A 1×1 convolution: `(..., in_channels) -> (..., out_channels)`."""
    return weight_norm(nn.Linear(in_channels, out_channels, bias=bias))


class Conv(nn.Module):
    """A k×k convolution that sees all around: `(B, h, w, in_channels) -> (B, h, w, out_channels)`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.conv(features.movedim(-1, 1)).movedim(1, -1)


class CausalConv(nn.Module):
    """
    A convolution over what comes before a position in raster order, the position itself not included: `(B, h, w,
    in_channels) -> (B, h, w, out_channels)`. Of a window of k rows and columns that ends with the position's row,
    `above` has the first k - 1 rows, and `left` the first k // 2 columns of the last one. There are no other taps, so
    nothing has to be masked, and an adapter on either of them is as causal as they are.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        half = self.half = kernel_size // 2
        self.kernel_size = kernel_size
        fan_in = in_channels * ((kernel_size - 1) * kernel_size + half)  # of both together
        self.above = weight_norm(nn.Conv2d(in_channels, out_channels, (kernel_size - 1, kernel_size)), fan_in)
        self.left = weight_norm(nn.Conv2d(in_channels, out_channels, (1, half), bias=False), fan_in)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        half, features = self.half, features.movedim(-1, 1)
        above = self.above(F.pad(features, (half, half, self.kernel_size - 1, -1)))
        return (above + self.left(F.pad(features, (half, -1)))).movedim(1, -1)


class CodeConv(nn.Module):
    """
    A convolution over one-hot codes, which is a sum of columns of its weight, one for each tap: int64 `(B, h, w) ->
    (B, h, w, out_channels)`. There are codes 0 … `num_codes` - 1; the code `num_codes`, and what lies outside, is all
    zeros.

    Args:
        offsets: row and column of each tap, relative to the position.
    """

    def __init__(self, num_codes: int, out_channels: int, offsets: list[tuple[int, int]]):
        super().__init__()
        self.num_codes, self.offsets = num_codes, offsets
        self.weight = nn.Parameter(torch.empty(out_channels, num_codes, len(offsets)))
        self.bias = nn.Parameter(torch.empty(out_channels))
        weight_norm(self)

    def table(self) -> torch.Tensor:
        """The weight as `(taps · (num_codes + 1), out_channels)`: tap by tap, a row for each code."""
        return F.pad(self.weight.permute(2, 1, 0), (0, 0, 0, 1)).flatten(0, 1)

    def forward(self, codes: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """`codes` may also be weights over the codes, `(B, h, w, num_codes)`; `table` is that of `table()`, if
        known.
        """
        height, width = codes.shape[1:3]
        reach = max(abs(distance) for offset in self.offsets for distance in offset)
        of_codes = (0, 0) * (codes.ndim - 3)
        padded = F.pad(codes, (*of_codes, *[reach] * 4), value=0.0 if of_codes else self.num_codes)
        shifted = [
            padded[:, reach + row : reach + row + height, reach + column : reach + column + width]
            for row, column in self.offsets
        ]
        if of_codes:
            return sum(part @ tap.t() for part, tap in zip(shifted, self.weight.unbind(2), strict=True)) + self.bias
        rows = torch.stack([part + tap * (self.num_codes + 1) for tap, part in enumerate(shifted)], dim=-1)
        table = self.table() if table is None else table
        return F.embedding_bag(rows.flatten(0, 2), table, mode="sum").unflatten(0, codes.shape) + self.bias


class GatedResidualBlock(GradientCheckpointingLayer):
    """
    ELU, convolution, ELU, convolution, and a gated linear unit, around a skip (Chen et al. 2018, figure 3a; van den
    Oord et al. 2016, equation 2): `(B, h, w, channels)` to the same shape.

    Args:
        conv: makes a convolution from its numbers of input and output channels.
        auxiliary_channels: of a second input, which a 1×1 convolution adds after the first convolution.
        condition_channels: of what a 1×1 convolution adds before the gate.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        conv: Callable[..., nn.Module],
        dropout: float,
        auxiliary_channels: int = 0,
        condition_channels: int = 0,
    ):
        super().__init__()
        self.conv1 = conv(channels, inner_channels)
        self.conv2 = conv(inner_channels, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        if auxiliary_channels:
            self.auxiliary = pointwise_conv(auxiliary_channels, inner_channels)
        if condition_channels:
            self.condition = pointwise_conv(condition_channels, 2 * channels, bias=False)

    def forward(
        self,
        features: torch.Tensor,
        auxiliary: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`condition` is `(B, h, w, condition_channels)`, or `(B, 1, 1, condition_channels)` for the same
        everywhere.
        """
        inner = self.conv1(F.elu(features))
        if auxiliary is not None:
            inner = inner + self.auxiliary(F.elu(auxiliary))
        outer = self.conv2(self.dropout(F.elu(inner)))
        if condition is not None:
            outer = outer + self.condition(condition)
        return features + F.glu(outer, dim=-1)


class StrictlyCausalAttention(nn.Module):
    """
    Attention in which a position sees those before it, and not itself; the first sees nothing, and gets zeros. Queries
    `(B, N, query_channels)` and what is attended to, `(B, N, key_channels)`, give `(B, N, channels)`.
    """

    def __init__(self, query_channels: int, key_channels: int, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = pointwise_conv(query_channels, channels)
        self.key = pointwise_conv(key_channels, channels)
        self.value = pointwise_conv(key_channels, channels)

    def split_heads(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, N, channels) -> (B, heads, N, channels / heads)`."""
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            self.split_heads(projection(features))
            for projection, features in ((self.query, queries), (self.key, memory), (self.value, memory))
        )
        # the second query against the first key, and so on, is the usual causal attention
        attended = F.scaled_dot_product_attention(
            query[:, :, 1:],
            key[:, :, :-1],
            value[:, :, :-1],
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return F.pad(attended, (0, 0, 1, 0)).transpose(1, 2).flatten(2)


class PixelSNAILBlock(nn.Module):
    """
    Gated residual blocks, and causal self-attention over what they and the block itself see (Chen et al. 2018, figure
    2), or a 1×1 convolution in its place: `(B, h, w, hidden_size)` to the same shape. Both also see the position on
    the grid.
    """

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        channels, dropout = config.hidden_size, config.dropout

        def causal(c_in, c_out):
            return CausalConv(c_in, c_out, config.kernel_size)

        self.residual_blocks = nn.ModuleList(
            GatedResidualBlock(
                channels,
                config.res_channels,
                causal,
                dropout,
                condition_channels=config.conditioning_channels if config.is_conditional else 0,
            )
            for _ in range(config.num_res_blocks)
        )
        self.has_attention = config.attention
        if not self.has_attention:
            self.out = pointwise_conv(channels + 2, channels)
            return
        query_channels, key_channels = channels + 2, 2 * channels + 2
        self.key_block = GatedResidualBlock(key_channels, channels, pointwise_conv, dropout)
        self.query_block = GatedResidualBlock(query_channels, channels, pointwise_conv, dropout)
        self.attention = StrictlyCausalAttention(
            query_channels, key_channels, channels // 2, config.num_attention_heads, dropout
        )
        self.out_block = GatedResidualBlock(
            channels, channels, pointwise_conv, dropout, auxiliary_channels=channels // 2
        )

    def forward(self, features: torch.Tensor, positions: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """`positions` `(B, h, w, 2)` are the coordinates on the grid, `condition` is as for a `GatedResidualBlock`."""
        hidden_states = features
        for block in self.residual_blocks:
            hidden_states = block(hidden_states, None, condition)
        located = torch.cat([hidden_states, positions], dim=-1)
        if not self.has_attention:
            return self.out(located)
        memory = self.key_block(torch.cat([features, located], dim=-1))
        attended = self.attention(self.query_block(located).flatten(1, 2), memory.flatten(1, 2))
        return self.out_block(hidden_states, attended.view(*features.shape[:3], -1))


class CodeStem(nn.Module):
    """
    The codes before a position, what a [`CodeConv`] takes `-> (B, h, w, hidden_size)`: those of the rows above, all
    around its column, and those on its left, from the rows above also.
    """

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        half = self.reach = config.kernel_size // 2
        above = [(row, column) for row in range(1 - half, 1) for column in range(-half, half + 1)]
        left = [(row, column) for row in range(-half, 1) for column in range(1 - half, 1)]
        self.above = CodeConv(config.codebook_size, config.hidden_size, above)
        self.left = CodeConv(config.codebook_size, config.hidden_size, left)

    def forward(
        self, codes: torch.LongTensor, tables: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    ) -> torch.Tensor:
        """`tables` are those of the two convolutions, where they are known."""
        # shifted, so that neither sees the position itself; there is nothing, not even a bias, above the first row
        above = F.pad(self.above(codes, tables[0])[:, :-1], (0, 0, 0, 0, 1, 0))
        return above + F.pad(self.left(codes, tables[1])[:, :, :-1], (0, 0, 1, 0))


class ConditioningStack(nn.Module):
    """
    What the codes of the level above say, int64 `(B, h', w') -> (B, h', w', conditioning_channels)`: a convolution and
    gated residual blocks that see all around (Razavi et al. 2019, section 3.2).
    """

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        channels = config.conditioning_channels
        half = config.conditioning_kernel_size // 2
        around = [(row, column) for row in range(-half, half + 1) for column in range(-half, half + 1)]
        self.codes = CodeConv(config.conditioning_codebook_size, channels, around)

        def conv(c_in, c_out):
            return Conv(c_in, c_out, kernel_size=config.conditioning_kernel_size)

        self.residual_blocks = nn.ModuleList(
            GatedResidualBlock(channels, channels, conv, config.dropout)
            for _ in range(config.num_conditioning_res_blocks)
        )

    def forward(self, indices: torch.LongTensor) -> torch.Tensor:
        features = self.codes(indices)
        for block in self.residual_blocks:
            features = block(features)
        return features


class PixelSNAILHead(nn.Module):
    """ELU and a 1×1 convolution, to logits: `(..., hidden_size) -> (..., codebook_size)`."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.out = pointwise_conv(config.hidden_size, config.codebook_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(F.elu(features))


__all__ = [
    "CausalConv",
    "CodeConv",
    "CodeStem",
    "ConditioningStack",
    "GatedResidualBlock",
    "PixelSNAILBlock",
    "PixelSNAILHead",
    "init_weight_norm",
    "pointwise_conv",
]
