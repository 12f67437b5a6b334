"""Sharing: folders that carry their own code, model cards, and pushing both to the Hub."""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .code_bundle import bundle
from .hub_requests import request_patiently
from .pipelines.saving import without_path
from .registration import MODELS


CARD_TEMPLATE = Path(__file__).parent / "model_card_template.md"


def save_with_code(model: Any, folder: str | Path) -> None:
    """Saves a model, image processor, scheduler or pipeline so that it loads where hf_vq is not installed.

    With `trust_remote_code=True`, a model then loads by `AutoModel` (or `AutoModelForCausalLM`), a denoiser by
    `diffusers.AutoModel`, an image processor by `AutoImageProcessor`, and a pipeline by `DiffusionPipeline`. A
    scheduler alone has no such class in diffusers: its folder carries the file that defines it. A model and its image
    processor may share a folder.

    Once hf_vq has been imported, all of these use its own classes, with or without `trust_remote_code`, and nothing
    from the folder is executed. `diffusers.AutoModel` is the exception: it executes the folder's code if it is
    trusted.

    Args:
        model: of a class of hf_vq, or a pipeline with a component of one.
        folder: where to.

    Raises:
        ValueError: if there is nothing of hf_vq in it.
    """
    folder = Path(folder)
    if isinstance(model, DiffusionPipeline):
        _save_pipeline(model, folder)
        return
    if not _is_ours(model) or not isinstance(model, (PreTrainedModel, ModelMixin, SchedulerMixin, BaseImageProcessor)):
        raise ValueError(
            "`model` must be a model, an image processor or a scheduler of hf_vq, or a pipeline that has one, got "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    auto_map = _auto_map(model)
    with without_path(model):
        model.save_pretrained(folder)
    _write_code(model, folder)
    if auto_map:
        _edit_json(folder / _config_name(model), auto_map=auto_map)


def save_for_sharing(
    folder: str | Path,
    model: Any,
    card: ModelCard | None = None,
    image_processor: BaseImageProcessor | None = None,
    with_code: bool = True,
) -> None:
    """Writes what a repository is to hold: a model or a pipeline, its image processor and its card.

    Args:
        folder: where to.
        model: a model or pipeline of hf_vq.
        card: becomes README.md (see `model_card`).
        image_processor: saved beside the model, and for a pipeline beside its tokenizer, in `vqvae`.
        with_code: as `save_with_code` does; otherwise only those who have hf_vq can load it.
    """
    folder = Path(folder)
    save = save_with_code if with_code else _save
    save(model, folder)
    if image_processor is not None:
        is_pipeline = isinstance(model, DiffusionPipeline)
        save(image_processor, folder / "vqvae" if is_pipeline else folder)
        if is_pipeline and with_code:
            _write_code(image_processor, folder)  # see `_save_pipeline`
    if card is not None:
        card.save(folder / "README.md")


def halve_weights(folder: str | Path) -> None:
    """Stores every float32 weight of a saved model or pipeline in half precision.

    It loads as float32 again, from half as many bytes. Measure it before and after: what half precision changes
    depends on the weights.

    Args:
        folder: what `save_pretrained` wrote, with its subfolders.
    """
    for path in sorted(Path(folder).rglob("*.safetensors")):
        tensors = {
            name: weight.half() if weight.dtype == torch.float32 else weight.clone()
            for name, weight in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)


def push_to_hub(
    model: Any,
    repo_id: str,
    card: ModelCard | None = None,
    image_processor: BaseImageProcessor | None = None,
    with_code: bool = True,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads what `save_with_code` takes, or indices, in one commit; returns the address of the commit or pull
    request.

    Args:
        model: a model, denoiser, scheduler, image processor or pipeline of hf_vq; or the path of a folder of indices
            (see `write_indices`), or of one that holds such folders, each named for its split. Indices become a data
            set, which `datasets.load_dataset` opens.
        repo_id: "user/name"; created if it does not exist.
        card: becomes README.md (see `model_card`); without one, a README.md that is there already stays. That of a
            data set says in any case which files are which split.
        image_processor, with_code: as in `save_for_sharing`.
        private, token, commit_message: as in `huggingface_hub`.
        revision: the branch to commit to; made from the main branch if it does not exist.
        create_pr: open a pull request, in place of a commit to the branch.

    A Hub that is busy or out of order is asked again for ten minutes.

    Raises:
        PermissionError: there is no token, or one that may not write there.
        ValueError: a folder without indices, or with indices that are not complete.
    """
    to = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, (str, Path)):
            _link_indices(Path(model), Path(folder), card)
            return push_folder(folder, repo_id, commit_message or "Upload indices", repo_type="dataset", **to)
        save_for_sharing(folder, model, card, image_processor, with_code)
        return push_folder(folder, repo_id, commit_message or f"Upload {type(model).__name__}", **to)


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder in one commit, as `push_to_hub` says, and returns the address of the commit or pull request."""
    api = HfApi(token=token)
    created = request_patiently(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
    to = {"repo_id": created.repo_id, "repo_type": repo_type}
    if revision is not None and not revision.startswith("refs/pr/"):
        request_patiently(lambda: api.create_branch(**to, branch=revision, exist_ok=True))
    commit = request_patiently(
        lambda: api.upload_folder(
            **to, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    )
    return commit.pr_url or commit.commit_url


def _link_indices(source: Path, folder: Path, card: ModelCard | None) -> None:
    """Links to the files of a data set of indices, and a card that says which of them are which split."""
    splits = {file.parent.name: file.parent for file in sorted(source.glob("*/config.json"))}
    if (source / "config.json").is_file():
        splits = {"train": source}
    data_files = []
    for split, place in splits.items():
        shards = sorted(place.glob("indices-*.parquet"))
        if not shards or not json.loads((place / "config.json").read_text(encoding="utf-8")).get("complete"):
            raise ValueError(f"`model` must be a folder of complete indices, got {place}: let `write_indices` finish.")
        (folder / split).mkdir()
        for file in (place / "config.json", *shards):
            (folder / split / file.name).symlink_to(file.resolve())
        data_files.append({"split": split, "path": f"{split}/indices-*.parquet"})
    if not splits:
        raise ValueError(f"`model` must be a folder of indices that `write_indices` has written, got {source}.")
    card = (
        ModelCard("---\ntags: [vector-quantization]\n---\n\nIndices of images, made by hf_vq.\n")
        if card is None
        else card
    )
    card.data.configs = [{"config_name": "default", "data_files": data_files}]
    card.save(folder / "README.md")


def model_card(
    model: Any,
    repo_id: str,
    license: str,
    dataset: str,
    dataset_id: str | None = None,
    metrics: dict[str, float] | None = None,
    split: str = "validation",
    description: str = "",
    command: str | None = None,
    tags: tuple[str, ...] = (),
    with_code: bool = True,
) -> ModelCard:
    """The card of a model or pipeline: what it is, how it loads, what it was trained on, and its figures.

    Args:
        repo_id: where it will live, for the examples.
        license: the weights' licence by its Hub name, such as "apache-2.0" or "cc-by-4.0".
        dataset: the training data's name, and its credit where its licence asks for it.
        dataset_id: the data set's Hub id, if it has one.
        metrics: the figures by name, measured on `split` of the data set; the card's index carries them too.
        description: what is particular about this checkpoint, in Markdown.
        command: the command that trained it.
        tags: further tags.
        with_code: whether the repository carries the code, as after `save_with_code`.

    Raises:
        ValueError: for a figure that is not a finite number.
    """
    is_pipeline = isinstance(model, DiffusionPipeline)
    parts = {name: part for name, part in model.components.items() if _is_ours(part)} if is_pipeline else {"": model}
    metrics = metrics or {}
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or value - value != 0:
            raise ValueError(f"`metrics[{name!r}]` must be a finite number, got {value!r}.")
    task = _task(model)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or "custom",
            dataset_name=dataset_id or dataset.splitlines()[0],
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
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        class_name=type(model).__name__,
        auto_class="DiffusionPipeline" if is_pipeline else next(iter(MODELS[model.config.model_type][1])),
        call=_example_call(model) if is_pipeline else None,
        with_code=with_code,
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
    )


def facts(model: PreTrainedModel | ModelMixin | SchedulerMixin) -> list[tuple[str, str]]:
    """What a model, or another part of a pipeline, is, as pairs of a name and a value, for people."""
    found = [("class", type(model).__name__)]
    if isinstance(model, SchedulerMixin) and _is_ours(model):
        return [*found, ("steps", str(model.config.num_train_timesteps)), ("schedule", model.config.schedule)]
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
    elif isinstance(model, ModelMixin) and _is_ours(model):
        height, width = model.sample_size
        found += [
            ("codes", f"{height}×{width} of {config.num_embeddings}"),
            ("layers", str(config.num_layers)),
            ("width", str(config.num_attention_heads * config.attention_head_dim)),
            ("condition", config.condition_type),
        ]
    return found


def _example_call(pipeline) -> str:
    """The arguments of a simple call of a pipeline; one of diffusers takes none."""
    return getattr(pipeline, "example_call", "")


def _stock_models(model) -> dict:
    """The denoisers of a pipeline that are diffusers' own classes."""
    if not isinstance(model, DiffusionPipeline):
        return {}
    return {
        name: part for name, part in model.components.items() if isinstance(part, ModelMixin) and not _is_ours(part)
    }


def _task(model) -> str:
    if isinstance(model, DiffusionPipeline):
        return "text-to-image" if "prompt=" in _example_call(model) else "unconditional-image-generation"
    return "image-feature-extraction" if hasattr(model.config, "quantizer") else "unconditional-image-generation"


def _is_ours(model) -> bool:
    return type(model).__module__.split(".")[0] == __package__


def _config_name(model: Any) -> str:
    return "preprocessor_config.json" if isinstance(model, BaseImageProcessor) else "config.json"


def _auto_map(model: Any) -> dict[str, str]:
    """What the Auto classes are told about the code beside a model: nothing of a scheduler, which none of them
    loads.
    """
    module, name = Path(inspect.getfile(type(model))).stem, type(model).__name__
    if isinstance(model, SchedulerMixin):
        return {}
    if isinstance(model, ModelMixin):
        return {"AutoModel": f"{module}.{name}"}
    if isinstance(model, BaseImageProcessor):
        return {"AutoImageProcessor": f"{module}.{name}"}
    config, classes = MODELS.get(model.config.model_type, (None, {}))
    own = [auto_class for auto_class, registered in classes.items() if registered == name]
    if not own:
        raise ValueError(f"`model` must be of a registered class (`hf_vq.registration.MODELS`), got {name}.")
    return {"AutoConfig": f"{module}.{config}", **dict.fromkeys(own, f"{module}.{name}")}


def _write_code(model: Any, folder: Path) -> str:
    """Writes the one file that defines the class of ``model``; returns its module name."""
    source = Path(inspect.getfile(type(model)))
    code = bundle(source)
    bases = [base.__name__ for base in type(model).__mro__[1:] if issubclass(base, DiffusionPipeline)]
    bases = [name for name in bases if name != DiffusionPipeline.__name__]
    if bases:
        code += "\n\n# diffusers wants one pipeline class in a file that is given as `custom_pipeline`\n"
        code += f"del {', '.join(bases)}\n"
    (folder / source.name).write_text(code, encoding="utf-8")
    return source.stem


def _save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    ours = {name: part for name, part in pipeline.components.items() if _is_ours(part)}
    if not ours:
        raise ValueError(f"`model` must have a component of hf_vq, got {type(pipeline).__name__} without one.")
    auto_maps = {name: _auto_map(part) for name, part in ours.items() if isinstance(part, PreTrainedModel)}
    with without_path(pipeline, *pipeline.components.values()):
        pipeline.save_pretrained(folder)
    entries = {}
    for name, part in ours.items():
        entries[name] = [_write_code(part, folder / name), type(part).__name__]
        if name in auto_maps:
            _edit_json(folder / name / "config.json", auto_map=auto_maps[name])
            # diffusers looks for the code beside the component, the Auto classes with `subfolder` at the root
            _write_code(part, folder)
    if _is_ours(pipeline):
        entries["_class_name"] = [_write_code(pipeline, folder), type(pipeline).__name__]
    _edit_json(folder / "model_index.json", **entries)


def _save(model, folder: Path) -> None:
    with without_path(model, *getattr(model, "components", {}).values()):
        model.save_pretrained(folder)


def _edit_json(path: Path, **entries) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["facts", "halve_weights", "model_card", "push_folder", "push_to_hub", "save_for_sharing", "save_with_code"]
