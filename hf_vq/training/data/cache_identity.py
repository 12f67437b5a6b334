"""Which tokenizer and which images a cache of codes or latents belongs to."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.utils.data import Dataset

from ..output_lock import lacks_locks


logger = logging.getLogger(__name__)


class StaleIndicesError(ValueError):
    """The cached indices or latents belong to another tokenizer or to other images."""


def tokenizer_fingerprint(tokenizer: nn.Module) -> str:
    """A hash of a tokenizer's class, of the fields of its config that matter, and of every weight and buffer."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    config = tokenizer.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def images_fingerprint(dataset: Dataset, samples: int = 16, head: list[dict] | None = None) -> str:
    """A hash of the pixels and fields of a few images of a map-style data set, evenly spaced, and of their number; of
    a stream, of the first, `head`.
    """
    digest = hashlib.sha256()
    chosen = head
    if head is None:
        digest.update(str(len(dataset)).encode())
        places = np.unique(np.linspace(0, len(dataset) - 1, samples).round().astype(int))
        chosen = [read_sample(dataset, int(place)) for place in places]
    for sample in chosen:
        for name, value in sorted((sample or {}).items()):
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().tobytes() if torch.is_tensor(value) else repr(value).encode())
    return digest.hexdigest()


def first_sample_hash(dataset: Dataset) -> str | None:
    """A hash of the first sample of a map-style data set as a run sees it in its first epoch; None of a stream's."""
    if not hasattr(dataset, "__len__"):
        return None
    sample = dataset.sample(0, 0) if hasattr(dataset, "sample") else dataset[0]
    return images_fingerprint(dataset, head=[sample]) if isinstance(sample, dict) else None


def read_sample(dataset: Dataset, row: int) -> dict | None:
    """One sample without augmentation, or None where its image is broken."""
    return dataset.read(row) if hasattr(dataset, "read") else dataset[row]


@contextmanager
def cache_lock(path: Path, is_writer: bool) -> Iterator[None]:
    """Held by the process that writes a cache: another run waits until it is complete, and then uses it.

    Args:
        path: the folder, made if it is not there.
        is_writer: whether this process locks; the others of its run wait for it elsewhere.
    """
    if not is_writer:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Waiting for another run that writes %s.", path)
        lock.acquire()
    except OSError as error:
        if not lacks_locks(error):
            raise
        logger.warning("%s cannot be locked (%s): see to it that one run alone writes there.", path, error)
    try:
        yield
    finally:
        lock.release()


__all__ = [
    "StaleIndicesError",
    "cache_lock",
    "first_sample_hash",
    "images_fingerprint",
    "read_sample",
    "tokenizer_fingerprint",
]
