"""The gated PixelCNN over code indices. Its `forward` is that of `CodePriorForCausalLM`, in modeling_code_prior.py."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_pixelcnn import PixelCNNConfig
from .modeling_code_prior import CodePriorForCausalLM, IncrementalCache, effective_weight


def gate(features: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """`tanh(f) * sigmoid(g)`, with f and g the halves of the channels (van den Oord et al. 2016, equation 2)."""
    filters, gates = features.chunk(2, dim)
    return torch.tanh(filters) * torch.sigmoid(gates)


class ClassBias(nn.Embedding):
    """What a class, or the null class, adds before a gate (van den Oord et al. 2016, equation 4)."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__(config.condition_vocab_size + 1, 2 * config.hidden_size)

    def forward(self, classes: torch.Tensor) -> torch.Tensor:
        """Of ids `(B,)`, or of weights over the classes `(B, classes)`: `(B, 2 * hidden_size)`."""
        return classes @ self.weight if classes.is_floating_point() else super().forward(classes)


class GatedLayer(GradientCheckpointingLayer):
    """
    A layer of both stacks (van den Oord et al. 2016, figure 2). The vertical stack knows the rows above a position,
    all around its column, and the horizontal stack what the vertical one knows and the positions on the left.

    The paper masks k×k and 1×k convolutions; here the kernels end where the mask would begin, and the maps are padded
    (and in the first layer, which may not see the position itself, shifted) by as much.

    Args:
        is_first: whether the inputs are the codes' embeddings; else they are features that know earlier codes only.
        is_last: the vertical stack ends with what it gives to the horizontal one.
    """

    def __init__(self, config: PixelCNNConfig, is_first: bool, is_last: bool):
        super().__init__()
        channels, half = config.hidden_size, config.kernel_size // 2
        self.is_first, self.is_last, self.half = is_first, is_last, half
        self.taps = half if is_first else half + 1  # rows, or columns, up to the position's own
        self.vertical_conv = nn.Conv2d(channels, 2 * channels, (self.taps, config.kernel_size))
        self.horizontal_conv = nn.Conv2d(channels, 2 * channels, (1, self.taps))
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal_out = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.class_horizontal = self.class_vertical = None
        if config.condition_type == "class":
            self.class_horizontal = ClassBias(config)
            self.class_vertical = None if is_last else ClassBias(config)

    def forward(
        self, vertical: torch.Tensor, horizontal: torch.Tensor, class_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Features `(B, C, h, w)` of either stack, and what a `ClassBias` takes."""
        half, shift = self.half, -1 if self.is_first else 0
        from_above = self.vertical_conv(F.pad(vertical, (half, half, half, shift)))
        from_left = self.horizontal_conv(F.pad(horizontal, (half, shift)))
        gated = from_left + self.vertical_to_horizontal(from_above)
        if class_ids is not None:
            gated = gated + self.class_horizontal(class_ids)[:, :, None, None]
        update = self.horizontal_out(self.dropout(gate(gated)))
        horizontal = update if self.is_first else horizontal + update
        if self.is_last:
            return None, horizontal
        if class_ids is not None:
            from_above = from_above + self.class_vertical(class_ids)[:, :, None, None]
        return gate(from_above), horizontal


class LayerSteps:
    """
    A `GatedLayer` evaluated row by row, and in a row position by position: the vertical stack for a whole row as soon
    as the row above is known. It keeps `kernel_size // 2` rows or columns, besides the current ones, of what the layer
    sees.

    Args:
        vertical, horizontal (`(B, C, rows, w)`): what the layer has seen so far, in a pass over all rows up to the
            current one.
    """

    def __init__(
        self, layer: GatedLayer, vertical: torch.Tensor, horizontal: torch.Tensor, class_ids: torch.Tensor | None
    ):
        half, taps = layer.half, layer.taps
        self.half, self.taps, self.kernel_size = half, taps, 2 * half + 1
        # a weight under weight norm is computed whenever it is read, so once here; as a matrix, row by row (or column
        # by column) of the kernel
        self.above_weight = effective_weight(layer.vertical_conv).permute(2, 3, 1, 0).flatten(0, 2)
        self.above_bias = layer.vertical_conv.bias
        self.across_weight = effective_weight(layer.vertical_to_horizontal).flatten(1).t()
        self.across_bias = layer.vertical_to_horizontal.bias + layer.horizontal_conv.bias
        self.left_weight = effective_weight(layer.horizontal_conv)[:, :, 0].permute(2, 1, 0).flatten(0, 1)
        self.out_weight = effective_weight(layer.horizontal_out).flatten(1).t().contiguous()
        self.out_bias = layer.horizontal_out.bias
        self.is_last, self.class_vertical = layer.is_last, None
        if class_ids is not None:
            self.across_bias = self.across_bias + layer.class_horizontal(class_ids)[:, None]
            self.class_vertical = None if layer.is_last else layer.class_vertical(class_ids)[:, None]
        shift = -1 if layer.is_first else 0
        rows = F.pad(vertical, (half, half, taps, shift))[:, :, -taps:]  # not the whole map
        self.rows = rows.permute(0, 2, 3, 1).contiguous()
        self.columns = F.pad(horizontal[:, :, -1], (half, 0)).transpose(1, 2).contiguous()
        self._read_rows()

    def _read_rows(self) -> torch.Tensor:
        """What the horizontal stack gets from above in the current row; returns what the vertical gate takes."""
        # (B, taps, w, C, k): the columns around each
        windows = self.rows.unfold(2, self.kernel_size, 1)
        from_above = windows.permute(0, 2, 1, 4, 3).flatten(2) @ self.above_weight + self.above_bias
        self.from_above = from_above @ self.across_weight + self.across_bias
        return from_above

    def next_row(self, row: torch.Tensor) -> torch.Tensor | None:
        """A new row of the vertical stack's input `(B, w, C)` (of the first layer's, the one above it), and its
        output.
        """
        row = F.pad(row, (0, 0, self.half, self.half))
        self.rows = torch.cat([self.rows[:, 1:], row[:, None]], dim=1)
        from_above = self._read_rows()
        if self.is_last:
            return None
        return gate(from_above if self.class_vertical is None else from_above + self.class_vertical, dim=-1)

    def put(self, column: int, features: torch.Tensor):
        """The horizontal stack's input `(B, C)` at a column of the current row."""
        self.columns[:, self.half + column] = features

    def update(self, column: int) -> torch.Tensor:
        """What the layer adds to the horizontal stack at a column `(B, C)`, given its inputs up to there."""
        window = self.columns[:, column : column + self.taps].flatten(1)
        gated = gate(torch.addmm(self.from_above[:, column], window, self.left_weight))
        return torch.addmm(self.out_bias, gated, self.out_weight)


class PixelCNNHead(nn.Module):
    """Two 1×1 convolutions, each after a ReLU, on features `(..., hidden_size)`."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.head_hidden_size)
        self.out = nn.Linear(config.head_hidden_size, config.codebook_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(F.relu(self.hidden(F.relu(features))))


class PixelCNNForCausalLM(CodePriorForCausalLM):
    """
    Gated PixelCNN over code indices (van den Oord et al., "Conditional Image Generation with PixelCNN Decoders",
    2016), the prior of VQ-VAE: `p(s | c) = prod_i p(s_i | s_<i, c)`, with `c` a class, see [`PixelCNNConfig`].

    ```python
    inputs = prior.prepare_inputs(indices, class_labels)          # training: indices (B, h, w)
    loss = prior(**inputs).loss
    sequences = prior.generate(prior.prepare_condition([3, 7]), do_sample=True, guidance_scale=2.0)
    indices = prior.extract_indices(sequences)                    # (2, h, w)
    ```

    Weights start as N(0, 1 / fan_in), embeddings of codes as N(0, 1), those of classes and biases as 0.
    """

    config: PixelCNNConfig
    _no_split_modules = ["GatedLayer"]

    def __init__(self, config: PixelCNNConfig):
        super().__init__(config)
        count = config.num_hidden_layers
        self.code_embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        self.layers = nn.ModuleList(GatedLayer(config, is_first=i == 0, is_last=i == count - 1) for i in range(count))
        self.head = PixelCNNHead(config)
        if config.weight_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    parametrizations.weight_norm(module)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, ClassBias):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            normed = is_parametrized(module, "weight")
            weight = module.parametrizations.weight.original1 if normed else module.weight
            init.normal_(weight, std=weight[0].numel() ** -0.5)
            init.zeros_(module.bias)
            if normed:
                length = module.parametrizations.weight.original0
                init.copy_(length, torch.linalg.vector_norm(weight.flatten(1), dim=1).view_as(length))

    def encode_condition(
        self, prefix: torch.Tensor, condition_indices: torch.LongTensor | None
    ) -> torch.Tensor | None:
        """Classes `(B,)`, the null class as the last one, or weights over them; `None` when unconditional."""
        if condition_indices is not None:
            raise ValueError("`condition_indices` must be None: a PixelCNN has no level above.")
        if self.config.condition_type != "class":
            return None
        return prefix if prefix.is_floating_point() else prefix - self.config.condition_token_offset

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Embeddings `(..., C)` of codes `(...)`, or of weights over the codes `(..., codebook_size)`."""
        return codes @ self.code_embedding.weight if codes.is_floating_point() else self.code_embedding(codes)

    def shifted(self, embeddings: torch.Tensor) -> torch.Tensor:
        """`(B, rows, w, C)`: at each position what was embedded before it, which is nothing at the first."""
        flat = F.pad(embeddings.flatten(1, 2)[:, :-1], (0, 0, 1, 0))
        return flat.view_as(embeddings)

    def read_grid(
        self, codes: torch.Tensor, condition: torch.Tensor | None, states: list | None = None
    ) -> torch.Tensor:
        return self._read_layers(codes, condition, states, steps=None)

    def read_grid_and_cache(
        self, codes: torch.LongTensor, condition: torch.Tensor | None, positions: int, states: list | None = None
    ):
        steps = []
        features = self._read_layers(codes, condition, states, steps)
        last_row = self.code_embedding(codes[:, -1]).detach()
        return features, IncrementalCache(positions, len(codes), condition, steps, row=last_row)

    def _read_layers(self, codes, condition, states, steps):
        embeddings = self.embed(codes)
        if states is not None:
            states.append(self.shifted(embeddings))
        vertical = horizontal = embeddings.movedim(-1, 1)
        for layer in self.layers:
            if steps is not None:
                with torch.no_grad():
                    steps.append(LayerSteps(layer, vertical, horizontal, condition))
            vertical, horizontal = layer(vertical, horizontal, condition)
            if states is not None:
                states.append(horizontal.movedim(1, -1))
        return horizontal.movedim(1, -1)

    def read_position(
        self, code: torch.LongTensor, position: int, cache: IncrementalCache, states: list | None = None
    ) -> torch.Tensor:
        width = self.config.grid_size[1]
        column = position % width
        embedding = self.code_embedding(code)
        cache.row[:, (column - 1) % width] = embedding
        first, *others = cache.layers
        if column:
            first.put(column - 1, embedding)
        else:
            row = cache.row
            for steps in cache.layers:
                row = steps.next_row(row)
        features = first.update(column)
        if states is not None:
            states += [embedding, features]
        for steps in others:
            steps.put(column, features)
            features = features + steps.update(column)
            if states is not None:
                states.append(features)
        return features


__all__ = ["PixelCNNForCausalLM"]
