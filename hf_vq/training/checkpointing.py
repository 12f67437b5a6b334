"""Folders that are either complete or absent, and the checkpoints of a run.

A folder is written under a temporary name, flushed to the disk and then renamed: a process that is killed at any moment
leaves the previous checkpoints and perhaps a temporary folder, which the next start removes.
"""

import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


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
    """Replaces a file: a reader, or a process killed half-way, sees the old or the new content, never a part."""
    path = Path(path)
    draft = path.with_name(_UNFINISHED + path.name)
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    flush_file(draft)
    os.replace(draft, path)
    flush_file(path.parent)


def draft_folder(path: str | Path) -> Path:
    """An empty folder beside `path`, to be filled and then given to `publish_folder`."""
    path = Path(path)
    draft = path.with_name(_UNFINISHED + path.name)
    if draft.exists():
        shutil.rmtree(draft)
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
    """Removes a folder so that, if the process dies meanwhile, no half of it keeps its name."""
    if path.exists():
        grave = path.with_name(f"{_UNFINISHED}removed-{path.name}")
        if grave.exists():
            shutil.rmtree(grave)
        os.rename(path, grave)
        shutil.rmtree(grave)


def remove_unfinished(folder: str | Path) -> list[str]:
    """Removes what an interrupted write left in `folder` and returns the names."""
    names = []
    for path in sorted(Path(folder).glob(_UNFINISHED + "*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        names.append(path.name)
    return names


def find_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints `checkpoint-<step>` in a folder, by step, in order."""
    matches = ((_NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*") if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def rotate_checkpoints(folder: str | Path, limit: int | None) -> None:
    """Keeps the newest `limit` checkpoints (`None`: all)."""
    if limit is not None:
        for path in list(find_checkpoints(folder).values())[:-limit]:
            remove_folder(path)


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
    """Writes the `state_dict()` of every part to `folder/<name>.pt`."""
    for name, part in parts.items():
        torch.save(part.state_dict(), folder / f"{name}.pt")


def load_parts(folder: Path, parts: dict) -> None:
    """Gives every part its state from `folder/<name>.pt`.

    An optimizer takes its state but keeps the hyper-parameters that it was made with: a run may be continued with
    another weight decay.
    """
    for name, part in parts.items():
        file = folder / f"{name}.pt"
        if not file.exists():
            raise ValueError(f"the checkpoint {folder} has no {name!r}: it was written by a run with other parts.")
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
