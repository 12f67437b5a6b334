"""A tokenizer or a prior, measured over a data set in one pass."""

import contextlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..distributed import is_main_process, union_over_processes
from .codebook import CodebookCounts
from .features import FeatureCollector, FeatureExtractor
from .generation import compare_features
from .likelihood import CodeLikelihood
from .pictures import plot_codebook_usage
from .reconstruction import MeanOverImages, l1, psnr, ssim


@torch.no_grad()
def evaluate_tokenizer(
    model: PreTrainedModel,
    dataloader: Iterable,
    perceptual: nn.Module | None = None,
    feature_extractors: Sequence[FeatureExtractor] = (),
    usage_plot: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict:
    """Reconstruction and codebook health of a tokenizer over a data set.

    Reconstructions are clamped to [-1, 1]. In a distributed run every process calls this with its own part of the
    data, on the unwrapped model, and gets the figures of the whole; a sampler that repeats pictures to fill its last
    batch makes these count twice.

    Args:
        model: a tokenizer, on its device; it is put into evaluation mode and back.
        dataloader: yields dicts with `pixel_values` `(B, 3, H, W)` in [-1, 1].
        perceptual: a distance `(images, references) -> (B,)` with a `name`, on the model's device.
        feature_extractors: networks, on the model's device, by which the distribution of the reconstructions is
            compared with that of the originals (as rFID does with Inception). Their features, not the pictures, are
            kept.
        usage_plot: file for the plot of the codes' frequencies; several codebooks get their number before the ending.
        progress: show a progress bar.

    Returns:
        `psnr` (dB, mean over images), `ssim`, `l1`; `perceptual` and `perceptual_network` where given;
        `codebook_perplexity`, `codebook_usage` and `codebook_dead_codes`, and with several codebooks their means (dead
        codes: the sum) and `codebooks`, a list of the three for each; `num_images`; `images_per_second` of encoding
        and decoding in this process; `distances`, a list of `Measurement.to_dict()`, where feature extractors are
        given.
    """
    means = MeanOverImages(["psnr", "ssim", "l1"] + ([] if perceptual is None else ["perceptual"]))
    codebooks: list[CodebookCounts] = []
    collectors = [(FeatureCollector(extractor), FeatureCollector(extractor)) for extractor in feature_extractors]
    seconds, images = 0.0, 0
    with evaluation_mode(model):
        for batch in progress_bar(dataloader, "tokenizer", progress):
            pixel_values = batch["pixel_values"].to(model.device)
            start = _clock(model.device)
            encoded = model.encode(pixel_values.to(model.dtype))
            sample = model.decode(encoded.quantized, quantize=False).sample
            seconds += _clock(model.device) - start
            images += len(pixel_values)

            pixel_values, sample = pixel_values.float(), sample.float().clamp(-1, 1)
            values = {"psnr": psnr(sample, pixel_values), "ssim": ssim(sample, pixel_values)}
            values["l1"] = l1(sample, pixel_values)
            if perceptual is not None:
                values["perceptual"] = perceptual(sample, pixel_values)
            means.update(**values)
            levels = codebook_levels(encoded.indices)
            codebooks = codebooks or [CodebookCounts(model.config.num_embeddings) for _ in levels]
            for counts, indices in zip(codebooks, levels, strict=True):
                counts.update(indices)
            for original, reconstructed in collectors:
                original.update(pixel_values)
                reconstructed.update(sample)
    found = union_over_processes({len(codebooks)} - {0})  # a process may have no image of its own
    if not found:
        raise ValueError("`dataloader` must yield at least one batch, got none")
    codebooks = codebooks or [CodebookCounts(model.config.num_embeddings) for _ in range(*found)]
    result = means.compute()
    if perceptual is not None:
        result["perceptual_network"] = perceptual.name
    result |= _codebook_results(codebooks)
    result["images_per_second"] = images / seconds if images else 0.0
    if collectors:
        pairs = [(original.compute(), reconstructed.compute()) for original, reconstructed in collectors]
        result["distances"] = [measured.to_dict() for pair in pairs for measured in compare_features(*pair)]
    if usage_plot is not None:
        _plot_usage(codebooks, Path(usage_plot))
    return result


@torch.no_grad()
def evaluate_prior(
    prior: nn.Module,
    dataloader: Iterable,
    condition_key: str | None = None,
    pixel_dims: int | None = None,
    progress: bool = True,
    indices_key: str = "indices",
    above_key: str | None = None,
) -> dict:
    """How well a prior predicts the codes of a data set.

    Args:
        prior: has `log_likelihood(indices, condition) -> (B,)` in nats; put into evaluation mode and back.
        dataloader: yields dicts with `indices_key`, int `(B, h, w)` or `(B, L)`.
        condition_key: the entry that is given as the condition, such as `label`, a tensor, or `caption`, a list;
            without it the condition is None.
        pixel_dims: C·H·W of the pictures, for `bits_per_pixel_dim`.
        progress: show a progress bar.
        indices_key: the entry that is predicted.
        above_key: the entry that is given as `condition_indices`, the codes of the level above; without it there is
            none.

    Returns:
        `CodeLikelihood.compute()`, and `uniform_bits_per_index`, log2 K: what knowing nothing costs.
    """
    likelihood = CodeLikelihood(pixel_dims)
    with evaluation_mode(prior):
        for batch in progress_bar(dataloader, "prior", progress):
            indices = batch[indices_key].to(prior.device)
            above = {} if above_key is None else {"condition_indices": batch[above_key].to(prior.device)}
            condition = None if condition_key is None else batch[condition_key]
            if torch.is_tensor(condition):
                condition = condition.to(prior.device)
            likelihood.update(prior.log_likelihood(indices, condition, **above), num_indices=indices[0].numel())
    return {**likelihood.compute(), "uniform_bits_per_index": math.log2(prior.config.codebook_size)}


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """Within it, every submodule is in evaluation mode; afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def codebook_levels(indices: torch.Tensor | tuple) -> list[torch.Tensor]:
    """The indices of each codebook: of each level of a hierarchy, and of each depth `(B, h, w, depth)` of a
    residual.
    """
    levels = indices if isinstance(indices, (tuple, list)) else (indices,)
    return [part for level in levels for part in (level.unbind(-1) if level.ndim == 4 else (level,))]


def _codebook_results(codebooks: list[CodebookCounts]) -> dict:
    each = []
    for counts in codebooks:
        statistics = counts.compute()
        each.append(
            {
                "codebook_perplexity": float(statistics.perplexity),
                "codebook_usage": float(statistics.usage),
                "codebook_dead_codes": int(statistics.dead_codes),
            }
        )
    if len(each) == 1:
        return each[0]
    mean = {name: sum(one[name] for one in each) / len(each) for name in ("codebook_perplexity", "codebook_usage")}
    return {**mean, "codebook_dead_codes": sum(one["codebook_dead_codes"] for one in each), "codebooks": each}


def _plot_usage(codebooks: list[CodebookCounts], path: Path) -> None:
    for number, counts in enumerate(codebooks):
        total = counts.total()  # a collective call: on every process
        name, title = path, "Codebook"
        if len(codebooks) > 1:
            name, title = path.with_stem(f"{path.stem}_{number}"), f"Codebook {number}"
        if is_main_process():
            plot_codebook_usage(total, name, title)


def progress_bar(batches: Iterable, name: str, progress: bool):
    """`batches`, counted by a bar on the main process that says what is evaluated; without a bar if not `progress`."""
    return tqdm(batches, desc=f"evaluating {name}", unit="batch", disable=not (progress and is_main_process()))


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


__all__ = ["codebook_levels", "evaluate_prior", "evaluate_tokenizer", "evaluation_mode", "progress_bar"]
