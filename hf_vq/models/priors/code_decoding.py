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
        positions (int64 `(1 or B, T)`, *optional*): of the first T ids, read or to come; others follow the last one.
        prompt_mask (`(B, T)`, *optional*): 0 where one of the first T ids is padding, and not seen.
        inputs: what else `forward` takes on its first pass.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        positions: torch.LongTensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        **inputs: Any,
    ):
        self.model, self.inputs, self.length = model, inputs, length
        # as long as the first positions see each other, a new one changes what has been read
        self.num_open = getattr(model.config, "n_unmasked", 0)
        self.ids = self.cache = None
        self.past = 0
        self.positions = None if positions is None else continued(positions, length)
        self.mask = prompt_mask
        if prompt_mask is not None:
            rest = prompt_mask.new_ones(len(prompt_mask), length - prompt_mask.shape[1])
            self.mask = torch.cat([prompt_mask, rest], dim=1)
        elif positions is not None:  # without a mask, transformers takes a gap for the beginning of another sequence
            self.mask = positions.new_ones(1, length)

    def __call__(self, ids: torch.LongTensor) -> torch.FloatTensor:
        ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        end = self.past + ids.shape[1]
        inputs = {"input_ids": ids, "logits_to_keep": 1}
        if self.positions is not None:
            inputs["position_ids"] = self.positions[:, self.past : end].expand(len(ids), -1)
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[:, :end].expand(len(ids), -1)
        if self.cache is None and end < self.num_open:
            self.ids = ids
            return self.model(**inputs, use_cache=False, **self.inputs).logits[:, -1]
        self.ids, self.past = None, end
        if self.cache is None:
            cache = self.model.new_cache(self.length)
            output = self.model(**inputs, past_key_values=cache, use_cache=True, **self.inputs)
            self.cache = output.past_key_values
        else:
            output = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        return output.logits[:, -1]


def continued(positions: torch.LongTensor, length: int) -> torch.LongTensor:
    """Positions `(B, T)` and those that follow the last of each row, `(B, length)`."""
    following = torch.arange(1, length - positions.shape[1] + 1, device=positions.device)
    return torch.cat([positions, positions[:, -1:] + following], dim=1)


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
    positions: torch.LongTensor | None = None,
    prompt_mask: torch.Tensor | None = None,
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
        positions, prompt_mask: of the prompts, see [`CodeDecoder`]; those of guidance have the same.

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
        positions, prompt_mask = (
            rows if rows is None or len(rows) != len(input_ids) else torch.cat([rows, rows])
            for rows in (positions, prompt_mask)
        )
    decoder = model.code_decoder(len(ids), total - 1, positions=positions, prompt_mask=prompt_mask, **inputs)
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


__all__ = ["CodeDecoder", "continued", "preallocated_cache", "sample_codes"]
