"""The denoiser of VQ-Diffusion: a transformer over a grid of code indices, some of them masked (Gu et al. 2022)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import BaseOutput
from torch import nn

from ...argument_checks import check_integer, check_real
from ...config_registration import register_by_name
from ..checked_loading import CheckedLoadingMixin


OPTIONS = {
    "condition_type": ("unconditional", "class", "text"),
    "mlp_type": ("fc", "conv"),
    "activation": ("quick_gelu", "gelu"),
    "timestep_embedding": ("learned", "sinusoidal"),
    "class_embedding": ("learned", "sinusoidal"),
    "class_norm": ("layer", "instance"),
}
# read by models of one condition only; the first of each must be given there
CONDITION_FIELDS = {
    "class": ("num_classes", "null_class", "null_class_position"),
    "text": ("cross_attention_dim", "learnable_null_embedding"),
}


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of an id's place among `num_ids`, stretched to 4000, at frequencies from 1 down to 1e-4.

    The id `num_ids`, which stands for none, lies at `null_position`.
    """

    def __init__(self, num_ids: int, dim: int, null_position: float | None = None):
        super().__init__()
        self.num_ids, self.dim = num_ids, dim
        self.null_position = num_ids if null_position is None else null_position

    def forward(self, ids: torch.LongTensor) -> torch.FloatTensor:
        """`(B,)` to float32 `(B, dim)`."""
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=ids.device) * (-math.log(10000) / (half - 1)))
        places = torch.where(ids == self.num_ids, self.null_position, ids.float()) / self.num_ids * 4000
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AdaptiveNorm(nn.Module):
    """`norm(x) (1 + s) + b` with `s`, `b` linear in the SiLU of a vector for each id, a timestep or a class.

    Args:
        embedding: of the ids, [`torch.nn.Embedding`] or [`SinusoidalEmbedding`].
        norm: "layer" normalises each position over its channels, "instance" each channel over the positions.
    """

    def __init__(self, embedding: nn.Module, dim: int, norm: str = "layer"):
        super().__init__()
        self.emb = embedding
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor, ids: torch.LongTensor) -> torch.Tensor:
        """`hidden_states` `(B, N, dim)`, `ids` `(B,)`."""
        embedded = self.emb(ids).to(hidden_states.dtype)
        scale, shift = self.linear(F.silu(embedded)).unsqueeze(1).chunk(2, dim=-1)
        if self.norm == "layer":
            normed = F.layer_norm(hidden_states, hidden_states.shape[-1:])
        else:
            normed = F.instance_norm(hidden_states.mT).mT
        return normed * (1 + scale) + shift


class VQDiffusionAttnProcessor:
    """Multi-head attention by diffusers' dispatch, so that `set_attention_backend` chooses the kernel."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            states.unflatten(-1, (-1, attn.head_dim))
            for states in self._project(attn, hidden_states, encoder_hidden_states)
        )
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=attn.attention_dropout if attn.training else 0.0,
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

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        dropout: float,
        attention_dropout: float,
        cross_attention_dim: int | None = None,
    ):
        super().__init__()
        self.heads, self.head_dim, self.use_bias = heads, head_dim, True
        self.attention_dropout = attention_dropout
        self.is_cross_attention = cross_attention_dim is not None
        source_dim = cross_attention_dim if self.is_cross_attention else dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(source_dim, dim)
        self.to_v = nn.Linear(source_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class ConvFeedForward(nn.Module):
    """Two 3×3 convolutions over the grid in place of the two linear maps."""

    def __init__(self, dim: int, mult: float, dropout: float, activation: str):
        super().__init__()
        self.conv_in = nn.Conv2d(dim, int(mult * dim), 3, padding=1)
        self.conv_out = nn.Conv2d(int(mult * dim), dim, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`hidden_states` `(B, h * w, dim)`, row by row."""
        hidden_states = self.conv_in(hidden_states.mT.unflatten(2, grid_size))
        if self.activation == "gelu":
            hidden_states = F.gelu(hidden_states)
        else:
            hidden_states = hidden_states * torch.sigmoid(1.702 * hidden_states)
        return self.dropout(self.conv_out(hidden_states).flatten(2).mT)


class VQDiffusionTransformerBlock(nn.Module):
    """
    Self-attention, cross-attention to a text, and an MLP, each behind its norm and with a residual. The norms before
    attention know the timestep; the one before the MLP knows the class.

    Args:
        config: of [`VQDiffusionTransformer2DModel`].
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        dim = config.num_attention_heads * config.attention_head_dim
        heads = (config.num_attention_heads, config.attention_head_dim, config.dropout, config.attention_dropout)
        self.norm1 = AdaptiveNorm(self._timestep_embedding(config, dim), dim)
        self.attn1 = VQDiffusionAttention(dim, *heads)
        self.norm2 = self.attn2 = None
        if config.condition_type == "text":
            self.norm2 = AdaptiveNorm(self._timestep_embedding(config, dim), dim)
            self.attn2 = VQDiffusionAttention(dim, *heads, config.cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        if config.condition_type == "class":
            self.norm3 = AdaptiveNorm(self._class_embedding(config, dim), dim, config.class_norm)
        if config.mlp_type == "conv":
            self.ff = ConvFeedForward(dim, config.mlp_ratio, config.dropout, config.activation)
        else:
            # "geglu-approximate" is x σ(1.702 x), without a gate
            activation = "gelu" if config.activation == "gelu" else "geglu-approximate"
            self.ff = FeedForward(dim, mult=config.mlp_ratio, activation_fn=activation)
            self.ff.net.append(nn.Dropout(config.dropout))

    @staticmethod
    def _timestep_embedding(config, dim: int) -> nn.Module:
        embedding = nn.Embedding if config.timestep_embedding == "learned" else SinusoidalEmbedding
        return embedding(config.num_train_timesteps, dim)

    @staticmethod
    def _class_embedding(config, dim: int) -> nn.Module:
        if config.class_embedding == "sinusoidal":
            return SinusoidalEmbedding(config.num_classes, dim, config.null_class_position)
        return nn.Embedding(config.num_classes + config.null_class, dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.LongTensor,
        grid_size: tuple[int, int],
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """`hidden_states` `(B, h * w, dim)` to the same; for the others see [`VQDiffusionTransformer2DModel`]."""
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


@dataclass
class VQDiffusionTransformerOutput(BaseOutput):
    """
    Args:
        sample (`(B, h, w, K)`): logits of the codes before any noise; the mask is no class of theirs.
    """

    sample: torch.FloatTensor


class VQDiffusionTransformer2DModel(CheckedLoadingMixin, ModelMixin, AttentionMixin, PeftAdapterMixin, ConfigMixin):
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
        num_classes (*optional*): number of classes, the null class not counted.
        null_class: the class `num_classes` stands for none, which guidance needs.
        cross_attention_dim (*optional*): channels D of the text states.
        learnable_null_embedding: learn the text states that stand for no text (Tang et al., "Improved Vector Quantized
            Diffusion Models", 2022, section 3.1).
        text_length: their length S.
        mlp_type: "fc", or "conv" for 3×3 convolutions over the grid.
        mlp_ratio: hidden width of the MLP over the width.
        dropout: after each attention and MLP.
        activation: of the MLP, "quick_gelu" (x σ(1.702 x)) or "gelu".
        timestep_embedding, class_embedding: "learned", a table, or "sinusoidal", without parameters.
        class_norm: what the class scales and shifts, "layer" or "instance"; see [`AdaptiveNorm`].
        null_class_position (*optional*): with sinusoidal classes, where among them the null class lies; by default
            after the last.
        attention_dropout: of the attention's probabilities.

    Raises:
        ValueError: for arguments that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VQDiffusionTransformerBlock"]
    _repeated_blocks = ["VQDiffusionTransformerBlock"]

    @register_by_name
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
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        activation: str = "quick_gelu",
        timestep_embedding: str = "learned",
        class_embedding: str = "learned",
        class_norm: str = "layer",
        null_class_position: float | None = None,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self._check_config()
        config = self.config
        self.sample_size = tuple(config.sample_size)
        position_size = config.position_embedding_size or self.sample_size
        dim = config.num_attention_heads * config.attention_head_dim
        self.latent_image_embedding = CodeEmbedding(config.num_embeddings + 1, position_size, dim)
        self.transformer_blocks = nn.ModuleList(VQDiffusionTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, config.num_embeddings)
        self.null_embedding = None
        if config.learnable_null_embedding:
            # about as long as a normalised text state
            self.null_embedding = nn.Parameter(
                torch.randn(config.text_length, config.cross_attention_dim) / config.cross_attention_dim**0.5
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
        return self.config.num_classes if self.config.null_class else None

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
            encoder_attention_mask (bool `(B, S)`, *optional*): True where a text state counts; at least one of each
                row.
            class_labels (int64 `(B,)`): if and only if `condition_type` is "class"; in 0 … `num_classes` - 1, or
                `null_class_id`.
            return_dict: a [`VQDiffusionTransformerOutput`] rather than a tuple.

        Returns:
            `sample`: logits `(B, h, w, K)`, contiguous.

        Raises:
            ValueError: wrong shapes or types, or a condition that is missing or unwanted. Values are the caller's to
                check: here it would mean to wait for the device.
        """
        self._check_inputs(indices, timestep, encoder_hidden_states, encoder_attention_mask, class_labels)
        timestep = torch.as_tensor(timestep, device=indices.device).expand(len(indices))
        attention_mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None, :]
        condition = (encoder_hidden_states, attention_mask, class_labels)
        hidden_states = self.latent_image_embedding(indices.flatten(1))
        for block in self.transformer_blocks:
            inputs = (hidden_states, timestep, self.sample_size, *condition)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)
        logits = self.out(self.norm_out(hidden_states)).unflatten(1, self.sample_size)
        return VQDiffusionTransformerOutput(sample=logits) if return_dict else (logits,)

    def _check_inputs(self, indices, timestep, encoder_hidden_states, encoder_attention_mask, class_labels):
        config, integers = self.config, (torch.int64, torch.int32)
        _check_tensor("indices", indices, (None, *self.sample_size), integers, "int64")
        batch = len(indices)
        if isinstance(timestep, torch.Tensor):
            shape = timestep.shape if timestep.shape in ((), (1,)) else (batch,)
            _check_tensor("timestep", timestep, shape, integers, "an int or int64")
        else:
            check_integer("timestep", timestep)
        for name, value, kind in (
            ("encoder_hidden_states", encoder_hidden_states, "text"),
            ("class_labels", class_labels, "class"),
        ):
            if (value is not None) != (config.condition_type == kind):
                wanted = "are needed" if value is None else "must be None"
                raise ValueError(f"`{name}` {wanted}: this model's condition is {config.condition_type!r}.")
        if class_labels is not None:
            _check_tensor("class_labels", class_labels, (batch,), integers, "int64")
        if encoder_hidden_states is not None:
            floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
            shape = (batch, None, config.cross_attention_dim)
            _check_tensor("encoder_hidden_states", encoder_hidden_states, shape, floats, "floating")
        if encoder_attention_mask is not None:
            if encoder_hidden_states is None:
                raise ValueError("`encoder_attention_mask` needs `encoder_hidden_states`.")
            shape = tuple(encoder_hidden_states.shape[:2])
            _check_tensor("encoder_attention_mask", encoder_attention_mask, shape, (torch.bool,), "bool")

    def _check_config(self):
        """Numbers of numpy and torch become Python's, so that they can be saved; a size becomes a pair."""
        config = self.config
        numbers = {"sample_size": _pair(config.sample_size, "sample_size")}
        if config.position_embedding_size is not None:
            numbers["position_embedding_size"] = _pair(config.position_embedding_size, "position_embedding_size")
        for name in ("num_embeddings", "num_layers", "num_attention_heads", "attention_head_dim", "text_length"):
            numbers[name] = check_integer(name, config[name], minimum=1)
        numbers["num_train_timesteps"] = check_integer("num_train_timesteps", config.num_train_timesteps, minimum=1)
        for name in ("num_classes", "cross_attention_dim"):
            if config[name] is not None:
                numbers[name] = check_integer(name, config[name], minimum=1)
        check_real("mlp_ratio", config.mlp_ratio, above=0)
        numbers["mlp_ratio"] = config.mlp_ratio if isinstance(config.mlp_ratio, int) else float(config.mlp_ratio)
        for name in ("dropout", "attention_dropout"):
            numbers[name] = check_real(name, config[name], minimum=0, below=1)
        if config.null_class_position is not None:
            numbers["null_class_position"] = check_real("null_class_position", config.null_class_position)
        self.register_to_config(**numbers)
        self._check_options()

    def _check_options(self):
        config = self.config
        for name, options in OPTIONS.items():
            if config[name] not in options:
                raise ValueError(f"`{name}` must be one of {options}, got {config[name]!r}.")
        positions = math.prod(config.sample_size)
        if math.prod(config.position_embedding_size or config.sample_size) < positions:
            raise ValueError(
                f"`position_embedding_size` must hold the {positions} positions of `sample_size` "
                f"{config.sample_size}, "
                f"got {config.position_embedding_size}."
            )
        for kind, (needed, *optional) in CONDITION_FIELDS.items():
            if (config[needed] is not None) != (config.condition_type == kind):
                raise ValueError(
                    f"`{needed}` must be given if and only if `condition_type` is {kind!r}, got {config[needed]} with "
                    f"{config.condition_type!r}."
                )
            for name in optional:
                if config[name] not in (None, False) and config.condition_type != kind:
                    raise ValueError(f"`{name}` needs `condition_type` {kind!r}, got {config.condition_type!r}.")
        if config.null_class_position is not None and (
            not config.null_class or config.class_embedding != "sinusoidal"
        ):
            raise ValueError("`null_class_position` needs `null_class` and `class_embedding` 'sinusoidal'.")
        width = config.num_attention_heads * config.attention_head_dim
        if "sinusoidal" in (config.timestep_embedding, config.class_embedding) and (width % 2 or width < 4):
            raise ValueError(
                "`num_attention_heads` times `attention_head_dim` must be even and at least 4 for "
                "sinusoidal embeddings, "
                f"got {width}."
            )


def _pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"`{name}` must be an int or two of them (height, width), got {size!r}.")
    return tuple(check_integer(name, side, minimum=1) for side in pair)


def _check_tensor(name: str, tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], kind: str):
    """A ValueError unless `tensor` has one of `dtypes`, and `shape`, of which None is any size."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got a {type(tensor).__name__}.")
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"`{name}` must be {kind} of shape ({wanted}), got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )


__all__ = ["VQDiffusionTransformer2DModel", "VQDiffusionTransformerOutput"]
