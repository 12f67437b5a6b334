"""Sampling grids of codes from autoregressive priors, one for each level of a tokenizer."""

import math
from collections.abc import Callable, Sequence
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

from .pipeline_utils import check_generator, draw_codes


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


class DrawnCode(LogitsProcessor):
    """
    Leaves only the code that `draw_codes` draws, so that greedy decoding takes it.

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
    """Calls `function(input_ids)` after each code, and never stops."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores, **kwargs):
        self.function(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class LevelSampling:
    """How the codes of one level are drawn; the fields are arguments of the pipelines' calls."""

    guidance_scale: float
    temperature: float
    top_k: int | None
    top_p: float | None

    def check(self, config, prompt: torch.LongTensor):
        """ValueErrors; `config` is the prior's, `prompt` `(B, T)` begins with its prefix."""
        if not isinstance(self.guidance_scale, (int, float)) or not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"`guidance_scale` must be a finite number that is not negative, got {self.guidance_scale!r}."
            )
        null = config.null_class_token_id
        if self.guidance_scale != 1 and (null is None or (prompt[:, : config.condition_length] == null).all()):
            raise ValueError("`guidance_scale` other than 1 needs a condition, and a prior that has a null condition.")
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive (`top_k=1` is greedy), got {self.temperature!r}.")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"`top_k` must be a positive int or None, got {self.top_k!r}.")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` must lie in (0, 1] or be None, got {self.top_p!r}.")

    def processors(self, known: KnownCodes | None, start: int, generator) -> LogitsProcessorList:
        """Given codes, temperature, top-k, top-p and the draw, in this order."""
        processors = LogitsProcessorList([KeptCodes(known, start)] if known is not None else [])
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(DrawnCode(generator))
        return processors


def for_each_level(name: str, value, count: int) -> list:
    """`value` for each of `count` levels: itself, or its entries if it is a list or tuple."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"`{name}` must be one value or one for each of {count} levels, got {len(value)}.")
    return list(value)


def repeat_rows(rows: dict[str, Sequence[torch.Tensor]], num_images_per_prompt: int) -> dict[str, list[torch.Tensor]]:
    """
    Tensors with 1 or B rows, to `B * num_images_per_prompt` rows, those of one input adjacent.

    Args:
        rows: by the name of the argument that they come from, a tensor for each level.

    Raises:
        ValueError: two of them have different numbers of rows, none of them 1.
    """
    batch_size = max(len(tensor) for tensors in rows.values() for tensor in tensors)
    for name, tensors in rows.items():
        for tensor in tensors:
            if len(tensor) not in (1, batch_size):
                raise ValueError(f"`{name}` must have 1 or {batch_size} rows, got {len(tensor)}.")
    return {
        name: [
            tensor.expand(batch_size, *tensor.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in tensors
        ]
        for name, tensors in rows.items()
    }


class CodeSamplingMixin:
    """
    For a pipeline whose property `priors` holds a causal LM over codes for each level of its tokenizer, from top to
    bottom. All but the first take the codes of the level above as `condition_indices`.
    """

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        return {"class": "class_labels=0", "codes": "condition=codes"}.get(self.priors[0].config.condition_type, "")

    def prepare_prompts(self, class_labels=None, condition=None) -> tuple[torch.LongTensor, ...]:
        """Each prior's prefix for each class or condition, `(B, condition_length)`, or 1 row where it takes none."""
        if class_labels is not None and condition is not None:
            raise ValueError("Only one of `class_labels` and `condition` can be given.")
        given = {"class": class_labels, "codes": condition}
        kinds = [prior.config.condition_type for prior in self.priors]
        for name, wanted in (("class_labels", "class"), ("condition", "codes")):
            if given[wanted] is not None and wanted not in kinds:
                raise ValueError(f"`{name}` needs a prior whose condition_type is {wanted!r}, got {kinds[0]!r}.")
        return tuple(
            prior.prepare_condition(given.get(kind)).to(self._execution_device)
            for prior, kind in zip(self.priors, kinds, strict=True)
        )

    def sample_levels(
        self,
        prompts: Sequence[torch.LongTensor],
        known: Sequence[KnownCodes | None] | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        generator=None,
        use_cache: bool = True,
        cache_implementation: str | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> tuple[torch.LongTensor, ...]:
        """
        The codes `(B, h, w)` of each level, given each prior's prefixes `(B, condition_length)` and the codes that are
        `known`. The other arguments are those of the call.
        """
        count = len(self.priors)
        known = [None] * count if known is None else known
        values = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        values = [for_each_level(name, value, count) for name, value in values.items()]
        settings = [LevelSampling(*of_level) for of_level in zip(*values, strict=True)]
        for prior, prompt, setting in zip(self.priors, prompts, settings, strict=True):
            setting.check(prior.config, prompt)
        check_generator(generator, len(prompts[0]))
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError("`callback_on_step_end` must be callable.")

        missing = [
            prior.config.image_seq_length - (0 if codes is None else codes.first)
            for prior, codes in zip(self.priors, known, strict=True)
        ]
        step, grids = 0, []
        with self.progress_bar(total=sum(missing)) as progress_bar:
            for level, prior in enumerate(self.priors):

                def after_each_code(codes, level=level):
                    nonlocal step
                    progress_bar.update()
                    if callback_on_step_end is not None:
                        callback_on_step_end(self, step, codes.shape[1] - 1, {"indices": codes, "level": level})
                    step += 1

                inputs = {"condition_indices": grids[-1]} if grids else {}
                grid = sample_level(
                    prior,
                    prompts[level],
                    known[level],
                    settings[level],
                    generator,
                    after_each_code,
                    use_cache=use_cache,
                    cache_implementation=cache_implementation,
                    **inputs,
                )
                grids.append(grid)
        return tuple(grids)


def sample_level(
    prior,
    prompt: torch.LongTensor,
    known: KnownCodes | None,
    setting: LevelSampling,
    generator,
    after_each_code: Callable,
    **options,
) -> torch.LongTensor:
    """
    The codes `(B, h, w)` of one level, from its prior.

    Args:
        prompt (`(B, condition_length)`): the prior's prefixes.
        after_each_code: called with the codes `(B, position + 1)` so far.
        options: of the prior's `generate`.
    """
    start, first = prior.config.condition_length, 0 if known is None else known.first
    steps = prior.config.image_seq_length - first
    if first:
        # what is known at the beginning is read at once, as part of the prompt
        prompt = torch.cat([prompt, known.codes.flatten(1)[:, :first]], dim=1)
    if steps:
        prompt = prior.generate(
            prompt,
            do_sample=False,
            num_beams=1,
            max_new_tokens=steps,
            guidance_scale=float(setting.guidance_scale),
            logits_processor=setting.processors(known, start, generator),
            stopping_criteria=StoppingCriteriaList([AfterEachCode(lambda ids: after_each_code(ids[:, start:]))]),
            **options,
        )
    return prior.extract_indices(prompt)


__all__ = ["CodeSamplingMixin", "KeptCodes", "KnownCodes", "LevelSampling", "repeat_rows", "sample_level"]
