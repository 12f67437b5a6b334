"""
Convolutional priors over a grid of codes, and their sampling without recomputation.

A model is made of `IncrementalGenerationMixin`, its `PreTrainedModel` and `GenerationMixin`, in this order; its config is a
`CodePriorConfig`. The mixin is the `forward` of transformers' causal LMs: training with labels, a full pass over the first
positions (with `use_cache=True` it leaves an `IncrementalCache`), and with that cache one step for each new code. `generate`
is transformers' own, so logits processors, sampling and guidance work as ever.

Position `p` of a grid of width `w` lies in row `p // w` and column `p % w`. Its features are computed from the codes of the
positions before it, and predict its code. What a model defines:

- `encode_condition(prefix, condition_indices)`: what the passes need of the prefix ids `(B,)` and, if the model takes them,
  of the codes of the level above `(B, h', w')`. It is computed once for each image and kept in the cache.
- `read_grid(codes, condition)`: the features `(B, rows, w, C)` of all positions of the first `rows` rows, given codes
  `(B, rows, w)`. The features of a position must not depend on its own code or on later ones.
- `read_grid_and_cache(codes, condition, positions)`: the same features and an `IncrementalCache` to go on with, where only
  the codes before position `positions - 1` are known, and the others are 0.
- `read_position(code, position, cache)`: the features `(B, C)` of `position`, given the code `(B,)` of the position before
  it, and with what the cache holds of all others before. It changes the cache.
- `head(features)`: the logits `(..., codebook_size)` of features `(..., C)`.
"""

from functools import partial

import torch
from torch import nn
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .code_sequences import CodeSequenceMixin, check_range


class IncrementalCache:
    """
    What the positions that are not computed yet need of those that are.

    Args:
        length: how many ids have been read, the prefix included.
        batch_size: rows of a batch that goes on with it.
        condition: what `encode_condition` has given.
        layers: whatever each of the model's layers keeps.
        **parts: whatever else the model keeps, by name.
    """

    is_compileable = False  # `generate` asks for it

    def __init__(self, length: int, batch_size: int, condition, layers: list, **parts):
        self.length = length
        self.batch_size = batch_size
        self.condition = condition
        self.layers = layers
        for name, part in parts.items():
            setattr(self, name, part)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many ids have been read."""
        return self.length


class IncrementalGenerationMixin(CodeSequenceMixin):
    """`forward` and `generate` of a prior over a grid of codes: see the head of this file."""

    def corrupt_inputs(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """
        `input_ids` `(B, T)` with the null class in place of the class where `config.condition_dropout` says so; the argument
        is left unchanged. `forward` calls it in training mode when labels are given.
        """
        drop = torch.rand((len(input_ids), 1), device=input_ids.device) < self.config.condition_dropout
        prefix = input_ids[:, :1].masked_fill(drop, self.config.null_class_token_id)
        return torch.cat([prefix, input_ids[:, 1:]], dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        condition_indices: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: IncrementalCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (int64 `(B, T)`): a prefix id, then codes; or with `past_key_values` the codes after those it has read.
            labels (int64 `(B, T)`, *optional*): the code wanted at each position; the model shifts them. The prefix and
                positions with -100 do not count, so that `labels=input_ids` is fine. The last token predicts nothing and
                is not run: `logits` then have `T - 1` positions.
            condition_indices (int64 `(B, h', w')`, *optional*): the codes of the level above, for a model that takes them;
                not needed any more with `past_key_values`.
            attention_mask (`(B, T)`, *optional*): ones, since a grid has no padding.
            past_key_values ([`IncrementalCache`], *optional*): what an earlier call with `use_cache` has returned. It is
                changed in place, and carries no gradient.
            use_cache (`bool`, *optional*): whether to return a cache; without it, only if one was given. Dropout does not act
                in a step with a cache, so call `eval()` first: in training mode it is not what a whole pass computes.
            logits_to_keep (`int` or `torch.Tensor`): compute the logits of the last so many or of these positions; 0: all.
            num_items_in_batch (`int`, *optional*): what the sum of the losses is divided by, instead of the labels here.

        Returns:
            `CausalLMOutputWithPast` with `logits` `(B, T, codebook_size)`.

        Raises:
            ValueError: inputs of the wrong type or shape, more positions than `config.n_positions`, labels together with a
                cache; padding and ids or labels out of range, where finding them needs no waiting for an accelerator in
                training or in a step with a cache.
        """
        self._check_inputs(input_ids, labels, attention_mask, past_key_values)
        if labels is not None:
            if self.training and self.config.condition_dropout > 0:
                input_ids = self.corrupt_inputs(input_ids)
            input_ids = input_ids[:, :-1]
        input_ids = input_ids.long()
        if past_key_values is not None:
            features, cache = self._read_on(input_ids, past_key_values), past_key_values
        else:
            features, cache = self._read_from_start(input_ids, condition_indices, bool(use_cache))
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            features = features[:, keep]
        logits = self.head(features)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=self.config.codebook_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=labels[:, 1:].long().contiguous(),
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _read_from_start(self, input_ids, condition_indices, use_cache):
        """Features `(B, T, C)` of the first T positions, in whole rows, and a cache or None."""
        positions, width = input_ids.shape[1], self.config.grid_size[1]
        rows = -(-positions // width)
        codes = nn.functional.pad(input_ids[:, 1:], (0, rows * width - positions + 1)).unflatten(1, (rows, width))
        condition = self.encode_condition(input_ids[:, 0], condition_indices)
        if use_cache:
            features, cache = self.read_grid_and_cache(codes, condition, positions)
        else:
            features, cache = self.read_grid(codes, condition), None
        return features.flatten(1, 2)[:, :positions], cache

    @torch.no_grad()
    def _read_on(self, codes, cache):
        """Features `(B, T, C)` of the positions after each of T codes."""
        features = []
        for code in codes.unbind(1):
            features.append(self.read_position(code, cache.length, cache))
            cache.length += 1
        return torch.stack(features, dim=1)

    def _check_inputs(self, input_ids, labels, attention_mask, past_key_values):
        given = {"input_ids": input_ids} if labels is None else {"input_ids": input_ids, "labels": labels}
        for name, ids in given.items():
            if not isinstance(ids, torch.Tensor):
                raise ValueError(f"`{name}` must be an int64 tensor (B, T), got {type(ids).__name__}.")
            if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
                raise ValueError(
                    f"`{name}` must be int64 of shape (B, T) and not empty, got {ids.dtype} of shape {tuple(ids.shape)}."
                )
        if labels is not None:
            if past_key_values is not None:
                raise ValueError("`labels` and `past_key_values` exclude each other: a cache carries no gradient.")
            if labels.shape != input_ids.shape or labels.shape[1] < 2:
                raise ValueError(
                    f"`labels` must have the shape of `input_ids`, a prefix and codes, got {tuple(labels.shape)} and "
                    f"{tuple(input_ids.shape)}."
                )
        past = 0
        if past_key_values is not None:
            if not isinstance(past_key_values, IncrementalCache):
                raise ValueError(
                    f"`past_key_values` must be what this model has returned, got {type(past_key_values).__name__}."
                )
            if past_key_values.batch_size != len(input_ids):
                raise ValueError(
                    f"`past_key_values` is for {past_key_values.batch_size} rows, but `input_ids` has {len(input_ids)}."
                )
            past = past_key_values.length
        reached = past + input_ids.shape[1] - (labels is not None)
        if reached > self.config.n_positions:
            raise ValueError(
                f"`input_ids` reach position {reached}, but the model has {self.config.n_positions}: a prefix id and N "
                "codes take N positions, since the last code is never an input."
            )
        if self.may_read(input_ids, is_step=past_key_values is not None):
            self._check_values(input_ids, labels, attention_mask, has_prefix=past_key_values is None)

    def may_read(self, ids: torch.LongTensor, is_step: bool = False) -> bool:
        """
        Whether `forward` may look at values: not in a compiled graph, and on an accelerator, where looking waits for all that
        is under way, neither in training nor in a step with a cache.
        """
        if torch.compiler.is_compiling() or ids.is_meta:
            return False
        return ids.device.type == "cpu" or not (self.training or is_step)

    def _check_values(self, input_ids, labels, attention_mask, has_prefix):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("`attention_mask` must hold ones only: a grid of codes has no padding.")
        self._check_ids("input_ids", input_ids, has_prefix)
        if labels is not None:
            wanted = labels[:, 1:]
            check_range(wanted[wanted != -100], self.config.codebook_size, "labels[:, 1:]", meaning=" or be -100")

    def _check_ids(self, name: str, ids: torch.LongTensor, has_prefix: bool = True):
        """ValueErrors unless `ids` `(B, T)` are a prefix id and codes, or codes alone."""
        num_codes, num_ids = self.config.codebook_size, self.config.vocab_size
        if has_prefix:
            check_range(ids[:, 0], num_ids, f"{name}[:, 0]", first=num_codes, meaning=" (ids of `prepare_condition`)")
            name, ids = f"{name}[:, 1:]", ids[:, 1:]
        check_range(ids, num_codes, name, meaning=" (codes)")

    # ------------------------------------------------------------------------------------------------ generation

    def generate(self, inputs=None, generation_config=None, **kwargs):
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 and prompt.shape[1]:
            self._check_ids("inputs", prompt)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    generate.__doc__ = CodeSequenceMixin.generate.__doc__

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Called by `generate`: nothing to prepare, since the first forward pass makes the cache."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "`cache_implementation` must be None or 'dynamic', the cache that this prior has of its own, got "
                f"{generation_config.cache_implementation!r}."
            )
        if generation_config.use_cache and generation_config.num_beams > 1:
            raise ValueError(
                f"`num_beams` must be 1 with a cache, which follows no beams, got {generation_config.num_beams}; beam "
                "search needs use_cache=False."
            )

    def _get_logits_processor(self, *args, model_kwargs=None, **kwargs):
        """Called by `generate`: guidance's second pass has another class, but the same codes of the level above."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        above = (model_kwargs or {}).get("condition_indices")
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and above is not None:
                processor.model = partial(processor.model, condition_indices=above)
        return processors


__all__ = ["IncrementalCache", "IncrementalGenerationMixin"]
