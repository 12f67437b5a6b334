"""
The priors of VQ-VAE-2 over code indices: PixelSNAIL, alone or given the codes of the level above. Its `forward` is
that of `CodePriorForCausalLM`, in modeling_code_prior.py.
"""

import torch
from torch import nn
from transformers import initialization as init

from .code_sequences import check_range
from .configuration_pixelsnail import PixelSNAILConfig
from .modeling_code_prior import CodePriorForCausalLM, IncrementalCache
from .pixelsnail_blocks import (
    CodeStem,
    ConditioningStack,
    GatedResidualBlock,
    PixelSNAILBlock,
    PixelSNAILHead,
    init_weight_norm,
    pointwise_conv,
)
from .pixelsnail_steps import PixelSNAILSteps


class PixelSNAILForCausalLM(CodePriorForCausalLM):
    """
    PixelSNAIL over code indices (Razavi et al. 2019, section 3.2): `p(s | c, u) = prod_i p(s_i | s_<i, c, u)`, with
    `c` a class and `u` the codes of the level above, either of them optional, see [`PixelSNAILConfig`].

    ```python
    inputs = prior.prepare_inputs(bottom, class_labels)           # training: bottom (B, h, w), top (B, h', w')
    loss = prior(**inputs, condition_indices=top).loss
    prefix = prior.prepare_condition([3, 7])
    sequences = prior.generate(prefix, condition_indices=top, do_sample=True, guidance_scale=2.0)
    bottom = prior.extract_indices(sequences)                     # (2, h, w)
    ```

    Weights start as torch's convolutions do, the embeddings of classes as N(0, 1).
    """

    config: PixelSNAILConfig
    _no_split_modules = ["GatedResidualBlock"]

    def __init__(self, config: PixelSNAILConfig):
        super().__init__(config)
        self.stem = CodeStem(config)
        if config.condition_type == "class":
            self.class_embedding = nn.Embedding(config.condition_vocab_size + 1, config.conditioning_channels)
        if config.conditioning_grid_size is not None:
            self.conditioning = ConditioningStack(config)
        self.blocks = nn.ModuleList(PixelSNAILBlock(config) for _ in range(config.num_blocks))
        self.output_blocks = nn.ModuleList(
            GatedResidualBlock(config.hidden_size, config.res_channels, pointwise_conv, config.dropout)
            for _ in range(config.num_output_res_blocks)
        )
        self.head = PixelSNAILHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        init_weight_norm(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def encode_condition(
        self, prefix: torch.Tensor, condition_indices: torch.LongTensor | None
    ) -> torch.Tensor | None:
        """
        What conditions the blocks: `(B, h', w', conditioning_channels)` on the grid of the level above, `(B, 1, 1,
        conditioning_channels)` of a class alone, or `None`.
        """
        self._check_condition_indices(condition_indices, batch_size=len(prefix))
        condition = None if condition_indices is None else self.conditioning(condition_indices)
        if self.config.condition_type == "class":
            if prefix.is_floating_point():
                classes = (prefix @ self.class_embedding.weight)[:, None, None]
            else:
                classes = self.class_embedding(prefix - self.config.condition_token_offset)[:, None, None]
            condition = classes if condition is None else condition + classes
        return condition

    def _check_condition_indices(self, indices: torch.LongTensor | None, batch_size: int):
        config = self.config
        if config.conditioning_grid_size is None:
            if indices is not None:
                raise ValueError("`condition_indices` must be None: this prior has no level above.")
            return
        shape = (batch_size, *config.conditioning_grid_size)
        is_tensor = isinstance(indices, torch.Tensor)
        if not is_tensor or tuple(indices.shape) != shape or indices.dtype not in (torch.int64, torch.int32):
            got = f"{indices.dtype} of shape {tuple(indices.shape)}" if is_tensor else type(indices).__name__
            raise ValueError(f"`condition_indices` must be the codes of the level above, int64 {shape}, got {got}.")
        if self.may_read(indices):  # a look-up would take a code out of range for a code of another tap
            check_range(indices, config.conditioning_codebook_size, "condition_indices")

    def grid_positions(self) -> torch.Tensor:
        """Each position's row and column `(h, w, 2)`, from -1/2 to 1/2 along the grid."""
        precise = torch.promote_types(self.dtype, torch.float32)
        rows, columns = (
            torch.arange(side, dtype=precise, device=self.device) / side - 0.5 for side in self.config.grid_size
        )
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).to(self.dtype)

    def read_grid(
        self, codes: torch.Tensor, condition: torch.Tensor | None, states: list | None = None
    ) -> torch.Tensor:
        batch_size, rows, width = codes.shape[:3]
        height = self.config.grid_size[0]
        features = self.stem(codes)
        kept = [features]
        positions = self.grid_positions()[:rows].expand(batch_size, -1, -1, -1)
        if condition is not None and condition.shape[1:3] != (1, 1):
            # upsampled to the nearest
            condition = condition.repeat_interleave(height // condition.shape[1], dim=1)[:, :rows]
            condition = condition.repeat_interleave(width // condition.shape[2], dim=2)
        for block in self.blocks:
            features = block(features, positions, condition)
            kept.append(features)
        for block in self.output_blocks:
            features = block(features)
        if states is not None:
            states += [*kept, features] if len(self.output_blocks) else kept
        return features

    def read_grid_and_cache(
        self, codes: torch.LongTensor, condition: torch.Tensor | None, positions: int, states: list | None = None
    ):
        steps = PixelSNAILSteps(self, condition, len(codes))
        if torch.is_grad_enabled():
            steps(codes.flatten(1)[:, : positions - 1], positions)
            features = self.read_grid(codes, condition, states)
        else:
            of_positions = None if states is None else []
            features = steps(codes.flatten(1)[:, : positions - 1], positions, of_positions)
            missing = (0, 0, 0, codes[0].numel() - positions)

            def as_grid(part):
                return nn.functional.pad(part, missing).unflatten(1, codes.shape[1:])

            features = as_grid(features)
            if states is not None:
                states += map(as_grid, of_positions)
        return features, IncrementalCache(positions, len(codes), steps.condition, steps.blocks, steps=steps)

    def read_position(
        self, code: torch.LongTensor, position: int, cache: IncrementalCache, states: list | None = None
    ) -> torch.Tensor:
        of_positions = None if states is None else []
        features = cache.steps(code[:, None], 1, of_positions)
        if states is not None:
            states += [state[:, 0] for state in of_positions]
        return features[:, 0]


__all__ = ["PixelSNAILForCausalLM"]
