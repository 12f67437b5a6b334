"""
The base of the convolutional priors over a grid of codes: `forward`, and sampling without recomputation.

[`CodePriorForCausalLM`] has the `forward` of transformers' causal LMs: training with labels, a full pass over the
first positions (with `use_cache=True` it leaves an `IncrementalCache`), and with that cache one step for each new
code. `generate` is transformers' own, so logits processors, sampling and guidance work as ever.

Position `p` of a grid of width `w` lies in row `p // w` and column `p % w`. Its features are computed from the codes
of the positions before it, and predict its code. The input ids are taken as one-hot vectors over all ids, `(B, T,
input_vocab_size)`, which may be given themselves (`inputs_embeds`), and may then be weights over ids. What a model
defines:

- `encode_condition(prefix, condition_indices)`: what the passes need of the prefix, ids `(B,)` or weights over the
  conditions `(B, condition_vocab_size + 1)`, and, if the model takes them, of the codes of the level above `(B, h',
  w')`. It is computed once for each image and kept in the cache.
- `read_grid(codes, condition, states)`: the features `(B, rows, w, C)` of all positions of the first `rows` rows,
  given codes `(B, rows, w)` or weights over the codes `(B, rows, w, codebook_size)`. The features of a position must
  not depend on its own code or on later ones. Each layer's features are appended to the list `states`, if it is one.
- `read_grid_and_cache(codes, condition, positions, states)`: the same features and an `IncrementalCache` to go on
  with, where only the codes before position `positions - 1` are known, and the others are 0.
- `read_position(code, position, cache, states)`: the features `(B, C)` of `position`, given the code `(B,)` of the
  position before it, and with what the cache holds of all others before. It changes the cache.
- `head(features)`: the logits `(..., vocab_size)` of features `(..., C)`.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..checked_loading import CheckedLoadingMixin
from .code_sequences import CodeSequenceMixin, check_range, too_many_positions


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

    def __init__(self, length: int, batch_size: int, condition: torch.Tensor | None, layers: list, **parts: Any):
        self.length = length
        self.batch_size = batch_size
        self.condition = condition
        self.layers = layers
        for name, part in parts.items():
            setattr(self, name, part)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many ids have been read."""
        return self.length


class OneHotIds(nn.Module):
    """Ids `(B, T)` to one-hot vectors `(B, T, num_ids)`, of torch's default dtype: the model casts them to its own."""

    def __init__(self, num_ids: int):
        super().__init__()
        self.num_ids = num_ids

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return nn.functional.one_hot(input_ids.long(), self.num_ids).to(torch.get_default_dtype())


class CodePriorForCausalLM(CodeSequenceMixin, CheckedLoadingMixin, PreTrainedModel, GenerationMixin):
    """`forward` and `generate` of a convolutional prior over a grid of codes: see the head of this file."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    prompt_inputs = ("condition_indices",)
    reads_in_places = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.one_hot_ids = OneHotIds(config.input_vocab_size)

    def get_input_embeddings(self) -> nn.Module:
        """What makes `inputs_embeds` of `input_ids`: these priors take ids as one-hot vectors."""
        return self.one_hot_ids

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        condition_indices: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: IncrementalCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (int64 `(B, T)`): a prefix id, then codes; or with `past_key_values` the codes after those it has
                read.
            labels (int64 `(B, T)`, *optional*): the code wanted at each position; the model shifts them. The prefix
                and positions with -100 do not count, so that `labels=input_ids` is fine. The last token predicts
                nothing and is not run: `logits` then have `T - 1` positions.
            condition_indices (int64 `(B, h', w')`, *optional*): the codes of the level above, for a model that takes
                them; not needed any more with `past_key_values`.
            attention_mask (`(B, T)`, *optional*): ones, since a grid has no padding.
            past_key_values ([`IncrementalCache`], *optional*): what an earlier call with `use_cache` has returned. It
                is changed in place, and carries no gradient.
            inputs_embeds (`(B, T, input_vocab_size)`, *optional*): in place of `input_ids`, what
                `get_input_embeddings()` makes of them, or any weights over the ids, which have a gradient. A cache
                holds codes and takes none.
            position_ids (int64 `(B, T)`, *optional*): the positions on the grid in their order, which need not be
                given.
            use_cache (`bool`, *optional*): whether to return a cache; without it, only if one was given. Dropout does
                not act in a step with a cache, so call `eval()` first: in training mode it is not what a whole pass
                computes.
            output_hidden_states (`bool`, *optional*): also return the features before and after each layer.
            output_attentions (`bool`, *optional*): False, since the layers keep no attention weights.
            return_dict (`bool`, *optional*): the output as an object or as a tuple; by default as the config says.
            logits_to_keep (`int` or `torch.Tensor`): compute the logits of the last so many or of these positions; 0
                of all.
            num_items_in_batch (`int`, *optional*): what the sum of the losses is divided by, instead of the labels
                here.

        Returns:
            `CausalLMOutputWithPast` with `logits` `(B, T, vocab_size)` and, where asked for, `hidden_states`, a tuple
            of `(B, T, hidden_size)` of which the last one is what the head sees.

        Raises:
            ValueError: inputs of the wrong type or shape, more positions than `config.n_positions`, labels together
                with a cache, an argument that these priors do not have; padding and ids, labels or positions out of
                range, where finding them needs no waiting for an accelerator in training or in a step with a cache.
        """
        _refuse(kwargs, output_attentions=output_attentions)
        if inputs_embeds is None and self.is_whole_image(input_ids, labels, past_key_values, use_cache):
            return self.read_whole_image(
                input_ids,
                logits_to_keep,
                condition_indices=condition_indices,
                attention_mask=attention_mask,
                position_ids=position_ids,
                output_hidden_states=output_hidden_states,
            )
        inputs = self._check_inputs(
            input_ids, inputs_embeds, labels, attention_mask, position_ids, past_key_values, use_cache
        )
        if labels is not None:
            if self.training and self.config.condition_dropout > 0:
                if input_ids is None:
                    raise ValueError("`condition_dropout` acts on `input_ids`, got `inputs_embeds` in training.")
                inputs = self.corrupt_inputs(input_ids)
            inputs = inputs[:, :-1]
        inputs = inputs.long() if input_ids is not None else inputs
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [] if wanted else None
        if past_key_values is not None:
            features, cache = self._read_on(inputs, past_key_values, states), past_key_values
        else:
            features, cache = self._read_from_start(inputs, condition_indices, bool(use_cache), states)
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            features = features[:, keep]
        logits = self.head(features)
        loss = None if labels is None else self.code_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
        )

    def _read_from_start(self, inputs, condition_indices, use_cache, states):
        """Features `(B, T, C)` of the first T positions, in whole rows, and a cache or None."""
        positions, width = inputs.shape[1], self.config.grid_size[1]
        rows = -(-positions // width)
        prefix, codes = inputs[:, 0], inputs[:, 1:]
        missing = (0, rows * width - positions + 1)
        if inputs.ndim == 3:
            split = [self.config.codebook_size, inputs.shape[2] - self.config.codebook_size]
            prefix, codes = prefix.split(split, dim=1)[1], codes.split(split, dim=2)[0]
            missing = (0, 0, *missing)
        codes = nn.functional.pad(codes, missing).unflatten(1, (rows, width))
        condition = self.encode_condition(prefix, condition_indices)
        if use_cache:
            self._check_is_whole(codes)
            features, cache = self.read_grid_and_cache(codes, condition, positions, states)
        else:
            features, cache = self.read_grid(codes, condition, states), None
        if states is not None:
            states[:] = [state.flatten(1, 2)[:, :positions] for state in states]
        return features.flatten(1, 2)[:, :positions], cache

    @torch.no_grad()
    def _read_on(self, codes, cache, states):
        """Features `(B, T, C)` of the positions after each of T codes."""
        features, of_positions = [], []
        for code in codes.unbind(1):
            of_position = None if states is None else []
            features.append(self.read_position(code, cache.length, cache, of_position))
            of_positions.append(of_position)
            cache.length += 1
        if states is not None:
            states[:] = [torch.stack(of_layer, dim=1) for of_layer in zip(*of_positions, strict=True)]
        return torch.stack(features, dim=1)

    # ------------------------------------------------------------------------------------------------ checks

    def _check_is_whole(self, codes: torch.Tensor) -> None:
        """A ValueError where weights wait for their layers' calls, which steps with a cache pass by."""
        if not codes.is_meta and any(weight.is_meta for weight in self.parameters()):
            raise ValueError(
                f"`use_cache=True` needs all weights of {type(self).__name__} in memory, got offloaded ones: pass "
                "`use_cache=False`, or offload whole models (`pipeline.enable_model_cpu_offload()`)."
            )

    def _check_inputs(
        self, input_ids, inputs_embeds, labels, attention_mask, position_ids, past_key_values, use_cache
    ) -> torch.Tensor:
        """The one of `input_ids` and `inputs_embeds` that is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        given = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        for name, ids in given.items():
            if ids is None:
                continue
            if not isinstance(ids, torch.Tensor):
                raise ValueError(f"`{name}` must be an int64 tensor (B, T), got {type(ids).__name__}.")
            if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
                raise ValueError(
                    f"`{name}` must be int64 of shape (B, T) and not empty, got {ids.dtype} of shape "
                    f"{tuple(ids.shape)}."
                )
        inputs = self._check_embeds(inputs_embeds, past_key_values, use_cache) if input_ids is None else input_ids
        if labels is not None:
            if past_key_values is not None:
                raise ValueError("`labels` and `past_key_values` exclude each other: a cache carries no gradient.")
            if labels.shape != inputs.shape[:2] or labels.shape[1] < 2:
                raise ValueError(
                    f"`labels` must have the shape of `input_ids`, a prefix and codes, got {tuple(labels.shape)} and "
                    f"{tuple(inputs.shape[:2])}."
                )
        past = self._check_cache(past_key_values, len(inputs))
        reached = past + inputs.shape[1] - (labels is not None)
        if reached > self.config.n_positions:
            raise ValueError(too_many_positions(reached, self.config.n_positions))
        if self.may_read(inputs, is_step=past_key_values is not None):
            self._check_values(input_ids, labels, attention_mask, has_prefix=past_key_values is None)
            expected = torch.arange(past, past + inputs.shape[1], device=inputs.device)
            if position_ids is not None and (
                position_ids.shape[1] != len(expected) or (position_ids != expected).any()
            ):
                raise ValueError(
                    f"`position_ids` must be {past} … {past + inputs.shape[1] - 1} in this order, or "
                    f"None: the codes of a "
                    "grid follow each other."
                )
        return inputs

    def _check_embeds(self, inputs_embeds, past_key_values, use_cache) -> torch.FloatTensor:
        num_ids = self.config.input_vocab_size
        is_tensor = isinstance(inputs_embeds, torch.Tensor)
        if not is_tensor or inputs_embeds.shape[2:] != (num_ids,) or not inputs_embeds.is_floating_point():
            got = f"{inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}" if is_tensor else type(inputs_embeds)
            raise ValueError(
                f"`inputs_embeds` must be weights over the ids (B, T, {num_ids}), see "
                f"`get_input_embeddings`, got {got}."
            )
        if past_key_values is not None or use_cache:
            raise ValueError(
                "`inputs_embeds` exclude a cache, which holds codes: give `input_ids` or use_cache=False."
            )
        return inputs_embeds.to(self.dtype)

    def _check_cache(self, past_key_values, batch_size: int) -> int:
        """How many ids it has read."""
        if past_key_values is None:
            return 0
        if not isinstance(past_key_values, IncrementalCache):
            raise ValueError(
                f"`past_key_values` must be what this model has returned, got {type(past_key_values).__name__}."
            )
        if past_key_values.batch_size != batch_size:
            raise ValueError(
                f"`past_key_values` is for {past_key_values.batch_size} rows, but `input_ids` has {batch_size}."
            )
        return past_key_values.length

    def may_read(self, ids: torch.LongTensor, is_step: bool = False) -> bool:
        """
        Whether `forward` may look at values: not in a compiled graph, and on an accelerator, where looking waits for
        all that is under way, neither in training nor in a step with a cache.
        """
        if torch.compiler.is_compiling() or ids.is_meta:
            return False
        return ids.device.type == "cpu" or not (self.training or is_step)

    def _check_values(self, input_ids, labels, attention_mask, has_prefix):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("`attention_mask` must hold ones only: a grid of codes has no padding.")
        if input_ids is not None:
            self._check_ids("input_ids", input_ids, has_prefix)
        if labels is not None:
            wanted = labels[:, 1:]
            check_range(wanted[wanted != -100], self.config.codebook_size, "labels[:, 1:]", meaning=" or be -100")

    def _check_ids(self, name: str, ids: torch.LongTensor, has_prefix: bool = True):
        """ValueErrors unless `ids` `(B, T)` are a prefix id and codes, or codes alone."""
        num_codes, num_ids = self.config.codebook_size, self.config.input_vocab_size
        if has_prefix:
            check_range(ids[:, 0], num_ids, f"{name}[:, 0]", first=num_codes, meaning=" (ids of `prepare_condition`)")
            name, ids = f"{name}[:, 1:]", ids[:, 1:]
        check_range(ids, num_codes, name, meaning=" (codes)")

    # ------------------------------------------------------------------------------------------------ generation

    def generate(
        self, inputs: torch.LongTensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ):
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("`inputs_embeds` must be None: the codes that follow are given as ids, so give ids.")
        if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 and prompt.shape[1]:
            self._check_ids("inputs", prompt)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    generate.__doc__ = CodeSequenceMixin.generate.__doc__

    def new_cache(self, length: int) -> None:
        """The first pass makes the cache."""

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


def _refuse(kwargs: dict, output_attentions: bool | None) -> None:
    """A ValueError that names an argument of other causal LMs that a convolutional prior has no use for."""
    if output_attentions:
        raise ValueError("`output_attentions` must be False: a convolutional prior keeps no attention weights.")
    for name, value in kwargs.items():
        if value is not None:
            raise ValueError(f"`{name}` must not be given: `forward` of a convolutional prior has no such argument.")


def effective_weight(layer: nn.Module) -> torch.Tensor:
    """
    The weight of a linear or convolutional layer, with what PEFT's active LoRA adapters add to it.

    Raises:
        ValueError: another kind of wrapper, whose weight cannot be told.
    """
    if not hasattr(layer, "get_base_layer"):
        return layer.weight
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return weight
    for adapter in layer.active_adapters:
        if adapter not in getattr(layer, "lora_A", {}):
            if not hasattr(layer, "lora_A"):
                raise ValueError(
                    f"`use_cache` must be False with an adapter of type {type(layer).__name__}, or "
                    f"merge it: only LoRA's "
                    "weights can be told."
                )
            continue
        if getattr(layer, "lora_variant", {}).get(adapter) is not None or layer.lora_bias.get(adapter):
            raise ValueError(
                f"`use_cache` must be False with the variant of LoRA that the adapter {adapter!r} is, or merge it."
            )
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


__all__ = ["CodePriorForCausalLM", "IncrementalCache", "OneHotIds", "effective_weight"]
