"""Reading the files of strangers: checkpoints and configurations, of which no code runs.

Whatever is wrong with a file is one `ValueError` that says which file, what it is and what to do.
"""

import argparse
import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)

# Classes of trainers that old checkpoints name beside their weights. Each becomes an empty stand-in: the trainer need
# not be installed, and none of its code runs.
TRAINER_CLASSES = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.gpu_stats_monitor.GPUStatsMonitor",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
# Plain data that trainers save beside the weights: the arguments of a script, and numbers of numpy.
PLAIN_CLASSES = (
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)


class _StandIn:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        """Its state is of no use."""


def _stand_in(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    return type(class_name, (_StandIn,), {"__module__": module})


# ---------------------------------------------------------------------------------------------------------------------
# What a file is
# ---------------------------------------------------------------------------------------------------------------------


def file_format(path: str | Path, name: str = "checkpoint") -> str:
    """ "safetensors", "zip" (`torch.save`), "pickle" (`torch.save` before PyTorch 1.6) or "msgpack" (Flax), by the
    content.

    Args:
        path: the file.
        name: the argument that an error is about.

    Raises:
        ValueError: for a file that is missing, empty, or something else.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"`{name}` {path} is a folder; give the file in it that holds the weights.")
    if not path.is_file():
        raise ValueError(f"`{name}` {path} does not exist.")
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        raise ValueError(f"`{name}` {path} is empty (0 bytes); get it again.")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"`{name}` {path} is a Git LFS pointer, not the file itself; get that by `git lfs pull`.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"`{name}` {path} is an HTML page, not a checkpoint; download the file that the page is about."
        )
    if start.startswith(b"PK\x03\x04"):
        return _zip_format(path, name)
    if len(start) > 8 and start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and path.suffix != ".msgpack":
        return "pickle"
    if path.suffix == ".msgpack":
        return "msgpack"
    kind = next((kind for magic, kind in OTHER_FORMATS if start.startswith(magic)), "a file of an unknown format")
    raise ValueError(
        f"`{name}` {path} is {kind}; it must be a safetensors file, or one that `torch.save` wrote, and whole."
    )


OTHER_FORMATS = (
    (b"\x1f\x8b", "a gzip archive, to be unpacked first"),
    (b"7z\xbc\xaf", "a 7z archive, to be unpacked first"),
    (b"Rar!", "a rar archive, to be unpacked first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"{", "a JSON file"),
)


def _zip_format(path: Path, name: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"`{name}` {path} is the beginning of a file of `torch.save` ({path.stat().st_size} "
            f"bytes): it was cut off; get "
            "it again."
        ) from error
    if any(member.endswith("/constants.pkl") or "/code/" in member for member in members):
        raise ValueError(
            f"`{name}` {path} is a TorchScript archive, which is code and cannot be converted; save its weights "
            "(`module.state_dict()`) and the configuration."
        )
    if not any(member.endswith("/data.pkl") for member in members):
        raise ValueError(f"`{name}` {path} is a zip archive, not a checkpoint; unpack it, and give the file in it.")
    return "zip"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, name: str = "checkpoint"):
    """What a safetensors file, or a file of `torch.save`, holds. Weights stay on the disk until they are used.

    Raises:
        ValueError: as `file_format`; for a damaged file; if a pickle holds anything but tensors, plain containers,
            `PLAIN_CLASSES` and `TRAINER_CLASSES`.
    """
    path, kind = Path(path), file_format(path, name)
    if kind == "msgpack":
        raise ValueError(f"`{name}` {path} is a Flax checkpoint; `hf_vq.load_tokenizer` reads the ones it knows.")
    if kind == "safetensors":
        return _load_safetensors(path, name)
    allowed = [*PLAIN_CLASSES, *map(_stand_in, TRAINER_CLASSES)]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(_what_is_wrong(path, name, error)) from error


def _what_is_wrong(path: Path, name: str, error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)|instantiate (\S+)|with builtin type (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and found is not None:
        culprit = next(filter(None, found.groups())).rstrip(".,")
        return (
            f"`{name}` {path} holds an object of the class {culprit}, which is not on the list that "
            f"is safe to read; save "
            "its state_dict alone."
        )
    return (
        f"`{name}` {path} is damaged or was cut off: `torch.save` wrote it, but it cannot be read to its end "
        f"({type(error).__name__}); get it again."
    )


def _load_safetensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"`{name}` {path} is not a whole safetensors file ({path.stat().st_size} bytes; {error}); get it again."
        ) from error


def load_state_dict(
    path: str | Path, name: str = "checkpoint", entries: tuple[str, ...] = ("state_dict",)
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint: all that is in it, or in the first of `entries` that it has; under their own names
    (see `without_wrapper`), in float32 (see `in_float32`).

    Raises:
        ValueError: as `load_checkpoint`; if it holds no dict of tensors; for a weight that is not finite.
    """
    return tensors_of(load_checkpoint(path, name), path, name, entries)


def tensors_of(
    checkpoint: Any, path: str | Path, name: str = "checkpoint", entries: tuple[str, ...] = ("state_dict",)
) -> dict[str, torch.Tensor]:
    """The weights in what `load_checkpoint` read; see `load_state_dict`."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"`{name}` {path} must hold a dict of weights, got {_described(checkpoint)}.")
    entry = next((entry for entry in entries if entry in checkpoint), None)
    state_dict = checkpoint if entry is None else checkpoint[entry]
    where = f"`{name}` {path}" if entry is None else f"`{name}` {path}, entry {entry!r},"
    if not isinstance(state_dict, dict):
        raise ValueError(f"{where} must hold a dict of weights, got {_described(state_dict)}.")
    others = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others or not state_dict:
        has = f"{others[0]!r} is {_described(state_dict[others[0]])}" if others else "it is empty"
        raise ValueError(f"{where} must hold weights by name, and nothing else: {has}.")
    check_finite(state_dict, where)
    return in_float32(without_wrapper(state_dict), where)


def without_wrapper(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without the prefix `module.` that DistributedDataParallel gives to the names of all of them."""
    if not all(key.startswith("module.") for key in state_dict):
        return state_dict
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def in_float32(state_dict: dict[str, torch.Tensor], where: str = "`checkpoint`") -> dict[str, torch.Tensor]:
    """Weights of any floating precision in float32, that of the models which the originals load them into.

    A warning says where digits are lost.

    Raises:
        ValueError: for a weight that is beyond float32.
    """
    found = {key: value.float() if value.is_floating_point() else value for key, value in state_dict.items()}
    rounded = [key for key, value in state_dict.items() if value.dtype == torch.float64 and not value.is_meta]
    rounded = [key for key in rounded if not torch.equal(found[key].double(), state_dict[key])]
    beyond = [key for key in rounded if not found[key].isfinite().all()]
    if beyond:
        raise ValueError(f"{where} has values in {beyond[0]} that float32 cannot hold.")
    if rounded:
        more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        logger.warning("%s has %s%s in float64, rounded to float32.", where, rounded[0], more)
    return found


def _described(value) -> str:
    return f"a {type(value).__name__}"


def check_finite(state_dict: dict[str, torch.Tensor], where: str = "`checkpoint`") -> None:
    """A `ValueError` that names the first weight which is not finite, of all that are in a file, used or not."""
    for key, value in state_dict.items():
        # a sum is finite only if all of its terms are, and needs no copy; one that overflows is looked at again
        if value.is_meta or not value.is_floating_point() or value.sum(dtype=torch.float64).isfinite():
            continue
        if not value.isfinite().all():
            what = "NaN" if value.isnan().any() else "an infinite value"
            raise ValueError(f"{where} has {what} in {key}: its training failed, or the file is damaged.")


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


class ConfigLoader(yaml.SafeLoader):
    """Plain data, and tuples, which some of the originals' configurations are written with."""


ConfigLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)
# 1e-3 is a number, as in the originals' OmegaConf and in YAML 1.2
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(path: str | Path, name: str = "config") -> dict:
    """A YAML or JSON file that holds a mapping.

    Raises:
        ValueError: naming the argument `name`, for a file that is missing, no text, no mapping, or holds other objects
            than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{name}` {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{name}` {path} must be a YAML or JSON file, but it is not text.") from error
    if text.lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
        raise ValueError(f"`{name}` {path} is an HTML page, not a configuration; download the file itself.")
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"`{name}` {path} is a Git LFS pointer, not the file itself; get that by `git lfs pull`.")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, ConfigLoader)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"`{name}` {path} holds what is not plain data: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", getattr(error, "lineno", 1) - 1) + 1
        raise ValueError(f"`{name}` {path} is no YAML or JSON that can be read: line {line} is wrong.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{name}` {path} must hold a mapping of names to values, got {_described(content)}.")
    return content


def read_model(path: str | Path, name: str = "config") -> dict:
    """The section `model` of a configuration, with its `target` and `params`.

    Raises:
        ValueError: as `read_config`, or if the section, or one of the two in it, is not there.
    """
    content = read_config(path, name)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"`{name}` {path} must have the section `model`, got {sorted(map(str, content))[:8]}.")
    if not isinstance(model.get("target"), str) or not isinstance(model.get("params", {}), dict):
        raise ValueError(
            f"`{name}` {path} must have `target` and `params` in its section `model`, got {sorted(model)}."
        )
    return {**model, "params": model.get("params") or {}}


def read_arguments(path: str | Path | None, name: str = "config") -> dict:
    """The arguments of an original's constructor in a JSON or YAML file: `{"target": …, "params": {…}}`, or these
    alone. None has none.

    Raises:
        ValueError: as `read_config`, or for `params` that are no mapping.
    """
    content = {} if path is None else read_config(path, name)
    params = content.get("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"`{name}` {path} must have names and values as its params, got {params!r}.")
    return {key: value for key, value in content.items() if key not in ("params", "target")} | params


_REQUIRED = object()


def is_count(value: Any, minimum: int = 1) -> bool:
    """Whether this is an int of at least `minimum`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


MAX_DEPTH = 1000


def is_depth(value: Any) -> bool:
    """Whether this is a number of layers that some model has."""
    return is_count(value) and value <= MAX_DEPTH


class Options:
    """A section of an original's configuration that remembers what was read of it, so that nothing is ignored unsaid.

        options = Options(model["params"], "model.params")
        depth = options.take("n_layer")                  # must be there
        dropout = options.take("dropout", 0.0)           # the original's default
        options.only("double_z", False, default=True)    # an option of which one value is known
        options.training_only("monitor", "ckpt_path")    # nothing of what a trained model computes
        options.finish()                                 # a ValueError for whatever is left

    Args:
        values: the section.
        where: its place in the configuration, for errors.
        argument: the argument that the configuration is.
    """

    def __init__(self, values: dict | None, where: str, argument: str = "config"):
        if not isinstance(values, dict) and values is not None:
            raise ValueError(f"`{argument}` must have a section {where}, got {values!r}.")
        if values is not None and not all(isinstance(name, str) for name in values):
            raise ValueError(
                f"`{argument}` must have names in {where}, got {next(n for n in values if not isinstance(n, str))!r}."
            )
        self.values, self.where, self.argument = dict(values or {}), where, argument
        self._left = set(self.values)

    def take(self, name: str, default: Any = _REQUIRED):
        """The value of an option, or its default.

        Raises:
            ValueError: it is not there, and there is no default.
        """
        self._left.discard(name)
        if name in self.values:
            return self.values[name]
        if default is _REQUIRED:
            raise ValueError(f"`{self.argument}` lacks {name} in {self.where}; it has {sorted(self.values)}.")
        return default

    def only(self, name: str, *known: Any, default: Any = _REQUIRED):
        """`take`, of an option of which only the values `known` have an equivalent here.

        Raises:
            ValueError: it has another value.
        """
        value = self.take(name, default)
        if value not in known:
            raise ValueError(
                f"`{self.argument}` must have {name}={' or '.join(map(str, known))} in {self.where}, "
                f"got {value!r}: hf_vq has "
                "no other."
            )
        return value

    def _of_kind(self, name: str, default: Any, is_right: Callable[[Any], bool], wanted: str):
        value = self.take(name, default)
        if (name in self.values or default is _REQUIRED) and not is_right(value):
            raise ValueError(f"`{self.argument}` must have {wanted} as {name} in {self.where}, got {value!r}.")
        return value

    def count(self, name: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        """`take`, of an int of at least `minimum`."""
        return self._of_kind(name, default, lambda value: is_count(value, minimum), f"an int of at least {minimum}")

    def depth(self, name: str, default: Any = _REQUIRED) -> int:
        """`take`, of a number of layers, which a model is built with before its weights are compared."""
        return self._of_kind(name, default, is_depth, f"an int from 1 to {MAX_DEPTH}")

    def counts(self, name: str, default: Any = _REQUIRED) -> list[int]:
        """`take`, of a list of ints of at least 1."""

        def is_right(value):
            return isinstance(value, (list, tuple)) and all(map(is_count, value))

        return list(self._of_kind(name, default, is_right, "a list of ints of at least 1"))

    def number(self, name: str, default: Any = _REQUIRED, minimum: float = 0.0, below: float = math.inf) -> float:
        """`take`, of a finite number in [`minimum`, `below`)."""

        def is_right(value):
            return isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value < below

        wanted = f"a number of at least {minimum:g}" + ("" if below == math.inf else f" and below {below:g}")
        return self._of_kind(name, default, is_right, wanted)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """`take`, of true or false."""
        return self._of_kind(name, default, lambda value: isinstance(value, bool), "true or false")

    def section(self, name: str, default: Any = _REQUIRED) -> "Options":
        """A mapping inside this one."""
        return Options(self.take(name, default), f"{self.where}.{name}", self.argument)

    def node(self, name: str, default: Any = _REQUIRED) -> tuple[str, "Options"]:
        """The class that a `target` names, without its module, and its `params`. What stands beside these two, such as
        a learning rate, the originals do not read either (`instantiate_from_config`).
        """
        value = self.section(name, default)
        target = value.take("target")
        if not isinstance(target, str):
            raise ValueError(f"`{self.argument}` must have a class as {value.where}.target, got {target!r}.")
        return target.rpartition(".")[2], value.section("params", {})

    def training_only(self, *names: str) -> None:
        """Options that change nothing of what a trained model computes."""
        self._left.difference_update(names)

    def finish(self) -> None:
        """A `ValueError` that names the options that nothing has read."""
        if self._left:
            raise ValueError(
                f"`{self.argument}` has options in {self.where} that are not known: {sorted(map(str, self._left))}."
            )


__all__ = [
    "ConfigLoader",
    "Options",
    "check_finite",
    "file_format",
    "in_float32",
    "is_count",
    "is_depth",
    "load_checkpoint",
    "load_state_dict",
    "read_arguments",
    "read_config",
    "read_model",
    "tensors_of",
    "without_wrapper",
]
