"""Loading that never invents weights: what a checkpoint lacks, has too much of or holds broken is one error.

transformers and diffusers warn about a missing key and draw the tensor at random. For a tokenizer or a prior the
result is noise that looks like a result, so each model class of the package inherits `CheckedLoadingMixin`.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_REPORTS = ("LOAD REPORT", "Some weights of ")
_WEIGHT_NAMES = {  # by the attribute that tells the two bases apart: weights, index of the shards, pickled weights
    "config_class": ("model{}.safetensors", "model.safetensors.index{}.json", "pytorch_model*.bin*"),
    "load_config": (
        "diffusion_pytorch_model{}.safetensors",
        "diffusion_pytorch_model.safetensors.index{}.json",
        "diffusion_pytorch_model*.bin*",
    ),
}


class CheckedLoadingMixin:
    """`from_pretrained` of a `PreTrainedModel` or a `ModelMixin`, with an error in place of random weights.

    It stands first among the bases.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> nn.Module | tuple[nn.Module, dict]:
        """Loads a model from a folder or a Hub repository; arguments and result are those of the base class.

        Raises:
            OSError: a file is missing, truncated or no such file at all (empty, an HTML page, a Git LFS pointer).
            ValueError: the configuration is that of another class; keys are missing, unexpected or of another shape
                than the configuration says (shapes may differ with `ignore_mismatched_sizes=True`); or weights are not
                finite.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.get("ignore_mismatched_sizes", False)
        is_transformers = hasattr(cls, "config_class")
        source = pretrained_model_name_or_path
        is_read_here = source is not None and not kwargs.get("gguf_file") and not kwargs.get("use_flashpack")
        if is_read_here:
            _check_class(cls, source, kwargs)
        files = _checked_files(cls, source, kwargs) if is_read_here else []
        if is_transformers:  # it would stop at a shape without saying which
            kwargs["ignore_mismatched_sizes"] = True
        report = nullcontext() if may_differ else _without_report()
        try:
            with report:
                model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        except Exception:
            files = _checked_files(cls, source, kwargs) if is_read_here else []  # those from the Hub are here now
            if files and not is_transformers and not may_differ:
                _check_keys(cls.__name__, _named(source, files), _compared(_on_meta(cls, source, kwargs), files))
            raise
        if is_read_here:
            files = _checked_files(cls, source, kwargs)
        if not is_transformers:
            info = _really_loaded(model, info, files)
        name = _named(source, files)
        _check_keys(cls.__name__, name, {**info, "mismatched_keys": []} if may_differ else info)
        _check_finite(name, model)
        return (model, info) if wants_info else model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps the bases' tables and lists of keys from this thread's log: what stands in them is an error here."""
    thread = threading.get_ident()

    def keep(record: LogRecord) -> bool:
        return record.thread != thread or not any(words in record.getMessage() for words in _REPORTS)

    loggers = [getLogger(f"{module}.modeling_utils") for module in ("transformers", "diffusers.models")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def _named(source: str | os.PathLike | None, files: list[Path]) -> str:
    if len(files) == 1:
        return str(files[0])
    return "state_dict" if source is None else str(source)


def check_parts(parts: Mapping[str, Any]) -> None:
    """The same rule for the parts of a pipeline that are other packages' models and were loaded from a folder.

    Args:
        parts: the pipeline's components by name.

    Raises:
        ValueError: weights that the part's folder lacks, or that are not finite.
    """
    for part_name, part in parts.items():
        if not isinstance(part, nn.Module) or isinstance(part, CheckedLoadingMixin) or _is_dispatched(part):
            continue
        folder = getattr(part, "name_or_path", None) or getattr(getattr(part, "config", None), "_name_or_path", None)
        if not folder or not Path(folder).is_dir():
            continue
        name = f"{folder} (`{part_name}`)"
        on_meta = [key for key, value in part.state_dict().items() if value.is_meta]
        if not on_meta and hasattr(type(part), "config_class"):
            on_meta = _drawn_at_random(part, Path(folder))
        _check_keys(type(part).__name__, name, {"missing_keys": on_meta})
        _check_finite(name, part)


def _drawn_at_random(part: nn.Module, folder: Path) -> list[str]:
    """The keys that transformers found no weights for; asked again only where the names differ from the file's."""
    names = _WEIGHT_NAMES["config_class"]
    files = _weight_files(folder, names, "")
    if not files or not part.state_dict().keys() - _headers(files).keys():
        return []
    return sorted(type(part).from_pretrained(folder, output_loading_info=True)[1]["missing_keys"])


def _is_dispatched(part: nn.Module) -> bool:
    """Whether accelerate keeps the weights elsewhere, on the CPU or on disk."""
    return any(hasattr(module, "_hf_hook") for module in part.modules())


def _checked_files(cls: type, source: str | os.PathLike, kwargs: dict) -> list[Path]:
    """The files of the weights in a folder or in the Hub's cache, after a look at each; [] where the base finds
    others.
    """
    folder = Path(source)
    if not folder.is_dir():
        name = "/".join(filter(None, (kwargs.get("subfolder"), "config.json")))
        try:
            cached = try_to_load_from_cache(str(source), name, kwargs.get("cache_dir"), kwargs.get("revision"))
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            return []  # the base class fetches it, or says why it cannot
        folder = Path(cached).parent
    elif kwargs.get("subfolder"):
        folder = folder / kwargs["subfolder"]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            read_json_file(folder / name)
    if kwargs.get("state_dict") is not None or kwargs.get("use_safetensors") is False:
        return []
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    names = _WEIGHT_NAMES["config_class" if hasattr(cls, "config_class") else "load_config"]
    files = _weight_files(folder, names, variant)
    if not files and Path(source).is_dir() and folder.is_dir() and not any(folder.glob(names[2])):
        if not (folder / "adapter_config.json").exists():
            raise FileNotFoundError(f"`{folder}` must hold {names[0].format(variant)}, the weights, got none.")
    for file in files:
        check_safetensors(file)
    return files


def _weight_files(folder: Path, names: tuple[str, str, str], variant: str) -> list[Path]:
    """The one file of weights, or the shards that an index names."""
    single, index = folder / names[0].format(variant), folder / names[1].format(variant)
    if single.exists():
        return [single]
    if not index.exists():
        return []
    shards = read_json_file(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise OSError(f"`{index}` must hold a `weight_map` from keys to files, got {type(shards).__name__}.")
    files = [folder / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(f"`{index}` must name files that are there, got {_some_of(missing)}, which are not.")
    return files


def read_json_file(path: str | os.PathLike) -> dict:
    """The object in a JSON file.

    Raises:
        OSError: the file holds none; the message names it and says what it is instead.
    """
    content = Path(path).read_bytes()
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(
            f"`{path}` must be a JSON file, got {_kind_of_file(content) or f'a damaged one ({error})'}."
        ) from error
    if not isinstance(value, dict):
        raise OSError(f"`{path}` must hold a JSON object, got a {type(value).__name__}.")
    return value


def _check_class_name(path: str | os.PathLike, key: str, found: Any, names: Collection[str]) -> None:
    found = found[-1] if isinstance(found, list) and found else found  # with code, [module, class]
    if found not in names:
        raise ValueError(f"`{path}` must be of a {next(iter(names))} (`{key}`), got {found!r}.")


class CheckedProcessorMixin:
    """`from_pretrained` of an image processor, which refuses the file of another one: it would be read as far as the
    names agree. It stands first among the bases.
    """

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers reads it.

        Raises:
            OSError: the file is no JSON object.
            ValueError: it belongs to another class.
        """
        file = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "preprocessor_config.json")
        if file.is_file():
            read_json_file(file)
        found, others = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        names = [base.__name__ for base in cls.__mro__]
        _check_class_name(file, "image_processor_type", found.get("image_processor_type"), names)
        return found, others


def check_pipeline_files(folder: str | os.PathLike, wanted: Iterable[str]) -> None:
    """The configurations in a pipeline's folder, of the parts that check none themselves, and whether its files of
    weights are whole.

    Args:
        folder: of the pipeline.
        wanted: the names of the parts that the pipeline cannot do without.

    Raises:
        OSError: a file is no JSON object, or no whole safetensors file.
        ValueError: the folder lacks a part, as that of another pipeline does; a file belongs to another class than
            `model_index.json` says.
    """
    folder = Path(folder)
    index = read_json_file(folder / "model_index.json")
    missing = [name for name in wanted if name not in index]
    if missing:
        raise ValueError(
            f"`{folder / 'model_index.json'}` must name the parts {', '.join(wanted)}, got that of a "
            f"{index.get('_class_name')} without {_some_of(missing)}."
        )
    for path in sorted(folder.glob("*/*.json")):
        entry = index.get(path.parent.name)
        config = read_json_file(path) if entry and not path.name.endswith(".index.json") else {}
        is_of_diffusers = path.name == "scheduler_config.json" or "_class_name" in config
        if is_of_diffusers and isinstance(entry, list) and isinstance(entry[-1], str):
            _check_class_name(path, "_class_name", config.get("_class_name"), [entry[-1]])
    for path in sorted(folder.glob("*/*.safetensors")):
        if index.get(path.parent.name):
            check_safetensors(path)


def check_safetensors(path: str | os.PathLike) -> dict[str, dict]:
    """Checks that a safetensors file is whole, by its header and its size, and returns the header without metadata.

    Raises:
        OSError: it is not; the message names it and says what it is instead.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"`{path}` must be a safetensors file, got {'a folder' if path.is_dir() else 'a broken link'}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        kind = _kind_of_file(start)
        if kind is None and size < 8:
            kind = f"a file of {size} bytes"
        if kind is None:
            (length,) = struct.unpack("<Q", start[:8])
            if length > min(size - 8, 100_000_000):
                kind = "another kind of file, or a truncated one" if length < 2**32 else "another kind of file"
        if kind is not None:
            raise OSError(f"`{path}` must be a safetensors file, got {kind}.")
        file.seek(8)
        header = file.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise OSError(f"`{path}` must be a safetensors file, got a damaged header.") from error
    if size != end:
        what = "a truncated file" if size < end else "a file with surplus data"
        raise OSError(f"`{path}` must have {end} bytes by its header, got {what} of {size}; fetch or save it again.")
    return tensors


def _kind_of_file(content: bytes) -> str | None:
    """What a file is that is often found where another was meant."""
    text = content[:512].lstrip().lower()
    if not content:
        return "an empty file"
    if not content[:512].strip(b"\0"):
        return "a file of zeros"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches the file itself)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page (a download that failed)"
    return None


def _headers(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor["shape"]) for file in files for key, tensor in check_safetensors(file).items()}


def _hub_arguments(kwargs: dict) -> dict:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def _check_class(cls: type, source: str | os.PathLike, kwargs: dict) -> None:
    """A configuration of another class would be read as far as the names of its fields agree."""
    folder = Path(source, kwargs.get("subfolder") or "")
    if folder.is_dir() and (folder / "config.json").exists():
        read_json_file(folder / "config.json")
    elif (folder / "adapter_config.json").exists():
        return  # PEFT's: transformers reads the configuration of the model that it belongs to
    if hasattr(cls, "config_class"):
        own = {getattr(base, "model_type", None) for base in cls.config_class.__mro__}
        key, wanted = "model_type", cls.config_class.model_type
        config = kwargs.get("config")
        if config is None or isinstance(config, (str, os.PathLike)):
            config = cls.config_class.get_config_dict(config or source, **_hub_arguments(kwargs))[0]
        else:
            config = config.to_dict()
    else:
        own = {base.__name__ for base in cls.__mro__}
        key, wanted = "_class_name", cls.__name__
        config = cls.load_config(source, **_hub_arguments(kwargs))
    found = config.get(key)
    if found is not None and found not in own:
        raise ValueError(
            f"`{folder / 'config.json'}` must be the configuration of a {cls.__name__} (`{key}`: {wanted!r}), got "
            f"{found!r}: the model in it is of another class."
        )


def _really_loaded(model: nn.Module, info: dict, files: list[Path]) -> dict:
    """What diffusers reports, mended: it trusts the index of shards, and leaves misshapen tensors uninitialized."""
    if files and getattr(model, "hf_quantizer", None) is None:
        info = {**info, **_compared(model, files)}
    if info["mismatched_keys"]:
        fresh, tensors = type(model).from_config(model.config).state_dict(), model.state_dict()
        for key, *_ in info["mismatched_keys"]:
            tensors[key].copy_(fresh[key])
    return info


def _on_meta(cls: type, source: str | os.PathLike, kwargs: dict) -> nn.Module:
    with torch.device("meta"):
        return cls.from_config(cls.load_config(source, **_hub_arguments(kwargs)))


def _compared(model: nn.Module, files: Iterable[Path]) -> dict[str, list]:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = _headers(files)
    return {
        "missing_keys": sorted(expected.keys() - found.keys()),
        "unexpected_keys": sorted(found.keys() - expected.keys()),
        "mismatched_keys": [
            (key, found[key], shape) for key, shape in expected.items() if key in found and found[key] != shape
        ],
    }


def _check_keys(class_name: str, name: str, info: Mapping[str, Iterable]) -> None:
    problems = []
    for kind, words in (("missing_keys", "without"), ("unexpected_keys", "with the unknown")):
        if info.get(kind):
            problems.append(f"{words} {_some_of(sorted(info[kind]))}")
    shapes = [f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in info.get("mismatched_keys") or ()]
    if shapes:
        problems.append(f"with other shapes: {_some_of(sorted(shapes))}")
    problems += [str(message) for message in info.get("error_msgs") or ()]
    if problems:
        raise ValueError(
            f"`{name}` must hold the weights of the {class_name} that its configuration describes, got one "
            f"{'; '.join(problems)}."
        )


def _check_finite(name: str, model: nn.Module) -> None:
    broken = [key for key, value in model.state_dict().items() if not _is_finite(value)]
    if broken:
        raise ValueError(f"`{name}` must hold finite weights, got NaN or infinity in {_some_of(broken)}.")


def _is_finite(value: Any) -> bool:
    """True too where nobody can look: weights of another place, and the packed ones of a quantized model."""
    if type(value) not in (torch.Tensor, nn.Parameter) or value.is_meta or not value.numel():
        return True
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        return True
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(value.detach())).tolist())


def _some_of(names: list[str], most: int = 5) -> str:
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


__all__ = [
    "CheckedLoadingMixin",
    "CheckedProcessorMixin",
    "check_parts",
    "check_pipeline_files",
    "check_safetensors",
    "read_json_file",
]
