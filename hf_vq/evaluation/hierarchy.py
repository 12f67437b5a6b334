"""What the levels of a hierarchy hold, and how well their priors predict the codes, each level's and together."""

import contextlib
import math
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from .evaluate import evaluation_mode, progress_bar
from .likelihood import CodeLikelihood


@torch.no_grad()
def evaluate_hierarchy(
    priors: Sequence,
    dataloader: Iterable,
    condition_key: str | None = None,
    pixel_dims: int | None = None,
    progress: bool = True,
) -> dict:
    """The likelihood of the codes of every level, given those of the level above, in one pass.

    log p(codes) = Σ log p(level | level above): bits per image add up over the levels. A training set and a validation
    set, one after the other, show how much the priors over-fit.

    Args:
        priors: from top to bottom, each with `log_likelihood(indices, condition) -> (B,)` in nats, all but the first
            with `condition_indices`, the codes of the level above; put into evaluation mode and back.
        dataloader: yields dicts with `indices_0`, `indices_1`, …, int `(B, h, w)` from top to bottom, as
            `hf_vq.training.data.indices_cache` gives them.
        condition_key: the entry that is the condition of every prior that takes classes, such as `label`; without it
            their condition is None.
        pixel_dims: C·H·W of the pictures, for `bits_per_pixel_dim`.
        progress: show a progress bar.

    Returns:
        `CodeLikelihood.compute()` of all levels together, and `levels`, a list of that of each level with
        `uniform_bits_per_index`, log2 K: what knowing nothing costs.

    Raises:
        ValueError: the data have not one grid of codes for each prior.
    """
    whole, levels = CodeLikelihood(pixel_dims), [CodeLikelihood(pixel_dims) for _ in priors]
    with contextlib.ExitStack() as stack:
        for prior in priors:
            stack.enter_context(evaluation_mode(prior))
        for batch in progress_bar(dataloader, "hierarchy", progress):
            codes = _codes_of_levels(batch, len(priors))
            total, above = 0.0, {}
            for prior, indices, level in zip(priors, codes, levels, strict=True):
                indices = indices.to(prior.device)
                takes_class = condition_key is not None and prior.config.condition_type == "class"
                condition = batch[condition_key].to(prior.device) if takes_class else None
                log_likelihood = prior.log_likelihood(indices, condition, **above)
                level.update(log_likelihood, num_indices=indices[0].numel())
                total = total + log_likelihood.double().cpu()
                above = {"condition_indices": indices}
            whole.update(total, num_indices=sum(indices[0].numel() for indices in codes))
    each = [
        {**level.compute(), "uniform_bits_per_index": math.log2(prior.config.codebook_size)}
        for prior, level in zip(priors, levels, strict=True)
    ]
    return {**whole.compute(), "levels": each}


def _codes_of_levels(batch: dict, count: int) -> list[torch.Tensor]:
    names = [f"indices_{level}" for level in range(count)]
    found = sorted(name for name in batch if name.startswith("indices"))
    if found != names:
        raise ValueError(f"`dataloader` must yield {names} for {count} priors, got {found}")
    return [batch[name] for name in names]


@torch.no_grad()
def reconstruct_by_levels(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """What each level of a hierarchical tokenizer adds: reconstructions from the top level, from the top two, …, from
    all.

    A tokenizer trained without `level_dropout` has never seen fewer levels than all; its pictures of some are rough.

    Args:
        model: a tokenizer whose `encode` gives tuples from top to bottom, and whose `decode` takes the first of them.
        pixel_values: `(B, C, H, W)` in [-1, 1].

    Returns:
        `(B, C, H, W)` in [-1, 1] for each number of levels.
    """
    quantized = model.encode(pixel_values).quantized
    parts = [quantized[:count] for count in range(1, len(quantized) + 1)]
    return [model.decode(levels, quantize=False).sample.clamp(-1, 1) for levels in parts]


__all__ = ["evaluate_hierarchy", "reconstruct_by_levels"]
