"""Sampling grids of codes from autoregressive priors, one for each level of a tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..argument_checks import check_integer, check_real
from .vq_pipeline import check_guidance_scale, check_temperature, onload


@dataclass
class KnownCodes:
    """Codes `(B, h, w)` of one level; where `keep` `(B, h, w)` is true they are given, the others are sampled."""

    codes: torch.LongTensor
    keep: torch.BoolTensor


class KeptCodes(LogitsProcessor):
    """Forces codes `(B, N)` of a sequence where `keep` `(B, N)` is true; `start` is the prefix's length."""

    def __init__(self, codes: torch.LongTensor, keep: torch.BoolTensor, start: int):
        self.codes, self.keep, self.start = codes, keep, start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        position = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, float("-inf")).scatter(1, self.codes[:, position, None], 0.0)
        return torch.where(self.keep[:, position, None], forced, scores)


def draw_codes(
    log_probs: torch.FloatTensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.LongTensor:
    """
    One sample of each row's categorical distribution.

    The code with the largest `log p - log q`, `q ~ Exp(1)`, is distributed as p (the Gumbel-max trick). Unlike
    `torch.multinomial` it takes a generator of each row, and one that lives on another device.

    Args:
        log_probs (`(B, K)`): log-probabilities up to a constant of the row; -inf is never drawn.
        generator: `None` for torch's global randomness, a `torch.Generator`, or a list of one for each row, with which
            a row's sample does not depend on the other rows.

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

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None = None):
        self.generator = generator
        self._is_broken: torch.BoolTensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        broken = scores.isnan().any()
        self._is_broken = broken if self._is_broken is None else self._is_broken | broken
        if isinstance(self.generator, list):
            codes, is_open = scores.argmax(dim=-1), scores.isfinite().sum(dim=-1) > 1
            if is_open.any():
                own = [source for source, draws in zip(self.generator, is_open.tolist(), strict=True) if draws]
                codes[is_open] = draw_codes(scores[is_open], own)
        else:
            codes = draw_codes(scores, self.generator)
        return torch.full_like(scores, float("-inf")).scatter(1, codes[:, None], 0.0)

    def check(self) -> None:
        """A ValueError if logits were NaN, for the end of a run: a step does not wait for the accelerator."""
        if self._is_broken is not None and self._is_broken:
            raise ValueError(
                "`prior` must give logits that are numbers, got nan: its weights, or the states of `prompt_embeds`, "
                "are no numbers that it can compute with."
            )


class AfterEachCode(StoppingCriteria):
    """Calls `function(codes (B,))` with each new code, puts what it returns in its place, and never stops."""

    def __init__(self, function: Callable[[torch.LongTensor], torch.LongTensor]):
        self.function = function

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any):
        input_ids[:, -1] = self.function(input_ids[:, -1])  # `generate` has not read it yet
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

    def check_guidance(self, config: PreTrainedConfig, prompt: torch.LongTensor):
        """A ValueError if there is nothing to guide; `prompt` `(B, T)` begins with the prefix of the `config`'s
        prior.
        """
        null = config.null_class_token_id
        if self.guidance_scale != 1 and (null is None or (prompt[:, : config.condition_length] == null).all()):
            raise ValueError("`guidance_scale` other than 1 needs a condition, and a prior that has a null condition.")

    def processors(
        self, first: LogitsProcessor | None, generator: torch.Generator | list[torch.Generator] | None
    ) -> LogitsProcessorList:
        """`first`, temperature, top-k, top-p and the draw, in this order."""
        processors = LogitsProcessorList([] if first is None else [first])
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(GumbelMax(generator))
        return processors


def for_each_level(name: str, value: Any, count: int) -> list:
    """`value` for each of `count` levels: itself, or its entries if it is a list or tuple."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"`{name}` must be one value or one for each of {count} levels, got {len(value)}.")
    return list(value)


@dataclass
class Run:
    """Codes that are sampled in one window, one after the other.

    Args:
        origin: row and column of the window's first code on the grid.
        start: how many codes of the window come before the first one of the run.
        length: how many codes the run has.
    """

    origin: tuple[int, int]
    start: int
    length: int

    def view(self, window: Sequence[int]) -> tuple[slice, ...]:
        """The index of the window in a grid `(B, h, w)`."""
        return slice(None), *(slice(first, first + side) for first, side in zip(self.origin, window, strict=True))


def window_runs(grid_size: Sequence[int], window: Sequence[int], stride: int = 1) -> list[Run]:
    """
    Which window each code of a grid is sampled in, row by row (Esser et al. 2021, section 3.3 and figure 5).

    A code lies in the middle of its window, half a window from the top and the left, but at the grid's sides, where
    the window ends with the grid. With a `stride` of more than 1 the window moves by so many codes at a time, and what
    it has read serves the codes until it moves. A window as large as the grid gives a single run.

    Raises:
        ValueError: a grid smaller than the window, or a stride that leaves a code outside of it.
    """
    for name, side, length in zip(("height", "width"), window, grid_size, strict=True):
        if length < side:
            raise ValueError(f"`{name}` must be at least the {side} codes of the prior's grid, got {length} codes.")
    most = None if tuple(grid_size) == tuple(window) else min(side - side // 2 for side in window)
    stride = check_integer("stride", stride, 1, most)

    runs: list[Run] = []
    rows, columns = (_origins(length, side, stride) for length, side in zip(grid_size, window, strict=True))
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            place = (i - top) * window[1] + j - left
            if runs and runs[-1].origin == (top, left) and runs[-1].start + runs[-1].length == place:
                runs[-1].length += 1
            else:
                runs.append(Run((top, left), place, 1))
    return runs


def _origins(length: int, side: int, stride: int) -> list[int]:
    """Where the window of each of `length` positions begins."""
    return [min(max(i - side // 2, 0) // stride * stride, length - side) for i in range(length)]


def _in_rows(runs: list[Run], width: int) -> list[Run]:
    """Each run as runs of one row of a window that is `width` codes wide."""
    parts = []
    for run in runs:
        start, end = run.start, run.start + run.length
        while start < end:
            length = min(end - start, width - start % width)
            parts.append(Run(run.origin, start, length))
            start += length
    return parts


def _frame(origin: Sequence[int], window: Sequence[int], frame: Sequence[int], grid_size: Sequence[int]) -> tuple:
    """Where a frame begins that has a window in its middle, as far as the grid reaches."""
    return tuple(
        min(max(first + side // 2 - outer // 2, 0), length - outer)
        for first, side, outer, length in zip(origin, window, frame, grid_size, strict=True)
    )


def check_window(window: int | Sequence[int] | None, prior: PreTrainedModel, name: str = "window") -> tuple[int, int]:
    """
    `window` as rows and columns of codes, by default the prior's own grid.

    Raises:
        ValueError: it is larger than the grid that the prior was trained on, or the prior has no smaller one.
    """
    own = tuple(prior.config.grid_size)
    if window is None:
        return own
    sides = tuple(window) if isinstance(window, (list, tuple)) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"`{name}` must be an int, or rows and columns, got {window!r}.")
    sides = tuple(check_integer(name, side, 1, most) for side, most in zip(sides, own, strict=True))
    if sides != own and not getattr(prior, "reads_in_places", False):
        raise ValueError(
            f"`{name}` must be the prior's grid {own}, got {sides}: a {type(prior).__name__} reads whole grids, and "
            "cannot leave out codes."
        )
    return sides


def strides_of_levels(
    stride: int, priors: Sequence[PreTrainedModel], window: int | Sequence[int] | None = None
) -> list[int]:
    """
    `stride` codes of the top level's window as codes of each level's, so that all windows move by as many pixels.

    Raises:
        ValueError: no positive int, or more than half a window.
    """
    sides = [check_window(window, prior) for prior in priors]
    ratios = [grid[0] // sides[0][0] for grid in sides]
    most = min((side - side // 2) // ratio for grid, ratio in zip(sides, ratios, strict=True) for side in grid)
    stride = check_integer("stride", stride, 1, max(most, 1))
    return [stride * ratio for ratio in ratios]


def code_order(prior: PreTrainedModel) -> torch.LongTensor:
    """The place on the grid, row by row, of each code of a prior's sequence, int64 `(h * w,)`."""
    order = getattr(prior.config, "code_order", None)
    return torch.arange(prior.config.image_seq_length) if order is None else torch.as_tensor(order)


def sampling_runs(
    prior: PreTrainedModel, grid_size: Sequence[int], window: Sequence[int], stride: int = 1
) -> list[Run]:
    """`window_runs`, of one row each where the prior's places do not follow each other in the window."""
    runs = window_runs(grid_size, window, stride)
    return runs if tuple(window) == tuple(prior.config.grid_size) else _in_rows(runs, window[1])


def count_steps(
    prior: PreTrainedModel,
    known: KnownCodes | None,
    grid_size: Sequence[int],
    stride: int = 1,
    window: Sequence[int] | None = None,
) -> int:
    """How many codes of a grid take a step of the prior: not those at the beginning of a run that every image has."""
    window = check_window(window, prior)
    runs = sampling_runs(prior, grid_size, window, stride)
    if known is None:
        return sum(run.length for run in runs)
    order = _order_in(window, prior).to(known.keep.device)
    return sum(run.length - _ready(known.keep[run.view(window)].flatten(1)[:, order], run) for run in runs)


def _order_in(window: Sequence[int], prior: PreTrainedModel) -> torch.LongTensor:
    """The place in the window, row by row, of each code in the order in which it is read."""
    whole = tuple(window) == tuple(prior.config.grid_size)
    return code_order(prior) if whole else torch.arange(window[0] * window[1])


def _ready(keep: torch.BoolTensor, run: Run) -> int:
    """How many codes at the beginning of a run are kept in each image; `keep` `(B, N)` is the window's."""
    return int(keep[:, run.start : run.start + run.length].all(dim=0).long().cumprod(dim=0).sum())


def sample_level(
    prior: PreTrainedModel,
    prompt: torch.LongTensor | Callable[[tuple[int, int]], torch.LongTensor],
    known: KnownCodes | None,
    setting: LevelSampling,
    generator: torch.Generator | list[torch.Generator] | None,
    after_each_code: Callable[[torch.LongTensor], torch.LongTensor] | None = None,
    on_known: Callable[[torch.LongTensor], None] | None = None,
    grid_size: Sequence[int] | None = None,
    stride: int = 1,
    window: int | Sequence[int] | None = None,
    inputs: Callable[[tuple[int, int]], dict[str, torch.Tensor]] | None = None,
    **options: Any,
) -> torch.LongTensor:
    """
    The codes `(B, h, w)` of one level, from its prior.

    Args:
        prompt (`(B, condition_length)`): the prior's prefixes, or a function to them from the origin of the part of
            the grid, as large as the prior's own, that they belong to.
        known: codes that are given.
        setting: how the others are drawn.
        generator: as in the pipelines' calls.
        after_each_code (*optional*): from each new code `(B,)` to itself, or to others in its place.
        on_known (*optional*): called with codes `(B, N)` that every image has, and that take no step.
        grid_size (*optional*): `(h, w)`, where it is larger than the prior's own grid: see [`window_runs`].
        stride: of the window.
        window (*optional*): rows and columns of the codes that are read, by default the prior's own grid. Of a smaller
            one the codes have those places on the prior's grid that they have there in a window of the whole size.
        inputs (*optional*): what else the prior's `forward` takes, from the same origin as `prompt`.
        options: of the prior's `generate`.
    """
    own, window = tuple(prior.config.grid_size), check_window(window, prior)
    size = own if grid_size is None else tuple(grid_size)
    order = code_order(prior)
    if (size != own or window != own) and not torch.equal(order, torch.arange(len(order))):
        raise ValueError(
            "`height`, `width` and `window` other than the prior's grid need a prior that reads row by row."
        )
    prompt_at = prompt if callable(prompt) else lambda origin: prompt
    batch_size, device = len(prompt_at((0, 0))), prompt_at((0, 0)).device
    order = _order_in(window, prior).to(device)
    if known is None:
        shape = (batch_size, *size)
        known = KnownCodes(
            torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
        )
    grid = known.codes.clone()
    for run in sampling_runs(prior, size, window, stride):
        view = run.view(window)
        codes, keep = grid[view].flatten(1)[:, order], known.keep[view].flatten(1)[:, order]
        end = run.start + run.length
        ready = _ready(keep, run)
        if ready and on_known is not None:
            on_known(codes[:, run.start : run.start + ready])
        if ready == run.length:
            continue
        frame = _frame(run.origin, window, own, size)
        read = options if inputs is None else {**options, **inputs(frame)}
        if window != own:
            read = {**read, "position_ids": _positions(prior, run, frame, window, end - 1).to(device)}
        sequence = _sample_run(
            prior,
            prompt_at(frame),
            codes,
            keep,
            (run.start + ready, end),
            setting,
            generator,
            after_each_code,
            read,
        )
        codes = torch.cat([sequence, codes[:, end:]], dim=1)
        grid[view] = torch.empty_like(codes).scatter(1, order.expand_as(codes), codes).unflatten(1, window)
    return grid


def _positions(prior: PreTrainedModel, run: Run, frame, window, count: int) -> torch.LongTensor:
    """The positions `(1, T)` in the prior's sequence of its prefix and of the first `count` codes of a window, which
    are all that is read until a run's last code.
    """
    rows, columns = (
        torch.arange(side) + first - outer for side, first, outer in zip(window, run.origin, frame, strict=True)
    )
    places = (rows[:, None] * prior.config.grid_size[1] + columns).flatten()[:count]
    length = prior.config.condition_length
    return torch.cat([torch.arange(length), length + places])[None]


def _sample_run(prior, prompt, codes, keep, span, setting, generator, after_each_code, options) -> torch.LongTensor:
    """The codes `(B, span[1])` of a window's sequence, of which those from `span[0]` on are sampled or kept."""
    first, end = span
    start = prompt.shape[1]
    mask = options.get("attention_mask")
    if mask is not None:  # of the prefix; all codes are seen
        options = {**options, "attention_mask": torch.cat([mask, mask.new_ones(len(mask), first)], dim=1)}
    onload(prior)  # sampling reads embeddings before the first `forward`
    processors = setting.processors(KeptCodes(codes, keep, start) if keep.any() else None, generator)
    sequence = prior.generate(
        torch.cat([prompt, codes[:, :first]], dim=1),
        do_sample=False,
        num_beams=1,
        max_new_tokens=end - first,
        guidance_scale=setting.guidance_scale,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([] if after_each_code is None else [AfterEachCode(after_each_code)]),
        **options,
    )
    processors[-1].check()
    return sequence[:, start:]


__all__ = [
    "KnownCodes",
    "LevelSampling",
    "Run",
    "check_window",
    "count_steps",
    "draw_codes",
    "for_each_level",
    "sample_level",
    "strides_of_levels",
    "window_runs",
]
