"""
PixelSNAIL over one part of a row after another, each position computed once: convolutions from cached rows and
columns, attention from cached keys and values, weights normalised once. Features of L columns of a row are `(B · L,
C)`.

What a convolution gets from the rows above is computed for a whole row when it begins. That leaves only the taps on
the left for each position, so that most of the weights are read once a row.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_code_prior import effective_weight
from .pixelsnail_blocks import (
    CausalConv,
    CodeStem,
    GatedResidualBlock,
    PixelSNAILBlock,
    StrictlyCausalAttention,
)


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    """`(out, in) -> (in, out)` in memory also, which a product with few rows reads faster."""
    return weight.t().contiguous()


class PointwiseSteps:
    """A 1×1 convolution; of several that see the same features, the outputs side by side."""

    def __init__(self, *convs: torch.nn.Linear):
        self.weight = _transposed(torch.cat([effective_weight(conv) for conv in convs]))
        self.bias = torch.cat([conv.bias for conv in convs])

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, features, self.weight)


class CausalConvSteps:
    """A `CausalConv`, what it sees of the current row, and the k - 1 rows above."""

    def __init__(self, conv: CausalConv, batch_size: int, width: int):
        k, left = conv.kernel_size, conv.kernel_size // 2
        # tap by tap, and for each of them the input channels
        above, left_part = (effective_weight(part).permute(2, 3, 1, 0) for part in (conv.above, conv.left))
        self.above_weight, self.left_weight = above.flatten(0, 2), left_part.flatten(0, 2)
        self.bias = conv.above.bias.detach()
        self.kernel_size, self.left, self.channels = k, left, above.shape[2]
        self.rows = self.bias.new_zeros(batch_size, k - 1, width + 2 * left, self.channels)
        self.current = self.bias.new_zeros(batch_size, width + 2 * left, self.channels)
        self.from_above = self.bias.new_zeros(batch_size, width, self.above_weight.shape[1])
        # a position at a time, most of the time would go into making these views of the memory above
        self.columns = [self._views(start, 1) for start in range(width)]

    def _views(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of `length` columns from `start` on: where the inputs go, what the taps on the left see, and what comes
        from the rows above.
        """
        current, channels = self.current, self.channels
        inputs = current[:, start + self.left : start + self.left + length]
        # the windows of the taps overlap in memory
        size, stride = (len(current), length, self.left * channels), (current.stride(0), channels, 1)
        windows = current.as_strided(size, stride, start * channels)
        from_above = self.from_above[:, start : start + length]
        if length == 1:
            return inputs[:, 0], windows[:, 0], from_above[:, 0]
        return inputs, windows.flatten(0, 1), from_above.flatten(0, 1)

    def start_row(self, extra: torch.Tensor | None = None) -> None:
        """The current row is done, and the next one begins; `extra` `(B, w, out_channels)` is added to it."""
        self.rows = torch.cat([self.rows[:, 1:], self.current.unsqueeze(1)], dim=1)
        self.current.zero_()
        # (B, k - 1, w, C, k): the columns around each
        windows = self.rows.unfold(2, self.kernel_size, 1)
        patches = windows.permute(0, 2, 1, 4, 3).flatten(2)
        self.from_above.copy_(patches @ self.above_weight + self.bias)
        if extra is not None:
            self.from_above += extra

    def __call__(self, features: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """The outputs at `length` columns from `start` on, where the input is `features`."""
        if length == 1:
            inputs, windows, from_above = self.columns[start]
            inputs.copy_(features)
        else:
            inputs, _, _ = self._views(start, length)
            inputs.copy_(features.view(-1, length, self.channels))
            _, windows, from_above = self._views(start, length)  # one of them may be a copy
        return torch.addmm(from_above, windows, self.left_weight)


class GatedResidualSteps:
    """A `GatedResidualBlock` of causal convolutions."""

    def __init__(self, block: GatedResidualBlock, batch_size: int, width: int):
        self.conv1 = CausalConvSteps(block.conv1, batch_size, width)
        self.conv2 = CausalConvSteps(block.conv2, batch_size, width)
        self.condition_weight = _transposed(effective_weight(block.condition)) if hasattr(block, "condition") else None
        self.width = width

    def start_row(self, condition: torch.Tensor | None) -> None:
        """`condition` `(B, w', C)` is that of the row, each column of it `w / w'` wide."""
        extra = None
        if condition is not None:
            extra = (condition @ self.condition_weight).repeat_interleave(self.width // condition.shape[1], dim=1)
        self.conv1.start_row()
        self.conv2.start_row(extra)

    def __call__(self, features: torch.Tensor, start: int, length: int) -> torch.Tensor:
        inner = self.conv1(F.elu(features), start, length)
        outer = self.conv2(F.elu(inner), start, length)
        return features + F.glu(outer, dim=-1)


class PointwiseResidualSteps:
    """A `GatedResidualBlock` of 1×1 convolutions."""

    def __init__(self, block: GatedResidualBlock):
        self.conv1, self.conv2 = PointwiseSteps(block.conv1), PointwiseSteps(block.conv2)
        self.auxiliary = PointwiseSteps(block.auxiliary) if hasattr(block, "auxiliary") else None

    def __call__(self, features: torch.Tensor, auxiliary: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.conv1(F.elu(features))
        if auxiliary is not None:
            inner = inner + self.auxiliary(F.elu(auxiliary))
        return features + F.glu(self.conv2(F.elu(inner)), dim=-1)


class AttentionSteps:
    """A `StrictlyCausalAttention`, and the keys and values of all positions so far."""

    def __init__(self, attention: StrictlyCausalAttention, batch_size: int, num_positions: int):
        self.query = PointwiseSteps(attention.query)
        self.key_value = PointwiseSteps(attention.key, attention.value)
        self.num_heads = attention.num_heads
        head_size = self.query.weight.shape[1] // self.num_heads
        self.memory = self.query.weight.new_zeros(2, batch_size, self.num_heads, num_positions, head_size)

    def __call__(self, queries: torch.Tensor, memory: torch.Tensor, past: int, length: int) -> torch.Tensor:
        """`(B · L, channels)` for the positions `past` … `past + length - 1`."""
        batch_size = self.memory.shape[1]
        query = self.query(queries).view(batch_size, length, self.num_heads, -1).transpose(1, 2)
        # (B, L, 2, heads, d) to (2, B, heads, L, d)
        new = self.key_value(memory).view(batch_size, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        self.memory[:, :, :, past : past + length].copy_(new)
        # the very first position sees nothing, and the last one all before it
        blind, seen = int(past == 0), past + length - 1
        if length == blind:
            return queries.new_zeros(batch_size, query.shape[1] * query.shape[3])
        mask = None
        if length - blind > 1:
            mask = queries.new_ones(length - blind, seen, dtype=torch.bool).tril(past + blind - 1)
        keys, values = self.memory[:, :, :, :seen]
        attended = F.scaled_dot_product_attention(query[:, :, blind:], keys, values, attn_mask=mask)
        if blind:
            attended = F.pad(attended, (0, 0, 1, 0))
        return attended.transpose(1, 2).reshape(batch_size * length, -1)


class BlockSteps:
    """A `PixelSNAILBlock`."""

    def __init__(self, block: PixelSNAILBlock, batch_size: int, grid_size: tuple[int, int]):
        height, width = grid_size
        self.residual_blocks = [GatedResidualSteps(each, batch_size, width) for each in block.residual_blocks]
        self.attention = None
        if not block.has_attention:
            self.out = PointwiseSteps(block.out)
            return
        self.key_block = PointwiseResidualSteps(block.key_block)
        self.query_block = PointwiseResidualSteps(block.query_block)
        self.out_block = PointwiseResidualSteps(block.out_block)
        self.attention = AttentionSteps(block.attention, batch_size, height * width)

    def start_row(self, condition: torch.Tensor | None) -> None:
        for block in self.residual_blocks:
            block.start_row(condition)

    def __call__(
        self, features: torch.Tensor, positions: torch.Tensor, past: int, start: int, length: int
    ) -> torch.Tensor:
        hidden_states = features
        for block in self.residual_blocks:
            hidden_states = block(hidden_states, start, length)
        located = torch.cat([hidden_states, positions], dim=1)
        if self.attention is None:
            return self.out(located)
        memory = self.key_block(torch.cat([features, located], dim=1))
        attended = self.attention(self.query_block(located), memory, past, length)
        return self.out_block(hidden_states, attended)


class StemSteps:
    """A `CodeStem`, and the codes so far."""

    def __init__(self, stem: CodeStem, batch_size: int, grid_size: tuple[int, int]):
        height, width = grid_size
        reach, num_codes, device = stem.reach, stem.left.num_codes, stem.left.bias.device
        self.stem, self.reach, self.num_codes = stem, reach, num_codes
        self.tables = (stem.above.table(), stem.left.table())
        # rows of codes, with a margin on the left; `num_codes` is no code
        self.codes = torch.full((batch_size, height, reach + width), num_codes, device=device)
        rows, columns = torch.arange(height, device=device), torch.arange(reach, reach + width, device=device)
        self.slots = (rows[:, None] * (reach + width) + columns).flatten()
        # the last taps of the convolution to the left are those of a position's own row
        self.left_table = self.tables[1][-reach * (num_codes + 1) :]
        self.left_taps = torch.arange(reach, device=device) * (num_codes + 1)
        self.from_above = None

    def put(self, codes: torch.LongTensor, first: int) -> None:
        """Codes `(B, L)`, the first of which is that of the position `first`."""
        self.codes.flatten(1).index_copy_(1, self.slots[first : first + codes.shape[1]], codes)

    def start_row(self, row: int) -> None:
        above = self.codes[:, max(row - self.reach, 0) : row, self.reach :]
        empty = torch.full_like(self.codes[:, :1, self.reach :], self.num_codes)
        self.from_above = self.stem(torch.cat([above, empty], dim=1), self.tables)[:, -1]

    def __call__(self, row: int, start: int, length: int) -> torch.Tensor:
        windows = self.codes[:, row, start : start + self.reach + length - 1].unfold(1, self.reach, 1)
        from_left = F.embedding_bag((windows + self.left_taps).flatten(0, 1), self.left_table, mode="sum")
        return from_left + self.from_above[:, start : start + length].flatten(0, 1)


class PixelSNAILSteps:
    """
    The whole network, at the positions that have been computed, and one call after another at the next ones.

    Args:
        model: a `PixelSNAILForCausalLM`.
        condition (`(B, h', w', C)`, *optional*): what conditions it, on any grid that divides the model's.
        batch_size: B.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, condition: torch.Tensor | None, batch_size: int):
        self.height, self.width = model.config.grid_size
        self.stem = StemSteps(model.stem, batch_size, model.config.grid_size)
        self.blocks = [BlockSteps(block, batch_size, model.config.grid_size) for block in model.blocks]
        self.output_blocks = [PointwiseResidualSteps(block) for block in model.output_blocks]
        self.positions = model.grid_positions().flatten(0, 1)
        self.condition = None if condition is None else condition.detach()
        self.past = 0

    @torch.no_grad()
    def __call__(self, codes: torch.LongTensor, length: int, states: list | None = None) -> torch.Tensor:
        """
        Hidden states `(B, length, hidden_size)` of the next `length` positions, given the `codes` `(B, L)` of those
        just before them that have not been given, `L = length` or, at the very beginning, `length - 1`. Each layer's
        are appended to `states`, if it is a list.
        """
        self.stem.put(codes, self.past + length - 1 - codes.shape[1])
        parts, of_parts = [], []
        while length > 0:
            row, start = self.past // self.width, self.past % self.width  # torch.compile knows no divmod
            part = min(length, self.width - start)
            of_part = None if states is None else []
            parts.append(self._part_of_a_row(row, start, part, of_part))
            of_parts.append(of_part)
            self.past, length = self.past + part, length - part
        if states is not None:
            states += [torch.cat(of_layer, dim=1) for of_layer in zip(*of_parts, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _part_of_a_row(self, row: int, start: int, length: int, states: list | None) -> torch.Tensor:
        batch_size = len(self.stem.codes)
        if start == 0:
            condition = self.condition
            if condition is not None:
                condition = condition[:, row * condition.shape[1] // self.height]
            self.stem.start_row(row)
            for block in self.blocks:
                block.start_row(condition)
        hidden_states = self.stem(row, start, length)
        positions = self.positions[self.past : self.past + length].expand(batch_size, -1, -1).flatten(0, 1)
        kept = [hidden_states]
        for block in self.blocks:
            hidden_states = block(hidden_states, positions, self.past, start, length)
            kept.append(hidden_states)
        for block in self.output_blocks:
            hidden_states = block(hidden_states)
        if states is not None:
            kept += [hidden_states] if self.output_blocks else []
            states += [state.unflatten(0, (batch_size, length)) for state in kept]
        return hidden_states.unflatten(0, (batch_size, length))


__all__ = ["PixelSNAILSteps"]
