"""Drawing codes one after another, with the rows of guidance in the same batch and a cache of the final length."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import MaxLengthCriteria


class PreallocatedLayer(DynamicLayer):
    """Keys and values in memory of the final length, so that a new one is written and nothing is moved."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch_size, num_heads, _, head_size = key_states.shape
            self.memory = key_states.new_empty(2, batch_size, num_heads, self.length, head_size)
            past = 0
        else:
            past = self.keys.shape[2]
        end = past + key_states.shape[2]
        self.memory[0, :, :, past:end] = key_states
        self.memory[1, :, :, past:end] = value_states
        self.keys, self.values = self.memory[:, :, :, :end]
        return self.keys, self.values


class CodeDecoder:
    """
    Reads a sequence part by part: called with the ids `(B, L)` that follow those it has read, it returns the logits
    `(B, vocab_size)` of what comes next.

    Args:
        model: a causal LM over codes.
        length: how many ids it will read at most.
        inputs: what else `forward` takes on its first pass.
    """

    def __init__(self, model: nn.Module, length: int, **inputs: Any):
        self.model, self.inputs, self.length = model, inputs, length
        # as long as the first positions see each other, a new one changes what has been read
        self.num_open = getattr(model.config, "n_unmasked", 0)
        self.ids = self.cache = None

    def __call__(self, ids: torch.LongTensor) -> torch.FloatTensor:
        ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        if self.cache is None and ids.shape[1] < self.num_open:
            self.ids = ids
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=1, **self.inputs).logits[:, -1]
        self.ids = None
        if self.cache is None:
            cache = self.model.new_cache(self.length)
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **self.inputs)
            self.cache = output.past_key_values
        else:
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]


def preallocated_cache(num_layers: int, length: int) -> Cache:
    """A cache of transformers for sequences of `length` ids at most."""
    return Cache(layers=[PreallocatedLayer(length) for _ in range(num_layers)])


@torch.no_grad()
def sample_codes(
    model: nn.Module,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    null_prompt: torch.LongTensor | None = None,
    null_scale: float = 1.0,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """
    The loop of transformers' `generate(custom_generate=...)` for a prior over codes. It draws what the usual loop
    draws, from the same random numbers; with `null_prompt`, both rows of guidance are in one batch.

    Args:
        input_ids (int64 `(B, T)`): the prompts.
        logits_processor, stopping_criteria, generation_config: as `generate` has made them.
        null_prompt (int64 `(B, T)`, *optional*): the prompts of guidance; the codes that follow are those of
            `input_ids`.
        null_scale: classifier-free guidance, `null + scale * (conditional - null)` on the log-probabilities (Ho &
            Salimans, 2022).

    Returns:
        int64 `(B, max_length)`, or less if the stopping criteria end all rows.
    """
    criteria = [each for each in stopping_criteria if not isinstance(each, MaxLengthCriteria)]
    start, total = input_ids.shape[1], generation_config.max_length
    inputs = {name: model_kwargs[name] for name in model.prompt_inputs if model_kwargs.get(name) is not None}
    ids = input_ids
    if null_prompt is not None:
        ids = torch.cat([input_ids, null_prompt])
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    decoder = model.code_decoder(len(ids), total - 1, **inputs)
    sequences = input_ids.new_empty(len(input_ids), total)
    sequences[:, :start] = input_ids
    for position in range(start, total):
        logits = decoder(ids).float()
        if null_prompt is not None:
            logits, null = logits.log_softmax(dim=-1).chunk(2)
            logits = null_scale * (logits - null) + null
        scores = logits_processor(sequences[:, :position], logits)
        if generation_config.do_sample:
            codes = scores.softmax(dim=-1).multinomial(1)
        else:
            codes = scores.argmax(dim=-1, keepdim=True)
        sequences[:, position : position + 1] = codes
        read = sequences[:, : position + 1]
        if criteria and torch.stack([each(read, scores) for each in criteria]).any(dim=0).all():
            return read
        ids = read[:, -1:]  # read again: a criterion may have put other codes in their place
        ids = ids if null_prompt is None else torch.cat([ids, ids])
    return sequences


__all__ = ["CodeDecoder", "preallocated_cache", "sample_codes"]
