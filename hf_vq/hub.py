"""Sharing: folders that carry their own code, and pushing them with their cards to the Hub."""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .code_bundle import bundle
from .folders import files_below
from .hub_cards import is_ours, model_card, with_section
from .hub_requests import request_patiently
from .models.autoencoders.image_processing_vq import VQImageProcessor
from .models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from .pipelines.saving import without_path
from .registration import MODELS


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
    if not is_ours(model) or not isinstance(model, (PreTrainedModel, ModelMixin, SchedulerMixin, BaseImageProcessor)):
        raise ValueError(
            "`model` must be a model, an image processor or a scheduler of hf_vq, or a pipeline that has one, got "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    _auto_map(model)  # refuses a class that is not registered before anything is written
    with without_path(model):
        model.save_pretrained(folder)
    _add_code(model, folder)


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
    """Uploads a folder, as `push_to_hub` says, and returns the address of the commit or pull request.

    An upload that broke off goes on where it was when it is started again: files whose content the Hub has are not
    sent again. huggingface_hub splits very large folders into several commits.

    Raises:
        ValueError: both a branch and a pull request, which is always one to the main branch.
        PermissionError: as in `push_to_hub`.
    """
    if create_pr and revision is not None:
        raise ValueError(
            f'`create_pr` must not be given with `revision`, got {revision!r}; "refs/pr/N" as the revision adds to '
            "pull request N."
        )
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


def push_saved(
    source: str | Path,
    model: Any,
    repo_id: str,
    license: str = "unknown",
    with_code: bool = True,
    commit_message: str | None = None,
    **to: Any,
) -> str:
    """Uploads the folder that a model or pipeline is saved in, as `folder_for_sharing` completes it.

    Args:
        source, model, repo_id, license, with_code: as in `folder_for_sharing`.
        commit_message, to: as in `push_folder`.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder_for_sharing(source, folder, model, repo_id, license, with_code)
        return push_folder(folder, repo_id, commit_message or f"Upload {type(model).__name__}", **to)


def folder_for_sharing(
    source: str | Path, folder: str | Path, model: Any, repo_id: str, license: str = "unknown", with_code: bool = True
) -> None:
    """Fills a folder with what a saved model is to be on the Hub: links to its files, its code, and its card.

    A card that is there stays, but that it names the repository, and how to load from it; without one it is made.

    Args:
        source: the folder in which `model` is saved.
        folder: an empty one.
        model: what loads from `source`.
        repo_id: where it will live, for the card.
        license: for a card where there is none.
        with_code: so that it loads where hf_vq is not installed.
    """
    source, folder = Path(source), Path(folder)
    for file in files_below(source):
        place = file.relative_to(source)
        if "__pycache__" in place.parts or place.parts[0] in (".git", ".cache"):
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and Path(str(content.get("_name_or_path", ""))).is_absolute():
                del content["_name_or_path"]  # of the author's machine
            (folder / place).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        elif file.suffix != ".py":  # code, which is written anew
            (folder / place).symlink_to(file.resolve())
    processors = [VQImageProcessor, VQConditionProcessor]
    if with_code:
        _add_code(model, folder)
        for file in sorted(folder.rglob("preprocessor_config.json")):
            name = json.loads(file.read_text(encoding="utf-8")).get("image_processor_type")
            for processor in (kind.from_pretrained(file.parent) for kind in processors if kind.__name__ == name):
                _add_code(processor, file.parent)
                _write_code(processor, folder)  # see `_add_code`
    path = folder / "README.md"
    card = model_card(model, repo_id, license, "", with_code=with_code)
    if path.exists():
        text = with_section(path.read_text(encoding="utf-8"), card.text, "## Use")
        path.unlink()
        card = ModelCard(text, ignore_metadata_errors=True)
        if card.data.model_name is not None:
            card.data.model_name = repo_id.split("/")[-1]
    card.save(path)


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
    ours = [part for part in pipeline.components.values() if is_ours(part)]
    if not ours:
        raise ValueError(f"`model` must have a component of hf_vq, got {type(pipeline).__name__} without one.")
    for part in ours:
        _auto_map(part)
    with without_path(pipeline, *pipeline.components.values()):
        pipeline.save_pretrained(folder)
    _add_code(pipeline, folder)


def _add_code(model: Any, folder: Path) -> None:
    """Adds the code to a folder that ``model`` is saved in, and tells its configurations about it."""
    if not isinstance(model, DiffusionPipeline):
        _write_code(model, folder)
        if auto_map := _auto_map(model):
            _edit_json(folder / _config_name(model), auto_map=auto_map)
        return
    entries = {}
    for name, part in model.components.items():
        if not is_ours(part):
            continue
        entries[name] = [_write_code(part, folder / name), type(part).__name__]
        if isinstance(part, PreTrainedModel):
            _edit_json(folder / name / "config.json", auto_map=_auto_map(part))
            # diffusers looks for the code beside the component, the Auto classes with `subfolder` at the root
            _write_code(part, folder)
    if is_ours(model):
        entries["_class_name"] = [_write_code(model, folder), type(model).__name__]
    _edit_json(folder / "model_index.json", **entries)


def _save(model, folder: Path) -> None:
    with without_path(model, *getattr(model, "components", {}).values()):
        model.save_pretrained(folder)


def _edit_json(path: Path, **entries) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = [
    "folder_for_sharing",
    "halve_weights",
    "push_folder",
    "push_saved",
    "push_to_hub",
    "save_for_sharing",
    "save_with_code",
]
