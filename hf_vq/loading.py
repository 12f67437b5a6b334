"""Loading what a folder or Hub repository holds, by the class that it names."""

import json
from pathlib import Path


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
        raise ValueError(f"`{source}` must hold one of {', '.join(CLASS_KEYS)}, with the name of its class.")
    if name in hf_vq.__all__:
        return getattr(hf_vq, name).from_pretrained(source)
    found = stock_class(name) if stock else None
    if found is None:
        raise ValueError(f"`{source}` must be a model or pipeline of hf_vq, or a part of one, got a {name}.")
    from .models.checked_loading import check_safetensors  # here: it imports torch, which the errors above do without

    for path in sorted(Path(source).glob("*.safetensors")):  # the classes of hf_vq check their own
        check_safetensors(path)
    return found.from_pretrained(source)


def stock_class(name: str) -> type | None:
    """The class of diffusers or transformers with this name."""
    import diffusers
    import transformers

    return getattr(diffusers, name, None) or getattr(transformers, name, None)


def class_name(source: str) -> str | None:
    """The class of what is saved in a folder or Hub repository; None where no file of `CLASS_KEYS` is there."""
    for file, key in CLASS_KEYS.items():
        content = read_json(source, file, needed=file == "config.json")
        if content is not None:
            name = content.get(key, content.get("_class_name"))
            return name[-1] if isinstance(name, list) and name else name  # with code, [module, class]
    return None


def read_json(source: str, name: str, needed: bool = False) -> dict | None:
    """A JSON file of a folder or Hub repository; None if it is not there.

    Without the Hub its cache is read; whether a file that is not in it exists is then unknown, an error if it is
    `needed`.
    """
    if Path(source).is_dir():
        path = Path(source) / name
    elif Path(source).is_file():
        raise ValueError(f"`{source}` must be a folder or the name of a repository, got a file.")
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            path = Path(hf_hub_download(source, name))
        except HFValidationError as error:
            raise ValueError(
                f"The folder `{source}` does not exist, and it is not the name of a repository."
            ) from error
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"The folder `{source}` does not exist, and the Hub has no repository of this name that you may read."
            ) from error
        except LocalEntryNotFoundError as error:
            if needed:
                raise ValueError(f"The folder `{source}` does not exist, and the Hub could not be reached.") from error
            return None
        except EntryNotFoundError:
            return None
    if not path.is_file():
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


__all__ = ["class_name", "load", "read_json", "stock_class"]
