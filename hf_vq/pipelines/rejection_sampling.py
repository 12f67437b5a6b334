"""Rejection sampling: a classifier says which of many samples show their class best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from transformers import BaseImageProcessor

from ..argument_checks import check_integer, check_real
from ..images import numpy_to_pil
from .vq_pipeline import of_levels, taking_turns


@dataclass
class RejectionSamplingOutput(BaseOutput):
    """
    What one acceptance rate kept, the images of a class adjacent and the best first.

    Args:
        images: as in [`VQPipelineOutput`].
        indices (int64 `(N, h, w)`, or a tuple of those of each level): their codes.
        class_ids (int64 `(N,)`): their classes.
        scores (float `(N,)`): what the classifier gave them.
        acceptance_rate (`float`): accepted over drawn images; it is below the rate asked for where the number of
            images does not divide evenly.
        threshold (`float`): the lowest score that was accepted.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None
    indices: torch.LongTensor | tuple[torch.LongTensor, ...]
    class_ids: torch.LongTensor
    scores: torch.FloatTensor
    acceptance_rate: float
    threshold: float


def class_scores(
    classifier: Callable,
    image_processor: BaseImageProcessor | None,
    images: torch.FloatTensor,
    class_ids: torch.LongTensor,
):
    """The score `(B,)` of each image `(B, C, H, W)` in [0, 1] for its class `(B,)`, see `rejection_sample`."""
    if image_processor is not None:
        pictures = numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy())
        inputs = image_processor(images=pictures, return_tensors="pt").to(classifier.device, classifier.dtype)
        logits = classifier(**inputs).logits.float()
        if class_ids.max() >= logits.shape[1]:
            raise ValueError(
                f"`classifier` has {logits.shape[1]} classes, but class {class_ids.max().item()} is sampled."
            )
        scores = logits.softmax(-1).gather(1, class_ids.to(logits.device)[:, None])[:, 0]
    else:
        scores = torch.as_tensor(classifier(images, class_ids))
    if scores.shape != class_ids.shape:
        raise ValueError(f"`classifier` must give one score for each image, got shape {tuple(scores.shape)}.")
    if scores.isnan().any():  # the largest of all to `topk`
        raise ValueError("`classifier` must give scores that can be compared, got nan.")
    return scores.float().to(images.device)


@taking_turns
@torch.no_grad()
def rejection_sample(
    pipeline: DiffusionPipeline,
    class_labels: int | str | Sequence[int] | Sequence[str],
    classifier: Callable,
    num_images_per_class: int = 1,
    acceptance_rates: float | list[float] = 0.25,
    image_processor: BaseImageProcessor | None = None,
    batch_size: int = 16,
    output_type: str = "pil",
    decode_batch_size: int = 16,
    **sampling: Any,
) -> RejectionSamplingOutput | dict[float, RejectionSamplingOutput]:
    """
    Draws `num_images_per_class / rate` images of every class and keeps those with the highest scores (Razavi et al.,
    "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019, on classifier-based rejection sampling; Esser et
    al., 2021). A low rate trades diversity for fidelity.

    Args:
        pipeline ([`AutoregressivePipeline`]): a class-conditional one.
        class_labels: one or several classes, ids or names, none of them twice.
        classifier: a function `(images (B, C, H, W) in [0, 1], class_ids (B,)) -> scores (B,)`, higher is better; or,
            with its `image_processor`, an `AutoModelForImageClassification` with the prior's class ids, whose score is
            the probability of the class.
        num_images_per_class: images to keep.
        acceptance_rates: a rate from a millionth to 1, or several for a sweep, which all choose from the same samples.
        image_processor (*optional*): the classifier's `AutoImageProcessor`.
        batch_size: images sampled and scored at a time.
        output_type, decode_batch_size: as in the call.
        sampling: the sampling arguments of the call; `generator` can be one generator, not a list.

    Returns:
        a [`RejectionSamplingOutput`], or for several rates a `dict` of one for each.

    Raises:
        ValueError: arguments out of range, a classifier without an image processor, or as in the call.
    """
    _, decode_batch_size = pipeline.check_output(1, output_type, decode_batch_size)
    num_images_per_class = check_integer("num_images_per_class", num_images_per_class, 1)
    batch_size = check_integer("batch_size", batch_size, 1)
    several = isinstance(acceptance_rates, (list, tuple))
    rates = [
        check_real("acceptance_rates", rate, minimum=1e-6, maximum=1)
        for rate in (acceptance_rates if several else [acceptance_rates])
    ]
    if not rates:
        raise ValueError("`acceptance_rates` must hold a rate in (0, 1], got none.")
    if not callable(classifier):
        raise ValueError(f"`classifier` must be a function or a model, got a {type(classifier).__name__}.")
    if hasattr(classifier, "config") and image_processor is None:
        raise ValueError("`image_processor` is required for a classifier that is a transformers model.")
    if isinstance(sampling.get("generator"), list):
        raise ValueError(
            "`generator` must be one torch.Generator here: how many images are drawn depends on the rates."
        )
    if class_labels is None:
        raise ValueError("`class_labels` is required: the classifier scores images of a class.")
    prompts = pipeline.prepare_prompts(class_labels)
    class_ids = pipeline.class_ids(prompts)
    if len(class_ids.unique()) != len(class_ids):
        raise ValueError(f"`class_labels` must differ, got {class_ids.tolist()}.")

    # without the small term 7 / 0.07 would give 101
    candidates = {rate: math.ceil(num_images_per_class / rate - 1e-6) for rate in rates}
    most = max(candidates.values())
    drawn = []
    for i, class_id in enumerate(class_ids):
        own = [prompt[i if len(prompt) > 1 else 0] for prompt in prompts]
        drawn.append(_draw_and_score(pipeline, own, class_id, most, batch_size, classifier, image_processor, sampling))
    results = {}
    for rate in rates:
        best = [scores[: candidates[rate]].topk(num_images_per_class) for _, scores in drawn]
        chosen = [[level[top.indices] for level in codes] for (codes, _), top in zip(drawn, best, strict=True)]
        indices = of_levels([torch.cat(of_level) for of_level in zip(*chosen, strict=True)])
        scores = torch.cat([top.values for top in best])
        results[rate] = RejectionSamplingOutput(
            images=pipeline.postprocess(indices, output_type, decode_batch_size),
            indices=indices,
            class_ids=class_ids.repeat_interleave(num_images_per_class),
            scores=scores,
            acceptance_rate=num_images_per_class / candidates[rate],
            threshold=scores.min().item(),
        )
    pipeline.maybe_free_model_hooks()
    return results if several else results[rates[0]]


def _draw_and_score(pipeline, prompts, class_id, count, batch_size, classifier, image_processor, sampling):
    """The codes `(count, h, w)` of each level, of one class, and their scores `(count,)`."""
    codes, scores = [], []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        levels = pipeline.sample_levels([prompt.expand(size, -1) for prompt in prompts], **sampling)
        images = pipeline.decode_indices(of_levels(levels), batch_size)
        codes.append(levels)
        scores.append(class_scores(classifier, image_processor, images, class_id.expand(size)))
    return [torch.cat(of_level) for of_level in zip(*codes, strict=True)], torch.cat(scores)


__all__ = ["RejectionSamplingOutput", "rejection_sample"]
