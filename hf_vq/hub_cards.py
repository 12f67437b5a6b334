"""Model cards: what a model is, how it loads, and its figures."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .registration import MODELS


CARD_TEMPLATE = Path(__file__).parent / "model_card_template.md"
LIMITS = (
    "It knows images like those that it was trained on, at their size, and no others; what it gives back carries "
    "their biases. Nothing filters what it generates."
)


def model_card(
    model: Any,
    repo_id: str,
    license: str,
    dataset: str = "",
    dataset_id: str | None = None,
    metrics: dict[str, float] | None = None,
    split: str = "validation",
    description: str = "",
    command: str | None = None,
    tags: tuple[str, ...] = (),
    with_code: bool = True,
    pictures: Mapping[str, str] | None = None,
    limits: str = LIMITS,
) -> ModelCard:
    """The card of what hf_vq saves: what it is, how it loads and works, what it was trained on, and its figures.

    Args:
        model: a model, denoiser, scheduler, image processor or pipeline of hf_vq.
        repo_id: where it will live, for the examples.
        license: the weights' licence by its Hub name, such as "apache-2.0" or "cc-by-4.0".
        dataset: the training data's name, and its credit where its licence asks for it.
        dataset_id: the data set's Hub id, if it has one.
        metrics: the figures by name, measured on `split` of the data set; the card's index carries them too.
        description: what is particular about this checkpoint, in Markdown.
        command: the command that trained it.
        tags: further tags.
        with_code: whether the repository carries the code, as after `save_with_code`.
        pictures: files in the repository, each with the line of text below it.
        limits: what the model should not be used for or relied on, in Markdown.

    Raises:
        ValueError: for a figure that is not a finite number.
    """
    is_pipeline = isinstance(model, DiffusionPipeline)
    parts = {name: part for name, part in model.components.items() if is_ours(part)} if is_pipeline else {"": model}
    metrics = metrics or {}
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or value - value != 0:
            raise ValueError(f"`metrics[{name!r}]` must be a finite number, got {value!r}.")
    task = _task(model)
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=dataset_id or "custom",
            dataset_name=dataset_id or (dataset.splitlines() or ["unknown"])[0],
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    data = ModelCardData(
        library_name="hf_vq",
        license=license,
        pipeline_tag=task,
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(metrics) or None,
        tags=["vector-quantization", *(["diffusers"] if is_pipeline else []), *tags],
        **({"model_name": repo_id.split("/")[-1], "eval_results": results} if results else {}),
    )
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        name=repo_id.split("/")[-1],
        snippet=_snippet(model, repo_id),
        remote_snippet=_remote_snippet(model, repo_id) if with_code else None,
        facts=[
            (f"`{name}` {key}" if name else key, value)
            for name, part in {**parts, **_stock_models(model)}.items()
            for key, value in facts(part)
        ],
        dataset=dataset,
        split=split,
        metrics=metrics,
        description=description,
        command=command,
        pictures=pictures or {},
        limits=limits,
    )


def with_section(text: str, other: str, title: str) -> str:
    """The Markdown `text` with the section `title` of `other` in place of its own, if both have one."""
    parts = [re.search(rf"(?ms)^{re.escape(title)}$.*?(?=^## |\Z)", content) for content in (text, other)]
    if None in parts:
        return text
    return text[: parts[0].start()] + parts[1][0] + text[parts[0].end() :]


def facts(model: PreTrainedModel | ModelMixin | SchedulerMixin) -> list[tuple[str, str]]:
    """What a model, or another part of a pipeline, is, as pairs of a name and a value, for people."""
    found = [("class", type(model).__name__)]
    if isinstance(model, SchedulerMixin) and is_ours(model):
        return [*found, ("steps", str(model.config.num_train_timesteps)), ("schedule", model.config.schedule)]
    if isinstance(model, BaseImageProcessor):
        return [*found, ("size", ", ".join(f"{key} {value}" for key, value in dict(model.size).items()))]
    if not hasattr(model, "num_parameters"):
        return found
    config = model.config
    found += [("parameters", f"{model.num_parameters():,}")]
    if hasattr(config, "quantizer"):
        found += [
            (
                "codebook",
                f"{config.num_embeddings} codes of {config.embed_dim} channels, quantizer `{config.quantizer}`",
            ),
            ("pixels a code", ", ".join(f"{factor}×{factor}" for factor in config.downsample_factors)),
            ("trained at", f"{config.resolution}×{config.resolution}"),
        ]
    elif hasattr(config, "codebook_size"):
        height, width = config.grid_size
        found += [
            ("codes", f"{height}×{width} of {config.codebook_size}"),
            ("layers", str(config.num_hidden_layers)),
            ("width", str(config.hidden_size)),
            ("condition", config.condition_type),
        ]
    elif isinstance(model, ModelMixin) and "condition_type" in config:
        height, width = model.sample_size
        found += [
            ("codes", f"{height}×{width} of {config.num_embeddings}"),
            ("layers", str(config.num_layers)),
            ("width", str(config.num_attention_heads * config.attention_head_dim)),
            ("condition", config.condition_type),
        ]
    return found


def _snippet(model: Any, repo_id: str) -> str:
    """Python that uses what is in the repository where hf_vq is installed."""
    name, load = type(model).__name__, f'{type(model).__name__}.from_pretrained("{repo_id}")'
    if isinstance(model, DiffusionPipeline):
        module = "hf_vq" if is_ours(model) else "diffusers"
        return f"from {module} import {name}\n\npipeline = {load}\n{_draw(model)}"
    if isinstance(model, BaseImageProcessor):
        code = f"from PIL import Image\nfrom hf_vq import {name}\n\nprocessor = {load}\n"
        return code + 'pixel_values = processor(Image.open("image.png"), return_tensors="pt").pixel_values'
    if isinstance(model, SchedulerMixin):
        return f"from hf_vq import {name}\n\nscheduler = {load}"
    if isinstance(model, ModelMixin):
        return f"from hf_vq import {name}\n\ndenoiser = {load}"
    if hasattr(model.config, "quantizer"):
        size, channels = model.config.resolution, model.config.in_channels
        code = f"from PIL import Image\nfrom hf_vq import {name}, VQImageProcessor\n\nmodel = {load}\n"
        code += f"processor = VQImageProcessor(size={size}, num_channels={channels})\n"
        code += 'pixel_values = processor(Image.open("image.png"), return_tensors="pt").pixel_values\n'
        return code + "indices = model.encode(pixel_values).indices\nsample = model.decode_indices(indices).sample"
    return f"from hf_vq import {name}\n\nprior = {load}\n{_generate(model)}"


def _remote_snippet(model: Any, repo_id: str) -> str | None:
    """Python that uses the repository by the code in it; None where no library loads such a part by itself."""
    load = f'from_pretrained("{repo_id}", trust_remote_code=True)'
    if isinstance(model, DiffusionPipeline):
        return f"from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.{load}\n{_draw(model)}"
    if isinstance(model, BaseImageProcessor):
        return f"from transformers import AutoImageProcessor\n\nprocessor = AutoImageProcessor.{load}"
    if isinstance(model, SchedulerMixin):
        return None
    if isinstance(model, ModelMixin):
        return f"from diffusers import AutoModel\n\ndenoiser = AutoModel.{load}"
    auto_class = next(iter(MODELS[model.config.model_type][1]))
    code = f"from transformers import {auto_class}\n\n"
    if hasattr(model.config, "quantizer"):
        size = model.config.resolution
        sides = f"{size}, {size}" if isinstance(size, int) else ", ".join(map(str, size))
        code = f"import torch\n{code}model = {auto_class}.{load}\n"
        code += f"pixel_values = torch.rand(1, {model.config.in_channels}, {sides}) * 2 - 1  # images in [-1, 1]\n"
        return code + "indices = model.encode(pixel_values).indices\nsample = model.decode_indices(indices).sample"
    return f"{code}prior = {auto_class}.{load}\n{_generate(model)}"


CONDITION_PICTURES = {
    "segmentation": "an id in each pixel, one channel",
    "depth": "a depth map, one channel",
    "edges": "an edge map, one channel",
    "pose": "a drawn pose",
}


def _draw(pipeline: DiffusionPipeline) -> str:
    """Python that draws an image from `pipeline`."""
    call = getattr(pipeline, "example_call", "")  # a pipeline of diffusers takes no argument
    before = ""
    if "condition_image=" in call:
        what = CONDITION_PICTURES[pipeline.condition_processor.condition]
        before = f'from PIL import Image\n\npicture = Image.open("condition.png")  # {what}\n'
    elif "condition=" in call:
        length = pipeline.priors[0].config.condition_length
        before = f"import torch\n\ncodes = torch.zeros(1, {length}, dtype=torch.long)  # of a condition\n"
    return f'{before}image = pipeline({call}).images[0]\nimage.save("sample.png")'


def _generate(prior: PreTrainedModel) -> str:
    """Python that generates codes from `prior`."""
    kind = prior.config.condition_type
    takes_codes = kind in ("codes", "coordinates")
    condition = {"class": "0, batch_size=4"}.get(kind, "codes" if takes_codes else "batch_size=4")
    before, above = "", ""
    if takes_codes:
        length = prior.config.condition_length
        before = f"import torch\n\ncodes = torch.zeros(4, {length}, dtype=torch.long)  # of conditions\n"
    if getattr(prior.config, "conditioning_grid_size", None) is not None:
        height, width = prior.config.conditioning_grid_size
        before = f"import torch\n\nabove = torch.zeros(4, {height}, {width}, dtype=torch.long)  # the level above\n"
        above = ", condition_indices=above"
    return (
        f"{before}prompt = prior.prepare_condition({condition})\n"
        f"sequences = prior.generate(prompt{above}, do_sample=True)\n"
        "indices = prior.extract_indices(sequences)  # for the tokenizer's `decode_indices`"
    )


def _stock_models(model) -> dict:
    """The denoisers of a pipeline that are diffusers' own classes."""
    if not isinstance(model, DiffusionPipeline):
        return {}
    return {
        name: part for name, part in model.components.items() if isinstance(part, ModelMixin) and not is_ours(part)
    }


def _task(model) -> str | None:
    """The Hub's name of what a model does; None of a scheduler or an image processor."""
    if isinstance(model, DiffusionPipeline):
        has_prompt = "prompt=" in getattr(model, "example_call", "")
        return "text-to-image" if has_prompt else "unconditional-image-generation"
    if isinstance(model, (SchedulerMixin, BaseImageProcessor)):
        return None
    return "image-feature-extraction" if hasattr(model.config, "quantizer") else "unconditional-image-generation"


def is_ours(model: Any) -> bool:
    """Whether a class of hf_vq made it."""
    return type(model).__module__.split(".")[0] == __package__


__all__ = ["facts", "is_ours", "model_card", "with_section"]
