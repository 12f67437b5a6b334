"""Any tokenizer or pipeline, measured over a data set: what `hf-vq evaluate` prints."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from ..argument_checks import check_integer
from ..distributed import all_gathered, share_of_process
from .agreement import ConditionAgreement
from .codebook import PositionCounts
from .diffusion_likelihood import DiffusionLikelihood
from .evaluate import evaluate_prior, evaluate_tokenizer, evaluation_mode, progress_bar
from .features import FeatureCollector, FeatureExtractor
from .generation import LEAST_REAL, Measurement, classifier_score, compare_features, compare_with_reference
from .hierarchy import evaluate_hierarchy
from .inception import ORIGINAL_NETWORK, ReferenceBatch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


METRICS = ("reconstruction", "codebook", "likelihood", "generation", "agreement")
CONDITION_CODES = "condition_codes"
DISTANCES = ("frechet_distance", "kernel_distance", "precision", "recall")


def applicable_metrics(model: "PreTrainedModel | DiffusionPipeline") -> list[str]:
    """Those of `METRICS` that a tokenizer or a pipeline has."""
    if not hasattr(model, "components"):
        return ["reconstruction", "codebook"]
    has_likelihood = hasattr(model, "prior") or hasattr(model, "priors") or hasattr(model, "transformer")
    has_condition = getattr(model, "condition_tokenizer", None) is not None
    has = {"likelihood": has_likelihood, "agreement": has_condition}
    return [name for name in METRICS if has.get(name, True)]


@torch.no_grad()
def evaluate_model(
    model: "PreTrainedModel | DiffusionPipeline",
    dataset: Dataset,
    metrics: Sequence[str] | None = None,
    perceptual: nn.Module | None = None,
    extractor: FeatureExtractor | None = None,
    classifier: nn.Module | None = None,
    num_samples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    label_key: str | None = None,
    caption_key: str | None = None,
    num_timesteps: int | None = None,
    progress: bool = True,
    reference: ReferenceBatch | None = None,
    annotator: Callable | None = None,
    **sampling: Any,
) -> dict:
    """The figures of a tokenizer or of a pipeline over a data set.

    In a distributed run every process calls this with the whole data set, measures its own part, and gets the figures
    of the whole. Images that are drawn have a generator each, so that they depend neither on the batch size nor on the
    number of processes.

    Args:
        model: a tokenizer, or a pipeline of hf_vq that has one, on its device.
        dataset: map-style, with `pixel_values` `(C, H, W)` in [-1, 1] and the entries `label_key` and `caption_key`;
            for a prior over spatial conditions with `condition`, see [`~training.data.conditions`].
        metrics: among `METRICS`; by default all that apply (`applicable_metrics`), agreement with the condition only
            with an annotator.
        perceptual: a distance `(images, references) -> (B,)` with a `name`.
        extractor: the network of the distances between drawn and real images, and of rFID-like distances between
            reconstructions and originals; without it neither is measured.
        classifier: from images `(B, C, H, W)` in [-1, 1] to logits, for `classifier_score`.
        num_samples: images that are drawn; by default as many as the data set has. Their classes and prompts are those
            of the data set's rows, in their order and from the beginning again where it is exhausted.
        batch_size: images at a time.
        seed: of the drawn images and of the bound's noise.
        label_key, caption_key: the entries that hold the classes and the prompts of conditional priors.
        num_timesteps: of the diffusion bound, see `DiffusionLikelihood`.
        progress: show progress bars.
        reference: what the drawn images are compared with in place of the data set.
        annotator: what makes conditions of drawn images, see [`ConditionAgreement`].
        sampling: further arguments of the pipeline's call, such as `guidance_scale`.

    Returns:
        Figures by name; `distances` is a list of `Measurement.to_dict()`.

    Raises:
        ValueError: a metric that does not exist or does not apply, or data without what it needs.
    """
    if metrics is None:
        metrics = [name for name in applicable_metrics(model) if name != "agreement" or annotator is not None]
    metrics = list(metrics)
    check_measurable(model, dataset, metrics, extractor, num_samples, label_key, caption_key, reference)
    batch_size = check_integer("batch_size", batch_size, 1)
    tokenizer = getattr(model, "vqvae", model)
    result = {}
    if "reconstruction" in metrics or "codebook" in metrics:
        extractors = [] if extractor is None else [extractor]
        loader = _loader(dataset, batch_size)
        figures = evaluate_tokenizer(tokenizer, loader, perceptual, extractors, progress=progress)
        if "distances" in figures:
            figures["reconstruction_distances"] = figures.pop("distances")
        for name, value in figures.items():
            if ("codebook" if name.startswith("codebook") else "reconstruction") in metrics:
                result[name] = value
        if "codebook" in metrics:
            result["codebook_entropy_per_position"] = entropy_per_position(tokenizer, dataset, batch_size, progress)
    if "likelihood" in metrics:
        result |= evaluate_likelihood(
            model, dataset, batch_size, seed, label_key, caption_key, num_timesteps, progress=progress
        )
    if "generation" in metrics:
        if extractor is None and classifier is None:
            raise ValueError("`extractor` or `classifier` must be given to measure drawn images, got None.")
        count = len(dataset) if num_samples is None else check_integer("num_samples", num_samples, 1)
        draws = draw_images(model, dataset, count, batch_size, seed, label_key, caption_key, progress, **sampling)
        result |= _measure_drawn(draws, dataset, extractor, classifier, batch_size, progress, reference)
        result["num_samples"] = count
    if "agreement" in metrics:
        if annotator is None:
            raise ValueError("`annotator` must be given to measure how drawn images follow their condition, got None.")
        count = len(dataset) if num_samples is None else check_integer("num_samples", num_samples, 1)
        agreement = ConditionAgreement(model.condition_processor, annotator)
        draws = draw_images(model, dataset, count, batch_size, seed, label_key, caption_key, progress, **sampling)
        numbers = iter(share_of_process(range(count)))
        for images in draws:
            rows = [dataset[next(numbers) % len(dataset)]["condition"] for _ in images]
            agreement.update(images, torch.stack(rows))
        result |= agreement.compute()
    return result


def check_measurable(
    model: "PreTrainedModel | DiffusionPipeline",
    dataset: Dataset,
    metrics: Sequence[str],
    extractor: FeatureExtractor | None = None,
    num_samples: int | None = None,
    label_key: str | None = None,
    caption_key: str | None = None,
    reference: ReferenceBatch | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuses, before anything is measured, metrics that do not apply and data that lack what one needs.

    Args:
        model, dataset, metrics, extractor, num_samples, label_key, caption_key, reference: as in `evaluate_model`.
        names: what the caller calls these arguments, for errors; `condition` is what adds conditions to the data set,
            `extractor` what says that there is none.

    Raises:
        ValueError: another metric, no classes, captions or conditions, or too few images.
    """
    possible = applicable_metrics(model)
    for name in metrics:
        if name not in possible:
            raise ValueError(f"`metrics` must be among {possible} for a {type(model).__name__}, got {name!r}.")
    if "likelihood" in metrics:
        _condition_key(_condition_type(model), label_key, caption_key, names)
    needs_condition = {"likelihood", "generation", "agreement"} & set(metrics)
    if needs_condition and getattr(model, "condition_tokenizer", None) is not None and "condition" not in dataset[0]:
        raise _without_condition(names)
    if extractor is None:
        return
    names = {"dataset": "dataset", "extractor": "extractor=None", "num_samples": "num_samples", **names}
    compares_reconstructions = "reconstruction" in metrics or "codebook" in metrics
    if len(dataset) < LEAST_REAL and (compares_reconstructions or "generation" in metrics and reference is None):
        raise ValueError(
            f"`{names['dataset']}` must have at least {LEAST_REAL} images for distances of features, got "
            f"{len(dataset)}; `{names['extractor']}` leaves them out."
        )
    count = len(dataset) if num_samples is None else check_integer("num_samples", num_samples, 1)
    if "generation" in metrics and count < LEAST_REAL // 2:
        raise ValueError(
            f"`{names['num_samples']}` must be at least {LEAST_REAL // 2} for distances of features, got {count}."
        )


@torch.no_grad()
def entropy_per_position(
    tokenizer: PreTrainedModel, dataset: Dataset, batch_size: int = 32, progress: bool = True
) -> float | list:
    """The mean over positions of the entropy of the codes at that position, in bits; of each level of a hierarchy.

    Few bits at a position mean that the code there is nearly always the same.
    """
    counts: list[PositionCounts] = []
    with evaluation_mode(tokenizer):
        for batch in progress_bar(_loader(dataset, batch_size), "positions", progress):
            indices = tokenizer.encode(batch["pixel_values"].to(tokenizer.device, tokenizer.dtype)).indices
            levels = indices if isinstance(indices, tuple) else (indices,)
            counts = counts or [PositionCounts(tokenizer.config.num_embeddings) for _ in levels]
            for level, own in zip(levels, counts, strict=True):
                own.update(level)
    entropies = [float(own.entropy().mean()) for own in counts]
    return entropies[0] if len(entropies) == 1 else entropies


def evaluate_likelihood(
    pipeline: "DiffusionPipeline",
    dataset: Dataset,
    batch_size: int = 32,
    seed: int = 0,
    label_key: str | None = None,
    caption_key: str | None = None,
    num_timesteps: int | None = None,
    progress: bool = True,
) -> dict:
    """Bits per index and per pixel dimension of a pipeline's prior (an upper bound for VQ-Diffusion).

    Args, Raises: as in `evaluate_model`.
    """
    height, width = dataset[0]["pixel_values"].shape[-2:]
    pixel_dims = dataset[0]["pixel_values"].shape[0] * height * width
    priors = getattr(pipeline, "priors", None)
    codes = _codes(pipeline.vqvae, _loader(dataset, batch_size))
    if hasattr(pipeline, "transformer"):
        key = _condition_key(_condition_type(pipeline), label_key, caption_key)
        prepare = None
        if _condition_type(pipeline) == "text":

            def prepare(prompts):
                return pipeline.prepare_condition(len(prompts), prompt=list(prompts))

        generator = torch.Generator().manual_seed(seed)
        prior = DiffusionLikelihood(pipeline.transformer, pipeline.scheduler, prepare, num_timesteps, generator)
        return evaluate_prior(prior, codes, key, pixel_dims, progress)
    if _condition_type(pipeline) == "codes":
        codes = ({**batch, CONDITION_CODES: condition_codes(pipeline, batch)} for batch in codes)
        return evaluate_prior(priors[0], codes, CONDITION_CODES, pixel_dims, progress)
    if _condition_type(pipeline) == "coordinates":
        whole = pipeline.prepare_coordinates(height, width)
        codes = ({**batch, CONDITION_CODES: whole.expand(len(batch["indices"]), -1, -1)} for batch in codes)
        return evaluate_prior(priors[0], codes, CONDITION_CODES, pixel_dims, progress)
    key = _condition_key(_condition_type(pipeline), label_key, caption_key)
    if len(priors) > 1:
        return evaluate_hierarchy(priors, codes, key, pixel_dims, progress)
    return evaluate_prior(priors[0], codes, key, pixel_dims, progress)


@torch.no_grad()
def draw_images(
    pipeline: "DiffusionPipeline",
    dataset: Dataset,
    num_samples: int,
    batch_size: int = 32,
    seed: int = 0,
    label_key: str | None = None,
    caption_key: str | None = None,
    progress: bool = True,
    **sampling: Any,
) -> Iterator[torch.FloatTensor]:
    """Images `(B, C, H, W)` in [-1, 1] of the classes or prompts of the data set's rows; this process's part of
    them.
    """
    pipeline.set_progress_bar_config(disable=True)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    name, key = None, None
    if label_key is not None and "class_labels" in parameters and _takes(pipeline, "class"):
        name, key = "class_labels", label_key
    elif caption_key is not None and "prompt" in parameters:
        name, key = "prompt", caption_key
    numbers = share_of_process(range(num_samples))
    for start in progress_bar(range(0, len(numbers), batch_size), "samples", progress):
        batch = numbers[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in batch]
        if getattr(pipeline, "condition_tokenizer", None) is not None:
            rows = [dataset[number % len(dataset)] for number in batch]
            given = {"condition": condition_codes(pipeline, _stacked(rows, "condition"))}
        elif name is None:
            given = {"num_images_per_prompt": len(batch)}
        else:
            values = [dataset[number % len(dataset)][key] for number in batch]
            given = {name: [int(value) for value in values] if name == "class_labels" else values}
        yield pipeline(**given, generator=generators, output_type="pt", **sampling).images.float().cpu() * 2 - 1


@torch.no_grad()
def condition_codes(pipeline: "DiffusionPipeline", batch: dict) -> torch.LongTensor:
    """The codes `(B, h', w')` of the conditions in a batch of a data set.

    Raises:
        ValueError: the pipeline lacks its condition tokenizer, or the data set the conditions.
    """
    from ..training.data.conditions import condition_values

    tokenizer = getattr(pipeline, "condition_tokenizer", None)
    if tokenizer is None or pipeline.condition_processor is None:
        raise ValueError("`pipeline` must have `condition_tokenizer` and `condition_processor` to be measured.")
    if "condition" not in batch:
        raise _without_condition()
    values = condition_values(batch["condition"], pipeline.condition_processor)
    return tokenizer.encode(values.to(tokenizer.device, tokenizer.dtype)).indices


def _without_condition(names: Mapping[str, str] = MappingProxyType({})) -> ValueError:
    if "condition" in names:
        return ValueError(f"`{names['condition']}` must name the column that holds the condition of each image.")
    return ValueError(
        "`dataset` must have the entry 'condition' of each image: load it with the pipeline's processor."
    )


def _stacked(rows: list[dict], key: str) -> dict:
    return {key: torch.stack([row[key] for row in rows])} if all(key in row for row in rows) else {}


def _measure_drawn(draws, dataset, extractor, classifier, batch_size: int, progress: bool, reference) -> dict:
    generated = None if extractor is None else FeatureCollector(extractor)
    logits = []
    for images in draws:
        if generated is not None:
            generated.update(images.to(_device_of(extractor)))
        if classifier is not None:
            logits.append(classifier(images.to(_device_of(classifier))).float().cpu())
    result = {}
    if generated is not None:
        result["distances"] = [
            measurement.to_dict()
            for measurement in _distances(generated.compute(), dataset, extractor, batch_size, progress, reference)
        ]
    if classifier is not None:
        scores = all_gathered(torch.cat(logits) if logits else None)
        result["classifier_score"], result["classifier_score_deviation"] = classifier_score(
            scores, min(10, len(scores))
        )
    return result


def _distances(generated, dataset, extractor, batch_size: int, progress: bool, reference) -> list[Measurement]:
    """Of the features of drawn images to those of the data set, or of a reference batch in its place."""
    known = None
    if reference is not None and reference.mean is not None and extractor.name == ORIGINAL_NETWORK:
        known = compare_with_reference(reference.mean, reference.covariance, generated)
    if reference is not None and reference.images is None:
        if known is None:
            raise ValueError(
                f"`reference` {reference.name} holds statistics of the original Inception only, which do not compare "
                f"with {extractor.name!r}: give one with images (`arr_0`)."
            )
        return [known]
    images = (batch["pixel_values"] for batch in _loader(dataset, batch_size))
    real = FeatureCollector(extractor)
    for batch in progress_bar(images if reference is None else reference.batches(batch_size), "real images", progress):
        real.update(batch.to(_device_of(extractor)))
    measured = compare_features(real.compute(), generated, DISTANCES)
    return measured if known is None else [replace(measured[0], value=known.value), *measured[1:]]


def _device_of(network) -> torch.device:
    module = getattr(network, "network", network)
    return next(module.parameters()).device if isinstance(module, nn.Module) else torch.device("cpu")


def _codes(vqvae, batches: Iterable[dict]) -> Iterator[dict]:
    """The batches with the indices of their images, under the names that the likelihoods read."""
    for batch in batches:
        indices = vqvae.encode(batch["pixel_values"].to(vqvae.device, vqvae.dtype)).indices
        if isinstance(indices, tuple):
            yield {**batch, **{f"indices_{level}": codes for level, codes in enumerate(indices)}}
        else:
            yield {**batch, "indices": indices}


def _condition_type(pipeline: "DiffusionPipeline") -> str | None:
    """Of the prior whose likelihood is measured, the first one of a hierarchy."""
    prior = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.priors[0]
    return prior.config.condition_type


def _condition_key(
    condition_type: str | None,
    label_key: str | None,
    caption_key: str | None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> str | None:
    wanted = {"class": ("label_key", label_key), "text": ("caption_key", caption_key)}.get(condition_type)
    if wanted is None:
        return None
    if wanted[1] is None:
        name = names.get(wanted[0], wanted[0])
        raise ValueError(
            f"`{name}` must name what holds the {condition_type} of each image, for the likelihood, got None."
        )
    return wanted[1]


def _takes(pipeline, condition_type: str) -> bool:
    """Whether any part of the pipeline is conditioned in this way."""
    parts = [*getattr(pipeline, "priors", ()), getattr(pipeline, "transformer", None)]
    types = [getattr(part.config, "condition_type", None) for part in parts if part is not None]
    return condition_type in types or not types


def _loader(dataset: Dataset, batch_size: int) -> DataLoader:
    """This process's part of a data set, in order."""
    from ..training.data.image_datasets import collate

    return DataLoader(
        Subset(dataset, share_of_process(range(len(dataset)))), batch_size=batch_size, collate_fn=collate
    )


__all__ = [
    "DISTANCES",
    "METRICS",
    "applicable_metrics",
    "check_measurable",
    "condition_codes",
    "draw_images",
    "entropy_per_position",
    "evaluate_likelihood",
    "evaluate_model",
]
