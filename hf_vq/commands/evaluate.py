"""``hf-vq evaluate``: the figures of a tokenizer or a pipeline over a data set, as a table, JSON and in its card."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..argument_checks import check_integer
from ..evaluation.generation import PUBLISHED
from ..loading import load
from .sources import check_call, check_output_file, device


# What the command calls the arguments of `evaluate_model`.
FLAGS = {
    "dataset": "--data",
    "extractor": "--features none",
    "num_samples": "--num-samples",
    "label_key": "--label-column",
    "caption_key": "--caption-column",
    "condition": "--conditioning-image-column",
}


def evaluate(options: argparse.Namespace) -> None:
    """Prints the figures; writes them to `--output` and into the card of a local folder by `--update-card`."""
    import torch

    from ..distributed import is_main_process
    from ..evaluation.evaluate_pipeline import applicable_metrics, check_measurable, evaluate_model
    from ..evaluation.inception import ReferenceBatch
    from ..pipelines.annotators import load_annotator
    from ..training.objectives.perceptual import build_perceptual

    if options.output is not None:
        check_output_file(options.output)
    if options.update_card and not (Path(options.model) / "README.md").is_file():
        raise ValueError(f"`--update-card` needs a local folder with a README.md, got {options.model!r}.")
    _join_processes()
    where = device(options)
    model = load_measured(options).to(where)
    sampling = dict(_pair(pair) for pair in options.sampling)
    check_call(model, sampling, "`--sampling {}`", own=("generator", "output_type", "num_images_per_prompt"))
    data, dataset = open_images(options, model)
    annotator = None if options.annotator is None else load_annotator(options.annotator, device=where)
    perceptual = build_perceptual(options.perceptual, argument="--perceptual")
    extractor, classifier = feature_networks(options, where)
    missing = {"agreement"} if annotator is None else set()
    missing |= {"generation"} if extractor is None and classifier is None else set()  # `--features none`
    metrics = options.metrics or [name for name in applicable_metrics(model) if name not in missing]
    needed = {
        "extractor": extractor,
        "num_samples": options.num_samples,
        "label_key": "label" if options.label_column else None,
        "caption_key": options.caption_column,
        "reference": None if options.reference is None else ReferenceBatch.from_npz(options.reference),
    }
    names = FLAGS if options.inception is None else {**FLAGS, "extractor": "--features none, without --inception"}
    check_measurable(model, dataset, metrics, **needed, names=names)  # before every image is read
    dataset = dataset.readable()
    check_measurable(model, dataset, metrics, **needed, names=names)  # of fewer images, maybe too few
    figures = evaluate_model(
        model,
        dataset,
        metrics,
        **needed,
        perceptual=None if perceptual is None else perceptual.to(where),
        classifier=classifier,
        batch_size=options.batch_size,
        seed=options.seed,
        num_timesteps=options.num_timesteps,
        annotator=annotator,
        progress=not options.json,
        **sampling,
    )
    is_main = is_main_process()  # asked while there are several
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_main:
        return
    source = Path(options.data).name if Path(options.data).exists() else options.data
    size = "x".join(map(str, dict.fromkeys(data.size)))
    figures = {
        "model": options.model,
        "data": f"{source}, split {data.validation_name}",
        "image_size": f"{size}, the shorter side by bicubic resizing with antialiasing, centre crop",
        **({} if options.reference is None else {"reference": Path(options.reference).name}),
        **figures,
    }
    if classifier is not None and "classifier_score" in figures:
        figures["classifier"] = classifier.name
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.update_card:
        update_card(Path(options.model), flat_figures(figures), options.data, data.validation_name)
    print(json.dumps(figures, indent=2, ensure_ascii=False) if options.json else table(figures))


def load_measured(options: argparse.Namespace):
    """The tokenizer or the pipeline that is to be measured; of a prior alone, its pipeline with `--tokenizer`.

    Raises:
        ValueError: something else, or a prior that takes more than a tokenizer beside it.
    """
    from .. import VQAutoregressivePipeline

    model = load(options.model)
    if hasattr(model, "decode_indices") or hasattr(model, "vqvae"):
        if options.tokenizer is not None:
            raise ValueError(f"`--tokenizer` is for a prior alone, got it with a {type(model).__name__}.")
        return model
    is_whole = hasattr(model, "log_likelihood") and getattr(model.config, "conditioning_grid_size", None) is None
    if not is_whole or options.tokenizer is None:
        wanted = "give the pipeline that has it" + (", or its --tokenizer" if is_whole else "")
        raise ValueError(f"`MODEL` must be a tokenizer or a pipeline, got a {type(model).__name__}: {wanted}.")
    tokenizer = load(options.tokenizer)
    if not hasattr(tokenizer, "decode_indices"):
        raise ValueError(f"`--tokenizer` must be an image tokenizer, got a {type(tokenizer).__name__}.")
    return VQAutoregressivePipeline(vqvae=tokenizer, prior=model)


def open_images(options: argparse.Namespace, model: Any) -> tuple:
    """The `DataArguments` of what is measured, and its images, as large as the model's and with its classes."""
    from ..training.data.image_datasets import DataArguments, load_image_dataset

    tokenizer = getattr(model, "vqvae", model)
    data = DataArguments(
        options.data,
        **_split_arguments(options),
        image_column=options.image_column,
        label_column=options.label_column,
        extra_columns=[options.caption_column] if options.caption_column else [],
        resolution=options.size or list(getattr(model, "image_size", None) or tokenizer.config.image_size),
        max_samples=options.max_images,
        conditioning_image_column=options.conditioning_image_column,
    )
    processor = getattr(model, "condition_processor", None)
    if processor is not None and processor.condition != "edges" and options.conditioning_image_column is None:
        processor = None  # what needs conditions will say so
    dataset = load_image_dataset(
        data,
        "validation",
        class_names=None if options.classes_by_number else names_of_classes(model),
        channels=tokenizer.config.in_channels,
        condition_processor=processor,
    )
    return data, dataset


def _split_arguments(options: argparse.Namespace) -> dict:
    """Which images of the data set are measured, as the validation of `DataArguments`."""
    if options.validation_share is None:
        return {"validation_split": options.split or "validation"}
    return {"train_split": options.split or "train", "validation_share": options.validation_share}


def names_of_classes(model: Any) -> list[str] | None:
    """Those of a pipeline's prior, in the order of its numbers; None without them."""
    names = getattr(model, "id2label", None) or {}
    return [names[number] for number in range(len(names))] if sorted(names) == list(range(len(names))) else None


def feature_networks(options: argparse.Namespace, where: str) -> tuple:
    """The network of the distances, and that of the classifier score, which Inception alone has."""
    from ..evaluation.features import PooledLayer
    from ..evaluation.inception import InceptionFeatures, InceptionLogits
    from ..training.objectives.perceptual import MobileNetV2Features, build_perceptual

    if options.inception is not None:
        try:
            network = InceptionFeatures(options.inception).to(where)
        except ImportError as error:
            raise ValueError(f"`--inception`: {error}") from error
        return network, InceptionLogits(network)
    network = build_perceptual(options.features, argument="--features")
    if network is None:
        return None, None
    if not isinstance(network, MobileNetV2Features):
        raise ValueError(f"`--features` must be mobilenet_v2 or none, or take --inception, got {options.features!r}.")
    layer = check_integer("--features-layer", options.features_layer, 0, network.LAST_LAYER)
    return PooledLayer(network.to(where), layer), None


def _join_processes() -> None:
    """Joins the processes that a launcher such as `torchrun` started."""
    import os

    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _pair(text: str) -> tuple[str, object]:
    """`name=value`, the value as JSON where it is some."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"`--sampling` must be of the form name=value, got {text!r}.")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), value


def flat_figures(figures: dict) -> dict[str, float]:
    """The numbers among the figures; distances under their labels with the numbers of images and their resizing."""
    flat = {}
    size = str(figures.get("image_size", "")).split(",")[0]
    resized = f", {size} pixels, bicubic with antialiasing" if size else ""
    for name, value in figures.items():
        if name.endswith("distances"):
            of_reconstructions = name.startswith("reconstruction")
            for one in value:
                label = one["label"]
                if of_reconstructions:
                    label = f"r{label}" if label in PUBLISHED.values() else f"reconstruction {label}"
                against = f"{one['num_real']} images"
                if not of_reconstructions and "reference" in figures:
                    against = figures["reference"]
                flat[f"{label} ({one['num_generated']} against {against}{resized})"] = one["value"]
        elif name.startswith("classifier_score") and figures.get("classifier") == "inception":
            label = name.replace("classifier_score", "Inception Score").replace("_", " ")
            flat[f"{label} ({figures['num_samples']} samples{resized})"] = value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = value
    return flat


def table(figures: dict) -> str:
    """The figures in two columns, for a terminal."""
    rows = [(name, value) for name, value in figures.items() if isinstance(value, str)]
    rows += [
        (name, f"{value:.6g}" if isinstance(value, float) else str(value))
        for name, value in flat_figures(figures).items()
    ]
    for number, level in enumerate(figures.get("levels", [])):
        rows.append((f"bits_per_index of level {number}", f"{level['bits_per_index']:.6g}"))
    floors = [one for name in figures if name.endswith("distances") for one in figures[name]]
    for one in {one["label"]: one for one in floors}.values():
        if one["real_split"] is not None:
            rows.append((f"{one['label']}, half of the real images against half", f"{one['real_split']:.6g}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def update_card(folder: Path, figures: dict[str, float], source: str, split: str) -> None:
    """Writes the figures of a split of the data set `source` into the `model-index` of the folder's README.md, and a
    benchmark's into `.eval_results/`.

    Raises:
        ValueError: the folder has no card.
    """
    from huggingface_hub import EvalResult, ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise ValueError(f"`--update-card` needs a local folder with a README.md, got {str(folder)!r}.")
    card = ModelCard.load(path)
    is_hub_id = not Path(source).exists()
    name = source if is_hub_id else Path(source).name
    new = [
        EvalResult(
            task_type=card.data.pipeline_tag or "image-feature-extraction",
            dataset_type=source if is_hub_id else "custom",
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in figures.items()
    ]
    replaced = {(result.dataset_name, result.metric_type) for result in new}
    kept = [r for r in card.data.eval_results or [] if (r.dataset_name, r.metric_type) not in replaced]
    card.data.eval_results = [*kept, *new]
    card.data.model_name = card.data.model_name or folder.name
    card.save(path)
    if is_hub_id:
        _write_eval_results(folder, figures, source, split)
    print(f"{path}: {len(new)} figures", file=sys.stderr)


def _write_eval_results(folder: Path, figures: dict[str, float], source: str, split: str) -> None:
    """The Hub's newer form: entries that link to a data set of the Hub, one file a data set."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(dataset_id=source, task_id=metric, value=value, notes=f"split {split}")
        for metric, value in figures.items()
    ]
    path = folder / ".eval_results" / f"{source.replace('/', '--')}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
