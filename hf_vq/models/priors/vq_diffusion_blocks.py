"""Building blocks of the denoiser of VQ-Diffusion (Gu et al. 2022, section 4.2)."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class AdaptiveLayerNorm(nn.Module):
    """`LN(x) (1 + s) + b` with `s`, `b` linear in the SiLU of a learned vector for each id (a timestep or a class)."""

    def __init__(self, num_ids: int, dim: int):
        super().__init__()
        self.emb = nn.Embedding(num_ids, dim)
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, hidden_states: torch.Tensor, ids: torch.LongTensor) -> torch.Tensor:
        """`hidden_states` `(B, N, dim)`, `ids` `(B,)`."""
        scale, shift = self.linear(F.silu(self.emb(ids))).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(hidden_states) * (1 + scale) + shift


class VQDiffusionAttnProcessor:
    """Multi-head attention by diffusers' dispatch, so that `set_attention_backend` chooses the kernel."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None) -> torch.Tensor:
        query, key, value = (
            states.unflatten(-1, (-1, attn.head_dim))
            for states in self._project(attn, hidden_states, encoder_hidden_states)
        )
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        for module in attn.to_out:
            hidden_states = module(hidden_states)
        return hidden_states

    @staticmethod
    def _project(attn, hidden_states, encoder_hidden_states):
        if attn.fused_projections and attn.is_cross_attention:
            return attn.to_q(hidden_states), *attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        if attn.fused_projections:
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        source = encoder_hidden_states if attn.is_cross_attention else hidden_states
        return attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)


class VQDiffusionAttention(nn.Module, AttentionModuleMixin):
    """Attention among the codes, or from them to the condition when `cross_attention_dim` is given."""

    _default_processor_cls = VQDiffusionAttnProcessor
    _available_processors = [VQDiffusionAttnProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, cross_attention_dim: int | None = None):
        super().__init__()
        self.heads, self.head_dim, self.use_bias = heads, head_dim, True
        self.is_cross_attention = cross_attention_dim is not None
        source_dim = cross_attention_dim if self.is_cross_attention else dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(source_dim, dim)
        self.to_v = nn.Linear(source_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class ConvFeedForward(nn.Module):
    """Two 3×3 convolutions over the grid in place of the two linear maps."""

    def __init__(self, dim: int, mult: int, dropout: float):
        super().__init__()
        self.conv_in = nn.Conv2d(dim, mult * dim, 3, padding=1)
        self.conv_out = nn.Conv2d(mult * dim, dim, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`hidden_states` `(B, h * w, dim)`, row by row."""
        hidden_states = self.conv_in(hidden_states.mT.unflatten(2, grid_size))
        hidden_states = hidden_states * torch.sigmoid(1.702 * hidden_states)
        return self.dropout(self.conv_out(hidden_states).flatten(2).mT)


class VQDiffusionTransformerBlock(nn.Module):
    """
    Self-attention, cross-attention to a text, and an MLP, each behind its norm and with a residual. The norms before
    attention know the timestep; the one before the MLP knows the class.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        num_train_timesteps: int,
        num_classes: int | None,
        cross_attention_dim: int | None,
        mlp_type: str,
        mlp_ratio: int,
        dropout: float,
    ):
        super().__init__()
        heads = (num_attention_heads, attention_head_dim)
        self.norm1 = AdaptiveLayerNorm(num_train_timesteps, dim)
        self.attn1 = VQDiffusionAttention(dim, *heads, dropout)
        self.norm2 = self.attn2 = None
        if cross_attention_dim is not None:
            self.norm2 = AdaptiveLayerNorm(num_train_timesteps, dim)
            self.attn2 = VQDiffusionAttention(dim, *heads, dropout, cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim) if num_classes is None else AdaptiveLayerNorm(num_classes, dim)
        if mlp_type == "conv":
            self.ff = ConvFeedForward(dim, mlp_ratio, dropout)
        else:
            self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="geglu-approximate")  # x σ(1.702 x), no gate
            self.ff.net.append(nn.Dropout(dropout))

    def forward(
        self, hidden_states, timestep, grid_size, encoder_hidden_states=None, attention_mask=None, class_labels=None
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states, timestep))
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(
                self.norm2(hidden_states, timestep), encoder_hidden_states, attention_mask
            )
        normed = self.norm3(hidden_states) if class_labels is None else self.norm3(hidden_states, class_labels)
        return hidden_states + (
            self.ff(normed, grid_size) if isinstance(self.ff, ConvFeedForward) else self.ff(normed)
        )


class CodeEmbedding(nn.Module):
    """
    A vector for each code and for the mask, plus one for its row and one for its column.

    Positions are read off the `position_size` table by flat index. For a grid of that size this is its row and column;
    a smaller grid takes the table's first entries row by row, whatever its own width, as the original's 16×16 models
    with a table of 32×32 do.
    """

    def __init__(self, num_embeddings: int, position_size: tuple[int, int], dim: int):
        super().__init__()
        self.emb = nn.Embedding(num_embeddings, dim)
        self.height_emb = nn.Embedding(position_size[0], dim)
        self.width_emb = nn.Embedding(position_size[1], dim)

    def forward(self, indices: torch.LongTensor) -> torch.Tensor:
        """`(B, N)` to `(B, N, dim)`."""
        positions = self.height_emb.weight.unsqueeze(1) + self.width_emb.weight
        return self.emb(indices) + positions.flatten(0, 1)[: indices.shape[1]]


__all__ = ["AdaptiveLayerNorm", "CodeEmbedding", "VQDiffusionTransformerBlock"]
