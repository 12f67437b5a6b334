"""Loading what a folder or Hub repository holds, by the class that it names."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import BaseImageProcessor, PreTrainedConfig


CLASS_KEYS = {  # the files that name a class, and where in them
    "model_index.json": "_class_name",
    "config.json": "architectures",
    "scheduler_config.json": "_class_name",
    "preprocessor_config.json": "image_processor_type",
}


def load(source: str, stock: bool = False):
    """The model, pipeline, scheduler or image processor of hf_vq in a folder or Hub repository.

    Args:
        source: the folder or repository.
        stock: take classes of diffusers and transformers too, of which pipelines have parts.
    """
    import hf_vq

    name = class_name(source)
    if name is None:
        raise ValueError(
            f"`{source}` must hold one of {', '.join(CLASS_KEYS)}, with the name of its class.{run_hint(source)}"
        )
    if name in hf_vq.__all__:
        return getattr(hf_vq, name).from_pretrained(source)
    found = stock_class(name) if stock else None
    if found is None:
        raise ValueError(f"`{source}` must be a model or pipeline of hf_vq, or a part of one, got a {name}.")
    from .models.checked_loading import check_safetensors  # here: it imports torch, which the errors above do without

    for path in sorted(Path(source).glob("*.safetensors")):  # the classes of hf_vq check their own
        check_safetensors(path)
    return found.from_pretrained(source)


def run_hint(source: str | Path) -> str:
    """For errors: what to give in place of the folder of a training run; empty for any other."""
    made = [name for name in ("pipeline", "tokenizer", "prior") if (Path(source) / name).is_dir()]
    if not made or not (Path(source) / "metrics.jsonl").is_file():
        return ""
    return f" It is the folder of a run: give {' or '.join(f'`{Path(source) / name}`' for name in made)}."


def load_part(
    argument: str, source: str, part: str, kinds: tuple[type, ...]
) -> tuple["nn.Module", "DiffusionPipeline | None"]:
    """A model, and the pipeline that it came in, if it did.

    Args:
        argument: the name by which the user gave `source`, for errors.
        source: a folder or Hub repository, of the model or of a pipeline that has it.
        part: the model's name in a pipeline.
        kinds: the classes that it may have.

    Raises:
        ValueError: nothing can be loaded, or what is there is none of `kinds`.
    """
    from diffusers import DiffusionPipeline

    try:
        found = load(source, stock=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"{argument}={source!r} cannot be loaded: {error}") from error
    pipeline = found if isinstance(found, DiffusionPipeline) else None
    model = found if pipeline is None else getattr(found, part, None)
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        held = type(found).__name__ if pipeline is None else f"{type(found).__name__} without one"
        raise ValueError(
            f"{argument}={source!r}: it must be a {names}, or a pipeline that has one as its `{part}`, got a {held}."
        )
    return model, pipeline


def image_processor_of(source: str, config: "PreTrainedConfig") -> "BaseImageProcessor":
    """That of the tokenizer, or of the pipeline, in a folder or Hub repository: a `VQImageProcessor`, or the
    `VQConditionProcessor` of conditioning images; where none was saved, the one of the resolution and the channels in
    the tokenizer's `config`.

    Raises:
        ValueError: a processor of another class was saved.
    """
    from .models.autoencoders.image_processing_vq import VQImageProcessor
    from .models.autoencoders.image_processing_vq_condition import VQConditionProcessor

    kinds = {kind.__name__: kind for kind in (VQImageProcessor, VQConditionProcessor)}
    for name in ("preprocessor_config.json", "vqvae/preprocessor_config.json"):  # of a tokenizer, of a pipeline
        saved = read_json(source, name)
        if saved is not None:
            kind = saved.get(CLASS_KEYS["preprocessor_config.json"])
            if kind not in kinds:
                raise ValueError(f"`{name}` of `{source}` must be that of a {' or '.join(kinds)}, got {kind!r}.")
            return kinds[kind].from_dict(saved)
    return VQImageProcessor(size=config.resolution, num_channels=config.in_channels)


def stock_class(name: str) -> type | None:
    """The class of diffusers or transformers with this name."""
    import diffusers
    import transformers

    return getattr(diffusers, name, None) or getattr(transformers, name, None)


def class_name(source: str) -> str | None:
    """The class of what is saved in a folder or Hub repository; None where no file of `CLASS_KEYS` is there."""
    for file, key in CLASS_KEYS.items():
        content = read_json(source, file)
        if content is not None:
            name = content.get(key, content.get("_class_name"))
            return name[-1] if isinstance(name, list) and name else name  # with code, [module, class]
    return None


def find_file(source: str | Path, name: str, subfolder: str | None = None, **options: Any) -> Path | None:
    """A file of a folder or Hub repository; None if it is not there.

    Without the Hub its cache is read: a repository that is in it is taken to lack the files that are not.

    Args:
        source: the folder or repository.
        name: of the file.
        subfolder: where it lies.
        options: of `huggingface_hub.hf_hub_download`, such as `revision`.

    Raises:
        ValueError: there is no such folder, repository or revision, or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        path = Path(source, subfolder or "", name)
        return path if path.is_file() else None
    if Path(source).is_file():
        raise ValueError(f"`{source}` must be a folder or the name of a repository, got a file.")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    missing = f"The folder `{source}` does not exist, and "
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **options))
    except HFValidationError as error:
        raise ValueError(f"{missing}it is not the name of a repository.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{missing}the Hub has no repository of this name that you may read.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` must be one of `{source}`, got {options.get('revision')!r}.") from error
    except LocalEntryNotFoundError as error:
        place = {key: options[key] for key in ("revision", "cache_dir") if key in options}
        try:
            snapshot_download(str(source), local_files_only=True, allow_patterns=[], **place)  # is there a cached one?
        except LocalEntryNotFoundError:
            raise ValueError(f"{missing}the Hub could not be reached.") from error
        return None
    except EntryNotFoundError:
        return None


def read_json(source: str, name: str) -> dict | None:
    """A JSON file of a folder or Hub repository; None if it is not there; see `find_file`."""
    path = find_file(source, name)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoding or of the JSON
        raise ValueError(
            f"`{path}` must be a JSON file, got {path.stat().st_size} bytes that are not: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got a {type(content).__name__}.")
    return content


__all__ = [
    "class_name",
    "find_file",
    "image_processor_of",
    "load",
    "load_part",
    "read_json",
    "run_hint",
    "stock_class",
]
