"""The denoiser of VQ-Diffusion: a transformer over a grid of code indices, some of them masked."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import BaseOutput
from torch import nn


CONDITION_TYPES = ("unconditional", "class", "text")
MLP_TYPES = ("fc", "conv")


@dataclass
class VQDiffusionTransformerOutput(BaseOutput):
    """`sample`: logits `(B, h, w, K)` of the codes before any noise; the mask is no class of theirs."""

    sample: torch.FloatTensor


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


class VQDiffusionTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """
    `p(x_0 | x_t, y)` of Gu et al., "Vector Quantized Diffusion Model for Text-to-Image Synthesis" (2022, section 4.2):
    from a grid of noised codes, the timestep and a condition, the distribution of each code before the noise.

    Args:
        num_embeddings: number of codes K; the index K is the mask.
        sample_size: the grid `(h, w)`, or its side.
        num_layers, num_attention_heads, attention_head_dim: the width is heads times head dimension.
        position_embedding_size (*optional*): the table `(H, W)` of positions where it is larger than the grid, see
            [`CodeEmbedding`]; by default `sample_size`.
        num_train_timesteps: T; a timestep lies in 0 … T - 1.
        condition_type: "unconditional"; "class" (adaptive norms before the MLPs); "text" (cross-attention).
        num_classes (*optional*): rows of the class embedding, the null class included if there is one.
        null_class: the last of the `num_classes` stands for no class, which guidance needs.
        cross_attention_dim (*optional*): channels D of the text states.
        learnable_null_embedding: learn the text states that stand for no text (Tang et al., "Improved Vector Quantized
            Diffusion Models", 2022, section 3.1).
        text_length: their length S.
        mlp_type: "fc", or "conv" for 3×3 convolutions over the grid.
        mlp_ratio: hidden width of the MLP over the width.
        dropout: after each attention and MLP.

    Raises:
        ValueError: for arguments that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VQDiffusionTransformerBlock"]
    _repeated_blocks = ["VQDiffusionTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_embeddings: int,
        sample_size: int | tuple[int, int] = (16, 16),
        num_layers: int = 20,
        num_attention_heads: int = 16,
        attention_head_dim: int = 32,
        position_embedding_size: int | tuple[int, int] | None = None,
        num_train_timesteps: int = 100,
        condition_type: str = "unconditional",
        num_classes: int | None = None,
        null_class: bool = False,
        cross_attention_dim: int | None = None,
        learnable_null_embedding: bool = False,
        text_length: int = 77,
        mlp_type: str = "fc",
        mlp_ratio: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.sample_size = _pair(sample_size)
        position_size = self.sample_size if position_embedding_size is None else _pair(position_embedding_size)
        self._check_config(position_size)
        dim = num_attention_heads * attention_head_dim
        self.latent_image_embedding = CodeEmbedding(num_embeddings + 1, position_size, dim)
        self.transformer_blocks = nn.ModuleList(
            VQDiffusionTransformerBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                num_train_timesteps,
                num_classes,
                cross_attention_dim,
                mlp_type,
                mlp_ratio,
                dropout,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, num_embeddings)
        self.null_embedding = None
        if learnable_null_embedding:
            # about as long as a normalised text state
            self.null_embedding = nn.Parameter(
                torch.randn(text_length, cross_attention_dim) / cross_attention_dim**0.5
            )
        self.gradient_checkpointing = False
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module):
        """N(0, 0.02) as in the original, whose convolutions keep PyTorch's initialisation."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def null_class_id(self) -> int | None:
        """The class that stands for none, if there is one."""
        return self.config.num_classes - 1 if self.config.null_class else None

    def forward(
        self,
        indices: torch.LongTensor,
        timestep: torch.LongTensor | int,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.BoolTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        return_dict: bool = True,
    ) -> VQDiffusionTransformerOutput | tuple[torch.FloatTensor]:
        """
        Args:
            indices (int64 `(B, h, w)`): the noised codes, in 0 … K with K the mask.
            timestep (int64 `(B,)` or scalar): in 0 … T - 1, for each example or for all.
            encoder_hidden_states (`(B, S, D)`): of a text, if and only if `condition_type` is "text".
            encoder_attention_mask (bool `(B, S)`, *optional*): True where a text state counts; at least one of each row.
            class_labels (int64 `(B,)`): if and only if `condition_type` is "class".
            return_dict: a [`VQDiffusionTransformerOutput`] rather than a tuple.

        Returns:
            `sample`: logits `(B, h, w, K)`, contiguous.

        Raises:
            ValueError: wrong shapes or types, a condition that is missing or unwanted; and by [`check_values`] values out
                of range, where that needs no waiting for a device.
        """
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.full((), timestep, device=indices.device)
        self._check_inputs(indices, timestep, encoder_hidden_states, encoder_attention_mask, class_labels)
        if indices.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_values(indices, timestep, class_labels)
        timestep = timestep.to(indices.device).expand(len(indices))
        attention_mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None, :]

        hidden_states = self.latent_image_embedding(indices.flatten(1))
        for block in self.transformer_blocks:
            inputs = (
                hidden_states,
                timestep,
                self.sample_size,
                encoder_hidden_states,
                attention_mask,
                class_labels,
            )
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)
        logits = self.out(self.norm_out(hidden_states)).unflatten(1, self.sample_size)
        return VQDiffusionTransformerOutput(sample=logits) if return_dict else (logits,)

    # ------------------------------------------------------------------------------------------------ checks

    def check_values(self, indices=None, timestep=None, class_labels=None) -> None:
        """
        Checks the range of what is given. `forward` does it on the CPU only: elsewhere it would wait for the device, so a
        caller does it once before a loop.

        Raises:
            ValueError: indices not in 0 … K, timesteps not in 0 … T - 1, classes not in 0 … num_classes - 1.
        """
        config = self.config
        _check_values(indices, config.num_embeddings + 1, "indices")
        _check_values(timestep, config.num_train_timesteps, "timestep")
        _check_values(class_labels, config.num_classes, "class_labels")

    def _check_inputs(self, indices, timestep, encoder_hidden_states, encoder_attention_mask, class_labels):
        config = self.config
        batch_size = indices.shape[0] if indices.ndim else 0
        if tuple(indices.shape) != (batch_size, *self.sample_size) or not _is_integer(indices):
            raise ValueError(
                f"`indices` must be int64 of shape (B, {self.sample_size[0]}, {self.sample_size[1]}), got {indices.dtype} of "
                f"shape {tuple(indices.shape)}."
            )
        if tuple(timestep.shape) not in ((), (1,), (batch_size,)) or not _is_integer(timestep):
            raise ValueError(
                f"`timestep` must be an integer or int64 of shape ({batch_size},), got {timestep.dtype} of shape "
                f"{tuple(timestep.shape)}."
            )
        if (encoder_hidden_states is not None) != (config.condition_type == "text"):
            wanted = "are needed" if config.condition_type == "text" else "must be None"
            raise ValueError(f"`encoder_hidden_states` {wanted}: this model's condition is {config.condition_type!r}.")
        if (class_labels is not None) != (config.condition_type == "class"):
            wanted = "are needed" if config.condition_type == "class" else "must be None"
            raise ValueError(f"`class_labels` {wanted}: this model's condition is {config.condition_type!r}.")
        if class_labels is not None and (tuple(class_labels.shape) != (batch_size,) or not _is_integer(class_labels)):
            raise ValueError(
                f"`class_labels` must be int64 of shape ({batch_size},), got {class_labels.dtype} of shape "
                f"{tuple(class_labels.shape)}."
            )
        if encoder_hidden_states is not None:
            shape = tuple(encoder_hidden_states.shape)
            if len(shape) != 3 or shape[0] != batch_size or shape[2] != config.cross_attention_dim:
                raise ValueError(
                    f"`encoder_hidden_states` must have shape ({batch_size}, S, {config.cross_attention_dim}), got {shape}."
                )
        if encoder_attention_mask is None:
            return
        if encoder_hidden_states is None:
            raise ValueError("`encoder_attention_mask` needs `encoder_hidden_states`.")
        if (
            encoder_attention_mask.shape != encoder_hidden_states.shape[:2]
            or encoder_attention_mask.dtype != torch.bool
        ):
            raise ValueError(
                f"`encoder_attention_mask` must be bool of shape {tuple(encoder_hidden_states.shape[:2])}, got "
                f"{encoder_attention_mask.dtype} of shape {tuple(encoder_attention_mask.shape)}."
            )

    def _check_config(self, position_size: tuple[int, int]):
        config = self.config
        if config.condition_type not in CONDITION_TYPES:
            raise ValueError(f"`condition_type` must be one of {CONDITION_TYPES}, got {config.condition_type!r}.")
        if config.mlp_type not in MLP_TYPES:
            raise ValueError(f"`mlp_type` must be one of {MLP_TYPES}, got {config.mlp_type!r}.")
        if position_size[0] * position_size[1] < self.sample_size[0] * self.sample_size[1]:
            raise ValueError(
                f"`position_embedding_size` must hold the {self.sample_size} positions of `sample_size`, got {position_size}."
            )
        for name, kind in (("num_classes", "class"), ("cross_attention_dim", "text")):
            if (config[name] is not None) != (config.condition_type == kind):
                raise ValueError(
                    f"`{name}` must be given if and only if `condition_type` is {kind!r}, got {config[name]} with "
                    f"{config.condition_type!r}."
                )
        for name, kind in (("null_class", "class"), ("learnable_null_embedding", "text")):
            if config[name] and config.condition_type != kind:
                raise ValueError(f"`{name}` needs `condition_type` {kind!r}, got {config.condition_type!r}.")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _is_integer(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _check_values(values: torch.LongTensor | int | None, size: int | None, name: str):
    if values is None:
        return
    values = torch.as_tensor(values)
    if values.numel() and (values.min() < 0 or values.max() >= size):
        raise ValueError(
            f"`{name}` must lie in 0 … {size - 1}, got values from {values.min().item()} to {values.max().item()}."
        )


__all__ = ["VQDiffusionTransformer2DModel", "VQDiffusionTransformerOutput"]
