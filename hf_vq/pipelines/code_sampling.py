"""Sampling grids of codes from autoregressive priors, one for each level of a tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..argument_checks import check_integer, check_real
from .vq_pipeline import check_guidance_scale, check_temperature


@dataclass
class KnownCodes:
    """Codes `(B, h, w)` of one level; those where `keep` `(B, h, w)` is true are given, the others are to be sampled."""

    codes: torch.LongTensor
    keep: torch.BoolTensor

    @property
    def first(self) -> int:
        """How many codes, row by row, come before the first one that is to be sampled in any image."""
        return int(self.keep.flatten(1).all(dim=0).long().cumprod(dim=0).sum())


class KeptCodes(LogitsProcessor):
    """Forces the codes that are `known`; `start` is the prefix's length."""

    def __init__(self, known: KnownCodes, start: int):
        self.codes, self.keep, self.start = known.codes.flatten(1), known.keep.flatten(1), start

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, float("-inf")).scatter(1, self.codes[:, position, None], 0.0)
        return torch.where(self.keep[:, position, None], forced, scores)


def draw_codes(log_probs: torch.FloatTensor, generator=None) -> torch.LongTensor:
    """
    One sample of each row's categorical distribution.

    The code with the largest `log p - log q`, `q ~ Exp(1)`, is distributed as p (the Gumbel-max trick). Unlike
    `torch.multinomial` it takes a generator of each row, and one that lives on another device.

    Args:
        log_probs (`(B, K)`): log-probabilities up to a constant of the row; -inf is never drawn.
        generator: `None` for torch's global randomness, a `torch.Generator`, or a list of one for each row, with which a
            row's sample does not depend on the other rows.

    Returns:
        int64 `(B,)`.
    """
    rows, device = log_probs.shape[0], log_probs.device

    def exponential(shape, source):
        where = device if source is None else source.device
        return torch.empty(shape, device=where).exponential_(generator=source).to(device)

    if isinstance(generator, list):
        noise = torch.cat([exponential((1, log_probs.shape[1]), source) for source in generator])
    else:
        noise = exponential((rows, log_probs.shape[1]), generator)
    noise = noise.clamp_min(torch.finfo(noise.dtype).tiny)
    return (log_probs.float() - noise.log()).argmax(dim=-1)


class GumbelMax(LogitsProcessor):
    """
    Sampling by greedy decoding: leaves only the code that `draw_codes` draws.

    `generate`'s own sampling takes no generator, nor one of each row.

    A row's own generator is not used where the row has one code left: how many kept codes are read at once depends on
    what the other rows keep, and must not shift the random numbers of this one.
    """

    def __init__(self, generator=None):
        self.generator = generator

    def __call__(self, input_ids, scores):
        if isinstance(self.generator, list):
            codes, is_open = scores.argmax(dim=-1), scores.isfinite().sum(dim=-1) > 1
            if is_open.any():
                own = [source for source, draws in zip(self.generator, is_open.tolist(), strict=True) if draws]
                codes[is_open] = draw_codes(scores[is_open], own)
        else:
            codes = draw_codes(scores, self.generator)
        return torch.full_like(scores, float("-inf")).scatter(1, codes[:, None], 0.0)


class AfterEachCode(StoppingCriteria):
    """Calls `function(codes)` after each code, puts what it returns as the last one in its place, and never stops."""

    def __init__(self, function, start: int):
        self.function, self.start = function, start

    def __call__(self, input_ids, scores, **kwargs):
        # `generate` has not read the last code yet
        input_ids[:, -1] = self.function(input_ids[:, self.start :])[:, -1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class LevelSampling:
    """How the codes of one level are drawn; the fields are arguments of the pipelines' calls."""

    guidance_scale: float
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self):
        self.guidance_scale = check_guidance_scale(self.guidance_scale)
        self.temperature = check_temperature(self.temperature)
        self.top_k = None if self.top_k is None else check_integer("top_k", self.top_k, minimum=1)
        self.top_p = None if self.top_p is None else check_real("top_p", self.top_p, above=0, maximum=1)

    def check_guidance(self, config, prompt: torch.LongTensor):
        """A ValueError if there is nothing to guide; `config` is the prior's, `prompt` `(B, T)` begins with its prefix."""
        null = config.null_class_token_id
        if self.guidance_scale != 1 and (null is None or (prompt[:, : config.condition_length] == null).all()):
            raise ValueError("`guidance_scale` other than 1 needs a condition, and a prior that has a null condition.")

    def processors(self, known: KnownCodes | None, start: int, generator) -> LogitsProcessorList:
        """Given codes, temperature, top-k, top-p and the draw, in this order."""
        processors = LogitsProcessorList([KeptCodes(known, start)] if known is not None else [])
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(GumbelMax(generator))
        return processors


def for_each_level(name: str, value, count: int) -> list:
    """`value` for each of `count` levels: itself, or its entries if it is a list or tuple."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"`{name}` must be one value or one for each of {count} levels, got {len(value)}.")
    return list(value)


def sample_level(
    prior,
    prompt: torch.LongTensor,
    known: KnownCodes | None,
    setting: LevelSampling,
    generator,
    after_each_code: Callable[[torch.LongTensor], torch.LongTensor] | None = None,
    **options,
) -> torch.LongTensor:
    """
    The codes `(B, h, w)` of one level, from its prior.

    Args:
        prompt (`(B, condition_length)`): the prior's prefixes.
        known: codes that are given.
        setting: how the others are drawn.
        generator: as in the pipelines' calls.
        after_each_code (*optional*): from the codes `(B, position + 1)` so far to the same ones, or with others in the last place.
        options: of the prior's `generate`.
    """
    start, first = prior.config.condition_length, 0 if known is None else known.first
    steps = prior.config.image_seq_length - first
    if first:
        # what is known at the beginning is read at once, as part of the prompt
        prompt = torch.cat([prompt, known.codes.flatten(1)[:, :first]], dim=1)
    if steps:
        followers = [] if after_each_code is None else [AfterEachCode(after_each_code, start)]
        prompt = prior.generate(
            prompt,
            do_sample=False,
            num_beams=1,
            max_new_tokens=steps,
            guidance_scale=setting.guidance_scale,
            logits_processor=setting.processors(known, start, generator),
            stopping_criteria=StoppingCriteriaList(followers),
            **options,
        )
    return prior.extract_indices(prompt)


__all__ = ["KnownCodes", "LevelSampling", "draw_codes", "for_each_level", "sample_level"]
