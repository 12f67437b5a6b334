"""Folders that are either complete or absent, and the checkpoints of a run.

A folder is written under a temporary name, flushed to the disk and then renamed: a process that is killed at any
moment leaves the previous checkpoints and perhaps a temporary folder, which the next start removes. A checkpoint
carries the size and the checksum of each of its files: one that was damaged afterwards is found out before it is
loaded.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from .disk_space import write_failures_named


logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"
_NAME = re.compile(r"checkpoint-(\d+)")


def flush_file(path: Path) -> None:
    """Returns once the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces a file: a reader, or a process killed half-way, sees the old or the new content, never a part.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    draft = draft_path(path)
    try:
        with write_failures_named(path, "the file", len(data)):
            draft.write_bytes(data)
            flush_file(draft)
            os.replace(draft, path)
            flush_file(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def draft_path(path: str | Path) -> Path:
    """Where the draft of the folder or file `path` is, or will be."""
    return Path(path).with_name(_UNFINISHED + Path(path).name)


def draft_folder(path: str | Path) -> Path:
    """An empty folder beside `path`, to be filled and then given to `publish_folder`."""
    draft = draft_path(path)
    if os.path.lexists(draft):
        _remove(draft)
    draft.mkdir(parents=True)
    return draft


def publish_folder(draft: Path, path: str | Path) -> Path:
    """Flushes every file of `draft` and renames it to `path`; an older folder of that name is replaced."""
    path = Path(path)
    for folder, _, files in os.walk(draft):
        for name in files:
            flush_file(Path(folder, name))
        flush_file(Path(folder))
    remove_folder(path)
    os.rename(draft, path)
    flush_file(path.parent)
    return path


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends without an error.

    ```python
    with atomic_folder("outputs/tokenizer") as folder:
        model.save_pretrained(folder)
    ```
    """
    draft = draft_folder(path)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    publish_folder(draft, path)


def remove_folder(path: Path) -> None:
    """Removes a folder, or what stands in its place, so that, if the process dies meanwhile, no half of it keeps its
    name; of a link only the link.
    """
    if os.path.lexists(path):
        grave = path.with_name(f"{_UNFINISHED}removed-{path.name}")
        if os.path.lexists(grave):
            _remove(grave)
        os.rename(path, grave)
        _remove(grave)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_unfinished(folder: str | Path) -> list[str]:
    """Removes what an interrupted write left in `folder` and returns the names; what resists is named and stays."""
    names = []
    for path in sorted(Path(folder).glob(_UNFINISHED + "*")):
        try:
            _remove(path)
            names.append(path.name)
        except OSError as error:  # a file that somebody reads, on a network's disk
            logger.warning("%s, left by an interrupted write, cannot be removed: %s.", path, error)
    return names


MANIFEST = "files.json"


def write_manifest(folder: Path) -> None:
    """Writes the size and the SHA-256 of every file of a folder to its `files.json`."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_manifest` has seen, or `None`."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        if not entries:
            return f"{folder / MANIFEST} names no file"
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size} bytes in place of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{path} does not have the checksum that it was written with"
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except OSError as error:  # of the list, or of a file that it names
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST} cannot be read"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no `file_digest`
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def last_good_checkpoint(folder: Path) -> str:
    """Which it is, in words."""
    good = list(find_checkpoints(folder).values())
    return f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"


def find_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints `checkpoint-<step>` in a folder, by step, in order."""
    matches = ((_NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*") if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def rotate_checkpoints(folder: str | Path, limit: int | None) -> None:
    """Keeps the newest `limit` checkpoints (`None`: all); one that cannot be removed is named and stays."""
    if limit is not None:
        for path in list(find_checkpoints(folder).values())[:-limit]:
            try:
                remove_folder(path)
            except OSError as error:
                logger.warning("The checkpoint %s cannot be removed: %s.", path, error)


def set_aside_after(folder: str | Path, step: int) -> list[Path]:
    """Renames the checkpoints of later steps, so that a run continued from `step` is not taken over by them."""
    moved = []
    for later, path in find_checkpoints(folder).items():
        if later > step:
            attempt = 1
            while (target := path.with_name(f"{path.name}-superseded-{attempt}")).exists():
                attempt += 1
            moved.append(path.rename(target))
    return moved


def save_parts(folder: Path, parts: dict) -> None:
    """Writes every model to `folder/<name>.safetensors`, the `state_dict()` of every other part to
    `folder/<name>.pt`.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            save_model(part, str(folder / f"{name}.safetensors"))
        else:
            torch.save(part.state_dict(), folder / f"{name}.pt")


def size_of_parts(parts: dict) -> int:
    """About how many bytes `save_parts` writes."""
    return sum(_bytes_of(part.state_dict()) for part in parts.values())


def _bytes_of(state: Any) -> int:
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_bytes_of(value) for value in state.values())
    return sum(_bytes_of(value) for value in state) if isinstance(state, (list, tuple)) else 0


def _difference(module: nn.Module, file: Path) -> str:
    """The first weight in which a module and a file differ."""
    with safe_open(file, "pt") as weights:
        found = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key in [*(key for key in own if key in found), *own, *found]:  # other sizes tell more than other names
        if own.get(key) != found.get(key):
            return f"its `{key}` is {found.get(key, 'not there')}, the run's {own.get(key, 'not there')}"
    return "its weights differ in their names"


def load_parts(folder: Path, parts: dict) -> None:
    """Gives every part its state from what `save_parts` has written.

    An optimizer takes its state but keeps the hyper-parameters that it was made with: a run may be continued with
    another weight decay.
    """
    for name, part in parts.items():
        file = folder / f"{name}.{'safetensors' if isinstance(part, nn.Module) else 'pt'}"
        if not file.exists():
            raise ValueError(f"the checkpoint {folder} has no {name!r}: it was written by a run with other parts.")
        if isinstance(part, nn.Module):
            try:
                load_model(part, str(file))
            except RuntimeError as error:
                raise ValueError(
                    f"{file} holds the weights of another model than this run's {name!r}: {_difference(part, file)}. "
                    "Give the arguments that the run began with, or another output_dir."
                ) from error
            continue
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(part, torch.optim.Optimizer):
            part.load_state_dict(state)
            continue
        options = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
        part.load_state_dict(state)
        for group, own in zip(part.param_groups, options, strict=True):
            group.update(own)


def get_buffers(models: dict) -> dict[str, dict]:
    """The saved state of every model without its parameters."""
    parameters = {name: dict(model.named_parameters()) for name, model in models.items()}
    return {
        name: {key: value for key, value in model.state_dict().items() if key not in parameters[name]}
        for name, model in models.items()
    }


def get_random_state() -> dict:
    """The state of the generators of Python, numpy, torch and the CUDA device of this process.

    Made of tensors and plain values, so that `torch.load(..., weights_only=True)` reads it.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict) -> None:
    """Restores what `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """What is drawn inside the context leaves no trace in the generators."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
