"""The denoiser of VQ-Diffusion: a transformer over a grid of code indices, some of them masked."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from .vq_diffusion_blocks import CodeEmbedding, VQDiffusionTransformerBlock


CONDITION_TYPES = ("unconditional", "class", "text")
MLP_TYPES = ("fc", "conv")
POSITIVE_INTS = ("num_embeddings", "num_layers", "num_attention_heads", "attention_head_dim", "num_train_timesteps")
POSITIVE_INTS += ("num_classes", "cross_attention_dim", "text_length", "mlp_ratio")  # the first two may be None


@dataclass
class VQDiffusionTransformerOutput(BaseOutput):
    """`sample`: logits `(B, h, w, K)` of the codes before any noise; the mask is no class of theirs."""

    sample: torch.FloatTensor


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
        self.sample_size = _pair(sample_size, "sample_size")
        position_size = self.sample_size
        if position_embedding_size is not None:
            position_size = _pair(position_embedding_size, "position_embedding_size")
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
        _check_tensors(
            indices=indices,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            class_labels=class_labels,
        )
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
            wanted = len(shape) == 3 and shape[0] == batch_size and shape[2] == config.cross_attention_dim
            if not wanted or not encoder_hidden_states.is_floating_point():
                raise ValueError(
                    f"`encoder_hidden_states` must be floating and have shape ({batch_size}, S, "
                    f"{config.cross_attention_dim}), got {encoder_hidden_states.dtype} of shape {shape}."
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
        for name in POSITIVE_INTS:
            value = config[name]
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive int, got {value!r}.")
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


def _pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, int) and x > 0 for x in pair):
        raise ValueError(f"`{name}` must be a positive int, or two of them (height, width), got {size!r}.")
    return tuple(pair)


def _check_tensors(indices, **optional):
    for name, value in {"indices": indices, **optional}.items():
        if not isinstance(value, torch.Tensor) and (value is not None or name == "indices"):
            raise ValueError(f"`{name}` must be a tensor, got a {type(value).__name__}.")


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
